"""Canonical rows, and pairs of a better and a worse response."""

from ..rows import Row, pair_to_row, to_canonical
from .fields import assistant, user


def rows(row: Row) -> Row:
    """Rows that are canonical already."""
    row["responses"]  # a KeyError here is reported with the row, and the columns that there are
    return to_canonical(row)


def pairs(row: Row) -> Row:
    """TRL pairs: `prompt` (or a prompt that both sides begin with), `chosen`, `rejected`; scores 1 and 0."""
    return pair_to_row(row)


def scored_pairs(row: Row) -> Row:
    """TRL preference pairs with `score_chosen` and `score_rejected` as the scores, which may tie."""
    scores = [row["score_chosen"], row["score_rejected"]]
    pair = pair_to_row({name: value for name, value in row.items() if name not in ("score_chosen", "score_rejected")})
    return {**pair, "scores": scores}


def argilla(row: Row) -> Row:
    """argilla/ultrafeedback-binarized-preferences: two responses with the mean of their aspect ratings (1 to 5)."""
    return {
        "prompt": [user(row["instruction"])],
        "responses": [[assistant(row[f"{side}_response"])] for side in ("chosen", "rejected")],
        "scores": [row[f"{side}_avg_rating"] for side in ("chosen", "rejected")],
        "source": row.get("source"),
    }
