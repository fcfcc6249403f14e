"""LIRE: its limits, options and metrics, and what a run loads and says. Vectors and invariants: test_losses.py."""

import logging

import pytest
import torch

from test_losses import VECTORS, close
from test_trainer import logged, trainer
from trainers.lire import LIRETrainer, lire_loss, lire_metrics, transform_scores

VECTORS = VECTORS["lire"]
CASES = {case["id"]: case for case in VECTORS["cases"] if case["function"] == "lire"}


def tensors(case, dtype=torch.float64):
    logps, scores = (torch.tensor([case["inputs"][k]], dtype=dtype) for k in ("seq_logps", "scores"))
    lengths = torch.tensor([case["inputs"]["lengths"]]) if "lengths" in case["inputs"] else None
    return logps.requires_grad_(), scores, torch.ones_like(scores, dtype=torch.bool), lengths


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case["id"])
def test_transformed_scores_of_the_vectors(case):
    _, scores, mask, _ = tensors(case)
    found = transform_scores(scores, mask, case["options"]["score_transform"])[0]
    close(found, case["expected"]["transformed_scores"])


def test_mean_over_candidates_and_over_tokens():
    [case] = VECTORS["batch_cases"]
    logps, scores, mask = (
        torch.tensor(case["inputs"][k], dtype=torch.float64) for k in ("seq_logps", "scores", "mask")
    )
    found = lire_loss(logps, scores, mask.bool(), reduction="mean", **case["options"])
    close(found.mean(), case["not_expected"]["loss_if_mean_over_candidates_too"])
    [case] = VECTORS["token_cases"]
    logps, scores, tokens = (
        torch.tensor(case["inputs"][k], dtype=torch.float64) for k in ("logps", "scores", "completion_mask")
    )
    summed, lengths = (logps * tokens).sum(-1), tokens.sum(-1)
    averaged = lire_loss(summed, scores, tokens.any(-1), lengths=lengths, length_average=True,
                         **case["options"])  # fmt: skip
    close(averaged[0], case["not_expected"]["loss_if_token_mean_were_used"])


def test_limits_of_the_temperature():
    logps, scores, mask, _ = tensors(CASES["A"])
    hot = lire_loss(logps, scores, mask, temperature=1e9, score_transform="none")
    cold = lire_loss(logps, scores, mask, temperature=1e-3, score_transform="none")
    torch.testing.assert_close(hot, -scores.mean(-1), rtol=0, atol=1e-8)
    torch.testing.assert_close(cold, -scores[:, 1], rtol=0, atol=1e-8)  # -9.5 is the most likely
    assert not torch.autograd.grad(cold.sum(), logps)[0].any()


def test_score_temperature_and_loss_weight():
    logps, scores, mask, lengths = tensors(CASES["D_mean"])
    torch.testing.assert_close(
        lire_loss(logps, scores, mask, score_temperature=0.5), lire_loss(logps, scores * 2, mask)
    )
    sft = lire_loss(logps, scores, mask, lengths=lengths, sft_alpha=0.2) - lire_loss(logps, scores, mask)
    torch.testing.assert_close(sft[0], torch.tensor(0.2 * 11 / 9).double())
    torch.testing.assert_close(
        lire_loss(logps, scores, mask, lengths=lengths, sft_alpha=0.2, loss_weight=5),
        5 * lire_loss(logps, scores, mask) + sft,
    )


@pytest.mark.parametrize("options", [{"length_average": True}, {"sft_alpha": 0.1}])
def test_an_average_over_tokens_needs_their_number(options):
    with pytest.raises(ValueError, match="lengths"):
        lire_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2).bool(), **options)


def test_metrics_of_the_default_example_and_of_a_saturated_one():
    expected = VECTORS["metrics"]
    lengths = torch.tensor([[10, 8, 15, 9]])
    found = lire_metrics(*tensors(CASES[expected["case"]])[:3], lengths)
    for name, key in (
        ("effective_candidates", "effective_candidates"),
        ("prob_best", "prob_best"),
        ("expected_score", "expected_score"),
        ("mean_score", "mean_score"),
        ("gradient", "grad_l1"),
    ):
        close(found["lire/" + name][0], expected[key])
    assert found["lire/vanished"].item() == 0 and found["lire/likeliest_length"].item() == 8
    saturated = lire_metrics(*tensors(CASES["S1"])[:3], lengths)
    assert saturated["lire/vanished"].item() == 1 and 1 <= saturated["lire/effective_candidates"].item() < 1.001
    constant = lire_metrics(*tensors(CASES["Q1"])[:3], lengths)
    assert all(value.isnan().all() for value in constant.values())


@pytest.mark.parametrize(
    "options", [{}, {"length_average": True}, {"reduction": "mean", "loss_weight": 3.0}, {"score_transform": "none"}]
)
def test_gradient_and_spread_are_what_they_say(options):
    generator = torch.Generator().manual_seed(0)
    logps = (torch.randn(3, 5, generator=generator, dtype=torch.float64) * 3).requires_grad_()
    scores = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    mask, lengths = torch.arange(5) < torch.tensor([[5], [3], [2]]), torch.randint(1, 9, (3, 5), generator=generator)
    lire_loss(logps, scores, mask, lengths=lengths, **options).sum().backward()
    found = lire_metrics(logps, scores, mask, lengths, temperature=2.0, **options)
    torch.testing.assert_close(found["lire/gradient"], logps.grad.abs().sum(-1))
    values = logps.detach() / lengths if options.get("length_average") else logps.detach()
    spread = [row[keep].std(correction=0) for row, keep in zip(values, mask, strict=True)]
    torch.testing.assert_close(found["lire/spread"], torch.stack(spread))


def rows(lengths):
    """Tokenised rows with responses of the given lengths, the best score first."""
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(5, 300, (count,), generator=generator).tolist()

    scores = [2.0, 1.0, 0.0]
    return [{"prompt_ids": ids(3 + i), "response_ids": [ids(c) for c in lengths], "scores": scores} for i in range(4)]


def test_rounds_are_not_forgotten_when_a_trainer_is_built_by_hand(tmp_path, tokenizer):
    options = {"scorer": "trainers.generation.rewards.vader_sentiment"}
    with pytest.raises(ValueError, match="self_enhance trains in rounds"):
        trainer(tmp_path, tokenizer, data=rows([3, 5, 4]), cls=LIRETrainer, self_enhance=options).train()


def test_a_collapsed_distribution_is_warned_of_once(tmp_path, tokenizer, caplog):
    fields = {"cls": LIRETrainer, "per_device_train_batch_size": 2}
    with caplog.at_level(logging.WARNING, logger="trainers.lire"):
        t = trainer(tmp_path, tokenizer, data=rows([3, 30, 60]), **fields)
        t.train()
    assert logged(t, "lire/vanished") == [1, 1]
    assert len([r for r in caplog.records if "one to two times that deviation" in r.getMessage()]) == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="trainers.lire"):
        t = trainer(tmp_path, tokenizer, data=rows([4, 4, 4]), length_average=True, **fields)
        t.train()
    assert 0 < logged(t, "lire/spread")[0] < 4 and not caplog.records
