"""The pure parts of EM-DPO on hand-worked vectors: likelihoods, what answers tell, E-step, EM by hand, the game."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from helpers import cases_of, close, vectors
from trainers.emdpo import min_max_regret, mixture_weights, observed_log_likelihood, posterior, ranking_logps
from trainers.emdpo.annotators import halves
from trainers.emdpo.game import regret_matrix
from trainers.emdpo.mixture import clamp_log_prior, e_step, match_types
from trainers.likelihood import ordered_stages

CASES = vectors("emdpo")


of = partial(cases_of, "emdpo")


# Likelihood of a ranking.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@of("item_loglik")
def test_likelihood_of_an_item(case, dtype):
    x = case["inputs"]
    logps, reference = (torch.tensor([x[name]], dtype=dtype) for name in ("seq_logps", "ref_seq_logps"))
    logps.requires_grad_()
    scores = torch.empty_like(reference)
    scores[0, x["ranking"]] = -torch.arange(len(x["ranking"]), dtype=dtype)
    rewards = case["options"]["beta"] * (logps - reference)
    found = ranking_logps(rewards, scores, torch.ones_like(scores).bool(), top=case["options"]["stages"])
    found.sum().backward()
    name = str(dtype).removeprefix("torch.")
    close(found[0], case["expected"]["loglik"], name)
    close(-logps.grad[0], case["expected"]["grad_nll_seq_logps"], name)


@of("ranking_from_scores")
def test_stages_from_scores_end_before_the_first_tie(case):
    rewards, scores = (torch.tensor([case["inputs"][n]], dtype=torch.float64) for n in ("rewards", "scores"))
    mask = torch.tensor([case["inputs"]["mask"]]).bool()
    rewards.requires_grad_()
    found = ranking_logps(rewards, scores, mask)
    found.sum().backward()
    close(found[0], case["expected"]["loglik"])
    close(-rewards.grad[0], case["expected"]["grad_nll_rewards"])
    stages = ordered_stages(scores, mask).sum()
    assert stages == case["expected"]["stages"] and bool(stages) == case["expected"]["used"]


def test_rankings_sum_to_one_and_marginals_are_the_shorter_feedback():
    rewards = torch.tensor([[0.3, -1.2, 2.0, 0.7]], dtype=torch.float64)
    mask = torch.ones(1, 4).bool()
    orders = list(itertools.permutations(range(4)))
    scores = torch.tensor([[-order.index(k) for k in range(4)] for order in orders]).double()
    probs = ranking_logps(rewards.expand(24, 4), scores, mask.expand(24, 4)).exp()
    torch.testing.assert_close(probs.sum(), torch.ones((), dtype=torch.float64))
    for top in (1, 2):
        for start in itertools.permutations(range(4), top):
            marginal = sum(p for p, order in zip(probs, orders, strict=True) if order[:top] == start)
            place = torch.tensor([[-start.index(k) if k in start else -9.0 for k in range(4)]]).double()
            torch.testing.assert_close(ranking_logps(rewards, place, mask)[0], marginal.log())
    above = sum(p for p, order in zip(probs, orders, strict=True) if order.index(0) < order.index(3))
    pair = ranking_logps(rewards[:, [0, 3]], torch.tensor([[1.0, 0.0]]).double(), mask[:, :2])
    torch.testing.assert_close(pair[0], above.log())
    with pytest.raises(ValueError, match="top=0"):
        ranking_logps(rewards, place, mask, top=0)


# What single answers tell about types: exact laws of answers.

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


# E-step and EM.


@of("e_step")
def test_e_step(case):
    likelihood, prior = np.array(case["inputs"]["annotator_loglik"]), np.array(case["inputs"]["prior"])
    found = posterior(likelihood, clamp_log_prior(prior))
    close(found, case["expected"]["posterior"])
    close(mixture_weights(found), case["expected"]["new_prior"])
    close(observed_log_likelihood(likelihood, clamp_log_prior(prior)).sum(), case["expected"]["observed_loglik"])


@of("e_step_from_items")
def test_items_are_summed_per_annotator_and_every_annotator_counts_once(case):
    x, expected = case["inputs"], case["expected"]
    found = e_step(np.array(x["item_loglik"]), np.array(x["owner"]), np.array(x["prior"]),
                   case["options"]["num_annotators"])  # fmt: skip
    close(found.posterior, expected["posterior"])
    close(found.prior, expected["new_prior"])
    close(found.log_likelihood, expected["annotator_loglik"])
    close(found.observed, expected["observed_loglik"])


def hand_em(counts, start, rounds):
    """EM on votes for one shown set, with the exact M-step: weighted shares of the votes. Our E-step throughout."""
    counts, gamma = np.array(counts, dtype=float), np.array(start)
    owner = np.repeat(np.arange(len(counts)), counts.sum(1).astype(int))
    votes = np.concatenate([np.repeat(np.arange(counts.shape[1]), row.astype(int)) for row in counts])
    for _ in range(rounds):
        prior = mixture_weights(gamma)
        shares = gamma.T @ counts
        shares /= shares.sum(1, keepdims=True)
        found = e_step(np.log(np.maximum(shares[:, votes].T, 1e-300)), owner, prior, len(counts))
        gamma = found.posterior
        yield prior, shares, found


@of("em_tabular")
def test_em_by_hand(case):
    rounds = hand_em(case["inputs"]["counts"], case["inputs"]["initial_posterior"], case["options"]["rounds"])
    for (prior, shares, found), want in zip(rounds, case["expected"]["rounds"], strict=True):
        close(prior, want["prior_used"])
        close(shares, want["choice_probs"])
        close(found.log_likelihood, want["annotator_loglik"])
        close(found.posterior, want["posterior"])
        close(found.observed, want["observed_loglik"])


def test_likelihood_never_falls_with_an_exact_m_step_and_types_are_exchangeable():
    random = np.random.default_rng(0)
    for _ in range(5):
        counts = random.integers(0, 20, (12, 3))
        start = random.dirichlet(np.ones(3), 12)
        order = random.permutation(3)
        runs = [list(hand_em(counts, s, 12)) for s in (start, start[:, order])]
        observed = [found.observed for _, _, found in runs[0]]
        assert all(b >= a - 1e-9 for a, b in itertools.pairwise(observed)) and observed[-1] > observed[0] + 0.1
        np.testing.assert_allclose(runs[1][-1][2].posterior, runs[0][-1][2].posterior[:, order], atol=1e-9)


def test_types_are_named_as_suits_them_best():
    gamma = np.array([[0.9, 0.1, 0], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0, 0, 1.0]])
    assert match_types(gamma, np.array([1, 0, 0, 1]))[0] == 0.75
    assert match_types(gamma[:, [1, 2, 0]], np.array([1, 0, 0, 1]))[0] == 0.75
    assert match_types(gamma, np.array([1, 0, 0, 1]))[1].tolist() == [1, 0, -1]


def test_halves_split_every_annotator():
    owner = np.array([0] * 5 + [1] * 2 + [2] + [0, 1, 3])
    half = halves(owner, seed=0)
    for annotator in range(4):
        mine = half[owner == annotator]
        assert abs(int((mine == 0).sum()) - int((mine == 1).sum())) <= 1
    assert (half == halves(owner, seed=0)).all()
    singles = halves(np.arange(100), seed=0)
    assert 20 < singles.sum() < 80  # the only row of an annotator does not always lie in the first half


# The game.


@of("min_max_regret")
def test_min_max_regret(case):
    regret, expected = np.array(case["inputs"]["regret"]), case["expected"]
    for zero_row in (True, False):
        found = min_max_regret(regret, zero_row=zero_row)
        close(found.mixture, expected["weights"])
        close(found.value, expected["value"])
    close(regret @ found.mixture, expected["regret_per_type"])
    close(np.array(expected["adversary"]) @ regret @ found.mixture, expected["value"])  # no mixture does better:
    assert (np.array(expected["adversary"]) @ regret >= expected["value"] - 1e-9).all()
    close(min_max_regret(37 * regret).mixture, expected["weights"])
    for other in CASES.values():  # an iterative solver does no better either
        if other["function"] == "omwu" and other["inputs"]["regret"] == case["inputs"]["regret"]:
            assert found.value <= other["expected"]["max_regret"] + 1e-12
    order = np.random.default_rng(0).permutation(regret.shape[1])
    close(min_max_regret(regret[:, order]).mixture, np.array(expected["weights"])[order])


def test_the_game_is_not_transposed_and_type_weights_scale_rows():
    regret = np.array(CASES["R1"]["inputs"]["regret"])
    wrong = CASES["R1"]["expected"]["transposed_by_mistake"]
    close(min_max_regret(regret.T).mixture, wrong["weights"])
    close((regret @ min_max_regret(regret.T).mixture).max(), wrong["true_max_regret"])
    found, expected = min_max_regret(regret, weights=[1, 4]), CASES["R2"]["expected"]
    close(found.mixture, expected["weights"])
    close(found.value, expected["value"])


def test_regrets_below_zero_have_the_value_zero():
    regret = np.array(CASES["R6"]["inputs"]["regret"])
    found = min_max_regret(regret)
    assert found.value == 0 and max(0, (regret @ found.mixture).max()) == 0
    free = min_max_regret(regret, zero_row=False)  # the smallest largest regret, whatever the zero row says
    np.testing.assert_allclose(free.mixture, found.mixture)
    assert free.value < 0
    assert min_max_regret(np.zeros((2, 2))).value == 0


@of("tabular_regret")
def test_regret_of_exact_policies(case):
    x, beta, want = case["inputs"], case["options"]["beta"], case["expected"]
    reference, rewards = np.array(x["ref_probs"]), np.array(x["type_rewards"])
    policies = reference * np.exp(rewards / beta)
    policies /= policies.sum(1, keepdims=True)
    close(policies, want["policies"])
    gains = np.log(policies / reference) @ policies.T
    close(gains, want["L"])
    regret = regret_matrix(gains)
    close(regret, want["regret"])
    close(beta * regret, want["reward_regret"])
    found = min_max_regret(regret)
    close(found.mixture, want["weights"])
    close(found.value, want["value"])
    mixed = found.mixture @ policies  # regret is linear: that of the mixed distribution itself is the same
    close(mixed, want["mixture"])
    direct = [(np.log(p / reference) * (p - mixed)).sum() for p in policies]
    close(direct, want["mixture_regret_direct"])
    close(regret @ found.mixture, direct)


@pytest.mark.parametrize(
    "keywords", [{"weights": [1, 0]}, {"weights": [1]}, {"solver": "omwu"}, {"steps": 1000}], ids=str
)
def test_factors_and_options_that_cannot_be_used_are_named(keywords):
    with pytest.raises(ValueError, match="one positive number per type|solved exactly"):
        min_max_regret([[0, 1], [1, 0]], **keywords)
