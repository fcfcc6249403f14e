"""One plain function per hub format, from a row of the data set to a canonical row.

An adapter returns the row, or raises `Drop(reason)` for a row to leave out. What it returns is validated and cleaned
by `canonicalize` afterwards, so an adapter neither checks for empty text nor for missing scores. Your own adapter is
any function with this signature, given to `load_preferences` by its dotted import path.
"""

from .drops import Drop
from .rows import Row, pair_to_row, to_canonical

__all__ = ["pairs", "rows", "ultrafeedback", "ultrafeedback_fine_grained"]

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def rows(row: Row) -> Row:
    """Rows that are canonical already."""
    row["responses"]  # a KeyError here is reported with the row, the field and the columns found
    return to_canonical(row)


def pairs(row: Row) -> Row:
    """TRL preference pairs: `prompt` (or a prompt that both sides begin with), `chosen`, `rejected`."""
    return pair_to_row(row)


def ultrafeedback(row: Row) -> Row:
    """openbmb/UltraFeedback with `overall_score` (1 to 10) as the score.

    The system prompts that its models were given differ from completion to completion, so they cannot be part of the
    one prompt and are left out.
    """
    return _ultrafeedback(row, [completion["overall_score"] for completion in row["completions"]])


def ultrafeedback_fine_grained(row: Row) -> Row:
    """openbmb/UltraFeedback with the mean of the numeric aspect ratings (1 to 5) as the score."""
    return _ultrafeedback(row, [_mean_rating(completion["annotations"]) for completion in row["completions"]])


def _ultrafeedback(row: Row, scores: list[float | None]) -> Row:
    if not row["completions"]:
        raise Drop("no completions")
    return {
        "prompt": [{"role": "user", "content": row["instruction"]}],
        "responses": [[{"role": "assistant", "content": item["response"]}] for item in row["completions"]],
        "scores": scores,
        "source": row["source"],
    }


def _mean_rating(annotations: dict | None) -> float | None:
    ratings = [(annotations or {}).get(aspect) or {} for aspect in ASPECTS]
    numbers = [float(rating["Rating"]) for rating in ratings if _is_number(rating.get("Rating"))]
    return sum(numbers) / len(numbers) if numbers else None


def _is_number(text) -> bool:
    try:
        float(text)
    except (TypeError, ValueError):  # "N/A" or missing
        return False
    return True
