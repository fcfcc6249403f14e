"""Ranking metrics of one prompt with K scored responses, and the meter that averages them.

Every metric is a pure function of `rewards (B,K)` (implicit rewards, what the policy thinks), `scores (B,K)` (the
data, higher is better) and `mask (B,K)` bool (which slots hold a response). It returns `(B,)` float tensors with NaN
where the metric is undefined for a prompt: always where no two scores differ (so with fewer than two responses) or a
reward is NaN. Values in masked slots never matter, and K may be padded at will.
Nothing here waits for the device: no Python loop over prompts, no `.item()`.
"""

from collections.abc import Mapping

import torch
from accelerate.utils import gather_object
from torch import Tensor


def best_and_worst(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Slots of the best and of the worst scored response, the first one on ties. (B,K) x 2 -> (B,), (B,)."""
    return scores.masked_fill(~mask, -torch.inf).argmax(-1), scores.masked_fill(~mask, torch.inf).argmin(-1)


def take(values: Tensor, index: Tensor) -> Tensor:
    """The value in one slot of each prompt: (B,K) and (B,) -> (B,)."""
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def scores_differ(scores: Tensor, mask: Tensor) -> Tensor:
    """(B,) bool: prompts with at least two different scores. Values in masked slots never matter."""
    lowest, highest = _score_range(scores, mask.bool())
    return (highest > lowest).squeeze(-1)


def preferred_pairs(scores: Tensor, mask: Tensor) -> Tensor:
    """(B,K) x 2 -> (B,K,K) bool: true at [i, j] where i has a higher score than j and both are real responses."""
    mask = mask.bool()
    return (scores.unsqueeze(-1) > scores.unsqueeze(-2)) & mask.unsqueeze(-1) & mask.unsqueeze(-2)


def best_worst(rewards: Tensor, scores: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Compares the best with the worst scored response, under TRL's metric names.

    Chosen is the best scored response and rejected the worst, the first one on ties. Accuracy is 1 where the chosen
    reward is strictly above the rejected one, else 0, as in TRL.

    Args: `rewards`, `scores`, `mask`, each (B,K). Returns four (B,) tensors by metric name.
    """
    rewards, scores, mask, defined = _prepare(rewards, scores, mask)
    chosen, rejected = (take(rewards, slot) for slot in best_and_worst(scores, mask))
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(rewards.dtype),
    }
    return {name: value.masked_fill(~defined, torch.nan) for name, value in metrics.items()}


