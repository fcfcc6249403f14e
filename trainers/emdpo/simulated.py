"""Simulated annotators: rows of UltraFeedback as if each prompt had been judged by one person with one taste."""

import zlib
from typing import Any

from ..data.formats.by_row import ultrafeedback

PEOPLE = 400
TASTES = ("helpfulness", "honesty")


def ultrafeedback_by_aspect(row: dict[str, Any]) -> dict[str, Any]:
    """A row of openbmb/UltraFeedback -> a canonical row with an `annotator`, whose aspect gives the scores (1 to 5).

    The prompt decides who judges it, and annotators take the tastes in turn: `honesty-7` judges by honesty. The name
    says what EM has to find; it does not read it.
    """
    person = zlib.crc32(row["instruction"].encode()) % PEOPLE
    taste = TASTES[person % len(TASTES)]
    ratings = [_rating(completion, taste) for completion in row["completions"]]
    return {**ultrafeedback(row), "scores": ratings, "annotator": f"{taste}-{person}"}


def _rating(completion: dict, aspect: str) -> float | None:
    try:
        return float(completion["annotations"][aspect]["Rating"])
    except (KeyError, TypeError, ValueError):
        return None  # not rated ("N/A"): canonicalize counts it and leaves the response out
