"""Who gave which row, and which rows of an annotator train and which ones judge."""

from collections.abc import Hashable
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from datasets import Dataset


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
        strange = next((i for i, name in enumerate(column) if not isinstance(name, str | Integral)), None)
        if strange is not None:
            raise ValueError(
                f"row {strange} of {label}: 'annotator' is {column[strange]!r}; give text or an integer, for several "
                "fields one text of them all."
            )
        names = list(dict.fromkeys(column))
        index = {name: i for i, name in enumerate(names)}
        return cls(names, np.array([index[name] for name in column], dtype=np.int64))


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
