"""Two ways to lay the tokens of a batch out for a model, and the estimate that chooses between them.

`rows`    one padded row per response, the prompt repeated in each.
`shared`  one row for the whole batch, without padding: the prompt once, its responses after it as branches that see
          the prompt and themselves only.

Both give the same log-probabilities. A position is the model input that predicts a response token; its target is that
token. In `shared` the trunk is the prompt without its last token and every branch begins with a copy of that last
token, so that each position has exactly one target. The last token of a response is never fed: it predicts nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Queries of a branch per call of the attention kernel: pieces this long skip most of what a causal mask would hide.
PIECE = 256


class Slots(NamedTuple):
    """A padded table of tokens. Every token of the packed row lies in exactly one real slot."""

    token: Tensor  # (slots,) index of the token, 0 in padded slots
    slot: Tensor  # (T,) the slot of each token
    real: Tensor  # (slots,) bool: which slots hold a token


class Branches(NamedTuple):
    """Where trunks and branches lie in a packed row. B prompts, M responses in all, the longest first.

    The queries of the branches are cut into pieces of at most `PIECE` steps. A piece holds those branches only that
    reach so far, which are the first n, and meets only the keys up to its own end.
    """

    trunk: tuple[int, int]  # B, longest trunk S
    branch: tuple[int, int]  # M, longest branch R
    owner: Tensor  # (M,) the prompt of each branch
    queries: Slots  # (B,S) trunks, then the (n,steps) slots of each piece, all flattened
    keys: Slots  # (B,S) trunks, then (M,R) branches, flattened
    masks: tuple[Tensor, ...]  # of each piece (n,1,steps,S+end) bool: which keys of trunk and branch a query sees


class ModelInputs(NamedTuple):
    """What the model is fed, and which positions predict which tokens, in the order of `response_mask`."""

    input_ids: Tensor  # (rows,L)
    position_ids: Tensor | None  # (rows,L), None for 0..L-1
    positions: Tensor  # (N,) index into the flattened rows
    targets: Tensor  # (N,) token ids
    branches: Branches | None = None
    fed: Tensor | None = None  # (rows,L) bool: which tokens are no padding, None for all


def rows_layout(batch: dict[str, Tensor]) -> ModelInputs:
    """One right-padded row per response. A causal model needs no mask for padding on the right."""
    prompt_lengths, lengths, owner, slot = _lengths(batch)
    prefix = prompt_lengths[owner]
    at = torch.arange(int((prefix + lengths - 1).max()), device=prefix.device).expand(len(owner), -1)
    in_prompt = at < prefix.unsqueeze(1)
    prompt = batch["prompt_ids"][owner].gather(1, at.clamp(max=batch["prompt_ids"].size(1) - 1))
    responses = batch["response_ids"][owner, slot]
    offset = (at - prefix.unsqueeze(1)).clamp(0, responses.size(1) - 1)
    fed = in_prompt | (at < (prefix + lengths - 1).unsqueeze(1))
    input_ids = torch.where(in_prompt, prompt, responses.gather(1, offset)) * fed
    steps = torch.arange(responses.size(1), device=prefix.device)
    first = torch.arange(len(owner), device=prefix.device) * at.size(1) + prefix - 1
    positions = (first.unsqueeze(1) + steps)[steps < lengths.unsqueeze(1)]
    return ModelInputs(input_ids, None, positions, batch["response_ids"][batch["response_mask"]], fed=fed)


def shared_layout(batch: dict[str, Tensor]) -> ModelInputs:
    """One packed row (1,T): for each prompt its trunk, then its branches."""
    prompt_lengths, lengths, owner, slot = _lengths(batch)
    device, trunk_lengths = lengths.device, prompt_lengths - 1
    # Segments in packed order: trunk of prompt 0, its branches, trunk of prompt 1, ...
    is_branch = torch.cat([torch.zeros_like(trunk_lengths), torch.ones_like(lengths)])
    segment_owner = torch.cat([torch.arange(len(trunk_lengths), device=device), owner])
    order = (segment_owner * 2 + is_branch).argsort(stable=True)
    sizes = torch.cat([trunk_lengths, lengths])
    starts = torch.empty_like(sizes)
    starts[order] = sizes[order].cumsum(0) - sizes[order]
    trunk_starts, branch_starts = starts[: len(trunk_lengths)], starts[len(trunk_lengths) :]

    trunk, in_trunk = _spans(trunk_starts, trunk_lengths)
    branch, in_branch = _spans(branch_starts, lengths)
    total = int(sizes.sum())
    input_ids = torch.zeros(total, dtype=torch.long, device=device)
    position_ids = torch.zeros(total, dtype=torch.long, device=device)
    input_ids[trunk[in_trunk]] = batch["prompt_ids"][:, : trunk.size(1)][in_trunk]
    position_ids[trunk[in_trunk]] = torch.arange(trunk.size(1), device=device).expand_as(trunk)[in_trunk]
    last = batch["prompt_ids"][owner, trunk_lengths[owner]]
    fed = torch.cat([last.unsqueeze(1), batch["response_ids"][owner, slot]], 1)[:, : branch.size(1)]
    input_ids[branch[in_branch]] = fed[in_branch]
    steps = torch.arange(branch.size(1), device=device)
    position_ids[branch[in_branch]] = (trunk_lengths[owner].unsqueeze(1) + steps)[in_branch]
    targets = batch["response_ids"][batch["response_mask"]]
    branches = _branches(trunk, in_trunk, branch, lengths, owner, total)
    return ModelInputs(input_ids.unsqueeze(0), position_ids.unsqueeze(0), branch[in_branch], targets, branches)


def _branches(trunk: Tensor, in_trunk: Tensor, branch: Tensor, lengths: Tensor, owner: Tensor, total: int) -> Branches:
    """Tables for the attention from those of the row: trunks (B,S), branches (M,R) and their lengths (M,)."""
    order = lengths.argsort(descending=True, stable=True)
    branch, owner, in_branch = branch[order], owner[order], _reached(lengths[order], branch.size(1))
    in_order = lengths[order].tolist()
    steps = torch.arange(branch.size(1), device=branch.device)
    sees_trunk = in_trunk[owner]
    tables, masks = [(trunk, in_trunk)], []
    for begin, end in piece_bounds(branch.size(1)):
        count = sum(length > begin for length in in_order)
        tables.append((branch[:count, begin:end], in_branch[:count, begin:end]))
        causal = steps[begin:end].unsqueeze(1) >= steps[:end]
        seen = sees_trunk[:count].unsqueeze(1).expand(-1, len(causal), -1)
        masks.append(torch.cat([seen, causal.expand(count, -1, -1)], 2).unsqueeze(1))
    queries, keys = _slots(tables, total), _slots([(trunk, in_trunk), (branch, in_branch)], total)
    sizes = (trunk.size(0), trunk.size(1)), (branch.size(0), branch.size(1))
    return Branches(*sizes, owner, queries, keys, tuple(masks))


def piece_bounds(longest: int) -> list[tuple[int, int]]:
    """First step and end of each piece of branches of which the longest has so many steps."""
    return [(begin, min(begin + PIECE, longest)) for begin in range(0, longest, PIECE)]


def _slots(tables: list[tuple[Tensor, Tensor]], total: int) -> Slots:
    """Index tables, each with the mask of its real slots, one after the other."""
    token = torch.cat([table.flatten() for table, _ in tables])
    real = torch.cat([mask.flatten() for _, mask in tables])
    slot = torch.empty(total, dtype=torch.long, device=token.device)
    slot[token[real]] = torch.arange(len(token), device=token.device)[real]
    return Slots(token, slot, real)


def to_responses(logps: Tensor, response_mask: Tensor) -> Tensor:
    """(N,) values in the order of `response_mask` -> (B,K,R), zero elsewhere."""
    return logps.new_zeros(response_mask.shape).masked_scatter(response_mask, logps)


def token_counts(batch: dict[str, Tensor]) -> tuple[int, int]:
    """Tokens a model is fed in the `rows` and in the `shared` layout, padding included."""
    prompt_lengths, lengths, owner, _ = _lengths(batch)
    rows = len(owner) * int((prompt_lengths[owner] + lengths - 1).max())
    return rows, int((prompt_lengths - 1).sum() + lengths.sum())


def _lengths(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompt lengths (B,), and for the M real responses: lengths, prompt index, slot (M,) each."""
    owner, slot = batch["mask"].nonzero(as_tuple=True)
    return batch["prompt_mask"].sum(1), batch["response_mask"].sum(2)[owner, slot], owner, slot


def _spans(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Index table of consecutive spans and the mask of its real slots, (len(starts), longest) each."""
    real = _reached(lengths, int(lengths.max()))
    return (starts.unsqueeze(1) + torch.arange(real.size(1), device=starts.device)) * real, real


def _reached(lengths: Tensor, longest: int) -> Tensor:
    """(n,) lengths -> (n, longest) bool: which steps lie within each length."""
    return torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)
