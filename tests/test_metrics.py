"""Ranking metrics against plain Python and scipy; the meter on one and two processes."""

import json
import math
import random
from itertools import combinations, permutations

import pytest
import torch
from accelerate import Accelerator
from scipy.stats import kendalltau

import processes
from trainers.metrics import MetricMeter, kendall_tau, pairwise_accuracy, ranking_metrics

NAMES = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")} | {
    f"ranking/{name}" for name in ("pairwise_accuracy", "ndcg", "kendall_tau")
}


def random_rows(seed, count=40, values=4):
    """Rows (rewards, scores) of 0 to 6 responses; few distinct values, so that ties of every kind occur."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        k = rng.randint(0, 6)
        rows.append(
            ([rng.randint(-values, values) / 8 for _ in range(k)], [rng.randint(1, values) / 2 for _ in range(k)])
        )
    return rows


def batch(rows, slots=9, garbage=0.0, dtype=torch.float64):
    """Pads rows to (B, slots) on the right with `garbage`."""
    rewards, scores = (torch.full((len(rows), slots), garbage, dtype=dtype) for _ in range(2))
    mask = torch.zeros(len(rows), slots, dtype=torch.bool)
    for b, (row_rewards, row_scores) in enumerate(rows):
        rewards[b, : len(row_rewards)] = torch.tensor(row_rewards, dtype=dtype)
        scores[b, : len(row_scores)] = torch.tensor(row_scores, dtype=dtype)
        mask[b, : len(row_rewards)] = True
    return rewards, scores, mask


def reference_ndcg(rewards, scores):
    """Expectation over every order that falling rewards allow, by listing all orders."""
    low, high = min(scores), max(scores)
    gains = [(score - low) / (high - low) for score in scores]

    def dcg(order):
        return sum(gains[i] / math.log2(rank + 2) for rank, i in enumerate(order))

    orders = [
        order
        for order in permutations(range(len(rewards)))
        if all(rewards[a] >= rewards[b] for a, b in zip(order, order[1:], strict=False))
    ]
    best = dcg(sorted(range(len(scores)), key=lambda i: -scores[i]))
    return sum(map(dcg, orders)) / len(orders) / best


def reference(rewards, scores):
    """All metrics of one prompt in plain Python, NaN where undefined."""
    if len(set(scores)) < 2:
        return dict.fromkeys(NAMES, math.nan)
    chosen, rejected = rewards[scores.index(max(scores))], rewards[scores.index(min(scores))]
    credits = []
    for i, j in combinations(range(len(scores)), 2):
        if scores[i] != scores[j]:
            agreement = (rewards[i] - rewards[j]) * (scores[i] - scores[j])
            credits.append(0.5 if agreement == 0 else float(agreement > 0))
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": float(chosen > rejected),
        "ranking/pairwise_accuracy": sum(credits) / len(credits),
        "ranking/ndcg": reference_ndcg(rewards, scores),
        "ranking/kendall_tau": kendalltau(rewards, scores).statistic,
    }


def assert_same(got, expected, atol=0.0):
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=atol, equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_plain_python_on_ragged_rows_with_ties(dtype, atol):
    rows = random_rows(0)
    got = ranking_metrics(*batch(rows, dtype=dtype))
    assert got.keys() == NAMES
    expected = [reference(*row) for row in rows]
    assert 0 < sum(math.isnan(row["ranking/ndcg"]) for row in expected) < len(rows) / 2
    assert any(len({*x}) == 1 and len({*s}) > 1 for x, s in rows)  # as at step 0: no rank correlation
    assert_same(got, {name: torch.tensor([row[name] for row in expected], dtype=dtype) for name in NAMES}, atol)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_slots_and_their_number_do_not_matter(garbage):
    rows = random_rows(1)
    expected = ranking_metrics(*batch(rows, slots=6))
    assert_same(ranking_metrics(*batch(rows, slots=11, garbage=garbage)), expected, atol=1e-15)


def test_permutation_of_slots_changes_nothing():
    # Distinct scores: with ties "the first best" names another response after a permutation.
    rng = random.Random(2)
    rows = [([rng.gauss(0, 1) for _ in range(k)], rng.sample(range(20), k)) for k in (2, 3, 5, 6, 4)]
    rows[3] = ([0.5, 0.5, -1.0, 0.5, -1.0, 2.0], rows[3][1])
    rewards, scores, mask = batch(rows, slots=7, garbage=math.nan)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert not mask[:, order].equal(mask)
    permuted = ranking_metrics(rewards[:, order], scores[:, order], mask[:, order])
    assert_same(permuted, ranking_metrics(rewards, scores, mask), atol=1e-12)


def test_scale_and_shift_of_scores_change_nothing():
    rewards, scores, mask = batch(random_rows(3))
    assert_same(
        ranking_metrics(rewards, 1000 * scores - 7e4, mask), ranking_metrics(rewards, scores, mask), atol=1e-12
    )


def test_a_nan_reward_leaves_only_its_own_prompt_undefined():
    rewards = torch.tensor([[1.0, math.nan, 0.0], [1.0, 2.0, 0.0]])
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    for name, value in ranking_metrics(rewards, scores, torch.ones(2, 3, dtype=torch.bool)).items():
        assert value.isnan().tolist() == [True, False], name


def test_infinite_rewards_are_ranked():
    rewards = torch.tensor([[math.inf, -math.inf, 0.0, -math.inf]])
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert pairwise_accuracy(rewards, scores, mask).item() == pytest.approx(5.5 / 6)
    assert kendall_tau(rewards, scores, mask).item() == pytest.approx(5 / math.sqrt(30))


def test_half_precision_rewards_are_computed_in_float32_without_gradient():
    rewards = torch.tensor([[256.0, 1.0, 2.0]], dtype=torch.bfloat16, requires_grad=True)
    metrics = ranking_metrics(rewards, torch.tensor([[3.0, 1.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool))
    # 255 is exact in float32; bfloat16 keeps 8 bits, so larger differences would be rounded there.
    assert metrics["rewards/margins"].item() == 255.0
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in metrics.values())


def test_close_float64_scores_are_not_tied_by_float32_rewards():
    scores = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    value = pairwise_accuracy(torch.tensor([[0.0, 1.0]]), scores, torch.ones(1, 2, dtype=torch.bool))
    assert value.item() == 1.0


def test_shapes_that_would_broadcast_are_refused():
    mask = torch.ones(4, 3, dtype=torch.bool)
    with pytest.raises(AssertionError, match=r"\(B,K\)"):
        pairwise_accuracy(torch.zeros(4, 1), torch.zeros(4, 3), mask)


def test_meter_weights_every_defined_entry_equally():
    meter = MetricMeter()
    meter.update({"a": torch.tensor([1.0, math.nan, 3.0]), "b": torch.tensor(4.0), "c": torch.tensor([math.nan])})
    meter.update({"a": torch.tensor([8.0]), "b": 6.0})
    values = meter.compute()
    assert list(values) == ["a", "b", "c"]
    assert values["a"] == 4.0 and values["b"] == 5.0 and math.isnan(values["c"])
    assert meter.compute()["a"] == 4.0
    meter.reset()
    assert meter.compute() == {}


def test_meter_keeps_small_values_after_a_large_sum():
    meter = MetricMeter()
    meter.update({"a": torch.tensor([2.0**26])})
    for _ in range(63):
        meter.update({"a": torch.ones(1)})
    assert meter.compute()["a"] == (2**26 + 63) / 64


def meter_on_processes(folder):
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    meter = MetricMeter()
    empty = meter.compute(accelerator)
    if accelerator.process_index == 0:
        meter.update({"both": torch.tensor([1.0, 2.0, float("nan")]), "zero": torch.tensor(5.0)})
    else:
        meter.update({"one": torch.tensor([7.0, 9.0]), "both": torch.tensor([6.0])})
    with open(folder / f"{accelerator.process_index}.json", "w") as file:
        json.dump([empty, meter.compute(accelerator)], file)
    accelerator.end_training()


@pytest.mark.distributed
def test_meter_reduces_over_processes_that_hold_different_names(tmp_path):
    codes, output = processes.run(meter_on_processes, tmp_path, count=2)
    assert codes == [0, 0], output
    for rank in range(2):
        text = (tmp_path / f"{rank}.json").read_text()
        assert text == '[{}, {"both": 3.0, "one": 8.0, "zero": 5.0}]'
