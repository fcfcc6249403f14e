"""Log-probabilities without logits: only positions that predict a response token reach the LM head, in chunks.

A chunk's logits live while that chunk is worked on and are recomputed in the backward pass, so that peak memory does
not grow with tokens x vocabulary. The head is called as a module, once per forward, and chunks inside that one call:
ZeRO-3 and FSDP2 gather its weights through the hooks of that call, the same number of times on every process.
"""

from collections.abc import Callable
from functools import wraps
from types import MethodType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

# Logits of one chunk (tokens x vocabulary): 128 MiB in float32.
CHUNK_ELEMENTS = 2**25


def add_logps_head(model: PreTrainedModel, chunk_elements: int = CHUNK_ELEMENTS) -> None:
    """Let `model(..., positions=, targets=)` return log-probabilities of `targets` instead of logits.

    `positions` (N,) index the flattened (rows x length) hidden states, `targets` (N,) are the token ids they predict;
    the call then returns (N,) log-probabilities in float32 (float64 for a float64 model). Without `positions` the
    model's own forward runs, so that generation and `transformers.pipeline` see no difference.

    Raises:
        ValueError: the model has no language-model head.
    """
    if model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} has no LM head: load it with AutoModelForCausalLM.")
    original = model.forward
    transform = logit_transform(model.config)

    @wraps(original.__func__ if isinstance(original, MethodType) else original)
    def forward(self, *args, positions: Tensor | None = None, targets: Tensor | None = None, **kwargs):
        if positions is None:
            return original(*args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        hidden = hidden.reshape(-1, hidden.size(-1)).index_select(0, positions)
        # Looked up at each call: FSDP and PEFT replace modules after this function ran.
        return chunked_logps(self.get_output_embeddings(), hidden, targets, transform, chunk_elements)

    model.forward = MethodType(forward, model)


def chunked_logps(
    head: nn.Module, hidden: Tensor, targets: Tensor, transform: Callable[[Tensor], Tensor], chunk_elements: int
) -> Tensor:
    """(N,H) hidden states and (N,) target ids -> (N,) log-probabilities, with the logits of one chunk in memory."""
    project = head.forward

    def logps(chunk: Tensor, ids: Tensor) -> Tensor:
        logits = project(chunk)
        logits = transform(logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits)
        return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)

    def all_chunks(hidden: Tensor) -> Tensor:
        size = max(1, chunk_elements // head_rows(head))
        pieces = zip(hidden.split(size), targets.split(size), strict=True)
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(logps, h, t, use_reentrant=False) for h, t in pieces])
        return torch.cat([logps(h, t) for h, t in pieces])

    head.forward = all_chunks
    try:
        return head(hidden)
    finally:
        head.forward = project


def head_rows(head: nn.Module) -> int:
    """Vocabulary size of an LM head, from its shape attribute: a sharded weight shows only its own part."""
    return getattr(head, "out_features", None) or head.weight.shape[0]


def logit_transform(config: PretrainedConfig) -> Callable[[Tensor], Tensor]:
    """What the model does to the output of its LM head before the softmax: scaling, then soft-capping.

    transformers has no common name for it; the names below are those of Cohere, Granite, MiniCPM3, HyperCLOVA X,
    Falcon-H1 and Gemma. The check on the first batch (`PreferenceTrainer`) catches a model that does something else.
    """
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) or getattr(text, "lm_head_multiplier", None)
    scaling = getattr(text, "logits_scaling", None)
    if not scale and scaling:
        scale = scaling if text.model_type == "hyperclovax" else 1 / scaling
    cap = getattr(text, "final_logit_softcapping", None)

    def transform(logits: Tensor) -> Tensor:
        if scale:
            logits = logits * scale
        return cap * torch.tanh(logits / cap) if cap else logits

    return transform
