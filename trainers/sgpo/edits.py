"""How far a rewritten text is from the text before it, and how varied texts are."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Edit(NamedTuple):
    """One text against the text before it, in whitespace tokens.

    `ratio` is the Levenshtein distance divided by the longer side, 0 (equal) to 1 (nothing in common); `word_ratio`
    is words after divided by words before.
    """

    distance: int
    ratio: float
    is_copy: bool
    word_ratio: float


def edit_metrics(before: str, after: str) -> Edit:
    """Edit from `before` to `after`; texts that differ in whitespace only are copies."""
    first, second = before.split(), after.split()
    distance = edit_distance(first, second)
    longer = max(len(first), len(second))
    word_ratio = len(second) / max(1, len(first))
    return Edit(distance, distance / longer if longer else 0.0, first == second, word_ratio)


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance of two sequences: insertions, deletions and substitutions each cost 1."""
    ids = {token: i for i, token in enumerate(dict.fromkeys([*a, *b]))}
    columns = np.array([ids[token] for token in b], dtype=np.int64)
    steps = np.arange(len(b) + 1)
    row = steps.copy()
    for i, token in enumerate(a, 1):
        substituted = row[:-1] + (columns != ids[token])
        best = np.concatenate(([i], np.minimum(row[1:] + 1, substituted)))
        # An insertion carries a value one place to the right at a cost of 1.
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])


def round_metrics(before: list[str], after: list[str]) -> dict[str, float]:
    """Copy rate, median edit ratio and mean word ratio of aligned texts; empty without any text."""
    if not before:
        return {}
    edits = [edit_metrics(*pair) for pair in zip(before, after, strict=True)]
    return {
        "copy_rate": float(np.mean([edit.is_copy for edit in edits])),
        "median_edit_ratio": float(np.median([edit.ratio for edit in edits])),
        "mean_word_ratio": float(np.mean([edit.word_ratio for edit in edits])),
    }


def distinct_n(texts: list[str], n: int = 2) -> float:
    """Share of different n-grams of words among all n-grams of the texts; NaN when there is none.

    It falls with the amount of text, so only sets of like size compare.
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")
