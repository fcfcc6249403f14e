"""Score all rows of a run with the reference once, before training, in large batches without gradients."""

import logging
import random
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.budget import packed_tokens
from .cache import LogpsCache, reference_fingerprint, reference_parameters, response_keys
from .policy import base_model

logger = logging.getLogger(__name__)

ROW = "reference_row"  # column with the number of a row in the table
WRITE_EVERY = 32  # batches per process between two parts on disk
CHECKED_ROWS = 4

# Largest difference per token between a cached and a fresh value that rounding explains.
AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}

Score = Callable[[list[dict]], Tensor]  # tokenised rows -> (B,K,R) log-probabilities


class StaleCacheError(RuntimeError):
    """Cached reference log-probabilities differ from fresh ones."""


class ReferenceTable:
    """Reference log-probabilities of the rows of all data sets of a run.

    `register` numbers the rows of a data set; `lookup` gives the values of numbered rows. `per_token` decides whether
    a response is one number or one per token.
    """

    def __init__(self, cache: LogpsCache, *, per_token: bool):
        cache.check_same_everywhere()
        self.cache, self.per_token = cache, per_token
        self._keys: list[list[str]] = []
        self._sources: list[tuple[Dataset, int]] = []

    def register(self, dataset: Dataset) -> Dataset:
        """The data set with its row numbers as a column."""
        if ROW in dataset.column_names:
            dataset = dataset.remove_columns(ROW)
        first = len(self._keys)
        for i, row in enumerate(dataset.select_columns(["prompt_ids", "response_ids"])):
            self._keys.append(response_keys(row["prompt_ids"], row["response_ids"]))
            self._sources.append((dataset, i))
        return dataset.add_column(ROW, list(range(first, len(self._keys))))

    def missing(self) -> list[dict]:
        """Tokenised rows of every response that is not in the cache yet, each response once."""
        seen, rows = set(), []
        for keys, (dataset, i) in zip(self._keys, self._sources, strict=True):
            slots = [k for k, key in enumerate(keys) if key not in self.cache and key not in seen]
            seen.update(keys[k] for k in slots)
            if slots:
                rows.append(_scorable(dataset[i], slots))
        return rows

    def lookup(self, rows: Tensor, response_mask: Tensor) -> Tensor:
        """(B,) row numbers -> (B,K,R) values per token, or (B,K,1) sums; 0 in padded slots."""
        shape = response_mask.shape if self.per_token else (*response_mask.shape[:2], 1)
        values = torch.zeros(shape, dtype=torch.float32 if self.per_token else torch.float64)
        for b, row in enumerate(rows.tolist()):
            for k, key in enumerate(self._keys[row]):
                value = torch.tensor(self.cache.entries[key])
                values[b, k, : value.numel()] = value
        return values.float().to(response_mask.device)

    def complete(self, rows: Tensor) -> bool:
        return all(key in self.cache for row in rows.tolist() for key in self._keys[row])

    def fill(
        self, score: Score, accelerator: Accelerator, *, budget: int, title: str = "Reference log-probabilities"
    ) -> int:
        """Score what is missing, on all processes, under a progress bar. Returns the number of responses scored."""
        rows = self.missing()  # the same on every process
        batches = list(_batches(rows, budget))
        rounds = -(-len(batches) // accelerator.num_processes)
        fresh, scored = {}, 0
        progress = tqdm(total=rounds, desc=title, disable=not rounds or not accelerator.is_local_main_process)
        for step in range(rounds):
            # Sharded engines run their collectives in lockstep: a process without a batch repeats the last one.
            at = step * accelerator.num_processes + accelerator.process_index
            fresh.update(self._entries(batches[min(at, len(batches) - 1)], score))
            progress.update()
            if (step + 1) % WRITE_EVERY == 0 or step + 1 == rounds:
                together = dict(gather_object(list(fresh.items())))
                self.cache.add(together, write=accelerator.is_main_process)
                fresh, scored = {}, scored + len(together)
        progress.close()
        if accelerator.is_main_process:
            self.cache.finish()
        accelerator.wait_for_everyone()
        return scored

    def verify(self, score: Score, accelerator: Accelerator, *, dtype: torch.dtype, seed: int) -> None:
        """Score a few random rows again.

        Raises:
            StaleCacheError: a cached value is not what the reference says now.
        """
        picked = random.Random(seed).sample(range(len(self._keys)), min(CHECKED_ROWS, len(self._keys)))
        rows = [_scorable(self._sources[i][0][self._sources[i][1]]) for i in picked]
        worst = 0.0
        for row in rows:
            fresh = self._entries([row], score)
            for key, ids in zip(
                response_keys(row["prompt_ids"], row["response_ids"]), row["response_ids"], strict=True
            ):
                known, now = (torch.tensor(v, dtype=torch.float64) for v in (self.cache.entries[key], fresh[key]))
                worst = max(worst, float((now - known).abs().sum()) / len(ids))
        worst = float(accelerator.gather(torch.tensor([worst], device=accelerator.device)).max())
        if worst > AGREEMENT.get(dtype, AGREEMENT[torch.bfloat16]):
            raise StaleCacheError(
                f"Cached reference log-probabilities differ by {worst:.2g} per token from fresh ones. "
                f"Delete {self.cache.path} to score the data again."
            )

    def _entries(self, rows: list[dict], score: Score) -> dict[str, float | list[float]]:
        logps, entries = score(rows).double().cpu(), {}
        for b, row in enumerate(rows):
            for k, key in enumerate(response_keys(row["prompt_ids"], row["response_ids"])):
                tokens = logps[b, k, : len(row["response_ids"][k])]
                entries[key] = tokens.tolist() if self.per_token else float(tokens.sum())
        return entries


def _scorable(row: dict, slots: list[int] | None = None) -> dict:
    """The part of a tokenised row that a forward needs."""
    responses = row["response_ids"] if slots is None else [row["response_ids"][k] for k in slots]
    return {"prompt_ids": row["prompt_ids"], "response_ids": responses, "scores": [0.0] * len(responses)}


def _batches(rows: list[dict], budget: int) -> Iterator[list[dict]]:
    """Rows of like length together, longest first so that a batch that does not fit in memory fails at once."""
    lengths = [packed_tokens((len(row["prompt_ids"]), [len(ids) for ids in row["response_ids"]])) for row in rows]
    batch, used = [], 0
    for i in sorted(range(len(rows)), key=lambda i: -lengths[i]):
        if batch and used + lengths[i] > budget:
            yield batch
            batch, used = [], 0
        batch.append(rows[i])
        used += lengths[i]
    if batch:
        yield batch


def reference_table(source: nn.Module, args, *, adapter: str | None, per_token: bool) -> ReferenceTable:
    """The table over the cache of a reference, which is `source` as it is now under `adapter`."""
    base = base_model(source)
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else "off"
    fingerprint = reference_fingerprint(
        reference_parameters(source, adapter=adapter).items(),
        base.config.to_dict(),
        compute_dtype=f"{base.dtype}, autocast {autocast}",
        per_token=per_token,
    )
    return ReferenceTable(LogpsCache(args.ref_cache_dir, fingerprint), per_token=per_token)
