"""DPO over K scored responses: the pairs that the scores imply, averaged per prompt.

Paper: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", arXiv 2305.18290, for pairs.
With K = 2 every choice of pairs is DPO. Label smoothing has the meaning it has in TRL: robust DPO, arXiv 2403.00409.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import PreferenceTrainer
from .config import PreferenceConfig, check_choice, option
from .metrics import preferred_pairs

PAIRS = ("best_worst", "best_rest", "all")


@dataclass
class DPOConfig(PreferenceConfig):
    """Options of DPO; the fields of `PreferenceConfig` and `transformers.TrainingArguments` apply as well."""

    learning_rate: float = option(1e-6, "Peak learning rate (1e-5 is a start for LoRA).")
    beta: float = option(0.1, "Strength of the pull towards the reference policy.", above=0)
    pairs: str = option(
        "best_worst",
        "Which pairs of a prompt's responses count: the best against the worst, the best against each other one, or "
        "all with different scores.",
        choices=PAIRS,
    )
    label_smoothing: float = option(
        0.0, "Probability that a pair is in the wrong order (TRL's loss_type 'robust').", at_least=0, below=0.5
    )


def dpo_loss(
    logratios: Tensor,
    scores: Tensor,
    mask: Tensor,
    *,
    beta: float = 0.1,
    pairs: Literal["best_worst", "best_rest", "all"] = "best_worst",
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO loss of each prompt: the mean over its pairs, so that a prompt counts once whatever its K.

    Args:
        logratios: (B,K) log pi(y|x) - log pi_ref(y|x), summed over the tokens of each response.
        scores: (B,K) data rewards, higher is better.
        mask: (B,K) true for real responses; other slots may hold anything.

    Returns:
        (B,) losses, exactly 0 and without gradient for prompts whose scores are all equal.
    """
    assert logratios.shape == scores.shape == mask.shape, (logratios.shape, scores.shape, mask.shape)
    rewards = beta * logratios.masked_fill(~mask.bool(), 0)
    margins = rewards.unsqueeze(-1) - rewards.unsqueeze(-2)
    losses = -(1 - label_smoothing) * logsigmoid(margins) + label_smoothing * logsigmoid(-margins)
    chosen = score_pairs(scores, mask, pairs)
    losses = (losses / (1 - 2 * label_smoothing) * chosen).sum((-2, -1))
    return losses / chosen.sum((-2, -1)).clamp(min=1)


def score_pairs(scores: Tensor, mask: Tensor, pairs: str = "best_worst") -> Tensor:
    """(B,K,K) bool: true at [i, j] where i is preferred to j and the pair counts.

    Responses that tie for best (or worst) all take that side, so the order of the data decides nothing.

    Raises:
        ValueError: `pairs` is unknown.
    """
    check_choice("pairs", pairs, PAIRS)
    mask, preferred = mask.bool(), preferred_pairs(scores, mask)
    if pairs == "all":
        return preferred
    best = scores >= scores.masked_fill(~mask, -math.inf).amax(-1, keepdim=True)
    preferred = preferred & best.unsqueeze(-1)
    if pairs == "best_rest":
        return preferred
    worst = scores <= scores.masked_fill(~mask, math.inf).amin(-1, keepdim=True)
    return preferred & worst.unsqueeze(-2)


class DPOTrainer(PreferenceTrainer):
    """Trains with `dpo_loss` on rows of K scored responses."""

    config_class = DPOConfig
    method = "DPO"
    paper = ("Direct Preference Optimization: Your Language Model is Secretly a Reward Model", "2305.18290")

    def loss(self, batch, policy, reference):
        args, scores, mask = self.args, batch["scores"], batch["mask"]
        logratios = policy.logps.sum(-1) - reference.logps.sum(-1)
        losses = dpo_loss(
            logratios, scores, mask, beta=args.beta, pairs=args.pairs, label_smoothing=args.label_smoothing
        )
        counts = score_pairs(scores, mask, args.pairs).sum((-2, -1)).to(losses.dtype)
        metrics = self.ranking_metrics(batch, args.beta * logratios.detach())
        return losses, metrics | {"dpo/pairs": torch.where(counts > 0, counts, math.nan)}
