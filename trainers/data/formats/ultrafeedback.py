"""openbmb/UltraFeedback: up to four completions of an instruction, rated by a model.

Pin `revision="40b436560ca83a8dba36114c22ab3c66e43f6d5e"` or a later one: about 2,600 overall scores of 10 were wrong
before. Rows with source `truthful_qa` overlap with that benchmark; the column `source` is kept to leave them out by.
"""

from collections.abc import Callable

from ..drops import Drop
from ..rows import Row
from .fields import assistant, user

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def ultrafeedback(row: Row) -> Row:
    """`overall_score` (1 to 10) as the score.

    The system prompts that its models were given differ from completion to completion, so they cannot be part of the
    one prompt and are left out.
    """
    return _row(row, lambda completion: completion["overall_score"])


def ultrafeedback_fine_grained(row: Row) -> Row:
    """The mean of the numeric aspect ratings (1 to 5) as the score; ratings of "N/A" do not count.

    That is the data set's own `fine-grained_score`, where it has one.
    """
    return _row(row, _mean_rating)


def _row(row: Row, score: Callable[[dict], float | None]) -> Row:
    completions = row["completions"]
    if not completions:
        raise Drop("no completions")
    return {
        "prompt": [user(row["instruction"])],
        "responses": [[assistant(completion["response"])] for completion in completions],
        "scores": [score(completion) for completion in completions],
        "models": [completion.get("model") for completion in completions],
        "source": row.get("source"),
    }


def _mean_rating(completion: dict) -> float | None:
    ratings = [((completion["annotations"] or {}).get(aspect) or {}).get("Rating") for aspect in ASPECTS]
    numbers = [float(rating) for rating in ratings if rating not in (None, "N/A")]
    return sum(numbers) / len(numbers) if numbers else None
