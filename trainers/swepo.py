"""SWEPO: all good responses of a prompt against all bad ones, weighted by how far each score lies from the mean.

Paper: "SWEPO: Simultaneous Weighted Preference Optimization for Group Contrastive Alignment", arXiv 2412.04628 (v4 is
a rewrite, "Multi-Preference Optimization"). Its full text was not available to us: the loss follows Eq. 5 of REFA v4
(arXiv 2412.16378, same authors), and `weighting="absolute"` is our reading of the abstracts, not a published formula.

Left out: REFA's length normalisation and reference-free form, which are REFA's own additions.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .base import PreferenceTrainer
from .config import PreferenceConfig, check_choice, option

WEIGHTINGS = ("absolute", "signed", "none")
POSITIVES = ("above_mean", "best", "top_m")
MEANS = ("kept", "all")

# A score counts as above the mean only by more than this share of the prompt's score range: the mean of three equal
# floats is not always that float.
MEAN_TOLERANCE = 1e-6

SPLIT_OPTIONS = ("positives", "top_m", "mean_over")  # who is contrasted with whom
WEIGHT_OPTIONS = ("beta", "alpha", "weighting", "power", "gamma", "alpha_inside_beta")


@dataclass
class SWEPOConfig(PreferenceConfig):
    """Options of SWEPO; the fields of `PreferenceConfig` and `transformers.TrainingArguments` apply as well."""

    learning_rate: float = option(5e-7, "Peak learning rate (5e-6 is a start for LoRA).")
    beta: float = option(0.1, "Strength of the pull towards the reference policy.", above=0)
    alpha: float = option(
        0.1, "Scale of the score weights; for scores multiplied by c use alpha divided by c.", at_least=0
    )
    weighting: str = option(
        "absolute",
        "Weight exp(alpha * g(d)) of a response that lies d above its prompt's mean score: g is |d|^power, "
        "sign(d)|d|^power or 0.",
        choices=WEIGHTINGS,
    )
    power: float = option(1.0, "Exponent of the score deviation; 0 means no weights.", at_least=0)
    positives: str = option(
        "above_mean",
        "Which responses are positive: above the prompt's mean, only the best one, or the `top_m` best against the "
        "`top_m` worst.",
        choices=POSITIVES,
    )
    top_m: int = option(1, "Responses per side with positives='top_m'.", at_least=1)
    mean_over: str = option(
        "kept", "With positives='top_m': mean score over the kept or over all responses.", choices=MEANS
    )
    gamma: float = option(1.0, "Factor on the negatives in the denominator (REFA Eq. 6).", above=0)
    alpha_inside_beta: bool = option(False, "Multiply the score weights' exponent by beta as well (REFA Eq. 18).")


class Split(NamedTuple):
    """Who is contrasted with whom. Each field is (B,K)."""

    positive: Tensor
    negative: Tensor
    deviations: Tensor


def swepo_loss(
    logratios: Tensor,
    scores: Tensor,
    mask: Tensor,
    *,
    beta: float,
    alpha: float,
    weighting: Literal["absolute", "signed", "none"] = "absolute",
    power: float = 1.0,
    positives: Literal["above_mean", "best", "top_m"] = "above_mean",
    top_m: int = 1,
    mean_over: Literal["kept", "all"] = "kept",
    gamma: float = 1.0,
    alpha_inside_beta: bool = False,
) -> Tensor:
    """SWEPO loss of each prompt: -log of the weighted share of the positives (REFA v4 Eq. 5).

    Args:
        logratios: (B,K) log pi(y|x) - log pi_ref(y|x), summed over the tokens of each response.
        scores: (B,K) data rewards, higher is better; no gradient passes through them.
        mask: (B,K) true for real responses; other slots may hold anything.

    Returns:
        (B,) losses, exactly 0 and without gradient for prompts that have no positive or no negative.
    """
    assert logratios.shape == scores.shape == mask.shape, (logratios.shape, scores.shape, mask.shape)
    split = score_split(scores, mask, positives=positives, top_m=top_m, mean_over=mean_over)
    weights = _log_weights(
        split, beta=beta, alpha=alpha, weighting=weighting, power=power, gamma=gamma,
        alpha_inside_beta=alpha_inside_beta,
    )  # fmt: skip
    return _log_share(beta * logratios + weights.to(logratios.dtype), split.positive, split.negative)


def score_split(
    scores: Tensor, mask: Tensor, *, positives: str = "above_mean", top_m: int = 1, mean_over: str = "kept"
) -> Split:
    """Positives, negatives and score deviations of each prompt; both sets are empty where nothing can be learned.

    They are constants: no gradient passes through the scores.
    """
    check_choice("positives", positives, POSITIVES)
    check_choice("mean_over", mean_over, MEANS)
    scores, mask = scores.detach(), mask.bool()
    # Measured from the lowest score, so that a large common offset costs no precision.
    lowest = scores.masked_fill(~mask, math.inf).amin(-1, keepdim=True)
    d = torch.where(mask, (scores - lowest).double(), 0.0)
    spread = d.amax(-1, keepdim=True)
    kept = mask
    if positives == "top_m":
        best, worst = _top_and_bottom(d, mask, top_m)
        kept = best | worst
    averaged = mask if mean_over == "all" else kept
    mean = (d * averaged).sum(-1, keepdim=True) / averaged.sum(-1, keepdim=True).clamp(min=1)

    if positives == "above_mean":
        positive = mask & (d - mean > MEAN_TOLERANCE * spread)
        used = positive.any(-1, keepdim=True)
    elif positives == "best":
        positive = mask & one_hot(d.masked_fill(~mask, -1).argmax(-1), d.size(-1)).bool()
        used = spread > 0
    else:
        positive = best
        lowest_best = d.masked_fill(~best, math.inf).amin(-1, keepdim=True)
        highest_worst = d.masked_fill(~worst, -math.inf).amax(-1, keepdim=True)
        used = (mask.sum(-1, keepdim=True) >= 2 * top_m) & (lowest_best > highest_worst)
    deviations = torch.where(kept, d - mean, 0.0).to(scores.dtype)
    return Split(positive & used, kept & ~positive & used, deviations)


def _top_and_bottom(d: Tensor, mask: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The m best and the m worst responses of each prompt, (B,K) bool each; the first one wins a tie."""
    best_rank = d.masked_fill(~mask, -math.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    worst_rank = d.masked_fill(~mask, math.inf).argsort(dim=-1, stable=True).argsort(-1)
    return mask & (best_rank < m), mask & (worst_rank < m)


def _log_weights(split: Split, *, beta, alpha, weighting, power, gamma, alpha_inside_beta) -> Tensor:
    """(B,K) logarithm of the factor of each response in the sums of the loss: its weight, times gamma if negative."""
    check_choice("weighting", weighting, WEIGHTINGS)
    deviations = split.deviations
    size = deviations.abs() ** power
    if weighting == "none" or power == 0:  # also for `signed`, where sign(d)|d|^0 would still tell the sides apart
        size = torch.zeros_like(deviations)
    exponents = alpha * (deviations.sign() * size if weighting == "signed" else size)
    exponents = beta * exponents if alpha_inside_beta else exponents
    return exponents + split.negative.to(exponents.dtype) * math.log(gamma)


def _log_share(x: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """-log( sum over P of e^x / sum over P and N of e^x ), 0 where P or N is empty."""
    used = positive.any(-1) & negative.any(-1)
    # logsumexp over nothing but -inf has a NaN gradient, so unused prompts take part with zeros and are cut off after.
    x = torch.where(used.unsqueeze(-1), x, 0.0)
    keep_all = (positive | negative) | ~used.unsqueeze(-1)
    keep_positive = positive | ~used.unsqueeze(-1)
    losses = torch.logsumexp(x.masked_fill(~keep_all, -math.inf), -1) - torch.logsumexp(
        x.masked_fill(~keep_positive, -math.inf), -1
    )
    return torch.where(used, losses, 0.0)


class SWEPOTrainer(PreferenceTrainer):
    """Trains with `swepo_loss` on rows of K scored responses."""

    config_class = SWEPOConfig
    method = "SWEPO"
    paper = ("SWEPO: Simultaneous Weighted Preference Optimization for Group Contrastive Alignment", "2412.04628")

    def signal(self, batch) -> Tensor:
        return self._split(batch).positive.any(-1)

    def preferred(self, batch) -> Tensor:
        positive = self._split(batch).positive.float()
        return positive / positive.sum(-1, keepdim=True).clamp(min=1)

    def loss(self, batch, policy, reference):
        logratios = policy.logps.sum(-1) - reference.logps.sum(-1)
        options = self._options(SPLIT_OPTIONS) | self._options(WEIGHT_OPTIONS)
        losses = swepo_loss(logratios, batch["scores"], batch["mask"], **options)
        rewards = self.args.beta * logratios.detach()
        return losses, self.ranking_metrics(batch, rewards) | self._set_metrics(batch, rewards)

    def _options(self, names: tuple[str, ...]) -> dict:
        return {name: getattr(self.args, name) for name in names}

    def _split(self, batch) -> Split:
        return score_split(batch["scores"], batch["mask"], **self._options(SPLIT_OPTIONS))

    def _set_metrics(self, batch, rewards: Tensor) -> dict[str, Tensor]:
        """Mean reward of each side, and how the sums of the loss are weighted; NaN for prompts without a signal."""
        split = self._split(batch)
        used = split.positive.any(-1)
        sizes = split.positive.sum(-1).to(rewards.dtype), split.negative.sum(-1).to(rewards.dtype)
        positive = (rewards * split.positive).sum(-1) / sizes[0].clamp(min=1)
        negative = (rewards * split.negative).sum(-1) / sizes[1].clamp(min=1)
        weights = _log_weights(split, **self._options(WEIGHT_OPTIONS))
        contrasted = split.positive | split.negative
        share = torch.softmax((rewards + weights).masked_fill(~contrasted, -1e30), -1)
        values = {
            "rewards/positive": positive,
            "rewards/negative": negative,
            "swepo/positives": sizes[0],
            "swepo/max_weight": weights.exp().masked_fill(~contrasted, 0).amax(-1),
            "swepo/effective_responses": 1 / share.square().sum(-1),
        }
        return {name: value.masked_fill(~used, math.nan) for name, value in values.items()}
