"""Canonical rows of several data sets as one."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from .canonical import FIXED
from .drops import log_report

logger = logging.getLogger(__name__)

OWN = ("prompt", "responses", "scores", "annotator", *FIXED)


@dataclass
class Shares:
    """How many rows of a mixture each data set gave, `taken`, of those that it has, `rows`."""

    names: list[str]
    rows: list[int]
    taken: list[int]

    def __str__(self) -> str:
        total = sum(self.taken)
        sources = zip(self.names, self.rows, self.taken, strict=True)
        lines = [f"  {n:,} rows ({n / total:.1%}) from the {rows:,} of {name}" for name, rows, n in sources]
        return "\n".join([f"{total:,} rows", *lines])


def mix(
    parts: Sequence[Dataset],
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    limits: Sequence[int | None] | None = None,
    *,
    seed: int = 0,
    max_rows: int | None = None,
) -> Dataset:
    """The rows of all data sets, one after the other.

    Of further columns those stay that all of them have, with one type. A row without a `weight` beside a data set that
    has some weighs 1. How many rows each gave is logged.

    Args:
        names: of the data sets, for messages.
        weights: which share of the rows of each is taken, drawn at random; 2 takes each row twice. Default: all.
        limits: at most so many rows of each are taken, after its share; drawn at random. None: no limit.
        max_rows: keep at most so many rows of the mixture, drawn at random.

    Raises:
        ValueError: two data sets hold different things in one column, such as text and messages.
    """
    weights, limits = weights or [1] * len(parts), limits or [None] * len(parts)
    given = [len(part) for part in parts]
    parts = [_share(part, weights[i], limits[i], (seed, i)) for i, part in enumerate(parts)]
    if any("weight" in part.column_names for part in parts):
        parts = [p if "weight" in p.column_names else p.add_column("weight", [1.0] * len(p)) for p in parts]
    features: dict[str, Any] = {}
    for part, name in zip(parts, names, strict=True):
        for column in (column for column in OWN if column in part.features):
            kind = part.features[column]
            if features.setdefault(column, kind) != kind:
                raise ValueError(
                    f"{name} holds {kind} in {column!r}, and the data sets before it {features[column]}: give every "
                    "column one type. With as_chat, texts become messages."
                )
    for column, kind in parts[0].features.items():
        if all(part.features.get(column) == kind for part in parts):
            features[column] = kind
    kept = [part.select_columns([name for name in part.column_names if name in features]) for part in parts]
    mixed = concatenate_datasets(kept)
    chosen = np.arange(len(mixed))
    if max_rows is not None and max_rows < len(mixed):
        chosen = np.random.default_rng(seed).permutation(len(mixed))[:max_rows]
        mixed = mixed.select(chosen)
    sources = np.repeat(np.arange(len(parts)), [len(part) for part in parts])[chosen]
    shares = Shares([*names], given, np.bincount(sources, minlength=len(parts)).tolist())
    log_report(logger, "mixture", shares)
    return mixed


def _share(part: Dataset, weight: float, limit: int | None, seed: tuple[int, int]) -> Dataset:
    count = max(1, round(weight * len(part)))
    count = count if limit is None else min(count, limit)
    if weight == 1 and count == len(part):
        return part
    order = np.random.default_rng(seed).permutation(len(part))
    return part.select(np.sort(order[np.arange(count) % len(part)]))
