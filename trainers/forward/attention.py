"""Attention for the `shared` layout, through transformers' public attention interface; no model code is patched.

A packed row is cut into its trunks and branches: trunks attend to themselves, each branch to its trunk and itself.
So no score between unrelated tokens is ever computed, unlike with one dense mask over the row. Calls without
`branches` (generation, evaluation pipelines, the `rows` layout) go to transformers' own SDPA unchanged.

A model loaded with `attn_implementation="flex_attention"` gets the same pattern as a block mask instead. Its kernel
has no backward on CPUs.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .layout import Branches, Slots

SHARED_SDPA = "sdpa_shared_prompt"
FLEX = "flex_attention"


def shared_sdpa(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, branches=None, **kwargs):
    """SDPA over trunks and branches. query (1,H,T,D), key and value (1,G,T,D) -> (1,T,H,D), None."""
    if branches is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    heads, scale = query.size(1), kwargs.get("scaling")
    in_trunks = branches.trunk[0] * branches.trunk[1]
    sizes = [in_trunks, *(mask.size(0) * mask.size(2) for mask in branches.masks)]
    queries = _to_slots(query, branches.queries).split(sizes)  # (slots,H,D) each
    (trunk_k, k), (trunk_v, v) = (_trunks_and_branches(x, branches) for x in (key, value))
    pieces = []
    if in_trunks:
        q = queries[0].view(*branches.trunk, heads, -1)
        pieces.append(_sdpa(q, _per_head(trunk_k, heads), _per_head(trunk_v, heads), scale, is_causal=True))
        k = torch.cat([trunk_k.index_select(0, branches.owner), k], 1)
        v = torch.cat([trunk_v.index_select(0, branches.owner), v], 1)
    k, v = _per_head(k, heads), _per_head(v, heads)
    for q, mask in zip(queries[1:], branches.masks, strict=True):
        count, _, steps, seen = mask.shape
        q = q.view(count, steps, heads, -1)
        pieces.append(_sdpa(q, k[:count, :, :seen], v[:count, :, :seen], scale, attn_mask=mask))
    flat = torch.cat([piece.flatten(0, 1) for piece in pieces])
    slots = branches.queries
    return _Move.apply(flat, slots.slot, slots.token, slots.real).unsqueeze(0), None


def flex_mask(branches: Branches) -> BlockMask:
    """Block mask of a packed row: earlier tokens of the same prompt that lie in the trunk or in the same branch."""
    slot, (prompts, trunk_length) = branches.keys.slot, branches.trunk
    trunk_slots, length = prompts * trunk_length, slot.numel()
    in_trunk = slot < trunk_slots
    branch = torch.where(in_trunk, -1, (slot - trunk_slots) // branches.branch[1])
    prompt = torch.where(in_trunk, slot // max(1, trunk_length), branches.owner[branch])

    def visible(b, h, q, k):
        return (k <= q) & (prompt[q] == prompt[k]) & ((branch[k] < 0) | (branch[k] == branch[q]))

    return create_block_mask(visible, None, None, length, length, device=slot.device)


def _trunks_and_branches(x: Tensor, branches: Branches) -> tuple[Tensor, Tensor]:
    """Keys or values of a packed row (1,G,T,D) -> trunks (B,S,G,D) and branches (M,R,G,D)."""
    x = _to_slots(x, branches.keys)
    trunk, branch = x.split([branches.trunk[0] * branches.trunk[1], branches.branch[0] * branches.branch[1]])
    return trunk.view(*branches.trunk, *x.shape[1:]), branch.view(*branches.branch, *x.shape[1:])


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


def _to_slots(x: Tensor, slots: Slots) -> Tensor:
    """(1,H,T,D) -> (slots,H,D)."""
    return _Move.apply(x[0].transpose(0, 1), slots.token, slots.slot, None)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values (A,E,groups,D) -> (A,heads,E,D)."""
    x = x.transpose(1, 2)
    return x.repeat_interleave(heads // x.size(1), 1) if heads > x.size(1) else x


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None, **mask) -> Tensor:
    """(A,C,heads,D) queries against (A,heads,E,D) keys -> (A,C,heads,D)."""
    return scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=scale, **mask).transpose(1, 2)


AttentionInterface.register(SHARED_SDPA, shared_sdpa)
AttentionMaskInterface.register(SHARED_SDPA, sdpa_mask)
