"""Sequences that begin alike, as a tree: what several of them begin with is one node, and is computed once.

Only lengths and token ids on the host are looked at here; layout.py makes tensors of it.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

# A beginning is shared where that saves so many tokens: fewer cost less than a call of the attention kernel.
SAVED = 16
# Queries of a node per call of the attention kernel: pieces this long skip most of what a causal mask would hide.
PIECE = 256
# What a call of the kernel costs, in pairs of a query and a key.
CALL = 2**14


class Node(NamedTuple):
    """The tokens `begin` to `end` of the sequences `first` to `last`, which are alike up to there."""

    begin: int
    end: int
    first: int
    last: int


class Piece(NamedTuple):
    """Queries of a call of the attention kernel: the tokens `begin` to `end`, counted from where each node begins, of
    the first `rows` nodes of a group. They meet the first `keys` tokens of the nodes' sequences."""

    rows: int
    begin: int
    end: int
    keys: int


class Tree(NamedTuple):
    """`order` sorts the sequences; `nodes` count them in that order, and each comes before those below it."""

    order: list[int]
    nodes: list[Node]

    @property
    def tokens(self) -> int:
        """Tokens in all nodes."""
        return sum(node.end - node.begin for node in self.nodes)


def grow(sequences: list[np.ndarray]) -> Tree:
    """The tree of sequences of token ids (L,), int32 or wider and not negative."""
    # Of big-endian numbers the bytes sort as the numbers do.
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].astype(">i4").tobytes())
    ordered = [sequences[i] for i in order]
    common = [_alike(*pair) for pair in pairwise(ordered)]
    nodes, todo = [], [(0, len(ordered), 0)]
    while todo:
        first, last, begin = todo.pop()
        end = min(common[first : last - 1], default=len(ordered[first]))
        cuts = [first, *(i + 1 for i in range(first, last - 1) if common[i] == end), last]
        alone = last - first == 1
        if alone or (len(cuts) - 2) * (end - begin) >= SAVED:
            nodes += [Node(begin, end, first, last)] if end > begin else []
            begin = end
        todo += [] if alone else [(*ends, begin) for ends in reversed([*pairwise(cuts)])]
    return Tree(order, nodes)


def _alike(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length


def groups(nodes: list[Node]) -> list[list[Node]]:
    """Nodes of like size, the longest first, whose attention is computed together: padding costs less than a call.

    Nodes without one above them share no group with others.
    """
    roots, rest = [node for node in nodes if node.begin == 0], [node for node in nodes if node.begin > 0]
    return [sorted(group, key=lambda node: node.begin - node.end) for group in (*_together(roots), *_together(rest))]


def _together(nodes: list[Node]) -> list[list[Node]]:
    found: list[list[Node]] = []
    steps = 0  # of the longest node of the last group, whose first node has the most keys
    for node in sorted(nodes, key=lambda node: (-node.end, node.begin)):
        own = node.end - node.begin
        if found:
            count, keys, wider = len(found[-1]), found[-1][0].end, max(steps, own)
            if (count + 1) * wider * keys <= count * steps * keys + own * node.end + CALL:
                found[-1].append(node)
                steps = wider
                continue
        found.append([node])
        steps = own
    return found


def pieces(group: list[Node]) -> list[Piece]:
    """The calls of the kernel for a group: each has the nodes that reach so far. Nodes without one above them are not
    cut, because a causal kernel skips what it need not see."""
    sizes = [node.end - node.begin for node in group]
    if group[0].begin == 0:
        return [Piece(len(group), 0, sizes[0], sizes[0])]
    found = []
    for begin in range(0, sizes[0], PIECE):
        reached, end = group[: sum(size > begin for size in sizes)], min(begin + PIECE, sizes[0])
        found.append(Piece(len(reached), begin, end, max(min(node.begin + end, node.end) for node in reached)))
    return found
