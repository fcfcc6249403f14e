"""Score rows under a frozen policy: log-probabilities of all responses, each once, on all processes, kept on disk.

One parquet file per policy. Its rows are keyed by the token ids of prompt and response, and by which of them are
trained on, so that nothing else, neither learning rate nor row order nor number of processes, can make an entry stale
or waste one; a killed pass goes on, and the file can be copied to another machine.
"""

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from trl.models import prepare_deepspeed

from ..data import PreferenceCollator
from ..data.budget import fill_batches, packed_tokens
from ..data.rows import TRAINED, trained_tokens
from .layout import read_lengths
from .policy import base_model, disable_dropout
from .run import Runner

WRITE_EVERY = 32  # batches per process between two parts on disk
CHECKED_ROWS = 4
NAME = "logps"  # of a file that lies in the folder of its policy

# Largest difference per token between a cached and a fresh value that rounding explains.
AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}

Value = float | list[float]
Score = Callable[[list[dict]], Tensor]  # tokenised rows -> (B,K,R) log-probabilities


class StaleCacheError(RuntimeError):
    """Cached log-probabilities differ from fresh ones."""


class LogpsCache:
    """Log-probabilities under one policy, `{key: sum over tokens}` or, with `per_token`, `{key: one of each token}`.

    They lie in memory and in `folder`/`name`.parquet. A pass writes parts as it goes; `finish` makes one file of them.
    Every process must make one.

    Raises:
        ValueError: processes read different entries, as nodes do that share no file system.
    """

    def __init__(self, folder: str | Path, name: str = NAME, *, per_token: bool = False):
        self.path, self.parts = Path(folder) / f"{name}.parquet", Path(folder) / f"{name}.parts"
        self.per_token = per_token
        self.entries: dict[str, Value] = {}
        for path in [self.path, *sorted(self.parts.glob("*.parquet"))]:
            if path.is_file():
                table = pq.read_table(path, columns=["key", "logps"])
                self.entries.update(zip(table["key"].to_pylist(), table["logps"].to_pylist(), strict=True))
        # What is missing is scored together, so all processes must know the same entries.
        counts = gather_object([(len(self.entries), _digest(self.entries))])
        if len(set(counts)) > 1:
            raise ValueError(
                f"{folder} holds different entries on different processes ({', '.join(str(n) for n, _ in counts)}): "
                "let all nodes share this folder (ref_cache_dir, or output_dir), or copy its files to every node."
            )

    def missing(self, datasets: Iterable[Dataset]) -> list[dict]:
        """Tokenised rows with every response that has no entry yet, each response once."""
        seen, rows = set(self.entries), []
        for dataset in datasets:
            for row in _token_rows(dataset):
                keyed = zip(_row_keys(row), row["response_ids"], row[TRAINED], strict=True)
                if fresh := {key: both for key, *both in keyed if key not in seen}:
                    seen.update(fresh)
                    ids, masks = zip(*fresh.values(), strict=True)
                    rows.append(_scorable(row["prompt_ids"], list(ids), list(masks)))
        return rows

    def of_rows(self, dataset: Dataset) -> list[list[Value]]:
        """The K values of each tokenised row."""
        return [[self.entries[key] for key in _row_keys(row)] for row in _token_rows(dataset)]

    def lookup(self, batch: dict[str, Tensor]) -> Tensor | None:
        """(B,K,R) values per token or (B,K,1) sums, 0 in padded slots; None if a response has no entry."""
        shape = batch["response_mask"].shape
        values = torch.zeros(shape if self.per_token else (*shape[:2], 1), dtype=torch.float64)
        prompts, prompt_mask, responses, response_mask = (
            batch[name].cpu() for name in ("prompt_ids", "prompt_mask", "response_ids", "response_mask")
        )
        for b, mask in enumerate(batch["mask"].tolist()):
            slots = [k for k, real in enumerate(mask) if real]
            ends = read_lengths(response_mask[b]).tolist()
            ids, masks = ([of[b, k, : ends[k]].tolist() for k in slots] for of in (responses, response_mask))
            for k, key in zip(slots, response_keys(prompts[b][prompt_mask[b]].tolist(), ids, masks), strict=True):
                if key not in self.entries:
                    return None
                value = torch.tensor(self.entries[key])
                values[b, k, : value.numel()] = value
        return values.float().to(batch["mask"].device)

    def fill(
        self, datasets: Iterable[Dataset], score: Score, accelerator: Accelerator, *, budget: int,
        title: str = "Reference log-probabilities",
    ) -> int:  # fmt: skip
        """Score what is missing, on all processes, under a progress bar. Returns the number of responses scored.

        `budget` is the most tokens of a batch.
        """
        batches = _batches(self.missing(datasets), budget)  # the same on every process
        rounds = -(-len(batches) // accelerator.num_processes)
        fresh, scored = {}, 0
        progress = tqdm(total=rounds, desc=title, disable=not rounds or not accelerator.is_local_main_process)
        for step in range(rounds):
            # Sharded engines run their collectives in lockstep: a process without a batch repeats the last one.
            at = step * accelerator.num_processes + accelerator.process_index
            fresh.update(self._score(batches[min(at, len(batches) - 1)], score))
            progress.update()
            if (step + 1) % WRITE_EVERY == 0 or step + 1 == rounds:
                together = dict(gather_object(list(fresh.items())))
                self.add(together, write=accelerator.is_main_process)
                fresh, scored = {}, scored + len(together)
        progress.close()
        if accelerator.is_main_process:
            self.finish()
        accelerator.wait_for_everyone()
        return scored

    def verify(
        self, datasets: Iterable[Dataset], score: Score, accelerator: Accelerator, *, dtype: torch.dtype, seed: int
    ) -> None:
        """Score a few random rows again.

        Raises:
            StaleCacheError: a cached value is not what the policy says now.
        """
        at = [(dataset, i) for dataset in datasets for i in range(len(dataset))]
        worst = 0.0
        for dataset, i in random.Random(seed).sample(at, min(CHECKED_ROWS, len(at))):
            [row] = _token_rows(dataset.select([i]))
            fresh = self._score([row], score)
            for key, ids in zip(_row_keys(row), row["response_ids"], strict=True):
                known, now = (torch.tensor(v, dtype=torch.float64) for v in (self.entries[key], fresh[key]))
                worst = max(worst, float((now - known).abs().sum()) / len(ids))
        worst = float(accelerator.gather(torch.tensor([worst], device=accelerator.device)).max())
        if worst > AGREEMENT.get(dtype, AGREEMENT[torch.bfloat16]):
            raise StaleCacheError(
                f"Cached reference log-probabilities differ by {worst:.2g} per token from fresh ones. "
                f"Delete {self.path} to score the data again."
            )

    def add(self, entries: dict[str, Value], *, write: bool) -> None:
        """Take new entries; `write` them as a part (one process only)."""
        self.entries.update(entries)
        if write and entries:
            self.parts.mkdir(parents=True, exist_ok=True)
            # Named by content, so that a part never replaces another one of an interrupted pass.
            _write(self.parts / f"{_digest(entries)[:16]}.parquet", entries)

    def finish(self) -> None:
        """Put all entries into the one file and remove what else a pass left (one process only)."""
        if self.parts.is_dir():
            _write(self.path, self.entries)
            for part in self.parts.iterdir():
                part.unlink()
            self.parts.rmdir()
        for half_written in self.path.parent.glob(f"{self.path.name}.*.tmp"):
            half_written.unlink()

    def _score(self, rows: list[dict], score: Score) -> dict[str, Value]:
        logps, entries = score(rows).double().cpu(), {}
        for b, row in enumerate(rows):
            for k, key in enumerate(_row_keys(row)):
                tokens = logps[b, k, : len(row["response_ids"][k])]
                entries[key] = tokens.tolist() if self.per_token else float(tokens.sum())
        return entries


def score_rows(
    load: Callable[[], nn.Module], datasets: Sequence[Dataset], folder: str | Path, *, accelerator, pad_token_id: int,
    layout: str = "auto", per_token: bool = False, budget: int = 16384, title: str = "Log-probabilities",
) -> list[list[list[Value]]]:  # fmt: skip
    """For every data set and row the log-probabilities of its K responses under one policy, read or made now.

    Args:
        load: gives the policy; it is called only if something is missing, and nothing here keeps the model.
        datasets: tokenised rows (`prompt_ids`, `response_ids`, where it is there `assistant_masks`).
        folder: where they are kept; it belongs to one policy.
        accelerator: places and shards the policy like one that is trained; or what stands in for an accelerator where
            every process holds the policy whole.
        per_token: one number per token up to the last one that is trained on, in place of their sum.
        budget: most tokens of a batch; 1 for a row at a time, so that no number depends, by rounding, on where a pass
            was killed.
    """
    table, collate = LogpsCache(folder, per_token=per_token), PreferenceCollator(pad_token_id)
    with ExitStack() as stack:

        @cache
        def policy() -> tuple[nn.Module, Runner]:
            model = load()
            disable_dropout(model)
            runner = Runner([base_model(model)], layout)
            return stack.enter_context(_placed(model.requires_grad_(False).eval(), accelerator)), runner

        def score(rows: list[dict]) -> Tensor:
            model, runner = policy()
            batch = {name: tensor.to(accelerator.device) for name, tensor in collate(rows).items()}
            with torch.no_grad(), accelerator.autocast():
                runner.check(model, batch, accelerator)
                return runner(model, batch).logps

        table.fill(datasets, score, accelerator, budget=budget, title=title)
    return [table.of_rows(rows) for rows in datasets]


@contextmanager
def _placed(model: nn.Module, accelerator) -> Iterator[nn.Module]:
    """A frozen policy on the device, sharded where the engine shards one that is trained; the engine ends with it."""
    if isinstance(accelerator, Accelerator) and accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = prepare_deepspeed(model, accelerator)
        yield engine
        engine.destroy()  # DeepSpeed's engine keeps its hooks and buffers otherwise
    elif isinstance(accelerator, Accelerator) and accelerator.distributed_type == DistributedType.FSDP:
        # In layers, as in training: TRL's `prepare_fsdp` makes one unit, whose forward gathers all weights at once.
        # FSDP2 is prepared with an optimizer only; this one makes no step.
        policy, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
        yield policy
        accelerator.free_memory()  # it keeps what it has prepared
    else:
        yield model.to(accelerator.device)


def response_keys(
    prompt_ids: Sequence[int], response_ids: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]] | None = None
) -> list[str]:
    """A key per response: what a policy says of the tokens that `masks` marks depends on this and on nothing else of
    the row. Responses end with the last marked token; None marks all."""
    prompt = hashlib.sha256(np.asarray([len(prompt_ids), *prompt_ids], dtype=np.int64).tobytes())
    keys = []
    for ids, mask in zip(response_ids, masks or [[]] * len(response_ids), strict=True):
        digest = prompt.copy()
        digest.update(np.asarray(ids, dtype=np.int64).tobytes())
        if not all(mask):
            digest.update(np.asarray(mask, dtype=np.bool_).tobytes())
        keys.append(digest.hexdigest()[:32])
    return keys


