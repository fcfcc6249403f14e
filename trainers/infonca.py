"""InfoNCA and NCA: noise-contrastive losses whose target distribution is a softmax of the scores.

Paper: "Noise Contrastive Alignment of Language Models with Explicit Rewards", arXiv 2402.05369; formulas as in the
authors' code. Its temperature is 1/alpha. The configuration it ships has temperature 1e-4, that is alpha=1e4, with
which only the best response counts; the default here lets the scores speak.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import PreferenceTrainer
from .config import PreferenceConfig, option
from .likelihood import masked_softmax
from .metrics import scores_differ


@dataclass
class InfoNCAConfig(PreferenceConfig):
    """Options of InfoNCA; the fields of `PreferenceConfig` and `transformers.TrainingArguments` apply as well."""

    learning_rate: float = option(5e-6, "Peak learning rate (the authors' value, for LoRA).")
    beta: float = option(0.01, "Strength of the pull towards the reference policy.", above=0)
    alpha: float = option(
        1.0,
        "Factor on the scores in the target softmax(alpha * scores): 0 makes it uniform, a large one puts all of it "
        "on the best response. For scores multiplied by c use alpha divided by c.",
        at_least=0,
    )


@dataclass
class NCAConfig(InfoNCAConfig):
    """Options of NCA, the same as InfoNCA's."""


def infonca_loss(logratios: Tensor, scores: Tensor, mask: Tensor, *, beta: float = 0.01, alpha: float = 1.0) -> Tensor:
    """InfoNCA loss of each prompt: cross entropy of softmax(beta * logratios) against softmax(alpha * scores).

    It says only which response is more likely than which; see `nca_loss` for the other.

    Args:
        logratios: (B,K) log pi(y|x) - log pi_ref(y|x), summed over the tokens of each response.
        scores: (B,K) data rewards, higher is better; no gradient passes through them.
        mask: (B,K) true for real responses; other slots may hold anything.

    Returns:
        (B,) losses, exactly 0 and without gradient for prompts whose scores are all equal.
    """
    rewards, target, mask = _prepare(logratios, scores, mask, beta, alpha)
    log_probs = torch.log_softmax(rewards.masked_fill(~mask, torch.finfo(rewards.dtype).min), -1)
    losses = -(target * log_probs.masked_fill(~mask, 0)).sum(-1)
    return torch.where(scores_differ(scores, mask), losses, 0.0)


def nca_loss(logratios: Tensor, scores: Tensor, mask: Tensor, *, beta: float = 0.01, alpha: float = 1.0) -> Tensor:
    """NCA loss of each prompt: every reward on its own, told from noise with weight softmax(alpha * scores).

    Unlike `infonca_loss` it fixes the level of the rewards too, which keeps the likelihood of good responses up.
    Arguments, shapes and unused prompts as in `infonca_loss`.
    """
    rewards, target, mask = _prepare(logratios, scores, mask, beta, alpha)
    noise = mask.to(rewards.dtype) / mask.sum(-1, keepdim=True).clamp(min=1)
    losses = -(target * logsigmoid(rewards) + noise * logsigmoid(-rewards)).sum(-1)
    return torch.where(scores_differ(scores, mask), losses, 0.0)


def _prepare(logratios, scores, mask, beta, alpha) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards (0 in masked slots), target distribution and boolean mask, (B,K) each."""
    assert logratios.shape == scores.shape == mask.shape, (logratios.shape, scores.shape, mask.shape)
    mask = mask.bool()
    # Differences first: alpha times a score may be so large that float32 forgets the differences.
    highest = scores.masked_fill(~mask, -math.inf).amax(-1, keepdim=True)
    exponents = alpha * (scores - highest).detach().to(logratios.dtype)
    return beta * logratios.masked_fill(~mask, 0), masked_softmax(exponents, mask), mask


class InfoNCATrainer(PreferenceTrainer):
    """Trains with `infonca_loss` on rows of K scored responses."""

    config_class = InfoNCAConfig
    method = "InfoNCA"
    paper = ("Noise Contrastive Alignment of Language Models with Explicit Rewards", "2402.05369")
    loss_function = staticmethod(infonca_loss)

    def loss(self, batch, policy, reference):
        args = self.args
        logratios = policy.logps.sum(-1) - reference.logps.sum(-1)
        losses = self.loss_function(logratios, batch["scores"], batch["mask"], beta=args.beta, alpha=args.alpha)
        return losses, self.ranking_metrics(batch, args.beta * logratios.detach())


class NCATrainer(InfoNCATrainer):
    """Trains with `nca_loss` on rows of K scored responses."""

    config_class = NCAConfig
    method = "NCA"
    loss_function = staticmethod(nca_loss)
