"""Canonical rows of several data sets as one."""

from collections.abc import Sequence

import numpy as np
import pyarrow
from datasets import Dataset, Features, concatenate_datasets

from .structured import TEMPLATE
from .tokenization import UNFINISHED

OWN = ("prompt", "responses", "scores", "weight", "annotator", UNFINISHED, *TEMPLATE)


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
    first = parts[0].features
    shared = {name for name in first if all(part.features.get(name) == first[name] for part in parts)}
    parts = [part.select_columns([n for n in part.column_names if n in shared or n in OWN]) for part in parts]
    features = _common_features(parts, names)
    mixed = concatenate_datasets([part.cast(Features({n: features[n] for n in part.column_names})) for part in parts])
    if max_rows is None or max_rows >= len(mixed):
        return mixed
    return mixed.select(np.random.default_rng(seed).permutation(len(mixed))[:max_rows])


def _share(part: Dataset, weight: float, seed: tuple[int, int]) -> Dataset:
    if weight == 1:
        return part
    count = max(1, round(weight * len(part)))
    order = np.random.default_rng(seed).permutation(len(part))
    return part.select(np.sort(order[np.arange(count) % len(part)]))


def _common_features(parts: list[Dataset], names: Sequence[str]) -> Features:
    common = pyarrow.schema([])
    for part, name in zip(parts, names, strict=True):
        try:
            schema = part.features.arrow_schema.remove_metadata()
            common = pyarrow.unify_schemas([common, schema], promote_options="permissive")
        except pyarrow.ArrowException as error:
            raise ValueError(
                f"{name} differs from the data sets before it ({error}): give every column one type. With as_chat, "
                "texts become messages."
            ) from error
    return Features.from_arrow_schema(common)