def _row_keys(row: dict) -> list[str]:
    return response_keys(row["prompt_ids"], row["response_ids"], row[TRAINED])


def _token_rows(dataset: Dataset) -> Iterator[dict]:
    """What the rows' keys depend on: a policy need not read what comes after the last token that is trained on."""
    masked = [TRAINED] if TRAINED in dataset.column_names else []
    for row in dataset.select_columns(["prompt_ids", "response_ids", *masked]):
        masks = trained_tokens(row)
        ends = [max((i + 1 for i, mark in enumerate(mask) if mark), default=0) for mask in masks]
        ids, masks = ([x[:end] for x, end in zip(of, ends, strict=True)] for of in (row["response_ids"], masks))
        yield _scorable(row["prompt_ids"], ids, masks)


def _scorable(prompt_ids: Sequence[int], response_ids: list, masks: list) -> dict:
    scores = [0.0] * len(response_ids)
    return {"prompt_ids": prompt_ids, "response_ids": response_ids, TRAINED: masks, "scores": scores}


def _digest(entries: Iterable[str]) -> str:
    return hashlib.sha256("".join(sorted(entries)).encode()).hexdigest()


def _write(path: Path, entries: dict[str, Value]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    pq.write_table(pa.table({"key": list(entries), "logps": list(entries.values())}), temporary)
    os.replace(temporary, path)


def _batches(rows: list[dict], budget: int) -> list[list[dict]]:
    """Rows of like length together, longest first so that a batch that does not fit in memory fails at once."""
    lengths = [packed_tokens((len(row["prompt_ids"]), [len(ids) for ids in row["response_ids"]])) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    return [[rows[i] for i in batch] for batch in fill_batches(order, lengths, budget)]
