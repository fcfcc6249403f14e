"""Token lengths of the rows, the micro-batches they make, and how many steps that is."""

import math
from typing import NamedTuple

from ..config import PreferenceConfig
from ..data.budget import Lengths, TokenBudgetSampler, packed_tokens
from .shape import Fed, fed


class Batches(NamedTuple):
    """How many micro-batches one process sees per epoch, and the rows of a large one and of the largest."""

    per_process: int
    large: list[int]
    largest: list[int]


def plan_batches(lengths: list[Lengths], args: PreferenceConfig, processes: int) -> Batches:
    """With a fixed number of prompts, a large batch is made of the row at the 99th percentile of tokens.

    Batches by token budget are taken as they come, since the budget already keeps long rows apart.
    """
    sizes = [packed_tokens(row) for row in lengths]
    if args.max_tokens_per_batch is not None:
        seed = args.seed if args.data_seed is None else args.data_seed
        batches = TokenBudgetSampler(sizes, args.max_tokens_per_batch, seed=seed, processes=processes).batches(0)
        ordered = sorted(batches, key=lambda batch: sum(sizes[i] for i in batch))
        return Batches(len(batches) // processes, ordered[_rank(len(batches))], ordered[-1])
    size, rows = args.per_device_train_batch_size, len(sizes)
    drop = args.dataloader_drop_last
    per_process = rows // size // processes if drop else math.ceil(math.ceil(rows / size) / processes)
    ordered = sorted(range(rows), key=sizes.__getitem__)
    return Batches(per_process, [ordered[_rank(rows)]] * size, [ordered[-1]] * size)


def _rank(count: int) -> int:
    """Where the 99th percentile stands among `count` sorted values."""
    return math.ceil(0.99 * count) - 1


def count_steps(args: PreferenceConfig, batches_per_process: int) -> tuple[int, int]:
    """Optimizer steps per epoch and in all, as the Trainer counts them."""
    per_epoch = max(1, math.ceil(batches_per_process / args.gradient_accumulation_steps))
    return per_epoch, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def fed_in_all(lengths: list[Lengths], layout: str) -> Fed:
    """All rows once, each fed on its own, so that padding between prompts is left out.

    `layout` is "rows", "shared" or "auto": for each row the one that feeds fewer tokens.
    """
    layouts = {"rows": (False,), "shared": (True,), "auto": (True, False)}[layout]
    found = (min((fed([row], shared=s) for s in layouts), key=lambda f: f.tokens) for row in lengths)
    return Fed(*map(sum, zip(*found, strict=True)))
