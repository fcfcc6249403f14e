"""What the estimate needs to know of a model and of a micro-batch."""

from dataclasses import dataclass
from typing import NamedTuple

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..forward.head import LogitRule, head_rows, logit_rule
from ..forward.layout import piece_bounds
from ..forward.policy import base_model


@dataclass(frozen=True)
class ModelShape:
    """Widths of a model and sizes of its parts, as loaded."""

    layers: int
    hidden: int
    heads: int
    attention: int  # width of all query heads
    key_values: int  # width of all key heads
    feed_forward: int
    gated: bool
    norms: int  # sum of the widths of one layer's norms
    vocabulary: int
    plain_head: bool  # a linear layer whose output are the logits
    parameters: int
    trainable: int
    quantised: int  # weights that bitsandbytes stores
    layer_parameters: int
    layer_linears: int  # weights of the linear layers of one layer, without adapters
    inputs: tuple[int, ...]  # input widths of the trained or adapted linear layers of one layer
    trainable_bytes: int
    frozen_bytes: int  # without the quantised weights
    quantised_bytes: float
    stream: int  # bytes per number between layers
    ranks: int  # sum of the adapters' ranks in one layer
    adapter_bytes: int  # bytes per number of an adapter, 0 without adapters

    @property
    def full(self) -> bool:
        """Whether all weights are trained."""
        return self.adapter_bytes == 0


class Fed(NamedTuple):
    """A micro-batch as a model is fed it: tokens, those that predict a response token, slots of the attention."""

    tokens: int
    predicted: int
    queries: int
    keys: int
    mask: int  # elements
    pairs: int = 0  # of a query and a key whose score is computed, those that the mask hides included

    @property
    def copies_keys(self) -> bool:
        """Whether attention works on tables of branches, with a copy of the trunk's keys for each."""
        return self.mask > 0


def shape_of(model: nn.Module, *, bits: float | None = None) -> ModelShape:
    """Read the shape off a model, bare or with LoRA, which may lie on the meta device.

    Args:
        bits: bits per weight of the layers' linear layers if bitsandbytes is to store them, None if it is not.
    """
    base = base_model(model)
    config = base.config.get_text_config()
    layer, count = _decoder_layers(base)
    linears = [m for name, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D) and "lora_" not in name]
    adapted = [m for m in layer.modules() if isinstance(m, LoraLayer)]
    downs = [p for m in adapted for p in m.lora_A.parameters()]
    norms = [p for name, p in layer.named_parameters() if p.dim() == 1 and name.endswith("weight")]
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    feed_forward = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    stream = base.get_input_embeddings().weight.element_size()
    layer_linears = sum(m.weight.numel() for m in linears)
    quantised = 0 if bits is None else count * layer_linears
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return ModelShape(
        layers=count,
        hidden=config.hidden_size,
        heads=heads,
        attention=heads * head_size,
        key_values=key_heads * head_size,
        feed_forward=feed_forward,
        gated=sum(_widths(m)[1] // feed_forward for m in linears) > 1,
        # A norm as wide as one head runs over all query heads or over all key heads.
        norms=sum(p.numel() if p.numel() != head_size else head_size * (heads + key_heads) // 2 for p in norms),
        vocabulary=head_rows(base.get_output_embeddings()),
        plain_head=type(base.get_output_embeddings()) is nn.Linear and logit_rule(base.config) == LogitRule(),
        parameters=sum(p.numel() for p in (*trained, *frozen)),
        trainable=sum(p.numel() for p in trained),
        quantised=quantised,
        layer_parameters=sum(p.numel() for p in layer.parameters()),
        layer_linears=layer_linears,
        inputs=tuple(m.in_features for m in adapted) or tuple(_widths(m)[0] for m in linears),
        trainable_bytes=sum(p.nbytes for p in trained),
        frozen_bytes=sum(p.nbytes for p in frozen) - quantised * stream,
        quantised_bytes=quantised * (bits or 0) / 8,
        stream=stream,
        ranks=sum(p.shape[0] for p in downs),
        adapter_bytes=downs[0].element_size() if downs else 0,
    )


def _decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, int]:
    """A decoder layer and how many there are: the longest list of modules."""
    layers = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    return layers[0], len(layers)


def _widths(linear: nn.Linear | Conv1D) -> tuple[int, int]:
    """Input and output width."""
    return tuple(linear.weight.shape) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


def fed(groups: list[tuple[int, list[int]]], *, shared: bool, flex: bool = False) -> Fed:
    """Lengths of prompts P and of their responses R -> what one micro-batch of them costs.

    `shared`: T = sum over prompts of (P - 1 + sum of R). Attention works on padded tables of trunks (longest P - 1)
    and branches (longest R), whose queries are cut into pieces; each branch has a copy of its trunk's keys. With
    `flex` (FlexAttention) it needs neither tables nor copies.
    `rows`: T = responses x longest (P + R - 1), without a mask.
    """
    responses = [r for _, lengths in groups for r in lengths]
    if not shared:
        longest = max(p + max(lengths) - 1 for p, lengths in groups)
        tokens = len(responses) * longest
        return Fed(tokens, sum(responses), tokens, tokens, 0, tokens * longest)
    trunk, branch = max(p for p, _ in groups) - 1, max(responses)
    tokens = sum(p - 1 for p, _ in groups) + sum(responses)
    trunks, keys = len(groups) * trunk, len(responses) * (trunk + branch)
    pieces = [(sum(r > begin for r in responses) * (end - begin), end) for begin, end in piece_bounds(branch)]
    queries, mask = sum(size for size, _ in pieces), sum(size * (trunk + end) for size, end in pieces)
    pairs = trunks * trunk + mask
    if flex:
        return Fed(tokens, sum(responses), tokens, tokens, 0, pairs)
    return Fed(tokens, sum(responses), trunks + queries, trunks + keys, mask, pairs)
