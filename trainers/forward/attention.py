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

from .layout import Branches

SHARED_SDPA = "sdpa_shared_prompt"
FLEX = "flex_attention"


def shared_sdpa(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, branches=None, **kwargs):
    """SDPA over trunks and branches. query (1,H,T,D), key and value (1,G,T,D) -> (1,T,H,D), None."""
    if branches is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    heads, scale = query.size(1), kwargs.get("scaling")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T,heads,D)
    pieces = []
    trunk_k, trunk_v = _take(k, branches.trunk), _take(v, branches.trunk)
    if branches.trunk.size(1):
        pieces.append(_sdpa(_take(q, branches.trunk), trunk_k, trunk_v, heads, scale, is_causal=True))
    branch_k = torch.cat([trunk_k[branches.owner], _take(k, branches.branch)], 1)
    branch_v = torch.cat([trunk_v[branches.owner], _take(v, branches.branch)], 1)
    pieces.append(_sdpa(_take(q, branches.branch), branch_k, branch_v, heads, scale, attn_mask=branches.mask))
    flat = torch.cat([piece.flatten(0, 1) for piece in pieces])
    return flat.index_select(0, branches.restore).unsqueeze(0), None


def flex_mask(branches: Branches) -> BlockMask:
    """Block mask of a packed row: earlier tokens of the same prompt that lie in the trunk or in the same branch."""
    trunk_slots, length = branches.trunk.numel(), branches.restore.numel()
    in_trunk = branches.restore < trunk_slots
    branch = torch.where(in_trunk, -1, (branches.restore - trunk_slots) // branches.branch.size(1))
    prompt = torch.where(in_trunk, branches.restore // max(1, branches.trunk.size(1)), branches.owner[branch])

    def visible(b, h, q, k):
        return (k <= q) & (prompt[q] == prompt[k]) & ((branch[k] < 0) | (branch[k] == branch[q]))

    return create_block_mask(visible, None, None, length, length, device=branches.restore.device)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """(T,heads,D) rows at an (A,C) index table -> (A,C,heads,D)."""
    return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None, **mask) -> Tensor:
    """(A,C,heads,D) queries against (A,E,groups,D) keys -> (A,C,heads,D)."""
    repeat = heads // k.size(2)
    k, v = (x.transpose(1, 2).repeat_interleave(repeat, 1) if repeat > 1 else x.transpose(1, 2) for x in (k, v))
    return scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=scale, **mask).transpose(1, 2)


AttentionInterface.register(SHARED_SDPA, shared_sdpa)
AttentionMaskInterface.register(SHARED_SDPA, sdpa_mask)
