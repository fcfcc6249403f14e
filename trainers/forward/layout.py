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


class Branches(NamedTuple):
    """Where trunks and branches lie in a packed row, as padded index tables. B prompts, M responses in all.

    Every token of the row lies in exactly one real slot of the two tables; `restore` says in which.
    """

    trunk: Tensor  # (B,S) token index, 0 in padded slots
    branch: Tensor  # (M,R) token index, 0 in padded slots
    owner: Tensor  # (M,) the prompt of each response
    mask: Tensor  # (M,1,R,S+R) bool: may query r of a branch see key s of its trunk or of the branch
    restore: Tensor  # (T,) the slot of each token in the two tables, flattened one after the other
    real: Tensor  # (B*S+M*R,) bool: which of those slots hold a token


class ModelInputs(NamedTuple):
    """What the model is fed, and which positions predict which tokens, in the order of `response_mask`."""

    input_ids: Tensor  # (rows,L)
    position_ids: Tensor | None  # (rows,L), None for 0..L-1
    positions: Tensor  # (N,) index into the flattened rows
    targets: Tensor  # (N,) token ids
    branches: Branches | None = None


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
    return ModelInputs(input_ids, None, positions, batch["response_ids"][batch["response_mask"]])


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

    causal = steps.unsqueeze(1) >= steps
    sees_trunk = in_trunk[owner].unsqueeze(1).expand(-1, len(steps), -1)
    mask = torch.cat([sees_trunk, causal.expand(len(owner), -1, -1)], 2).unsqueeze(1)
    restore = torch.empty(total, dtype=torch.long, device=device)
    restore[trunk[in_trunk]] = torch.arange(trunk.numel(), device=device).view_as(trunk)[in_trunk]
    restore[branch[in_branch]] = trunk.numel() + torch.arange(branch.numel(), device=device).view_as(branch)[in_branch]
    real = torch.cat([in_trunk.flatten(), in_branch.flatten()])
    branches = Branches(trunk, branch, owner, mask, restore, real)
    targets = batch["response_ids"][batch["response_mask"]]
    return ModelInputs(input_ids.unsqueeze(0), position_ids.unsqueeze(0), branch[in_branch], targets, branches)


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
    steps = torch.arange(int(lengths.max()), device=starts.device)
    real = steps < lengths.unsqueeze(1)
    return (starts.unsqueeze(1) + steps) * real, real
