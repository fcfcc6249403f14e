"""KL divergence per token between a frozen model and the policy, over the whole vocabulary, without logits.

Both heads are applied chunk by chunk, so of either model only one chunk's logits exist at a time; in the backward pass
they are computed again. The frozen head is kept whole: the policy's head is gathered by its own call in a sharded
engine (see head.py), and a second sharded head could not be gathered inside that call.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from .head import (
    CPU_CHUNK_ELEMENTS,
    HeadGradients,
    LogitRule,
    Pass,
    by_chunk,
    call_head,
    chunk_size,
    fused,
    is_plain,
    linear,
    logit_rule,
    parts,
    wide_dtype,
    widen,
)
from .identity import read_whole


class FrozenHead(NamedTuple):
    """The whole LM head of a frozen model: weight (V,H), bias (V,) or None."""

    weight: Tensor
    bias: Tensor | None
    rule: LogitRule

    def logits(self, hidden: Tensor) -> Tensor:
        """(n,H) -> (n,V), in float32 or wider."""
        return self.rule(widen(linear(hidden, self.weight.to(hidden.dtype).t(), self.bias)))

    @torch.no_grad()
    def mean_logits(self, hidden: Tensor) -> Tensor:
        """(N,H) -> (N,) mean over the vocabulary. Without a cap the logits themselves are not needed."""
        if self.rule.cap is not None:
            size = max(1, CPU_CHUNK_ELEMENTS // len(self.weight))
            return torch.cat([self.logits(chunk).mean(-1) for chunk in hidden.split(size)])
        wide = wide_dtype(hidden.dtype)
        means = hidden.to(wide) @ self.weight.mean(0, dtype=wide)
        return self.rule(means if self.bias is None else means + self.bias.mean(dtype=wide))


def frozen_head(model: PreTrainedModel, device: torch.device, *, with_adapter: bool = False) -> FrozenHead:
    """The head of `model` without adapters, on `device`: the weights themselves, or a whole copy of sharded ones.

    Every process must call this. A model that is sharded later must not be sharded yet, or be sharded by ZeRO-3.

    Args:
        with_adapter: whether the frozen model is `model` with its adapter on.

    Raises:
        ValueError: the head is not a linear layer with ordinary numbers, or the adapter that is on changes it.
    """
    head = model.get_output_embeddings()
    if with_adapter and isinstance(head, (BaseTunerLayer, ModulesToSaveWrapper)):
        raise ValueError(
            "The reference's adapter changes the LM head, which the KL per token cannot use: merge the adapter into "
            "the model and start a fresh one, or train an adapter without the LM head."
        )
    if isinstance(head, ModulesToSaveWrapper):
        head = head.original_module
    if isinstance(head, BaseTunerLayer):
        head = head.get_base_layer()
    if not (isinstance(head, nn.Linear) and head.weight.is_floating_point()):
        raise ValueError(
            f"The KL per token needs an LM head that is a linear layer in floating point, but this model's is a "
            f"{type(head).__name__}: leave it out of the quantisation."
        )
    bias = None if head.bias is None else read_whole(head.bias, device)
    return FrozenHead(read_whole(head.weight, device), bias, logit_rule(model.config))


def check_vocabulary(policy: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Raises ValueError when the two have different vocabularies, over which there is no KL."""
    ours, theirs = (model.config.get_text_config().vocab_size for model in (policy, reference))
    if ours != theirs:
        raise ValueError(
            f"ref_model has a vocabulary of {theirs} tokens and the policy one of {ours}: the KL per token needs the "
            "same vocabulary in both."
        )


