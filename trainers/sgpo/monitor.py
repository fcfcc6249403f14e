"""What is watched in every round, and the limits beyond which something has gone wrong. The limits are our choice."""

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .filters import meta_text

SIDES = {"above": operator.gt, "below": operator.lt, "not above": operator.le}
TALKS, PLAIN_TALKS = "the improver speaks of its task", "plain answers speak of the improver's task"
NO_BETTER = (
    "the scorer does not prefer the improved responses, and DPO on such pairs does harm: use a stronger reviser, more "
    "data, or a policy_weight of 0.3 to 1"
)
NO_SHARPER = (
    "the scorer does not prefer the improved responses to the most likely plain ones, and DPO on those would teach as "
    "much without an improver: use a stronger reviser, or more data"
)
# (stage/metric), on which side of the limit something is wrong, the limit, and what it means.
RULES = (
    ("targets/copy_rate", "above", 0.2, "the rewrites are copies: use a stronger reviser"),
    ("pairs/copy_rate", "above", 0.2, "the rewrites are copies: train the improver for fewer epochs"),
    ("targets/median_edit_ratio", "below", 0.02, "the edits are too small"),
    ("targets/median_edit_ratio", "above", 0.8, "the drafts are hardly used"),
    ("pairs/median_edit_ratio", "below", 0.02, "the edits are too small"),
    ("pairs/median_edit_ratio", "above", 0.8, "the responses to improve are hardly used"),
    ("targets/closer_to_reference", "above", 0.5, "the reviser pastes the reference"),
    ("targets/mean_word_ratio", "above", 1.3, "texts grow longer"),
    ("pairs/mean_word_ratio", "above", 1.3, "texts grow longer"),
    ("measure/policy_length_ratio", "above", 1.3, "answers grow longer"),
    ("current/truncated", "above", 0.2, "raise max_new_tokens of sampling"),
    ("targets/target_truncated", "above", 0.2, "raise max_new_tokens of revision"),
    ("pairs/rejected_truncated", "above", 0.2, "raise max_new_tokens of sampling"),
    ("pairs/chosen_truncated", "above", 0.2, "raise max_new_tokens of revision"),
    ("pairs/chosen_meta_text", "above", 0.0, TALKS),
    ("gate/improver_chosen_meta_text", "above", 0.0, TALKS),
    ("measure/policy_chosen_meta_text", "above", 0.0, "the policy speaks of the task when it improves"),
    ("pairs/rejected_meta_text", "above", 0.0, PLAIN_TALKS),
    ("gate/improver_rejected_meta_text", "above", 0.0, PLAIN_TALKS),
    ("measure/policy_rejected_meta_text", "above", 0.0, PLAIN_TALKS),
    ("gate/pairs_scorer_gain", "not above", 0.0, NO_BETTER),
    ("gate/improver_scorer_gain", "not above", 0.0, NO_BETTER),
    ("gate/over_greedy_scorer_gain", "not above", 0.0, NO_SHARPER),
    ("measure/policy_distinct_2_fall", "above", 0.1, "answers grow alike"),
    ("dpo/chosen_fall", "above", 0.0, "the chosen responses lose likelihood: set sft_weight or lower learning_rate"),
    ("dpo/early_accuracy", "above", 0.95, "the pairs differ in style only"),
)  # fmt: skip


def alarms(stage: str, metrics: dict) -> list[str]:
    """A sentence for each metric of a stage beyond its limit; one that is missing or NaN is not judged."""
    values = {f"{stage}/{name}": value for name, value in metrics.items()}
    return [
        f"{name} is {values[name]:.3g}, {side} {limit:g}: {advice}."
        for name, side, limit, advice in RULES
        if name in values and SIDES[side](values[name], limit)
    ]


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
    return Edit(distance, distance / max(1, len(first), len(second)), first == second,
                len(second) / max(1, len(first)))  # fmt: skip


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
    return len(set(grams)) / len(grams) if grams else math.nan


def rewrite_metrics(rows: list[dict], before: str, after: str) -> dict[str, float]:
    """Edits from one column to another, cut-off texts and texts that speak of the task; empty without any row."""
    rows = [row for row in rows if row[before] and row[after] and row[after].strip()]
    metrics = round_metrics([row[before] for row in rows], [row[after] for row in rows])
    for name in (before, after) if rows else ():
        metrics[f"{name}_truncated"] = float(np.mean([row[f"{name}_truncated"] for row in rows]))
        metrics[f"{name}_meta_text"] = float(np.mean([meta_text(row[name]) for row in rows]))
        metrics[f"{name}_distinct_2"] = distinct_n([row[name] for row in rows])
    return metrics


def dpo_metrics(history: list[dict], beta: float, *, starts_at_reference: bool) -> dict[str, float]:
    """What a trainer's log says of the DPO stage; what it does not tell, as with few logs, is left out.

    `chosen_drift` and `rejected_drift` are how far the responses' log-probabilities moved, in nats per response: the
    rewards of the last log over beta, minus those of the first log where the policy did not start at its reference.
    `chosen_fall` is minus the chosen drift where margins rose, else 0. `early_accuracy` is of the first tenth of the
    steps but the first, before which all rewards may be 0.
    """
    logs = [log for log in history if "loss" in log and "rewards/chosen" in log]
    if len(logs) < 2:
        return {}
    first, last = logs[0], logs[-1]
    chosen, rejected = (
        (last[name] - (0.0 if starts_at_reference else first[name])) / beta
        for name in ("rewards/chosen", "rewards/rejected")
    )
    metrics = {
        "first_loss": first["loss"], "last_loss": last["loss"], "margin": last["rewards/margins"],
        "accuracy": last["rewards/accuracies"], "chosen_drift": chosen, "rejected_drift": rejected,
        "chosen_fall": max(0.0, -chosen) if chosen > rejected else 0.0,
    }  # fmt: skip
    early = [log["rewards/accuracies"] for log in logs if 1 < log["step"] <= last["step"] / 10]
    return metrics | ({"early_accuracy": float(np.mean(early))} if early else {})
