"""The tree of sequences that begin alike, on token ids alone."""

import numpy as np
import pytest

from trainers.forward import tree
from trainers.forward.tree import Node, Piece, groups, grow, pieces


def sequences(seed, count=12, vocab=3):
    """Short random sequences of few different tokens: many begin alike, and some are equal."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab + 1, rng.integers(1, 9)) for _ in range(count)]


def test_nodes_of_a_small_tree(monkeypatch):
    monkeypatch.setattr(tree, "SAVED", 1)
    rows = [np.array(ids) for ids in ([7, 8, 9, 300], [7, 8, 4], [7, 8, 9], [5, 5], [7, 8, 9, 300])]
    grown = grow(rows)
    assert [rows[i].tolist() for i in grown.order] == [[5, 5], [7, 8, 4], [7, 8, 9], [7, 8, 9, 300], [7, 8, 9, 300]]
    assert grown.nodes == [Node(0, 2, 0, 1), Node(0, 2, 1, 5), Node(2, 3, 1, 2), Node(2, 3, 2, 5), Node(3, 4, 3, 5)]
    assert grown.tokens == 7


@pytest.mark.parametrize("saved", [1, 4, 100])
@pytest.mark.parametrize("seed", range(5))
def test_every_sequence_is_the_path_of_its_nodes(seed, saved, monkeypatch):
    monkeypatch.setattr(tree, "SAVED", saved)
    rows = sequences(seed)
    order, nodes = grown = grow(rows)
    for place, i in enumerate(order):
        path = [node for node in nodes if node.first <= place < node.last]
        assert [node.begin for node in path] == [0, *(node.end for node in path[:-1])]
        assert path[-1].end == len(rows[i])
        for node in path:  # the tokens of a node are those of all its sequences
            assert rows[order[node.first]][: node.end].tolist() == rows[i][: node.end].tolist()
    beginnings = {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)}
    whole = sum(map(len, rows))
    assert grown.tokens == {1: len(beginnings), 100: whole}.get(saved, grown.tokens)
    assert len(beginnings) <= grown.tokens <= whole


def test_a_beginning_is_shared_where_it_saves_enough(monkeypatch):
    monkeypatch.setattr(tree, "SAVED", 6)
    prompt = [1, 2, 3]
    two, three = ([np.array([*prompt, 10 + i]) for i in range(n)] for n in (2, 3))
    assert grow(two).tokens == 8  # 3 would be saved
    assert grow(three).tokens == 3 + 3


def test_nodes_of_like_size_share_a_group_and_others_do_not(monkeypatch):
    monkeypatch.setattr(tree, "CALL", 300)
    monkeypatch.setattr(tree, "PIECE", 6)
    root, long, short, other = nodes = [Node(0, 40, 0, 3), Node(40, 50, 0, 1), Node(40, 45, 1, 2), Node(3, 5, 2, 3)]
    assert groups(nodes) == [[root], [long, short], [other]]
    assert pieces([root]) == [Piece(1, 0, 40, 40)]
    assert pieces([long, short]) == [Piece(2, 0, 6, 46), Piece(1, 6, 10, 50)]
