"""Likelihood of a ranking under implicit rewards, which are the stages of the Plackett-Luce model; and of responses.

At each stage one response is chosen over all those that are ranked below it. A pair is one stage (Bradley-Terry), the
best of m is one stage over m responses, and a whole ranking without ties is K - 1 stages.
"""

import math

import torch
from torch import Tensor

from .config import REDUCTIONS, check_choice
from .metrics import preferred_pairs


def stage_logps(rewards: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """Log-probability that each response is chosen over all those with a strictly lower score.

    Args:
        rewards: (B,K) implicit rewards; gradients pass through them.
        scores: (B,K) data scores, higher is better.
        mask: (B,K) true for real responses; other slots may hold anything.

    Returns:
        (B,K), exactly 0 for a response with none below it and in masked slots.
    """
    assert rewards.shape == scores.shape == mask.shape, (rewards.shape, scores.shape, mask.shape)
    mask = mask.bool()
    rewards = rewards.masked_fill(~mask, 0)
    available = preferred_pairs(scores, mask) | torch.eye(mask.size(-1), dtype=torch.bool, device=mask.device)
    return rewards - torch.logsumexp(rewards.unsqueeze(-2).masked_fill(~available, -math.inf), -1)


def ordered_stages(scores: Tensor, mask: Tensor, top: int | None = None) -> Tensor:
    """(B,K) bool: the responses that are chosen at a stage, from the best one down to the first tie.

    A tie for the best leaves no stage, because the data do not say who won. A response with none below it is no stage.

    Args:
        scores, mask: (B,K) as in `stage_logps`.
        top: at most so many stages; 1 is the best of K. None for the whole ranking.
    """
    mask = mask.bool()
    pairs = preferred_pairs(scores, mask)
    above, below = pairs.sum(-2), pairs.sum(-1)
    tied = mask & (above + below + 1 < mask.sum(-1, keepdim=True))
    # Responses are above or at the first tie where none of the tied ones has a higher or the same score.
    first_tie = scores.masked_fill(~tied, -math.inf).amax(-1, keepdim=True)
    stages = mask & (below > 0) & (scores > first_tie)
    return stages if top is None else stages & (above < top)


def ranking_logps(rewards: Tensor, scores: Tensor, mask: Tensor, *, top: int | None = None) -> Tensor:
    """Log-likelihood of each prompt's ranking by its scores, counted from the best response down to the first tie.

    With K = 2 it is log sigmoid(r_w - r_l), minus the loss of DPO; with `top=1` it is r_best minus logsumexp over all.

    Args:
        rewards: (B,K) implicit rewards, beta * (log pi(y|x) - log pi_ref(y|x)), summed over the response's tokens.
        scores: (B,K) data scores, higher is better.
        mask: (B,K) true for real responses; other slots may hold anything.
        top: count at most so many stages; None for all.

    Returns:
        (B,) log-likelihoods, exactly 0 and without gradient where there is no stage.

    Raises:
        ValueError: `top` is below 1.
    """
    if top is not None and top < 1:
        raise ValueError(f"top={top!r} must be at least 1, or None for the whole ranking.")
    stages = ordered_stages(scores, mask, top)
    return stage_logps(rewards, scores, mask).masked_fill(~stages, 0).sum(-1)


def sft_loss(logps: Tensor, token_mask: Tensor, weights: Tensor, *, reduction: str = "mean") -> Tensor:
    """Negative log-likelihood of a prompt's preferred responses, per token: -sum_k w_k / |y_k| sum_t log pi(y_kt).

    Args:
        logps: (B,K,R) log-probabilities of the tokens; gradients pass through them.
        token_mask: (B,K,R) true for response tokens; other slots may hold anything.
        weights: (B,K) which responses, and how much each counts; those of a prompt usually sum to 1.
        reduction: "mean" or "sum", which leaves out the division by the response's length |y|.

    Returns:
        (B,) losses, exactly 0 and without gradient where all weights are 0.
    """
    assert logps.shape == token_mask.shape and weights.shape == logps.shape[:2], (logps.shape, weights.shape)
    check_choice("reduction", reduction, REDUCTIONS)
    losses = -logps.masked_fill(~token_mask, 0).sum(-1)
    if reduction == "mean":
        losses = losses / token_mask.sum(-1).clamp(min=1)
    return (weights * losses.masked_fill(weights == 0, 0)).sum(-1)


def masked_softmax(x: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the real slots (B,K), exactly 0 in the others and in prompts without any."""
    return torch.softmax(x.masked_fill(~mask, torch.finfo(x.dtype).min), -1) * mask
