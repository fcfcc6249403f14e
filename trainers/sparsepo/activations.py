"""MaPO's mask: how strongly the reference's activations answer to each token; nothing is learned.

An activation gives one number per token, its mean over the last dimension. These are rescaled to [0, 1] over the
tokens of a response, averaged inside a type (MLP, attention, residual, logits), then over the types.

The list of activations is ours, cut to what fires once per layer in every supported model: the rotated queries and
keys of the authors' code are left out. Their z-normalisation before the rescaling changes nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel


class Style(NamedTuple):
    """Where a family of models keeps the parts of its blocks."""

    blocks: str
    attention: str
    projections: tuple[str, ...]  # queries, keys and values, or one projection that gives all three
    output: str
    activation: str
    norms: tuple[str, str]
    last_norm: str
    heads_first: bool = False  # in one projection: (head, q k v, dim) instead of (q k v, head, dim)

    def places(self, parallel: bool) -> list[tuple[str, str, bool]]:
        """(type, path in a block, whether what goes in counts instead of what comes out); "" is the block itself."""
        places = [("attention", f"{self.attention}.{name}", False) for name in self.projections]
        places += [("attention", f"{self.attention}.{self.output}", True), ("mlp", f"mlp.{self.activation}", False)]
        places += [("residual", path, False) for path in (*self.norms, self.attention, "mlp", "")]
        # Where attention and MLP are parallel, no stream lies between them.
        return places if parallel else [*places, ("residual", self.norms[1], True)]


STYLES = {
    "Llama, Qwen, Mistral": Style("layers", "self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj", "act_fn",
                                  ("input_layernorm", "post_attention_layernorm"), "norm"),
    "GPT-2": Style("h", "attn", ("c_attn",), "c_proj", "act", ("ln_1", "ln_2"), "ln_f"),
    "GPT-NeoX": Style("layers", "attention", ("query_key_value",), "dense", "act",
                      ("input_layernorm", "post_attention_layernorm"), "final_layer_norm", heads_first=True),
}  # fmt: skip


class Site(NamedTuple):
    """A place where activations are read: what goes into a module, or what comes out of it."""

    kind: str
    name: str
    module: nn.Module
    incoming: bool = False
    split: Callable[[Tensor], tuple[Tensor, ...]] | None = None  # for three activations in one tensor


def activation_mask(activations: dict[str, Tensor], token_mask: Tensor) -> Tensor:
    """{type: (A,B,K,R) token means of its A activations} and token_mask (B,K,R) -> mask (B,K,R) in [0, 1].

    An activation that is constant over a response, as with a single token, counts as 1. The result is 0 outside
    `token_mask`, where activations may hold anything, and carries no gradient.
    """
    types = []
    for values in activations.values():
        values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
        low = values.masked_fill(~token_mask, torch.inf).amin(-1, keepdim=True)
        high = values.masked_fill(~token_mask, -torch.inf).amax(-1, keepdim=True)
        scaled = torch.where(high > low, (values - low) / (high - low), 1.0)
        types.append(scaled.masked_fill(~token_mask, 0).mean(0))
    return torch.stack(types).mean(0)


def find_sites(model: PreTrainedModel) -> list[Site]:
    """Every place of `model` where activations are read, logits apart.

    Raises:
        ValueError: the model's blocks are built in another way than those in `STYLES`.
    """
    base = model.base_model
    style = next((style for style in STYLES.values() if _fits(model, style)), None)
    if style is None:
        raise ValueError(
            f"mask='activations' knows the blocks of {', '.join(STYLES)}, and {type(model).__name__} has others: use "
            "mask='learned', which works with every model."
        )
    blocks = base.get_submodule(style.blocks)
    assert isinstance(blocks, nn.ModuleList)  # as it fits
    sites = [Site("residual", "embedding", blocks[0], incoming=True)]
    for i, block in enumerate(blocks):
        for kind, path, incoming in style.places(_parallel(block)):
            split = _split(block, style) if path.endswith(style.projections) and len(style.projections) == 1 else None
            sites.append(Site(kind, f"{style.blocks}.{i}.{path}", block.get_submodule(path), incoming, split))
    return [*sites, Site("residual", style.last_norm, base.get_submodule(style.last_norm))]


def _fits(model: PreTrainedModel, style: Style) -> bool:
    modules = dict(model.base_model.named_modules())
    blocks = modules.get(style.blocks)
    if not isinstance(blocks, nn.ModuleList) or style.last_norm not in modules:
        return False
    parts = dict(blocks[0].named_modules())
    # Further norms mean another order of norm and residual.
    norms = {name for name, _ in blocks[0].named_children() if "norm" in name or name.startswith("ln_")}
    if norms != {*style.norms} or any(path not in parts for _, path, _ in style.places(_parallel(blocks[0]))):
        return False
    if len(style.projections) > 1:
        return True
    width = _width(parts[f"{style.attention}.{style.projections[0]}"])
    return width == 3 * model.config.get_text_config().hidden_size


def _parallel(block: nn.Module) -> bool:
    return getattr(block, "use_parallel_residual", False)


def _split(block: nn.Module, style: Style) -> Callable[[Tensor], tuple[Tensor, ...]]:
    if not style.heads_first:
        return lambda x: x.chunk(3, -1)
    size = block.get_submodule(style.attention).head_size

    def by_head(x: Tensor) -> tuple[Tensor, ...]:
        parts = x.unflatten(-1, (-1, 3, size)).unbind(-2)  # (N, heads, dim) each
        return tuple(part.flatten(-2) for part in parts)

    return by_head


def _width(projection: nn.Module) -> int:
    layer = projection.get_base_layer() if isinstance(projection, BaseTunerLayer) else projection
    return getattr(layer, "nf", 0) or getattr(layer, "out_features", 0)


@contextmanager
def recorded(sites: list[Site], select: Callable[[Tensor], Tensor]) -> Iterator[dict[str, list[Tensor]]]:
    """Record token means (N,) while a model runs once: {type: one list entry per activation}, filled at the end.

    Args:
        select: (rows, length, D) -> (N,D), the tokens that count.

    Raises:
        RuntimeError: a place was not passed exactly once, for example because a fused kernel replaced it.
    """
    means: list[list[Tensor]] = [[] for _ in sites]
    by_kind: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for site, into in zip(sites, means, strict=True):
            stack.enter_context(_hook(site, into, select))
        yield by_kind
    for site, values in zip(sites, means, strict=True):
        expected = 3 if site.split else 1
        if len(values) != expected:
            raise RuntimeError(
                f"{site.name} was passed {len(values) // expected} times in one forward instead of once: its "
                "activations cannot be read (fused kernels and compiled models skip modules)."
            )
        by_kind.setdefault(site.kind, []).extend(values)


def _hook(site: Site, into: list[Tensor], select: Callable[[Tensor], Tensor]):
    def take(value) -> None:
        value = select(value[0] if isinstance(value, tuple) else value).detach()
        parts = site.split(value) if site.split else (value,)
        into.extend(part.mean(-1, dtype=torch.promote_types(part.dtype, torch.float32)) for part in parts)

    if site.incoming:
        handle = site.module.register_forward_pre_hook(
            lambda module, args, kwargs: take(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    else:
        handle = site.module.register_forward_hook(lambda module, args, output: take(output))
    return handle
