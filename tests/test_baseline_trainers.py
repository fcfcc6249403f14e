"""LIRE and the baselines through the whole stack: closed forms at step 0, a lower loss later, DPO as in TRL."""

import copy
import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

import trainers
from batches import own_logps
from test_trainer import config, rows, signal_rows, trainer
from trainers import (
    DPOTrainer,
    InfoNCATrainer,
    LIRETrainer,
    NCATrainer,
    PlackettLuceTrainer,
    RRHFTrainer,
    SGPOTrainer,
    SparsePOTrainer,
    SWEPOTrainer,
)
from trainers.emdpo.m_step import TypePolicyTrainer, m_step_rows


@torch.no_grad()
def summed_logps(model, row):
    return [float(own_logps(model, row["prompt_ids"], ids, torch.float64).sum()) for ids in row["response_ids"]]


def lire_by_hand(logps, row):
    weights, gains = (
        [math.exp(v - max(values)) for v in values] for values in ([x / 2 for x in logps], row["scores"])
    )
    return -sum(w * g for w, g in zip(weights, gains, strict=True)) / sum(weights) / sum(gains)


def rrhf_by_hand(logps, row):
    scores, per_token = row["scores"], [x / len(r) for x, r in zip(logps, row["response_ids"], strict=True)]
    pairs = itertools.permutations(range(len(scores)), 2)
    hinge = sum(max(0, per_token[j] - per_token[i]) for i, j in pairs if scores[i] > scores[j])
    return hinge - logps[scores.index(max(scores))]


STEP_ZERO = {
    DPOTrainer: lambda logps, row: math.log(2),
    PlackettLuceTrainer: lambda logps, row: math.log(math.factorial(len(logps))),
    InfoNCATrainer: lambda logps, row: math.log(len(logps)),
    NCATrainer: lambda logps, row: 2 * math.log(2),
    LIRETrainer: lire_by_hand,
    RRHFTrainer: rrhf_by_hand,
    SGPOTrainer: lambda logps, row: math.log(2),
}


@pytest.mark.parametrize("cls", STEP_ZERO, ids=lambda cls: cls.__name__)
def test_training_starts_at_the_closed_form_and_lowers_the_loss(tmp_path, tokenizer, cls):
    options = {"data": signal_rows(), "eval_data": signal_rows(), "per_device_train_batch_size": 7}
    t = trainer(tmp_path, tokenizer, cls=cls, learning_rate=2e-3, **options)
    expected = sum(STEP_ZERO[cls](summed_logps(t.model, row), row) for row in t.train_dataset) / 7
    before = copy.deepcopy(t.model.state_dict())
    assert t.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    t.train()
    assert t.evaluate()["eval_loss"] < expected - 1e-6
    assert all(not torch.equal(value, before[name]) for name, value in t.model.state_dict().items())
    assert (t.reference is None) == (cls in (LIRETrainer, RRHFTrainer))
    assert 0 <= t.state.log_history[1]["ranking/pairwise_accuracy"] <= 1


