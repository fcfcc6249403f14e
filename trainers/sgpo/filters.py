"""What is left out of the improver's data and of the pairs, with a reason for each row.

Hygiene looks at one text, the IQR filter at a statistic of all rows. Which quantity the paper filters, and on which
sides, is unknown; the factor 1.5 is Tukey's.
"""

import logging
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

logger = logging.getLogger(__name__)

FEWEST = 4  # examples that quartiles are taken of

# Reasons why a row goes. One that comes of an option names it.
NO_ROOM, TRUNCATED = "no room for {}.max_new_tokens in the model's context", "cut at {}.max_new_tokens"
TOO_LONG = "longer than {}"
EMPTY, META = "empty, or no revision in it", "speaks of the task"
COPY = "equal to the response before it"
NOT_FINITE, OUTLIER = "filter_statistic is not finite", "outside the fences of filter_statistic and filter_factor"

# What only a text about the task of improving says. Looked for at the start, except for our own delimiters.
_KIND = r"(?:improved|revised|rewritten|edited|refined|enhanced|polished)"
_NOUN = r"(?:response|answer|version|draft|reply|revision|text)"
META_START = re.compile(
    rf"\b(?:here is|here's|below is|this is)\s+(?:the|an|a|my|your)\s+(?:\w+\s+)?{_KIND}\b"
    rf"|^\W*(?:the\s+)?{_KIND}\s+{_NOUN}\b\W*:"
    rf"|\b(?:the|this|your|my|original|current)\s+(?:draft|original response|original answer|reference answer)\b"
    rf"|\b{_KIND}\s+(?:the|your|this)\s+(?:response|answer|draft)\b",
    re.IGNORECASE,
)
META_ANYWHERE = re.compile(
    r"<<REVISED( \d+)?>>|\[\[/?(?:prompt|response|draft|reference)(?: \d+)?\]\]"
    rf"|\bthe reference (?:shows|is|highlights|states|mentions|answer|response)\b|\bthe {_KIND} {_NOUN}\b",
    re.IGNORECASE,
)
START = 160  # characters


def meta_text(text: str) -> bool:
    """Whether a text speaks of the task of improving, or holds one of its delimiters.

    A list of patterns: it can miss a phrase, and strike an honest answer to a prompt that asks for a revision.
    """
    return bool(META_START.search(text[:START]) or META_ANYWHERE.search(text))


def fault(
    text: str | None, *, truncated: bool = False, before: str | None = None, option: str = "sampling"
) -> str | None:
    """Why a generated text cannot be used, or None.

    Args:
        text: None where the prompt left no room for one.
        before: the response that it must differ from.
        option: says how it was drawn, `sampling` or `revision`.
    """
    if text is None:
        return NO_ROOM.format(option)
    if truncated:
        return TRUNCATED.format(option)
    if not text.strip():
        return EMPTY
    if meta_text(text):
        return META
    return COPY if before is not None and text.split() == before.split() else None


def column_fault(row: dict, name: str, before: str | None = None) -> str | None:
    """`fault` of the text in a column, which it names; it must differ from the text in the column `before`."""
    option = "sampling" if before is None else "revision"
    reason = fault(row[name], truncated=row[f"{name}_truncated"], before=before and row[before], option=option)
    return reason and f"{name}: {reason}"


class Fences(NamedTuple):
    """Result of the IQR filter. Without `applied` all finite values are kept, for `reason`."""

    applied: bool
    reason: str | None
    q1: float | None
    q3: float | None
    lower: float
    upper: float


def iqr_fences(values, factor: float = 1.5, side: str = "both", fewest: int = FEWEST) -> Fences:
    """Q1 - factor*IQR and Q3 + factor*IQR of the finite values; a side that is not asked for is infinite.

    Quartiles are interpolated linearly at position (n-1)p, NumPy's default.
    """
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if len(values) < fewest:
        return Fences(False, "too few examples", None, None, -math.inf, math.inf)
    q1, q3 = map(float, np.quantile(values, [0.25, 0.75]))
    if q1 == q3:
        return Fences(False, "zero interquartile range", q1, q3, -math.inf, math.inf)
    spread = factor * (q3 - q1)
    lower = q1 - spread if side != "upper" else -math.inf
    upper = q3 + spread if side != "lower" else math.inf
    return Fences(True, None, q1, q3, lower, upper)


def iqr_keep(values, factor: float = 1.5, side: str = "both", fewest: int = FEWEST) -> np.ndarray:
    """(N,) bool: which values lie inside the fences of `iqr_fences`, or on them; values that are not finite do not.

    Fewer than `fewest` finite values, or an interquartile range of 0, keep all finite values; the log says so.
    """
    fences = iqr_fences(values, factor, side, fewest)
    if not fences.applied:
        logger.warning("The IQR filter keeps all examples: %s.", fences.reason)
    values = np.asarray(values, dtype=float)
    return np.isfinite(values) & (values >= fences.lower) & (values <= fences.upper)


def filter_statistic(
    name: str, target_logps: Sequence[Sequence[float]], current_logps: Sequence[Sequence[float]]
) -> list[float]:
    """One number per example: `logp_gain`, the mean log-probability per token of the target minus that of the draft.

    Args:
        target_logps, current_logps: log-probability of each token under the initial policy and the plain prompt, the
            end token included.

    Raises:
        ValueError: no such statistic.
    """
    if name != "logp_gain":
        raise ValueError(f"filter_statistic={name!r} is unknown: logp_gain is the only one.")
    mean = lambda logps: math.fsum(logps) / len(logps)  # noqa: E731
    return [mean(target) - mean(current) for target, current in zip(target_logps, current_logps, strict=True)]
