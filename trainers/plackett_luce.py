"""Plackett-Luce DPO: the likelihood of the whole ranking under the implicit rewards (ListMLE on rewards).

Paper: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", arXiv 2305.18290, appendix on
the Plackett-Luce model. It assumes strict rankings; the rule for ties is ours.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .base import PreferenceTrainer
from .config import REDUCTIONS, PreferenceConfig, check_choice, option
from .likelihood import stage_logps


@dataclass
class PlackettLuceConfig(PreferenceConfig):
    """Options of Plackett-Luce DPO; those of `PreferenceConfig` and `transformers.TrainingArguments` apply as well."""

    learning_rate: float = option(1e-6, "Peak learning rate (1e-5 is a start for LoRA).")
    beta: float = option(0.1, "Strength of the pull towards the reference policy.", above=0)
    reduction: str = option(
        "sum",
        "Sum over the stages of a ranking, its likelihood, or that divided by the number of responses.",
        choices=REDUCTIONS,
    )


def plackett_luce_loss(
    logratios: Tensor,
    scores: Tensor,
    mask: Tensor,
    *,
    beta: float = 0.1,
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """Negative log-likelihood of each prompt's ranking: every response is chosen over all those with a lower score.

    Without ties these are the stages of the Plackett-Luce model. Responses with equal scores are never compared with
    each other: each of them is chosen over the lower ones alone.

    Args:
        logratios: (B,K) log pi(y|x) - log pi_ref(y|x), summed over the tokens of each response.
        scores: (B,K) data rewards, higher is better.
        mask: (B,K) true for real responses; other slots may hold anything.

    Returns:
        (B,) losses, exactly 0 and without gradient for prompts whose scores are all equal.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    mask = mask.bool()
    losses = -stage_logps(beta * logratios.masked_fill(~mask, 0), scores, mask).sum(-1)
    return losses / mask.sum(-1).clamp(min=1) if reduction == "mean" else losses


class PlackettLuceTrainer(PreferenceTrainer):
    """Trains with `plackett_luce_loss` on rows of K scored responses."""

    config_class = PlackettLuceConfig
    method = "Plackett-Luce-DPO"
    paper = ("Direct Preference Optimization: Your Language Model is Secretly a Reward Model", "2305.18290")

    def loss(self, batch, policy, reference):
        args = self.args
        logratios = policy.logps.sum(-1) - reference.logps.sum(-1)
        losses = plackett_luce_loss(
            logratios, batch["scores"], batch["mask"], beta=args.beta, reduction=args.reduction
        )
        return losses, self.ranking_metrics(batch, args.beta * logratios.detach())
