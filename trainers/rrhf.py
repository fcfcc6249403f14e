"""RRHF: rank responses by their log-probability per token, and imitate the best one. No reference.

Paper: "RRHF: Rank Responses to Align Language Models with Human Feedback without tears", arXiv 2304.05302. The
released code divides the SFT term by the padded width of the batch; this is the paper's sum over tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import PreferenceTrainer
from .config import REDUCTIONS, PreferenceConfig, option
from .metrics import best_and_worst, preferred_pairs, take


@dataclass
class RRHFConfig(PreferenceConfig):
    """Options of RRHF; the fields of `PreferenceConfig` and `transformers.TrainingArguments` apply as well."""

    learning_rate: float = option(2e-5, "Peak learning rate (the authors' value).")
    sft_weight: float = option(1.0, "Weight of the best response's negative log-likelihood.", at_least=0)
    sft_reduction: str = option("sum", "Sum (the paper's) or mean over its tokens.", choices=REDUCTIONS)


def rrhf_loss(logps: Tensor, scores: Tensor, mask: Tensor, lengths: Tensor, *, sft_weight: float = 1.0) -> Tensor:
    """RRHF loss of each prompt: a hinge for every pair in the wrong order, plus the SFT term.

    Args:
        logps: (B,K) log pi(y|x), summed over the tokens of each response.
        scores: (B,K) data rewards, higher is better.
        mask: (B,K) true for real responses; other slots may hold anything.
        lengths: (B,K) tokens of each response.
        sft_weight: weight of the summed negative log-likelihood of the best response, the first one on ties.

    Returns:
        (B,) losses, exactly 0 and without gradient for prompts whose scores are all equal.
    """
    hinge, nll = rrhf_terms(logps, scores, mask, lengths)
    return hinge + sft_weight * nll


def rrhf_terms(logps: Tensor, scores: Tensor, mask: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The hinge summed over pairs and the negative log-likelihood of the best response, (B,) each.

    Both are exactly 0 where all scores are equal. Shapes as in `rrhf_loss`.
    """
    assert logps.shape == scores.shape == mask.shape == lengths.shape, (
        logps.shape, scores.shape, mask.shape, lengths.shape,
    )  # fmt: skip
    mask = mask.bool()
    logps = logps.masked_fill(~mask, 0)
    per_token = logps / lengths.masked_fill(~mask, 1)
    preferred = preferred_pairs(scores, mask)
    hinge = torch.relu(per_token.unsqueeze(-2) - per_token.unsqueeze(-1)) * preferred
    nll = torch.where(preferred.any(-1).any(-1), -take(logps, best_and_worst(scores, mask)[0]), 0.0)
    return hinge.sum((-2, -1)), nll


class RRHFTrainer(PreferenceTrainer):
    """Trains with `rrhf_loss` on rows of K scored responses; loads no reference."""

    config_class = RRHFConfig
    method = "RRHF"
    paper = ("RRHF: Rank Responses to Align Language Models with Human Feedback without tears", "2304.05302")
    needs_reference = False

    def loss(self, batch, policy, reference):
        logps, lengths = policy.logps.sum(-1), batch["response_mask"].sum(-1)
        hinge, nll = rrhf_terms(logps, batch["scores"], batch["mask"], lengths)
        # The base adds the SFT term, which is a sum over tokens and hides the hinge in the loss.
        parts = {"rrhf/hinge": hinge.detach(), "rrhf/sft": nll.detach()}
        parts = {name: value.masked_fill(~self.signal(batch), math.nan) for name, value in parts.items()}
        per_token = logps.detach() / lengths.clamp(min=1)
        return hinge, self.ranking_metrics(batch, per_token) | parts
