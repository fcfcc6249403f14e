"""LIRE: raise the expected score under the policy's own distribution over a prompt's responses, without a reference.

Paper: "LIRE: listwise reward enhancement for preference alignment", arXiv 2405.13516. Its full text was not available
to us: the loss and its defaults follow the authors' code, which turns the scores into a softmax; the objective that
public reviews quote has the plain scores (`score_transform="none"`). `zscore` and `length_average` are nobody's paper.
Its self-enhancement (Evolve and Iterate) is `self_enhance`; the loop itself is in rounds.py.

Left out: `sft_target` "chosen" (rows name no chosen response beside the scores) and division by the padded width.
"""

import logging
import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .base import PreferenceTrainer
from .config import REDUCTIONS, PreferenceConfig, check_choice, option
from .likelihood import masked_softmax
from .metrics import best_and_worst, scores_differ, take

logger = logging.getLogger(__name__)

SCORE_TRANSFORMS = ("softmax", "none", "zscore")
LISTWISE_OPTIONS = (
    "temperature", "score_transform", "score_temperature", "length_average", "reduction", "loss_weight",
)  # fmt: skip

# A prompt's gradient has vanished when it is below this share of what it would be with all responses equally likely.
VANISHED = 1e-3
# The user is warned where the spread of a prompt's log-probabilities is more than so many temperatures.
PEAKED = 2.0


@dataclass
class LIREConfig(PreferenceConfig):
    """Options of LIRE; the fields of `PreferenceConfig` and `transformers.TrainingArguments` apply as well."""

    learning_rate: float = option(2e-5, "Peak learning rate (the authors' value, for LoRA).")
    temperature: float = option(
        2.0,
        "The responses' probabilities are a softmax of their log-probabilities divided by this. One to two times "
        "their standard deviation inside a prompt (lire/spread) is a start; far below it one response has all.",
        above=0,
    )
    score_transform: str = option(
        "softmax",
        "What the scores become: a softmax over the prompt's responses (the authors' code), themselves (none), or "
        "z-scores with the population's standard deviation.",
        choices=SCORE_TRANSFORMS,
    )
    score_temperature: float = option(
        1.0, "Divides the scores before score_transform='softmax'; no effect otherwise.", above=0
    )
    length_average: bool = option(
        False, "Log-probability per token instead of the sum. Not LIRE, but does not collapse."
    )
    reduction: str = option("sum", "Sum or mean over a prompt's responses.", choices=REDUCTIONS)
    loss_weight: float = option(1.0, "Factor on the expected score, not on the SFT term.", above=0)
    sft_alpha: float = option(0.0, "The old name of sft_weight.", at_least=0)

    def __post_init__(self):
        super().__post_init__()
        if self.sft_alpha and self.sft_weight not in (0, self.sft_alpha):
            raise ValueError(
                f"sft_alpha={self.sft_alpha} is the old name of sft_weight={self.sft_weight}: leave out sft_alpha."
            )
        if self.sft_alpha:
            warnings.warn("sft_alpha is sft_weight now, as in every method.", FutureWarning, stacklevel=3)
            self.sft_weight = self.sft_alpha


