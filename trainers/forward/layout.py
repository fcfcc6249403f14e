"""Two ways to lay the tokens of a batch out for a model, and the choice between them.

`rows`    one padded row per response, the prompt repeated in each.
`shared`  one row for the whole batch, without padding: what several sequences of prompt and response begin with is
          there once, and every token sees its own sequence only (tree.py).

Both give the same log-probabilities. A position is the model input that predicts a response token that is trained on;
its target is that token. `response_mask` marks those tokens and may have holes, such as the turns of a tool. Of a
response the last such token is never fed, nor what follows it: it predicts nothing. In `shared` a position may have
several targets, those of the responses that part there.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .tree import Piece, Tree, groups, grow, pieces


class Call(NamedTuple):
    """The attention of a group of n nodes: the keys of their whole sequences, padded, and pieces of their queries."""

    keys: Tensor  # (n,length) index of the token
    pieces: tuple[Piece, ...]
    masks: tuple[Tensor | None, ...]  # of each (rows,1,steps,keys) bool: the keys that a query sees; None is causal


class Branches(NamedTuple):
    """Where the nodes of a tree lie in a packed row of T tokens, for its attention."""

    ends: Tensor  # (T,) a token is seen by those from itself on to this one, which is not in its subtree any more
    calls: tuple[Call, ...]
    token: Tensor  # (slots,) the token of each query of all calls, 0 in padded ones
    slot: Tensor  # (T,) the query of each token
    real: Tensor  # (slots,) bool: which queries are no padding


class Distinct(NamedTuple):
    """Which of N positions are the same as an earlier one, with the same target."""

    first: Tensor  # (U,) index of those that are not
    inverse: Tensor  # (N,) of those, the one that each of the N is like


class ModelInputs(NamedTuple):
    """What the model is fed, and which positions predict which tokens, in the order of `response_mask`."""

    input_ids: Tensor  # (rows,L)
    position_ids: Tensor | None  # (rows,L), None for 0..L-1
    positions: Tensor  # (N,) index into the flattened rows
    targets: Tensor  # (N,) token ids
    branches: Branches | None = None
    distinct: Distinct | None = None
    fed: Tensor | None = None  # (rows,L) bool: which tokens are no padding, None for all


def lay_out(batch: dict[str, Tensor], layout: str, window: int | None = None) -> ModelInputs:
    """A batch in the layout `rows` or `shared`, or in the cheaper one (`auto`).

    Linear layers cost the same per token in both layouts and attention is computed per branch in both, so the tokens
    that are fed decide. Gathering keys and values costs about as much as 5 % of the tokens (measured on CPU).

    Args:
        window: the longest distance that every layer can look back; nothing is shared where a row outgrows it, as the
            attention of `shared` has no window.
    """
    shared = _worth_sharing(batch, layout, window)
    return rows_layout(batch) if shared is None else _shared_layout(batch, *shared)


def count_tokens(batch: dict[str, Tensor], layout: str, window: int | None = None) -> int:
    """Tokens that `lay_out` feeds a model, padding included; its tables, which may be large, are not made."""
    shared = _worth_sharing(batch, layout, window)
    if shared is not None:
        return shared[-1].tokens
    prompt_lengths, lengths, owner, _ = _lengths(batch)
    return len(owner) * int((prompt_lengths[owner] + lengths - 1).max())


def _worth_sharing(
    batch: dict[str, Tensor], layout: str, window: int | None
) -> tuple[list[np.ndarray], list[int], Tree] | None:
    """`_sequences` and their tree, None where the layout is that of rows."""
    if layout == "rows":
        return None
    sequences, prompts = _sequences(batch)
    longest = max(map(len, sequences))
    if window is not None and longest >= window:
        return None
    tree = grow(sequences)
    dear = tree.tokens * 1.05 >= len(sequences) * longest
    return None if layout == "auto" and dear else (sequences, prompts, tree)


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
    positions = (first.unsqueeze(1) + steps)[batch["response_mask"][owner, slot]]
    return ModelInputs(input_ids, None, positions, batch["response_ids"][batch["response_mask"]], fed=fed)


def _shared_layout(
    batch: dict[str, Tensor], sequences: list[np.ndarray], prompts: list[int], tree: Tree
) -> ModelInputs:
    """One packed row (1,T): the nodes of the tree of all sequences, each before those below it."""
    device = batch["mask"].device
    starts = np.cumsum([0, *(node.end - node.begin for node in tree.nodes)])
    input_ids, position_ids = np.empty((2, starts[-1]), np.int64)
    at = np.zeros((len(sequences), max(map(len, sequences))), np.int64)  # of each sequence in the tree's order
    for start, node in zip(starts, tree.nodes, strict=False):
        span = slice(start, start + node.end - node.begin)
        input_ids[span] = sequences[tree.order[node.first]][node.begin : node.end]
        position_ids[span] = np.arange(node.begin, node.end)
        at[node.first : node.last, node.begin : node.end] = np.arange(span.start, span.stop)
    rank = np.argsort(tree.order)
    # A response of one token adds none to its prompt, whose last token predicts it.
    trained = batch["response_mask"][batch["mask"]].cpu().numpy()
    predicting = [
        at[i, p - 1 : len(ids)][mask[: len(ids) - p + 1]]
        for i, p, ids, mask in zip(rank, prompts, sequences, trained, strict=True)
    ]
    positions, targets = _tensor(np.concatenate(predicting), device), batch["response_ids"][batch["response_mask"]]
    return ModelInputs(
        _tensor(input_ids, device).unsqueeze(0),
        _tensor(position_ids, device).unsqueeze(0),
        positions,
        targets,
        _branches(tree, starts, at, device),
        _distinct(positions, targets),
    )


def _sequences(batch: dict[str, Tensor]) -> tuple[list[np.ndarray], list[int]]:
    """What is fed of each of the M real responses, after its prompt, and the length of that prompt."""
    prompt_lengths, lengths, owner, slot = (values.tolist() for values in _lengths(batch))
    prompts, responses = (batch[name].cpu().numpy() for name in ("prompt_ids", "response_ids"))
    sequences = [
        np.concatenate([prompts[b, : prompt_lengths[b]], responses[b, k, : n - 1]])
        for b, k, n in zip(owner, slot, lengths, strict=True)
    ]
    return sequences, [prompt_lengths[b] for b in owner]


def _branches(tree: Tree, starts: np.ndarray, at: np.ndarray, device: torch.device) -> Branches:
    """Tables for the attention; `at` (M,L) is where the tokens of each sequence lie."""
    calls, queries, real = [], [], []
    for group in groups(tree.nodes):
        begins, ends = (np.array(values)[:, None] for values in zip(*(node[:2] for node in group), strict=True))
        keys, cut, masks = at[[node.first for node in group], : ends.max()], pieces(group), []
        for piece in cut:
            places = (begins + np.arange(piece.begin, piece.end))[: piece.rows]
            within = places < ends[: piece.rows]
            token = np.take_along_axis(keys[: piece.rows], np.minimum(places, keys.shape[1] - 1), 1)
            queries.append(np.where(within, token, 0).ravel())
            real.append(within.ravel())
            seen = np.arange(piece.keys) <= places[:, None, :, None]
            masks.append(_tensor(seen, device) if begins.any() else None)
        calls.append(Call(_tensor(keys, device), tuple(cut), tuple(masks)))
    token, kept = np.concatenate(queries), np.concatenate(real)
    slot = np.empty(starts[-1], np.int64)
    slot[token[kept]] = np.flatnonzero(kept)
    ends = np.empty_like(slot)
    for i, node in enumerate(tree.nodes):
        after = (j for j in range(i + 1, len(tree.nodes)) if tree.nodes[j].first >= node.last)
        ends[starts[i] : starts[i + 1]] = starts[next(after, len(tree.nodes))]
    return Branches(_tensor(ends, device), tuple(calls), *(_tensor(x, device) for x in (token, slot, kept)))


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)


def _distinct(positions: Tensor, targets: Tensor) -> Distinct | None:
    found, inverse = torch.unique(positions * (int(targets.max()) + 1) + targets, return_inverse=True)
    if len(found) == len(inverse):
        return None
    first = inverse.new_empty(len(found)).scatter_(0, inverse, torch.arange(len(inverse), device=inverse.device))
    return Distinct(first, inverse)


def to_responses(logps: Tensor, response_mask: Tensor) -> Tensor:
    """(N,) values in the order of `response_mask` -> (B,K,R), zero elsewhere."""
    return logps.new_zeros(response_mask.shape).masked_scatter(response_mask, logps)


def read_lengths(response_mask: Tensor) -> Tensor:
    """(...,R) which tokens are trained on -> (...) tokens up to the last of them, 0 where there is none."""
    return (response_mask * torch.arange(1, response_mask.size(-1) + 1, device=response_mask.device)).amax(-1)


def _lengths(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompt lengths (B,), and for the M real responses: `read_lengths`, prompt index, slot (M,) each."""
    owner, slot = batch["mask"].nonzero(as_tuple=True)
    return batch["prompt_mask"].sum(1), read_lengths(batch["response_mask"])[owner, slot], owner, slot
