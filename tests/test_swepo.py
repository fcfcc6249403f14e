"""SWEPO: who is contrasted with whom, its limits, and what its metrics say. Vectors and invariants: test_losses.py."""

import math
from types import SimpleNamespace

import pytest
import torch

from test_losses import VECTORS, close, swepo_options
from trainers import SWEPOConfig, SWEPOTrainer
from trainers.swepo import score_split, swepo_loss

VECTORS = VECTORS["swepo"]
CASES = {case["id"]: case for case in VECTORS["cases"]}


def tensors(case):
    logratios, scores = (torch.tensor([case["inputs"][k]], dtype=torch.float64) for k in ("logratios", "scores"))
    return logratios.requires_grad_(), scores, torch.ones_like(scores, dtype=torch.bool)


@pytest.mark.parametrize("case", [c for c in CASES.values() if c["function"] == "swepo"], ids=lambda case: case["id"])
def test_sides_of_the_vectors(case):
    _, scores, mask = tensors(case)
    keep = {k: v for k, v in swepo_options(case).items() if k in ("positives", "top_m", "mean_over")}
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


def test_cases_that_must_equal_another_methods_case_do():
    pairs = [(CASES[a], CASES[b]) for a, b in VECTORS["identities"]]
    pairs = [(a, b) for x, y in pairs for a, b in ((x, y), (y, x)) if a["function"] == "swepo"]
    assert len(pairs) >= 5 and {b["function"] for _, b in pairs} >= {"dpo", "infonca"}
    for case, other in pairs:
        logratios, scores, mask = tensors(case)
        losses = swepo_loss(logratios, scores, mask, **swepo_options(case))
        losses.sum().backward()
        close(losses[0], other["expected"]["loss"])
        close(logratios.grad[0], other["expected"]["grad_logratios"])


def test_signed_weights_of_two_responses_are_dpo_with_an_offset():
    """Other weights of two responses change nothing: test_losses.py."""
    logratios, mask = torch.tensor([[1.3, -0.4], [-2.0, 0.5]], dtype=torch.float64), torch.ones(2, 2).bool()
    scores, margins = torch.tensor([[6.0, 4.0], [0.0, 1.0]]), torch.tensor([1.7, 2.5]).double()
    signed = swepo_loss(logratios, scores, mask, beta=0.1, alpha=0.2, weighting="signed")
    offset = 0.2 * torch.tensor([2.0, 1.0])
    torch.testing.assert_close(signed, -torch.nn.functional.logsigmoid(0.1 * margins + offset))


def test_scores_times_c_with_alpha_over_c_change_nothing():
    generator = torch.Generator().manual_seed(1)
    logratios, scores = torch.randn(4, 3, generator=generator), torch.randn(4, 3, generator=generator)
    mask = torch.ones(4, 3, dtype=torch.bool)
    torch.testing.assert_close(
        swepo_loss(logratios, scores * 8, mask, beta=0.2, alpha=0.5),
        swepo_loss(logratios, scores, mask, beta=0.2, alpha=4.0),
    )


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
    logratios, scores, mask = tensors(CASES["A2"])
    batch = {"scores": scores, "mask": mask}
    policy, reference = (SimpleNamespace(logps=x.unsqueeze(-1)) for x in (logratios, torch.zeros_like(logratios)))
    losses, metrics = trainer.loss(batch, policy, reference)
    terms = [w * math.exp(0.1 * x) for w, x in zip(weights, logratios[0].tolist(), strict=True)]
    close(losses, [-math.log((terms[0] + terms[1]) / sum(terms))])
    close(metrics["swepo/max_weight"], [max(weights)])
    close(metrics["swepo/effective_responses"], [sum(terms) ** 2 / sum(term**2 for term in terms)])