def lire_loss(
    logps: Tensor,
    scores: Tensor,
    mask: Tensor,
    *,
    temperature: float = 2.0,
    score_transform: Literal["softmax", "none", "zscore"] = "softmax",
    score_temperature: float = 1.0,
    lengths: Tensor | None = None,
    length_average: bool = False,
    reduction: Literal["sum", "mean"] = "sum",
    loss_weight: float = 1.0,
    sft_alpha: float = 0.0,
    sft_reduction: Literal["sum", "mean"] = "mean",
) -> Tensor:
    """LIRE loss of each prompt: minus the expected transformed score under softmax(logps / temperature).

    Args:
        logps: (B,K) log pi(y|x), summed over the tokens of each response.
        scores: (B,K) data rewards, higher is better; no gradient passes through them.
        mask: (B,K) true for real responses; other slots may hold anything.
        lengths: (B,K) tokens of each response, for `length_average` and for an SFT term with `sft_reduction="mean"`.

    Returns:
        (B,) losses. Where all scores are equal the loss is a constant (-1/K under softmax) without gradient, and has
        no SFT term. The SFT term is about the first of the best responses.

    Raises:
        ValueError: `lengths` is missing, or a choice is unknown.
    """
    assert logps.shape == scores.shape == mask.shape, (logps.shape, scores.shape, mask.shape)
    if lengths is None and (length_average or (sft_alpha and sft_reduction == "mean")):
        raise ValueError("lengths is missing: length_average and sft_reduction='mean' need the tokens per response.")
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("sft_reduction", sft_reduction, REDUCTIONS)
    mask = mask.bool()
    logits = candidate_logits(logps, mask, temperature, lengths if length_average else None)
    rewards = transform_scores(scores.to(logits.dtype), mask, score_transform, score_temperature)
    losses = -loss_weight * (masked_softmax(logits, mask) * rewards).sum(-1)
    if reduction == "mean":
        losses = losses / mask.sum(-1).clamp(min=1)
    total = losses
    if sft_alpha:
        total = losses - sft_alpha * _best_logps(logps, scores, mask, lengths if sft_reduction == "mean" else None)
    # Rounding would leave a gradient of 1e-17 where there is none.
    return torch.where(scores_differ(scores, mask), total, losses.detach())


def candidate_logits(logps: Tensor, mask: Tensor, temperature: float, lengths: Tensor | None = None) -> Tensor:
    """(B,K) logits of the distribution over responses, at least float32; per token if `lengths` is given; 0 if masked.

    They are also what LIRE has as implicit rewards.
    """
    logps = logps.to(torch.promote_types(logps.dtype, torch.float32)).masked_fill(~mask, 0)
    if lengths is not None:
        logps = logps / lengths.masked_fill(~mask, 1)
    return logps / temperature


def transform_scores(scores: Tensor, mask: Tensor, transform: str, temperature: float = 1.0) -> Tensor:
    """(B,K) constants R that take the place of the scores, 0 in masked slots."""
    check_choice("score_transform", transform, SCORE_TRANSFORMS)
    scores = scores.detach().masked_fill(~mask, 0)
    if transform == "softmax":
        return masked_softmax(scores / temperature, mask)
    if transform == "none":
        return scores
    # As shares of the prompt's range: equal scores then give exactly 0, whatever their mean is rounded to.
    lowest = scores.masked_fill(~mask, math.inf).amin(-1, keepdim=True)
    d = (scores - lowest).masked_fill(~mask, 0)
    spread = d.amax(-1, keepdim=True)
    d = d / spread.masked_fill(spread == 0, 1)
    d, deviation = _centred(d, mask)
    return torch.where(spread > 0, d / deviation.masked_fill(spread == 0, 1), 0.0)


