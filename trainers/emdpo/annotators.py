"""Who judged which row, which rows say anything, and which rows of an annotator train and which ones judge."""

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..likelihood import ordered_stages, ranking_logps


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
            ValueError: there is no such column, or a row names no annotator.
        """
        column = dataset["annotator"][:] if "annotator" in dataset.column_names else [None]
        if None in column:
            raise ValueError(
                f"{label} has no column 'annotator' that says of every row who judged it: row {column.index(None)} is "
                "nobody's."
            )
        names = list(dict.fromkeys(column))
        index = {name: i for i, name in enumerate(names)}
        return cls(names, np.array([index[name] for name in column], dtype=np.int64))


@dataclass
class Judged:
    """The J rows of a data set that say something, each with its annotator and its weight.

    `annotators` are all of the data set's, with the owners of these rows; `silent` counts the rows that were left out
    because of a tie for the best. `reference` holds K log-probabilities per row once the reference has scored them.
    """

    rows: Dataset
    annotators: Annotators
    weights: np.ndarray
    silent: int = 0
    reference: list[list[float]] | None = None

    @classmethod
    def of(cls, dataset: Dataset, top_q: int | None, label: str) -> "Judged":
        """Raises ValueError where nobody is named, or where no row says who was best."""
        annotators = Annotators.of(dataset, label)
        kept = np.flatnonzero(usable(dataset["scores"][:], top_q))
        if not len(kept):
            raise ValueError(f"no row of {label} says who was best: the best scores of each row tie.")
        rows = dataset.select(kept)
        weights = np.asarray(rows["weight"][:], float) if "weight" in rows.column_names else np.ones(len(rows))
        return cls(rows, Annotators(annotators.names, annotators.owner[kept]), weights, len(dataset) - len(kept))

    @property
    def owner(self) -> np.ndarray:
        """(J,) index of the annotator of each row."""
        return self.annotators.owner

    def items(self, scored: np.ndarray | None = None) -> np.ndarray:
        """(N,) rows of each annotator that count: those with a weight, and of the `scored` ones if given."""
        counted = self.weights > 0 if scored is None else scored & (self.weights > 0)
        return np.bincount(self.owner[counted], minlength=len(self.annotators))

    @property
    def single_pairs(self) -> bool:
        """Whether no annotator has more than one row, and no row more than two responses."""
        return bool(self.items().max() <= 1 and max(map(len, self.rows["scores"])) <= 2)

    def log_likelihood(self, logps: list[list[float]], *, beta: float, top: int | None) -> np.ndarray:
        """(J,) log-likelihood, in float64, of each row's ranking under a policy with these log-probabilities, times
        the row's weight."""
        scores, mask = _pad(self.rows["scores"][:])
        assert self.reference is not None
        rewards = beta * (_pad(logps)[0] - _pad(self.reference)[0])
        return self.weights * ranking_logps(rewards, scores, mask, top=top).numpy()


def usable(scores: list[list[float]], top: int | None) -> np.ndarray:
    """(J,) bool: the rows that say anything, with at least one stage."""
    return ordered_stages(*_pad(scores), top).any(-1).numpy()


def halves(owner: np.ndarray, seed: int) -> np.ndarray:
    """(rows,) 0 or 1: each annotator's rows dealt at random into two halves that differ by at most one row.

    Which half gets an odd row is random too, so that annotators with one row lie in both.
    """
    random, out = np.random.default_rng((seed, 1)), np.empty(len(owner), dtype=np.int64)
    for own in np.split(np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner))[:-1]):
        rows = random.permutation(own)
        out[rows] = (np.arange(len(rows)) + random.integers(2)) % 2
    return out


def _pad(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """(J,K) values in float64, and which slots hold one."""
    sizes = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(sizes.max())) < sizes[:, None]
    values = torch.zeros(mask.shape, dtype=torch.float64)
    values[mask] = torch.tensor([*chain.from_iterable(rows)], dtype=torch.float64)  # at once, which is fast
    return values, mask