def logps_and_kl(this: Pass, hidden: Tensor, frozen: FrozenHead, frozen_hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets (N,), and KL(frozen || policy) at their positions (N,), in float32 or wider.

    Args:
        this: the policy's forward pass.
        hidden: (N,H) the policy's last hidden states.
        frozen: the frozen model's head.
        frozen_hidden: (N,H') the frozen model's last hidden states at the same positions; they get no gradient.
    """
    size = max(1, chunk_size(this, hidden) // 2)  # logits of two models
    plain = is_plain(this.head, this.rule) and frozen.rule == LogitRule()
    compute: Callable = _linear_kl if plain else _module_kl
    return call_head(this.head, partial(compute, this, size, frozen, frozen_hidden.detach()), hidden)


def _linear_kl(this: Pass, size: int, frozen: FrozenHead, frozen_hidden: Tensor, project: Callable, hidden: Tensor):
    ours, theirs = (this.head.weight, this.head.bias), (frozen_hidden, frozen.weight, frozen.bias)
    return fused(_LinearKL.apply, hidden, *ours, this.targets, *theirs, size)


def _module_kl(this: Pass, size: int, frozen: FrozenHead, frozen_hidden: Tensor, project: Callable, hidden: Tensor):
    """Any head: quantised, under an adapter, or with a rule for its logits."""

    def both(chunk: Tensor, ids: Tensor, frozen_chunk: Tensor) -> tuple[Tensor, Tensor]:
        logps = this.rule(widen(project(chunk))).log_softmax(-1)
        theirs = frozen.logits(frozen_chunk).log_softmax(-1)
        return logps.gather(-1, ids.unsqueeze(-1)).squeeze(-1), (theirs.exp() * (theirs - logps)).sum(-1)

    chunks = by_chunk(both, size, hidden, this.targets, frozen_hidden)
    return tuple(torch.cat(values) for values in zip(*chunks, strict=True))


class _LinearKL(torch.autograd.Function):
    """log pi(target) and KL(q || pi), with the logits of one chunk of each model, forward and backward.

    With pi the policy's softmax and q the frozen one, the gradients of a row's logits are onehot(target) - pi for the
    log-probability and pi - q for the divergence.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, frozen_hidden, frozen_weight, frozen_bias, size):
        frozen_hidden = frozen_hidden.to(hidden.dtype)
        chosen = torch.empty(len(hidden), dtype=wide_dtype(hidden.dtype), device=hidden.device)
        kls, totals, frozen_totals = (torch.empty_like(chosen) for _ in range(3))
        weight_t, frozen_t = weight.to(hidden.dtype).t(), frozen_weight.to(hidden.dtype).t()
        for part in parts(len(hidden), size):
            logps = widen(linear(hidden[part], weight_t, bias))
            theirs = widen(linear(frozen_hidden[part], frozen_t, frozen_bias))
            totals[part], frozen_totals[part] = logps.logsumexp(-1), theirs.logsumexp(-1)
            logps.sub_(totals[part].unsqueeze(-1))
            theirs.sub_(frozen_totals[part].unsqueeze(-1))
            chosen[part] = logps.gather(-1, targets[part].unsqueeze(-1)).squeeze(-1)
            # From log-probabilities on both sides: a probability that underflows to 0 then counts 0 and not NaN.
            logps.sub_(theirs)
            kls[part] = -logps.mul_(theirs.exp_()).sum(-1)
        ctx.save_for_backward(
            hidden, weight, bias, targets, frozen_hidden, frozen_weight, frozen_bias, totals, frozen_totals
        )
        ctx.size = size
        return chosen, kls

    @staticmethod
    def backward(ctx, grad_logps: Tensor, grad_kls: Tensor):
        hidden, weight, bias, targets, frozen_hidden, frozen_weight, frozen_bias, totals, frozen_totals = (
            ctx.saved_tensors
        )
        cast, frozen_t = weight.to(hidden.dtype), frozen_weight.to(hidden.dtype).t()
        gradients = HeadGradients(ctx.needs_input_grad, hidden, weight, bias, cast)
        for part in parts(len(hidden), ctx.size):
            of_logps, of_kls = grad_logps[part].unsqueeze(-1), grad_kls[part].unsqueeze(-1)
            logits = widen(linear(hidden[part], cast.t(), bias))
            slope = logits.sub_(totals[part].unsqueeze(-1)).exp_().mul_(of_kls - of_logps)
            logits = widen(linear(frozen_hidden[part], frozen_t, frozen_bias))
            slope.sub_(logits.sub_(frozen_totals[part].unsqueeze(-1)).exp_().mul_(of_kls))
            slope.scatter_add_(-1, targets[part].unsqueeze(-1), of_logps)
            gradients.add(part, slope, slope.to(hidden.dtype))
        return *gradients.found(), *(None,) * 5
