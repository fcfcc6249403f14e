"""openbmb/UltraFeedback: up to four completions of an instruction, rated by a model.

Pin `revision="40b436560ca83a8dba36114c22ab3c66e43f6d5e"` or a later one: about 2,600 overall scores of 10 were wrong
before. Rows with source `truthful_qa` overlap with that benchmark; the column `source` is kept to leave them out by.
"""

from ..drops import Drop
from ..rows import Row, describe
from .fields import assistant, carried, number, records, text, user

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def ultrafeedback(row: Row) -> Row:
    """`overall_score` (1 to 10) as the score.

    The system prompts that its models were given differ from completion to completion, so they cannot be part of the
    one prompt and are left out.
    """
    return _row(row, [number(completion, "overall_score") for completion in records(row, "completions")])


def ultrafeedback_fine_grained(row: Row) -> Row:
    """The mean of the numeric aspect ratings (1 to 5) as the score; ratings of "N/A" do not count.

    That is the data set's own `fine-grained_score`, where it has one.
    """
    return _row(row, [_mean_rating(completion["annotations"]) for completion in records(row, "completions")])


def _row(row: Row, scores: list[float | None]) -> Row:
    completions = records(row, "completions")
    if not completions:
        raise Drop("no completions")
    return {
        "prompt": [user(text(row, "instruction"))],
        "responses": [[assistant(text(completion, "response"))] for completion in completions],
        "scores": scores,
        "models": [carried(completion, "model") for completion in completions],
        "source": carried(row, "source"),
    }


def _mean_rating(annotations: dict | None) -> float | None:
    ratings = [(annotations or {}).get(aspect) or {} for aspect in ASPECTS]
    numbers = [float(rating["Rating"]) for rating in ratings if _is_number(rating.get("Rating"))]
    return sum(numbers) / len(numbers) if numbers else None


def _is_number(rating: str | None) -> bool:
    if rating is None or rating == "N/A":
        return False
    try:
        float(rating)
    except (TypeError, ValueError) as error:
        raise ValueError(f"'Rating' is {describe(rating)}; give a number, or 'N/A' for none.") from error
    return True
