"""Samples as columns of a row, and what is counted of them."""

import numpy as np

from ..generation.sampler import Sample
from .edits import distinct_n, round_metrics
from .filters import meta_text


def sample_columns(name: str, sample: Sample | None) -> dict:
    """Text and whether it was cut off; None is a prompt that had no room for a response."""
    if sample is None:
        return {name: None, f"{name}_truncated": False, f"{name}_tokens": 0}
    return {name: sample.text, f"{name}_truncated": sample.truncated, f"{name}_tokens": len(sample.token_ids)}


def count_samples(drawn: list[Sample | None]) -> dict[str, float]:
    made = [sample for sample in drawn if sample is not None]
    counts = {"prompts": len(drawn), "no_room": len(drawn) - len(made)}
    if made:
        counts |= {
            "truncated": float(np.mean([sample.truncated for sample in made])),
            "tokens": float(np.mean([len(sample.token_ids) for sample in made])),
        }
    return counts


def rewrite_metrics(rows: list[dict], before: str, after: str) -> dict[str, float]:
    """Edits from one column to another, cut-off texts and texts that speak of the task; empty without any row."""
    rows = [row for row in rows if row[before] is not None and row[after] is not None]
    if not rows:
        return {}
    first, second = ([row[name] for row in rows] for name in (before, after))
    return round_metrics(first, second) | {
        f"{before}_truncated": share(row[f"{before}_truncated"] for row in rows),
        f"{after}_truncated": share(row[f"{after}_truncated"] for row in rows),
        f"{before}_meta_text": share(map(meta_text, first)),
        f"{after}_meta_text": share(map(meta_text, second)),
        f"{before}_distinct_2": distinct_n(first),
        f"{after}_distinct_2": distinct_n(second),
    }


def share(values) -> float:
    return float(np.mean(list(values)))
