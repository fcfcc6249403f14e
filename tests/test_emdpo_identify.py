"""What single answers tell about types: exact laws of answers."""

import numpy as np
import torch

from helpers import close
from test_emdpo_parts import CASES
from trainers import ranking_logps

ORDERS = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]


def probability(features, theta, order, shown=(0, 1, 2), top=None) -> np.ndarray:
    """(prompts,) probability that an annotator of taste theta ranks the shown responses in this order."""
    rewards = torch.tensor(features @ theta)[:, list(shown)]
    scores = torch.tensor([[-float(order.index(k)) if k in order else -9.0 for k in shown]]).double()
    scores = scores.expand(len(rewards), -1)
    return ranking_logps(rewards, scores, torch.ones_like(scores).bool(), top=top).exp().numpy()


def law(features, world) -> dict[str, np.ndarray]:
    """Probabilities of all answers of one annotator who is drawn from the world."""
    thetas, shares = np.array(world["theta"]), world["eta"]

    def mean(answer):
        return sum(share * answer(theta) for share, theta in zip(shares, thetas, strict=True))

    def rankings(theta):
        return np.stack([probability(features, theta, order) for order in ORDERS], 1)

    def best(theta):
        return np.stack([probability(features, theta, (k,), top=1) for k in range(3)], 1)

    def both_pairs(theta):
        one, other = (probability(features, theta, order, order) for order in ((0, 1), (2, 1)))
        return one * other

    return {
        "pair_0_over_1": mean(lambda theta: probability(features, theta, (0, 1), (0, 1))),
        "best_of_3": mean(best),
        "ranking_012_021_102_120_201_210": mean(rankings),
        "two_pairs_01_and_21": mean(both_pairs),
    }


def test_one_pair_per_annotator_has_one_law_in_different_worlds_and_other_answers_have_not():
    case = CASES["I1"]
    features = np.array(case["inputs"]["features"])
    found = {name: law(features, world) for name, world in case["inputs"]["worlds"].items()}
    for name, laws in found.items():
        for answer, values in case["expected"][name].items():
            close(laws[answer], values)
    for a, b in (("W1", "W2"), ("W1", "W3"), ("V1", "V2")):
        np.testing.assert_allclose(found[a]["pair_0_over_1"], found[b]["pair_0_over_1"], atol=1e-12)
        for answer in ("best_of_3", "ranking_012_021_102_120_201_210", "two_pairs_01_and_21"):
            assert np.abs(found[a][answer] - found[b][answer]).max() > 0.01, (a, b, answer)