@pytest.mark.parametrize("cls", [*STEP_ZERO, SWEPOTrainer, SparsePOTrainer, TypePolicyTrainer])
def test_the_sft_term_is_the_likelihood_of_the_preferred_responses(tmp_path, tokenizer, monkeypatch, cls):
    """Per token, of SWEPO's positives and of all others' best response; prompts weigh as they do in the loss."""
    data = [row | {"weight": 1.0 + i % 2} for i, row in enumerate(rows())]
    t = trainer(tmp_path, tokenizer, data=data, cls=DPOTrainer)
    posterior = np.linspace(0.2, 1, len(data))
    if cls is TypePolicyTrainer:
        references = [[-5.0] * len(row["scores"]) for row in data]
        data = m_step_rows(t.train_dataset, posterior, np.ones(len(data)), references, "batch").to_list()
    terms, weights = [], []
    for row, factor in zip(t.train_dataset, posterior, strict=True):
        if len(set(row["scores"])) == 1:
            continue
        nll = [-x / len(ids) for x, ids in zip(summed_logps(t.model, row), row["response_ids"], strict=True)]
        bar = sum(row["scores"]) / len(nll) if cls is SWEPOTrainer else sorted(row["scores"])[-2]
        preferred = [x for x, score in zip(nll, row["scores"], strict=True) if score > bar]
        terms.append(sum(preferred) / len(preferred) * (factor if cls is TypePolicyTrainer else 1))
        weights.append(row["weight"])
    found = []
    for weight in (0.3, 0.0):
        options = {"data": data, "eval_data": data, "sft_weight": weight, "sft_reduction": "mean"}
        found.append(trainer(tmp_path, tokenizer, cls=cls, **options).evaluate())
        monkeypatch.setattr(cls, "preferred", None)  # never asked for without a weight
    assert found[0]["eval_sft_loss"] == pytest.approx(np.mean(terms), rel=1e-5) and "eval_sft_loss" not in found[1]
    added = 0.3 * np.average(terms, weights=weights)
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"] + added, abs=1e-5)


def test_lires_old_name_of_the_weight_is_the_same_option(tmp_path):
    with pytest.warns(FutureWarning, match="sft_alpha is sft_weight now"):
        args = config(tmp_path, LIRETrainer, sft_alpha=0.2)
        assert args.sft_weight == dataclasses.replace(args).sft_weight == 0.2
    with pytest.raises(ValueError, match="sft_alpha=0.2 is the old name of sft_weight=0.3: leave out sft_alpha"):
        config(tmp_path, LIRETrainer, sft_alpha=0.2, sft_weight=0.3)


@pytest.mark.parametrize("wrong", [-math.inf, math.nan])
@pytest.mark.parametrize("cls", [InfoNCATrainer, NCATrainer, SWEPOTrainer])
def test_a_prompt_without_a_signal_cannot_spoil_the_sft_term(tmp_path, tokenizer, cls, wrong):
    t = trainer(tmp_path, tokenizer, cls=cls, sft_weight=0.3)
    batch, forward = t.data_collator(list(t.train_dataset)), t.policy_forward
    left_out = ~t.signal(batch)[:, None, None] & batch["response_mask"]
    found = []
    for value in (0.0, wrong):
        t.policy_forward = lambda *given, value=value: (policy := forward(*given))._replace(
            logps=policy.logps.masked_fill(left_out, value)
        )
        t.model.zero_grad()
        loss = t.compute_loss(t.model.train(), batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in t.model.parameters())])
    assert left_out.any() and all(map(torch.equal, *found))


THEIRS = {"loss", "grad_norm", "learning_rate", "epoch", "step"}  # of transformers


@pytest.mark.parametrize("name", [name for name in trainers.__all__ if name.endswith("Trainer")])
def test_every_logged_metric_is_on_its_page(tmp_path, tokenizer, name):
    cls = {"EMDPOTrainer": TypePolicyTrainer}.get(name, getattr(trainers, name))
    if cls is trainers.PreferenceTrainer:
        return
    page = (Path(__file__).parents[1] / "docs/metrics.md").read_text()
    rows = [{"prompt_ids": [5, 9 - i], "response_ids": [[6, 7 + i, 8], [9]], "scores": [1.0, 0.0]} for i in range(6)]
    if cls is TypePolicyTrainer:
        rows = m_step_rows(Dataset.from_list(rows), np.full(6, 0.5), np.ones(6), [[0.0, 0.0]] * 6, "batch").to_list()
    options = {"independent": True} if cls is trainers.SparsePOTrainer else {}
    t = trainer(tmp_path, tokenizer, data=rows, cls=cls, **options)
    t.train()
    logged = set().union(*[log for log in t.state.log_history if "loss" in log]) - THEIRS
    assert len(logged) > 10 and not [metric for metric in logged if f"`{metric}`" not in page]
