"""swepo_loss on hand-worked vectors, its limits and its invariances."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainers import SWEPOConfig, SWEPOTrainer
from trainers.metrics import ranking_metrics
from trainers.swepo import score_split, swepo_loss

VECTORS = json.loads((Path(__file__).parent / "vectors" / "swepo.json").read_text())
SWEPO_CASES = [case for case in VECTORS["cases"] if case["function"] == "swepo"]
RENAMED = {"m": "top_m"}


def options(case):
    return {"alpha": 0.0, **{RENAMED.get(k, k): v for k, v in case["options"].items()}}


def tensors(case, dtype=torch.float64):
    inputs = {k: torch.tensor([v], dtype=dtype) for k, v in case["inputs"].items()}
    mask = torch.ones_like(inputs["scores"], dtype=torch.bool)
    return inputs["logratios"].requires_grad_(), inputs["scores"], mask


def close(found, expected, dtype=torch.float64):
    tolerance = VECTORS["tolerance"][str(dtype).removeprefix("torch.")]
    expected = torch.as_tensor(expected, dtype=torch.float64)
    error = (found.detach().double() - expected).abs() / expected.abs().clamp(min=1)
    assert error.max() <= tolerance, (found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", SWEPO_CASES, ids=lambda case: case["id"])
def test_vector(case, dtype):
    logratios, scores, mask = tensors(case, dtype)
    losses = swepo_loss(logratios, scores, mask, **options(case))
    losses.sum().backward()
    close(losses[0], case["expected"]["loss"], dtype)
    close(logratios.grad[0], case["expected"]["grad_logratios"], dtype)
    keep = {k: v for k, v in options(case).items() if k in ("positives", "top_m", "mean_over")}
    split = score_split(scores, mask, **keep)
    assert bool(split.positive.any()) == case["expected"]["used"]
    for side in ("positive", "negative"):
        if case["expected"]["used"]:
            assert getattr(split, side)[0].tolist() == case["expected"][side]


@pytest.mark.parametrize("case", VECTORS["splits"])
def test_split(case):
    scores = torch.tensor([case["scores"]], dtype=torch.float64)
    split = score_split(
        scores, torch.ones_like(scores, dtype=torch.bool), positives=case["positives"], top_m=case["m"]
    )
    assert split.positive[0].tolist() == case["positive"] and split.negative[0].tolist() == case["negative"]
    assert bool(split.positive.any()) == case["used"]


@pytest.mark.parametrize("case", VECTORS["batch_cases"], ids=lambda case: case["id"])
def test_padded_batch_with_garbage(case):
    logratios = torch.tensor(case["inputs"]["logratios"], dtype=torch.float64, requires_grad=True)
    scores, mask = torch.tensor(case["inputs"]["scores"]).double(), torch.tensor(case["inputs"]["mask"]).bool()
    losses = swepo_loss(logratios, scores, mask, **options(case))
    close(losses, case["expected"]["losses"])
    used = score_split(scores, mask).positive.any(-1)
    assert used.tolist() == case["expected"]["used"]
    mean = losses.sum() / used.sum()
    close(mean, case["expected"]["loss"])
    mean.backward()
    close(logratios.grad, case["expected"]["grad_logratios_of_loss"])


def test_infinite_and_nan_garbage_in_padded_slots_changes_nothing():
    case = VECTORS["batch_cases"][0]
    clean, scores = (torch.tensor(case["inputs"][k], dtype=torch.float64) for k in ("logratios", "scores"))
    mask = torch.tensor(case["inputs"]["mask"]).bool()
    for garbage in (math.nan, math.inf, -math.inf):
        logratios = clean.masked_fill(~mask, garbage).requires_grad_()
        losses = swepo_loss(logratios, scores.masked_fill(~mask, garbage), mask, **options(case))
        close(losses, case["expected"]["losses"])
        losses.sum().backward()
        assert logratios.grad[mask].isfinite().all() and not logratios.grad[~mask].nan_to_num(0).any()


@pytest.mark.parametrize("case", VECTORS["token_cases"], ids=lambda case: case["id"])
def test_tokens_are_summed_not_averaged(case):
    inputs = {k: torch.tensor(v, dtype=torch.float64) for k, v in case["inputs"].items()}
    logps = inputs["logps"].requires_grad_()
    logratios = ((logps - inputs["ref_logps"]) * inputs["completion_mask"]).sum(-1)
    mask = inputs["completion_mask"].any(-1)
    loss = swepo_loss(logratios, inputs["scores"], mask, **options(case))
    close(loss[0], case["expected"]["loss"])
    loss.sum().backward()
    close(logps.grad, case["expected"]["grad_logps"])
    assert abs(loss.item() - case["not_expected"]["loss_if_token_mean_were_used"]) > 1e-3


def test_cases_that_must_equal_another_methods_case_do():
    by_id = {case["id"]: case for case in VECTORS["cases"]}
    pairs = [(by_id[a], by_id[b]) for a, b in VECTORS["identities"]]
    pairs = [(a, b) for x, y in pairs for a, b in ((x, y), (y, x)) if a["function"] == "swepo"]
    assert len(pairs) >= 5 and {b["function"] for _, b in pairs} >= {"dpo", "infonca"}
    for case, other in pairs:
        logratios, scores, mask = tensors(case)
        losses = swepo_loss(logratios, scores, mask, **options(case))
        losses.sum().backward()
        close(losses[0], other["expected"]["loss"])
        close(logratios.grad[0], other["expected"]["grad_logratios"])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"weighting": "none"},
        {"weighting": "absolute"},
        {"weighting": "signed"},
        {"weighting": "signed", "power": 2},
        {"positives": "best"},
        {"positives": "top_m", "top_m": 2},
        {"positives": "top_m", "top_m": 2, "mean_over": "all"},
        {"gamma": 2.5},
        {"alpha_inside_beta": True},
        {"power": 0},
    ],
    ids=str,
)
def test_gradcheck_permutation_and_shift(kwargs):
    generator = torch.Generator().manual_seed(0)
    logratios = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(3, 5, generator=generator, dtype=torch.float64) * 3
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()

    def loss(x, scores=scores, mask=mask):
        return swepo_loss(x, scores, mask, **{"beta": 0.3, "alpha": 0.4, **kwargs})

    assert torch.autograd.gradcheck(loss, logratios)
    gradient = torch.autograd.grad(loss(logratios).sum(), logratios)[0]
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(3).double(), rtol=0, atol=1e-12)
    assert not gradient[~mask].any()
    order = torch.tensor([3, 0, 4, 2, 1])
    moved = torch.autograd.grad(loss(logratios[:, order], scores[:, order], mask[:, order]).sum(), logratios)[0]
    torch.testing.assert_close(moved, gradient)
    torch.testing.assert_close(loss(logratios + 7, scores - 1000), loss(logratios))


def test_two_responses_are_dpo_whatever_the_weights():
    logratios = torch.tensor([[1.3, -0.4], [-2.0, 0.5]], dtype=torch.float64)
    scores, mask = torch.tensor([[6.0, 4.0], [0.0, 1.0]]), torch.ones(2, 2, dtype=torch.bool)
    margins = torch.stack([logratios[0, 0] - logratios[0, 1], logratios[1, 1] - logratios[1, 0]])
    dpo = -torch.nn.functional.logsigmoid(0.1 * margins)
    for kwargs in (
        {"weighting": "none"},
        {"alpha": 3.0},
        {"alpha": 0.5, "power": 2},
        {"positives": "best"},
        {"positives": "top_m"},
    ):
        losses = swepo_loss(logratios, scores, mask, **{"beta": 0.1, "alpha": 0.2, **kwargs})
        torch.testing.assert_close(losses, dpo, rtol=0, atol=1e-12)
    signed = swepo_loss(logratios, scores, mask, beta=0.1, alpha=0.2, weighting="signed")
    offset = 0.2 * torch.tensor([2.0, 1.0])
    torch.testing.assert_close(signed, -torch.nn.functional.logsigmoid(0.1 * margins + offset))


def test_step_zero_is_log_of_n_over_the_number_of_positives():
    scores = torch.tensor([[9.0, 7, 4, 1, 0], [1, 0, 0, 0, 0]])
    losses = swepo_loss(torch.zeros(2, 5), scores, torch.ones(2, 5).bool(), beta=0.7, alpha=9, weighting="none")
    torch.testing.assert_close(losses, torch.tensor([math.log(5 / 2), math.log(5)]))


def test_scores_times_c_with_alpha_over_c_change_nothing():
    generator = torch.Generator().manual_seed(1)
    logratios, scores = torch.randn(4, 3, generator=generator), torch.randn(4, 3, generator=generator)
    mask = torch.ones(4, 3, dtype=torch.bool)
    torch.testing.assert_close(
        swepo_loss(logratios, scores * 8, mask, beta=0.2, alpha=0.5),
        swepo_loss(logratios, scores, mask, beta=0.2, alpha=4.0),
    )


def test_metrics_of_the_default_example():
    expected = VECTORS["metrics"]
    case = next(case for case in SWEPO_CASES if case["id"] == expected["case"])
    logratios, scores, mask = tensors(case)
    metrics = ranking_metrics(case["options"]["beta"] * logratios.detach(), scores, mask)
    close(metrics["rewards/margins"][0], expected["margin_best_worst"])
    close(metrics["rewards/accuracies"][0], expected["accuracy_best_worst"])


@pytest.mark.parametrize("weighting", ["absolute", "signed"])
def test_no_gradient_passes_through_the_scores(weighting):
    logratios, scores, mask = tensors(next(case for case in SWEPO_CASES if case["id"] == "A2"))
    losses = swepo_loss(logratios, scores.requires_grad_(), mask, beta=0.1, alpha=0.25, weighting=weighting)
    losses.sum().backward()
    assert scores.grad is None and logratios.grad.abs().min() > 0


@pytest.mark.parametrize(
    "options, weights",
    [
        ({}, [2.5535894581, 1.5488302986, 1.3668379412, 2.8935959442]),
        ({"gamma": 2.0}, [2.5535894581, 1.5488302986, 2 * 1.3668379412, 2 * 2.8935959442]),
        ({"alpha_inside_beta": True}, [math.exp(0.025 * d) for d in (3.75, 1.75, 1.25, 4.25)]),
        ({"alpha_inside_beta": True, "gamma": 2.0}, [math.exp(0.025 * 3.75), math.exp(0.025 * 1.75),
                                                     2 * math.exp(0.025 * 1.25), 2 * math.exp(0.025 * 4.25)]),
    ],
)  # fmt: skip
def test_the_metrics_show_the_weights_of_the_loss(tmp_path, options, weights):
    trainer = SWEPOTrainer.__new__(SWEPOTrainer)
    trainer.args = SWEPOConfig(output_dir=str(tmp_path), use_cpu=True, beta=0.1, alpha=0.25, **options)
    logratios, scores, mask = tensors(next(case for case in SWEPO_CASES if case["id"] == "A2"))
    batch = {"scores": scores, "mask": mask}
    policy, reference = (SimpleNamespace(logps=x.unsqueeze(-1)) for x in (logratios, torch.zeros_like(logratios)))
    losses, metrics = trainer.loss(batch, policy, reference)
    terms = [w * math.exp(0.1 * x) for w, x in zip(weights, logratios[0].tolist(), strict=True)]
    close(losses, [-math.log((terms[0] + terms[1]) / sum(terms))])
    close(metrics["swepo/max_weight"], [max(weights)])
    close(metrics["swepo/effective_responses"], [sum(terms) ** 2 / sum(term**2 for term in terms)])
