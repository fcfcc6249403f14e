"""Attention for the `shared` layout, through transformers' public attention interface; no model code is patched.

A packed row is cut into the nodes of its tree, and each attends to the nodes above it and to itself. So no score
between unrelated tokens is ever computed, unlike with one dense mask over the row. Calls without `branches`
(generation, evaluation pipelines, the `rows` layout) go to transformers' own SDPA unchanged.

A model loaded with `attn_implementation="flex_attention"` gets the same pattern as a block mask instead. Its kernel
has no backward on CPUs.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SHARED_SDPA = "sdpa_shared_prompt"
FLEX = "flex_attention"


def shared_sdpa(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, branches=None, **kwargs):
    """SDPA over the nodes of a tree. query (1,H,T,D), key and value (1,G,T,D) -> (1,T,H,D), None."""
    if branches is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    heads, scale = query.size(1), kwargs.get("scaling")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    sizes = [piece.rows * (piece.end - piece.begin) for call in branches.calls for piece in call.pieces]
    queries, pieces = iter(_Move.apply(query, branches.token, branches.slot, None).split(sizes)), []
    for call in branches.calls:
        k, v = (_per_head(x.index_select(0, call.keys.flatten()).view(*call.keys.shape, *x.shape[1:]), heads)
                for x in (key, value))  # fmt: skip
        for piece, seen in zip(call.pieces, call.masks, strict=True):
            q = next(queries).view(piece.rows, -1, heads, query.size(-1)).transpose(1, 2)
            mask = {"is_causal": True} if seen is None else {"attn_mask": seen}
            met = slice(piece.rows), slice(None), slice(piece.keys)
            found = scaled_dot_product_attention(q, k[met], v[met], scale=scale, **mask)
            pieces.append(found.transpose(1, 2).flatten(0, 1))
    return _Move.apply(torch.cat(pieces), branches.slot, branches.token, branches.real).unsqueeze(0), None


@lru_cache(maxsize=1)  # policy and reference are fed the same row
def flex_mask(ends: Tensor) -> BlockMask:
    """(T,) `Branches.ends` -> mask of a packed row: a token sees itself and what is before it in its sequence."""
    length = len(ends)
    places = torch.arange(length, device=ends.device)  # of the queries: the CPU kernel has no name for q as a number

    def visible(b, h, q, k):
        return (k <= q) & (places[q] < ends[k])

    return create_block_mask(visible, None, None, length, length, device=ends.device)


class _Move(torch.autograd.Function):
    """Tokens to slots, or back. Its gradient gathers again, where that of indexing would scatter and add."""

    @staticmethod
    def forward(ctx, x: Tensor, there: Tensor, back: Tensor, real: Tensor | None) -> Tensor:
        """x (n, ...) at `there`; `back` is where to each of the n went, `real` (n,) which of them counts."""
        ctx.save_for_backward(back, real)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, grad: Tensor):
        back, real = ctx.saved_tensors
        grad = grad.index_select(0, back)
        return grad if real is None else grad * real.view(-1, *[1] * (grad.dim() - 1)), None, None, None


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values (A,E,groups,D) -> (A,heads,E,D)."""
    x = x.transpose(1, 2)
    return x.repeat_interleave(heads // x.size(1), 1) if heads > x.size(1) else x


AttentionInterface.register(SHARED_SDPA, shared_sdpa)
AttentionMaskInterface.register(SHARED_SDPA, sdpa_mask)
