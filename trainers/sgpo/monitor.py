"""What is watched in every round, and the limits beyond which something has gone wrong. The limits are our choice."""

import dataclasses
import math
from dataclasses import dataclass

from ..generation.options import read_mapping

LIMITS = "limits.json"  # in a run's folder: what it was judged by


@dataclass(frozen=True)
class Limits:
    """The keys of `limits`; a limit of None is not watched.

    Args:
        copy_rate: largest share of rewrites that equal what they were made of.
        lowest_edit, highest_edit: range of the median edit ratio.
        length_ratio: largest mean ratio of words after to words before.
        truncated: largest share of responses at the token limit.
        meta_text: largest share of texts that speak of the task, in either mode.
        distinct_fall: largest relative fall of distinct-2 against the policy before all rounds.
        chosen_fall: largest fall of the chosen responses' log-probability from the start to the last tenth of the DPO
            stage while margins rise, in nats per response.
        saturation: largest accuracy of the implicit rewards in the first tenth of the DPO stage.
        pasted: largest share of targets that are nearer to the reference than to the response they should improve.
        scorer_gain: lowest mean score of improved minus plain responses, where there is a scorer.
    """

    copy_rate: float | None = 0.2
    lowest_edit: float | None = 0.02
    highest_edit: float | None = 0.8
    length_ratio: float | None = 1.3
    truncated: float | None = 0.2
    meta_text: float | None = 0.0
    distinct_fall: float | None = 0.1
    chosen_fall: float | None = 0.0
    saturation: float | None = 0.95
    pasted: float | None = 0.5
    scorer_gain: float | None = 0.0

    @classmethod
    def parse(cls, value) -> "Limits":
        """Raises ValueError for a key that does not exist or a value that is no number."""
        found = read_mapping("limits", value or {}, [f.name for f in dataclasses.fields(cls)])
        for name, limit in found.items():
            if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float)):
                raise ValueError(f"limits: {name}={limit!r} must be a number, or null to switch it off.")
        return cls(**found)


# Limit, metrics (stage/name) it holds for, whether it is the largest value, advice.
RULES = (
    ("copy_rate", ("targets/copy_rate", "pairs/copy_rate"), True,
     "rewrites are copies: use a stronger reviser, or fewer epochs for the improver"),
    ("lowest_edit", ("targets/median_edit_ratio", "pairs/median_edit_ratio"), False, "the edits are too small"),
    ("highest_edit", ("targets/median_edit_ratio", "pairs/median_edit_ratio"), True,
     "what should be edited is hardly used"),
    ("length_ratio", ("targets/mean_word_ratio", "pairs/mean_word_ratio", "measure/policy_length_ratio"), True,
     "texts grow longer"),
    ("truncated", ("current/truncated", "targets/target_truncated", "pairs/rejected_truncated",
                   "pairs/chosen_truncated"), True, "raise max_new_tokens"),
    ("meta_text", ("pairs/chosen_meta_text", "measure/improver_chosen_meta_text", "measure/policy_chosen_meta_text"),
     True, "the improver speaks of its task"),
    ("meta_text", ("pairs/rejected_meta_text", "measure/improver_rejected_meta_text",
                   "measure/policy_rejected_meta_text"), True, "plain answers speak of the improver's task"),
    ("distinct_fall", ("measure/policy_distinct_2_fall",), True, "answers grow alike"),
    ("chosen_fall", ("dpo/chosen_fall",), True,
     "the chosen responses lose likelihood: set sft_weight, drop near-copies or lower learning_rate"),
    ("saturation", ("dpo/early_accuracy",), True, "pairs differ in style only"),
    ("pasted", ("targets/closer_to_reference",), True, "the reviser pastes the reference"),
    ("scorer_gain", ("measure/pairs_scorer_gain", "measure/improver_scorer_gain"), False,
     "the outside scorer does not prefer the improved responses"),
)  # fmt: skip


def alarms(metrics: dict[str, float], limits: Limits) -> list[str]:
    """A sentence for each metric that is beyond its limit; a metric that is missing or NaN is not judged."""
    found = []
    for limit_name, names, is_largest, advice in RULES:
        limit = getattr(limits, limit_name)
        for name in names:
            value = metrics.get(name)
            if limit is None or value is None or math.isnan(value):
                continue
            if value > limit if is_largest else value < limit:
                side = "above" if is_largest else "below"
                found.append(f"{name} is {value:.3g}, {side} {limit:g} (limits.{limit_name}): {advice}.")
    return found
