"""Log-probabilities without logits: only positions that predict a response token reach the LM head, in chunks.

A chunk's logits live while that chunk is worked on and are computed again in the backward pass, so that peak memory
does not grow with tokens x vocabulary. The head is called as a module, once per forward, and chunks inside that one
call: ZeRO-3 and FSDP2 gather its weights through the hooks of that call, the same number of times on every process.

What a forward gives back is decided by a reading, a function of the pass. `read_logps` is the default; a method that
wants more than log-probabilities brings its own, and everything it does happens inside the wrapped forward.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from types import MethodType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from .layout import Distinct
from .router import router_loss

# Logits of one chunk (tokens x vocabulary): 256 MiB in float32 on an accelerator, less on CPUs with small caches.
CHUNK_ELEMENTS = 2**26
CPU_CHUNK_ELEMENTS = 2**24
# Elements of the weight's gradient that a CPU works on at once: a product that fits in its cache is cheap to widen.
CPU_BLOCK_ELEMENTS = 2**21
PLAIN = "_forward_to_logits"  # attribute of a prepared model: its own forward


class LogitRule(NamedTuple):
    """What a model does to the output of its LM head before the softmax: scaling, then soft-capping."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@dataclass(frozen=True)
class Pass:
    """One forward pass, as a reading sees it.

    `body(**more)` runs the model up to its last hidden states, once, and gives the model's output. `positions` (N,)
    index the flattened (rows x length) states, `targets` (N,) are the token ids they predict. `distinct` says which
    of the N are alike, None where none are.
    """

    model: PreTrainedModel
    body: Callable
    positions: Tensor
    targets: Tensor
    distinct: Distinct | None
    rule: LogitRule
    chunk_elements: int | None

    def select(self, states: Tensor) -> Tensor:
        """(rows, length, H) -> (N,H): the states that predict a token of a response."""
        return states.reshape(-1, states.size(-1)).index_select(0, self.positions)

    @property
    def head(self) -> nn.Module:
        """The LM head, looked up at each call: FSDP and PEFT replace modules after the model was prepared."""
        return self.model.get_output_embeddings()

    def logps(self, hidden: Tensor) -> Tensor:
        """(N,H) hidden states -> (N,) log-probabilities of the targets, with the logits of one chunk in memory."""
        compute = _linear_logps if is_plain(self.head, self.rule) else _module_logps
        return call_head(self.head, partial(compute, self, chunk_size(self, hidden)), hidden)


Reading = Callable[[Pass], dict[str, Tensor]]  # values of the N positions, "logps" among them


def read_logps(this: Pass) -> dict[str, Tensor]:
    """Log-probabilities of the targets, in float32 (float64 for a float64 model)."""
    states = this.body().last_hidden_state
    if this.distinct is None:
        return {"logps": this.logps(this.select(states))}
    first, inverse = this.distinct
    this = replace(this, positions=this.positions[first], targets=this.targets[first])
    return {"logps": this.logps(this.select(states)).index_select(0, inverse)}


def add_logps_head(model: PreTrainedModel, chunk_elements: int | None = None) -> None:
    """Let `model(..., positions=, targets=, reading=)` return what the reading says instead of logits.

    A mixture of experts whose config asks for it also gives "aux_loss", the scalar loss of its router over the tokens
    that `fed` marks. Without `positions` the model's own forward runs, so that generation and `transformers.pipeline`
    see no difference.

    Raises:
        ValueError: the model is no causal language model: it has an encoder, no head, or no body apart from the head.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} has an encoder, which sees the whole response: only decoders can be trained here."
        )
    if model.get_output_embeddings() is None or model.base_model is model:
        raise ValueError(
            f"{type(model).__name__} has no LM head, or no body that runs without it (its base_model is itself): load "
            "it with AutoModelForCausalLM, or take a model whose base_model_prefix names its body."
        )
    if PLAIN not in vars(model):
        vars(model)[PLAIN] = model.forward  # not in a closure, so that a copy of the model gets its own
    original, rule, router = vars(model)[PLAIN], logit_rule(model.config), router_loss(model.config)

    @wraps(original.__func__ if isinstance(original, MethodType) else original)
    def forward(
        self,
        *args,
        positions: Tensor | None = None,
        targets: Tensor | None = None,
        distinct: Distinct | None = None,
        reading: Reading = read_logps,
        fed: Tensor | None = None,
        **kwargs,
    ):
        if positions is None:
            return vars(self)[PLAIN](*args, **kwargs)
        assert targets is not None
        options, aux = {"use_cache": False} | ({} if router is None else {"output_router_logits": True}), {}

        def body(**more):
            output = self.base_model(*args, **(kwargs | options | more))  # PEFT names all options itself
            if router is not None:
                aux["aux_loss"] = router(output.router_logits, fed)
            return output

        return reading(Pass(self, body, positions, targets, distinct, rule, chunk_elements)) | aux

    model.forward = MethodType(forward, model)


def call_head(head: nn.Module, compute: Callable, hidden: Tensor):
    """`compute(project, hidden)` inside a call of the head, where `project` is what the head's forward would do."""
    project = head.forward
    head.forward = partial(compute, project)
    try:
        return head(hidden)
    finally:
        head.forward = project


