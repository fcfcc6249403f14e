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
    """Queries of one node, the tokens `begin` to `end` of sequence `row`; their keys are all tokens up to `end`."""

    row: int
    begin: int
    end: int


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


def calls(nodes: list[Node]) -> list[list[Piece]]:
    """The pieces of all nodes by call of the attention kernel; of a call the first has the most keys.

    A node without one above it is not cut: a causal kernel skips what it need not see. Such nodes share no call with
    others.
    """
    roots = [Piece(node.first, 0, node.end) for node in nodes if node.begin == 0]
    cut = [
        Piece(node.first, begin, min(begin + PIECE, node.end))
        for node in nodes
        if node.begin > 0
        for begin in range(node.begin, node.end, PIECE)
    ]
    return [call for pieces in (roots, cut) for call in _together(pieces)]


def _together(pieces: list[Piece]) -> list[list[Piece]]:
    """Pieces of like size share a call, where the padding costs less than another call."""
    groups: list[list[Piece]] = []
    steps = 0
    for piece in sorted(pieces, key=lambda piece: (-piece.end, piece.begin)):
        own = piece.end - piece.begin
        if groups:
            count, keys, wider = len(groups[-1]), groups[-1][0].end, max(steps, own)
            if (count + 1) * wider * keys <= count * steps * keys + own * piece.end + CALL:
                groups[-1].append(piece)
                steps = wider
                continue
        groups.append([piece])
        steps = own
    return groups
