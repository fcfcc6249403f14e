"""Canonical rows of several data sets as one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from .canonical import FIXED

OWN = ("prompt", "responses", "scores", "annotator", *FIXED)


def mix(
    parts: Sequence[Dataset],
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
    max_rows: int | None = None,
) -> Dataset:
    """The rows of all data sets, one after the other.

    Of further columns those stay that all of them have, with one type. A row without a `weight` beside a data set that
    has some weighs 1.

    Args:
        names: of the data sets, for messages.
        weights: which share of the rows of each is taken, drawn at random; 2 takes each row twice. Default: all.
        max_rows: keep at most so many rows of the mixture, drawn at random.

    Raises:
        ValueError: two data sets hold different things in one column, such as text and messages.
    """
    weights = weights or [1] * len(parts)
    parts = [_share(part, weights[i], (seed, i)) for i, part in enumerate(parts)]
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
    if max_rows is None or max_rows >= len(mixed):
        return mixed
    return mixed.select(np.random.default_rng(seed).permutation(len(mixed))[:max_rows])


def _share(part: Dataset, weight: float, seed: tuple[int, int]) -> Dataset:
    if weight == 1:
        return part
    count = max(1, round(weight * len(part)))
    order = np.random.default_rng(seed).permutation(len(part))
    return part.select(np.sort(order[np.arange(count) % len(part)]))