def pairwise_accuracy(rewards: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """Share of the pairs with different scores that the rewards put in the same order. (B,K) x 3 -> (B,).

    A pair with exactly equal rewards counts one half, so that a policy that says nothing (all rewards 0, as at the
    first step) is at chance and not at 0. This differs from `rewards/accuracies`, which follows TRL.
    """
    rewards, scores, mask, defined = _prepare(rewards, scores, mask)
    pairs = preferred_pairs(scores, mask)
    credit = 0.5 * (1 + _pair_signs(rewards, mask))
    return ((credit * pairs).sum((-2, -1)) / pairs.sum((-2, -1))).masked_fill(~defined, torch.nan)


def ndcg(rewards: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """Normalised discounted cumulative gain of the order that the rewards give. (B,K) x 3 -> (B,) in (0, 1].

    The gain of a response is its score above the prompt's lowest, divided by the prompt's range: scores have any
    scale here, so 2^score - 1 would mean nothing. Rank i (from 0) is discounted by 1 / log2(i + 2). Responses with
    equal rewards share the average discount of the ranks they occupy, which is the expectation over random tie
    breaking and does not depend on the order of the responses.
    """
    rewards, scores, mask, defined = _prepare(rewards, scores, mask)
    lowest, highest = _score_range(scores, mask)
    gains = ((scores - lowest) / (highest - lowest)).masked_fill(~mask, 0)
    value = (gains * _discounts(rewards, mask)).sum(-1) / (gains * _discounts(scores, mask)).sum(-1)
    return value.masked_fill(~defined, torch.nan)


def kendall_tau(rewards: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """Kendall's tau-b between rewards and scores, corrected for ties. (B,K) x 3 -> (B,) in [-1, 1].

    NaN also where all rewards are equal, as at the first step of training.
    """
    rewards, scores, mask, defined = _prepare(rewards, scores, mask)
    reward_signs, score_signs = _pair_signs(rewards, mask), _pair_signs(scores, mask)
    untied = reward_signs.abs().sum((-2, -1)) * score_signs.abs().sum((-2, -1))
    return ((reward_signs * score_signs).sum((-2, -1)) / untied.sqrt()).masked_fill(~defined, torch.nan)


def ranking_metrics(rewards: Tensor, scores: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """All metrics of this module by their logged name: (B,K) x 3 -> {name: (B,)}, NaN where undefined."""
    return {
        **best_worst(rewards, scores, mask),
        "ranking/pairwise_accuracy": pairwise_accuracy(rewards, scores, mask),
        "ranking/ndcg": ndcg(rewards, scores, mask),
        "ranking/kendall_tau": kendall_tau(rewards, scores, mask),
    }


class MetricMeter:
    """Averages metrics over batches and processes, every prompt with the same weight.

    Sums and counts stay on the device of the values until `compute`, so that `update` never waits for it.
    """

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def update(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Adds `{name: (B,) or scalar}`: one entry per element, NaN entries left out of sum and count."""
        for name, value in metrics.items():
            value = torch.as_tensor(value).detach()
            value = value.to(_summed(value.device))
            total = torch.stack([value.nansum(), (~value.isnan()).sum().to(value.dtype)])
            self._totals[name] = self._totals[name] + total if name in self._totals else total

    def compute(self, accelerator=None) -> dict[str, float]:
        """Mean per name, in sorted order; NaN for a name of which no entry was defined.

        With an `accelerate.Accelerator` of several processes the means are over all of them. Every process must then
        call this, and gets the same result, also for names it has not seen itself.
        """
        distributed = accelerator is not None and accelerator.num_processes > 1
        names = sorted(set(gather_object(list(self._totals)) if distributed else self._totals))
        if not names:
            return {}
        device = accelerator.device if distributed else self._totals[names[0]].device
        absent = torch.zeros(2, dtype=_summed(device), device=device)  # a name that this process has not seen
        totals = torch.stack([self._totals.get(name, absent).to(absent) for name in names])
        if distributed:
            totals = accelerator.reduce(totals, reduction="sum")
        means = totals[:, 0] / totals[:, 1]
        return dict(zip(names, means.tolist(), strict=True))

    def reset(self) -> None:
        """Forgets everything added so far."""
        self._totals.clear()


def _summed(device: torch.device) -> torch.dtype:
    """float64 because a long evaluation adds many small values to a large sum; MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _prepare(rewards: Tensor, scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, scores and mask with 0 in the masked slots, in float32 or better, and `defined` (B,) bool."""
    assert rewards.dim() == 2 and rewards.shape == scores.shape == mask.shape, (
        f"rewards {tuple(rewards.shape)}, scores {tuple(scores.shape)} and mask {tuple(mask.shape)} must all be (B,K)"
    )
    mask = mask.bool()
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, scores.dtype), torch.float32)
    # Garbage may be NaN or inf, which a product with a zero mask would keep.
    rewards = rewards.detach().to(dtype).masked_fill(~mask, 0)
    scores = scores.detach().to(dtype).masked_fill(~mask, 0)
    return rewards, scores, mask, scores_differ(scores, mask) & ~rewards.isnan().any(-1)


def _score_range(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest score of each prompt, (B,1) each; the highest is the smaller one where nothing is present."""
    lowest = scores.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
    return lowest, scores.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)


def _pair_signs(values: Tensor, mask: Tensor) -> Tensor:
    """Sign of `values[i] - values[j]` for all ordered pairs of present responses: (B,K) -> (B,K,K), else 0.

    By comparison, since the difference of two equal infinities is NaN.
    """
    above = preferred_pairs(values, mask).to(values.dtype)
    return above - above.transpose(-1, -2)


def _discounts(values: Tensor, mask: Tensor) -> Tensor:
    """Discount of each response when ranked by falling `values`, averaged within ties: (B,K) -> (B,K)."""
    start = preferred_pairs(values, mask).sum(-2)
    # At least 1, for masked slots: their gain is 0, but 0 times NaN would not be.
    ties = ((values.unsqueeze(-1) == values.unsqueeze(-2)) & mask.unsqueeze(-2)).sum(-1).clamp(min=1)
    ranks = torch.arange(values.shape[-1], device=values.device, dtype=values.dtype)
    cumulative = torch.nn.functional.pad((1 / torch.log2(ranks + 2)).cumsum(0), (1, 0))
    return (cumulative[start + ties] - cumulative[start]) / ties
