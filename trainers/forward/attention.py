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
    table = torch.cat([branches.trunk.flatten(), branches.branch.flatten()])
    # (slots, heads, D), then (B,S,heads,D) for the trunks and (M,R,heads,D) for the branches
    q, k, v = (_ToTables.apply(x[0].transpose(0, 1), table, branches.restore) for x in (query, key, value))
    (trunk_q, branch_q), (trunk_k, branch_k), (trunk_v, branch_v) = (_split(x, branches) for x in (q, k, v))
    pieces = []
    if branches.trunk.size(1):
        pieces.append(_sdpa(trunk_q, trunk_k, trunk_v, heads, scale, is_causal=True))
        branch_k = torch.cat([_ToOwners.apply(trunk_k, branches.owner), branch_k], 1)
        branch_v = torch.cat([_ToOwners.apply(trunk_v, branches.owner), branch_v], 1)
    pieces.append(_sdpa(branch_q, branch_k, branch_v, heads, scale, attn_mask=branches.mask))
    flat = torch.cat([piece.flatten(0, 1) for piece in pieces])
    return _FromTables.apply(flat, table, branches.restore, branches.real).unsqueeze(0), None


def flex_mask(branches: Branches) -> BlockMask:
    """Block mask of a packed row: earlier tokens of the same prompt that lie in the trunk or in the same branch."""
    trunk_slots, length = branches.trunk.numel(), branches.restore.numel()
    in_trunk = branches.restore < trunk_slots
    branch = torch.where(in_trunk, -1, (branches.restore - trunk_slots) // branches.branch.size(1))
    prompt = torch.where(in_trunk, branches.restore // max(1, branches.trunk.size(1)), branches.owner[branch])

    def visible(b, h, q, k):
        return (k <= q) & (prompt[q] == prompt[k]) & ((branch[k] < 0) | (branch[k] == branch[q]))

    return create_block_mask(visible, None, None, length, length, device=branches.restore.device)


def _split(x: Tensor, branches: Branches) -> tuple[Tensor, Tensor]:
    """(slots, heads, D) -> trunks (B,S,heads,D) and branches (M,R,heads,D)."""
    trunk, branch = x.split([branches.trunk.numel(), branches.branch.numel()])
    return trunk.view(*branches.trunk.shape, *x.shape[1:]), branch.view(*branches.branch.shape, *x.shape[1:])


class _ToTables(torch.autograd.Function):
    """Tokens (T, ...) to table slots. Its gradient gathers again, where that of indexing would scatter and add."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, restore: Tensor) -> Tensor:
        ctx.save_for_backward(restore)
        return x.index_select(0, table)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (restore,) = ctx.saved_tensors
        return grad.index_select(0, restore), None, None


class _FromTables(torch.autograd.Function):
    """Table slots back to tokens (T, ...); padded slots get no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, restore: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(table, real)
        return x.index_select(0, restore)

    @staticmethod
    def backward(ctx, grad: Tensor):
        table, real = ctx.saved_tensors
        return grad.index_select(0, table) * real.view(-1, *[1] * (grad.dim() - 1)), None, None, None


class _ToOwners(torch.autograd.Function):
    """A trunk (B, ...) for each of its branches (M, ...)."""

    @staticmethod
    def forward(ctx, x: Tensor, owner: Tensor) -> Tensor:
        ctx.save_for_backward(owner)
        ctx.prompts = len(x)
        return x.index_select(0, owner)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (owner,) = ctx.saved_tensors
        return grad.new_zeros(ctx.prompts, *grad.shape[1:]).index_add_(0, owner, grad), None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None, **mask) -> Tensor:
    """(A,C,heads,D) queries against (A,E,groups,D) keys -> (A,C,heads,D)."""
    repeat = heads // k.size(2)
    k, v = (x.transpose(1, 2).repeat_interleave(repeat, 1) if repeat > 1 else x.transpose(1, 2) for x in (k, v))
    return scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=scale, **mask).transpose(1, 2)


AttentionInterface.register(SHARED_SDPA, shared_sdpa)
AttentionMaskInterface.register(SHARED_SDPA, sdpa_mask)
