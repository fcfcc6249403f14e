"""Who gave which row, and which rows of an annotator train and which ones judge."""

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from ..data.rows import checked_annotator


@dataclass(frozen=True)
class Annotators:
    """`names` of the N annotators in the order of their first row, and `owner` (rows,) the index of each row's."""

    names: list[Hashable]
    owner: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, dataset: Dataset, label: str = "train_dataset") -> "Annotators":
        """From the column `annotator`, text or integers as in any row; the rows of one annotator may lie anywhere.

        Raises:
            ValueError: there is no such column, or a row names no annotator, or by something else.
        """
        if "annotator" not in dataset.column_names:
            raise ValueError(
                f"{label} has no column 'annotator': EM-DPO finds types of annotators, so a row must say who judged."
            )
        column = list(dataset["annotator"])
        missing = next((i for i, name in enumerate(column) if name is None), None)
        if missing is not None:
            raise ValueError(f"row {missing} of {label}: 'annotator' is None; name who judged, or remove the row.")
        for i, name in enumerate(column):
            try:
                checked_annotator(name)
            except ValueError as error:
                raise ValueError(f"row {i} of {label}: {error}") from error
        names = list(dict.fromkeys(column))
        _refuse_names_that_look_alike(names, label)
        index = {name: i for i, name in enumerate(names)}
        return cls(names, np.array([index[name] for name in column], dtype=np.int64))


def _refuse_names_that_look_alike(names: list[Hashable], label: str) -> None:
    """Raises ValueError for names that differ in the spaces around them only: one person would be two."""
    seen = {}
    for name in names:
        other = seen.setdefault(str(name).strip(), name)
        if other is not name:
            raise ValueError(
                f"{label}: the annotators {other!r} and {name!r} differ in spaces only; give one person one name."
            )


def halves(owner: np.ndarray, seed: int) -> np.ndarray:
    """(rows,) 0 or 1: each annotator's rows dealt at random into two halves that differ by at most one row.

    Which half gets an odd row is random too, so that annotators with one row lie in both.
    """
    random = np.random.default_rng((seed, 1))
    out = np.empty(len(owner), dtype=np.int64)
    for annotator in range(int(owner.max()) + 1 if len(owner) else 0):
        rows = random.permutation(np.flatnonzero(owner == annotator))
        out[rows] = (np.arange(len(rows)) + random.integers(2)) % 2
    return out
