"""Batches by token budget instead of by number of prompts, as a pure function of (seed, epoch, position)."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from pyarrow import compute
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

logger = logging.getLogger(__name__)

Lengths = tuple[int, list[int]]  # of a prompt and of its responses, in tokens

WINDOW = 64  # batches whose prompts are sorted together: the longer, the less padding and the less mixing
EVEN = 8  # the number of batches is a multiple of this, so that 1, 2, 4 and 8 processes see the same order
SLACK = 1.02  # more batches than the first epoch needs, so that every epoch has the same number


class TokenBudgetSampler(Sampler[list[int]]):
    """Yields lists of row indices whose packed lengths sum to at most `budget` tokens.

    Every row comes once per epoch, in an order that depends on seed and epoch only. The number of batches is the same
    in every epoch and divisible by `processes`, so that accelerate can deal them out evenly; where the packing gives
    fewer, the largest batches are halved. Where it gives more, as nearly every row is a batch, those that do not go
    round all processes are left out, others in each epoch. A row longer than the budget is a batch of its own.

    Args:
        lengths: packed length of every row (`packed_tokens`).
        budget: most tokens per batch.

    Raises:
        ValueError: there are fewer rows than processes.
    """

    def __init__(self, lengths: Sequence[int], budget: int, *, seed: int = 0, processes: int = 1):
        if len(lengths) < processes:
            raise ValueError(f"{len(lengths)} rows cannot be dealt to {processes} processes: use fewer processes.")
        self.lengths, self.budget, self.seed, self.epoch = np.asarray(lengths), budget, seed, 0
        multiple = int(np.lcm(EVEN, processes))
        wanted = int(np.ceil(len(self._pack(0)) * SLACK / multiple)) * multiple
        # At most one batch per row, at least what the first epoch needs.
        self.count = min(wanted, len(lengths) // processes * processes)
        self.oversized = int((self.lengths > budget).sum())

    @property
    def sampler(self) -> "TokenBudgetSampler":
        """accelerate passes the epoch on to `batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches(self.epoch))

    def batches(self, epoch: int) -> list[list[int]]:
        """All batches of an epoch, in order."""
        packed = self._pack(epoch)
        if len(packed) > self.count:  # rare, and the budget must hold: keep the first epoch's groups, in a new order
            packed = self._pack(0)
        while len(packed) < self.count:
            largest = max(range(len(packed)), key=lambda i: len(packed[i]))
            batch = packed[largest]
            packed[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(packed))
        return [packed[i] for i in order[: self.count]]

    def _pack(self, epoch: int) -> list[list[int]]:
        """Shuffle, sort within windows, fill greedily."""
        order = np.random.default_rng((self.seed, epoch, 0)).permutation(len(self.lengths))
        window = max(1, int(WINDOW * self.budget / max(1.0, self.lengths.mean())))
        chunks = [order[start : start + window] for start in range(0, len(order), window)]
        rows = [row for chunk in chunks for row in chunk[np.argsort(self.lengths[chunk], kind="stable")].tolist()]
        return fill_batches(rows, self.lengths, self.budget)


def fill_batches(rows: Iterable[int], lengths: Sequence[int] | np.ndarray, budget: int) -> list[list[int]]:
    """Indices of rows in their order, as many to a batch as sum to at most `budget`; a longer one is alone."""
    batches: list[list[int]] = []
    used = 0
    for row in rows:
        if not batches or used + lengths[row] > budget:
            batches.append([])
            used = 0
        batches[-1].append(row)
        used += int(lengths[row])
    return batches


def token_lengths(rows: Dataset) -> list[Lengths]:
    """Lengths of each prompt and of its responses, read off Arrow's offsets without looking at a token."""
    found = []
    for table in rows.select_columns(["prompt_ids", "response_ids"]).with_format("arrow").iter(batch_size=1000):
        prompts, counts = (compute.list_value_length(table[name]).to_pylist() for name in table.column_names)
        lengths = iter(compute.list_value_length(compute.list_flatten(table["response_ids"])).to_pylist())
        found += [(p, list(islice(lengths, k))) for p, k in zip(prompts, counts, strict=True)]
    return found


def packed_tokens(row: Lengths) -> int:
    """Tokens of a row of which the prompt alone is shared: the prompt but for its last token, and all responses."""
    return row[0] - 1 + sum(row[1])


def budget_loader(dataset: Dataset, collate: Callable, args: TrainingArguments, *, budget: int) -> DataLoader:
    """Batches of at most `budget` tokens, dealt out to the processes."""
    lengths = [packed_tokens(row) for row in token_lengths(dataset)]
    seed = args.seed if args.data_seed is None else args.data_seed
    sampler = TokenBudgetSampler(lengths, budget, seed=seed, processes=args.world_size)
    if sampler.oversized:
        logger.warning("%d rows are longer than max_tokens_per_batch=%d; each is a batch of its own.",
                       sampler.oversized, budget)  # fmt: skip
    return batch_loader(dataset, sampler, collate, args)


def batch_loader(
    dataset: Dataset, batches: Sampler[list[int]] | list[list[int]], collate: Callable, args: TrainingArguments
) -> DataLoader:
    """These batches in this order, dealt out to the processes, whose number divides theirs."""
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor if args.dataloader_num_workers else None,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        in_order=args.dataloader_in_order,
    )
    # Not `accelerator.prepare`: it evens out batches by repeating rows, and these are even already.
    return prepare_data_loader(
        loader, args.device, args.world_size, args.process_index, put_on_device=True, even_batches=False
    )