@torch.no_grad()
def lire_metrics(
    logps: Tensor,
    scores: Tensor,
    mask: Tensor,
    lengths: Tensor,
    *,
    temperature: float = 2.0,
    score_transform: str = "softmax",
    score_temperature: float = 1.0,
    length_average: bool = False,
    reduction: str = "sum",
    loss_weight: float = 1.0,
) -> dict[str, Tensor]:
    """How peaked each prompt's distribution over its responses is, {name: (B,)}; NaN where all scores are equal.

    - `lire/spread`: standard deviation of the log-probabilities over the responses (population).
    - `lire/effective_candidates`: exp(entropy), from 1 (one response has all the probability) to K.
    - `lire/gradient`: sum over the responses of |d loss / d logps|, without the SFT term.
    - `lire/vanished`: 1 where that is below 1e-3 of what it would be if all responses were equally likely.
    - `lire/prob_best`: probability of the response with the best score.
    - `lire/expected_score`, `lire/mean_score`: mean of the raw scores under the distribution, and plain.
    - `lire/likeliest_length`: tokens of the most probable response; sums of log-probabilities favour short ones.

    Args as in `lire_loss`; `lengths` (B,K) in tokens.
    """
    mask = mask.bool()
    logits = candidate_logits(logps, mask, temperature, lengths if length_average else None)
    probs, count = masked_softmax(logits, mask), mask.sum(-1).clamp(min=1)
    scores = scores.to(logits.dtype).masked_fill(~mask, 0)
    rewards = transform_scores(scores, mask, score_transform, score_temperature)
    scale = loss_weight / temperature * mask.to(logits.dtype)
    if reduction == "mean":
        scale = scale / count.unsqueeze(-1)
    if length_average:
        scale = scale / lengths.masked_fill(~mask, 1)

    def gradient(p: Tensor) -> Tensor:
        return (scale * p * (rewards - (p * rewards).sum(-1, keepdim=True)).abs()).sum(-1)

    vanished = gradient(probs) < VANISHED * gradient(mask.to(probs.dtype) / count.unsqueeze(-1))
    best, likeliest = best_and_worst(scores, mask)[0], probs.argmax(-1)
    values = {
        "lire/spread": temperature * _centred(logits, mask)[1].squeeze(-1),
        "lire/effective_candidates": torch.special.entr(probs).sum(-1).exp(),
        "lire/gradient": gradient(probs),
        "lire/vanished": vanished.to(probs.dtype),
        "lire/prob_best": take(probs, best),
        "lire/expected_score": (probs * scores).sum(-1),
        "lire/mean_score": scores.sum(-1) / count,
        "lire/likeliest_length": take(lengths, likeliest).to(probs.dtype),
    }
    varied = scores_differ(scores, mask)
    return {name: value.masked_fill(~varied, math.nan) for name, value in values.items()}


def _centred(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Values (B,K), 0 in masked slots, minus the mean of their prompt; and their population deviation (B,1)."""
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    centred = (values - values.sum(-1, keepdim=True) / count).masked_fill(~mask, 0)
    return centred, (centred.square().sum(-1, keepdim=True) / count).sqrt()


def _best_logps(logps: Tensor, scores: Tensor, mask: Tensor, lengths: Tensor | None) -> Tensor:
    """(B,) log-probability of the response with the best score, the first one on ties; per token with `lengths`."""
    best = best_and_worst(scores, mask)[0]
    values = take(logps.masked_fill(~mask, 0), best)
    return values if lengths is None else values / take(lengths.masked_fill(~mask, 1), best)


class LIRETrainer(PreferenceTrainer):
    """Trains with `lire_loss` on rows of K scored responses; loads no reference."""

    config_class = LIREConfig
    method = "LIRE"
    paper = ("LIRE: listwise reward enhancement for preference alignment", "2405.13516")
    needs_reference = False
    _warned = False

    def loss(self, batch, policy, reference):
        args, scores, mask = self.args, batch["scores"], batch["mask"]
        logps, lengths = policy.logps.sum(-1), batch["response_mask"].sum(-1)
        options = {name: getattr(args, name) for name in LISTWISE_OPTIONS}
        losses = lire_loss(logps, scores, mask, lengths=lengths, **options)
        logps = logps.detach()
        rewards = candidate_logits(logps, mask, args.temperature, lengths if args.length_average else None)
        return losses, self.ranking_metrics(batch, rewards) | lire_metrics(logps, scores, mask, lengths, **options)

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        spread, temperature = self.state.log_history[-1].get("lire/spread", 0.0), self.args.temperature
        if spread > PEAKED * temperature and not self._warned and self.is_world_process_zero():
            self._warned = True
            logger.warning(
                "The log-probabilities of a prompt's responses have a standard deviation of %.3g (lire/spread), and "
                "temperature is %g: few responses have nearly all the probability, and most gradients vanish "
                "(lire/vanished). Set temperature to one to two times that deviation, train on shorter responses or "
                "on samples of the policy itself, or set length_average.", spread, temperature,
            )  # fmt: skip