def chunk_size(this: Pass, hidden: Tensor) -> int:
    """Tokens per chunk, so that a chunk's logits have at most `chunk_elements` numbers."""
    elements = this.chunk_elements or (CPU_CHUNK_ELEMENTS if hidden.device.type == "cpu" else CHUNK_ELEMENTS)
    return max(1, elements // head_rows(this.head))


def is_plain(head: nn.Module, rule: LogitRule) -> bool:
    """Whether logits are hidden @ weight.T + bias and nothing else.

    FSDP2 makes a subclass of nn.Linear, quantised layers are one as well: the forward tells what a head computes.
    """
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and rule == LogitRule()


def _linear_logps(this: Pass, size: int, project: Callable, hidden: Tensor) -> Tensor:
    return fused(_LinearLogps.apply, hidden, this.head.weight, this.head.bias, this.targets, size)


def _module_logps(this: Pass, size: int, project: Callable, hidden: Tensor) -> Tensor:
    """Any head: quantised, under an adapter, or with a rule for its logits."""

    def logps(chunk: Tensor, ids: Tensor) -> Tensor:
        logits = this.rule(widen(project(chunk)))
        return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)

    return torch.cat(by_chunk(logps, size, hidden, this.targets))


def fused(function: Callable, hidden: Tensor, *arguments):
    """`function(hidden, ...)` without autocast inside, on hidden states in the dtype that it would take."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return function(hidden, *arguments)


def by_chunk(function: Callable, size: int, *tensors: Tensor) -> list:
    """`function` of `size` rows at a time; what it makes inside is made again in the backward pass."""
    if torch.is_grad_enabled():
        function = partial(checkpoint, function, use_reentrant=False)
    return [function(*piece) for piece in zip(*(x.split(size) for x in tensors), strict=True)]


class _LinearLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[targets] with one buffer of logits, forward and backward.

    With p the softmax and g the incoming gradient, the gradient of a row's logits is g (onehot(target) - p).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, size: int) -> Tensor:
        totals = torch.empty(len(hidden), dtype=wide_dtype(hidden.dtype), device=hidden.device)
        chosen = torch.empty_like(totals)
        weight_t, logits = weight.to(hidden.dtype).t(), None
        for part in parts(len(hidden), size):
            logits = None  # the last chunk's memory is for this one
            logits = widen(linear(hidden[part], weight_t, bias))
            chosen[part] = logits.gather(-1, targets[part].unsqueeze(-1)).squeeze(-1)
            top = logits.amax(-1, keepdim=True)
            totals[part] = logits.sub_(top).exp_().sum(-1).log_() + top.squeeze(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, totals)
        ctx.size = size
        return chosen - totals

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, weight, bias, targets, totals = ctx.saved_tensors
        cast, logits, slope = weight.to(hidden.dtype), None, None
        gradients = HeadGradients(ctx.needs_input_grad, hidden, weight, bias, cast)
        for part in parts(len(hidden), ctx.size):
            logits = slope = None
            logits = widen(linear(hidden[part], cast.t(), bias))
            slope = logits.sub_(totals[part].unsqueeze(-1)).exp_().mul_(-grad[part].unsqueeze(-1))
            slope.scatter_add_(-1, targets[part].unsqueeze(-1), grad[part].unsqueeze(-1))
            gradients.add(part, slope, slope.to(hidden.dtype))
        return *gradients.found(), None, None


class HeadGradients:
    """Gradients of a linear head's hidden states, weight and bias, added up from the slopes of the logits by chunk.

    Sums are in at least float32: bfloat16 sums drift. `cast` is the weight in the dtype of the hidden states.
    """

    def __init__(self, needed: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None, cast: Tensor):
        self.inputs, self.cast = (hidden, weight, bias), cast
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide_dtype(weight.dtype)) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide_dtype(bias.dtype)) if bias is not None and needed[2] else None

    def add(self, part: slice, slope: Tensor, narrow: Tensor) -> None:
        """Take a chunk's slopes (n,V) over, as they are and in the dtype of the hidden states."""
        if self.bias is not None:
            self.bias += slope.sum(0)
        if self.hidden is not None:
            torch.mm(narrow, self.cast, out=self.hidden[part])
        if self.weight is not None:
            _add_products(self.weight, narrow, self.inputs[0][part])

    def found(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three gradients, each in the dtype of its input, None where it is not needed."""
        sums = zip((self.hidden, self.weight, self.bias), self.inputs, strict=True)
        hidden, weight, bias = (None if s is None or x is None else s.to(x.dtype) for s, x in sums)
        return hidden, weight, bias


def linear(hidden: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(hidden, weight_t) if bias is None else torch.addmm(bias.to(hidden.dtype), hidden, weight_t)


def _add_products(grad_weight: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """grad_weight (V,H) += slope (n,V).T @ hidden (n,H), some rows at a time on a CPU."""
    on_cpu = grad_weight.device.type == "cpu"
    rows = CPU_BLOCK_ELEMENTS // grad_weight.size(1) if on_cpu else len(grad_weight)
    for part in parts(len(grad_weight), max(1, rows)):
        grad_weight[part] += slope[:, part].t() @ hidden


def parts(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def widen(logits: Tensor) -> Tensor:
    return logits.to(wide_dtype(logits.dtype))


def head_rows(head: nn.Module) -> int:
    """Vocabulary size of an LM head, from its shape attribute: a sharded weight shows only its own part."""
    weight = head.weight
    assert isinstance(weight, Tensor)
    return getattr(head, "out_features", None) or weight.shape[0]


def logit_rule(config: PretrainedConfig) -> LogitRule:
    """The rule of a model, from its config.

    transformers has no common name for it; the names below are those of Cohere, Granite, MiniCPM3, HyperCLOVA X,
    Falcon-H1 and Gemma. The check on the first batch (`Runner.check`) catches a model that does something else.
    """
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) or getattr(text, "lm_head_multiplier", None)
    scaling = getattr(text, "logits_scaling", None)
    if not scale and scaling:
        scale = scaling if text.model_type == "hyperclovax" else 1 / scaling
    return LogitRule(scale or 1.0, getattr(text, "final_logit_softcapping", None))
