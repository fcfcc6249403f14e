"""The reward-KL experiment on a tiny model: it measures what it says, goes on where it stopped, and reports."""

import json

import pytest
import torch

from experiments import sparsepo_frontier
from experiments.sparsepo_frontier import at_equal_kl
from helpers import build_tokenizer, save_start, tiny_llama
from trainers.generation.sampler import Sample


@pytest.fixture
def run(tmp_path, monkeypatch):
    save_start(tmp_path / "model")
    monkeypatch.setattr(sparsepo_frontier, "TOKENS", 6)
    monkeypatch.setattr(sparsepo_frontier, "OPENINGS", sparsepo_frontier.OPENINGS[:1])
    monkeypatch.setattr(sparsepo_frontier, "KINDS", sparsepo_frontier.KINDS[:2])
    monkeypatch.setattr(
        sparsepo_frontier, "vader_sentiment", lambda prompts, texts: [text.count("e") / 9 for text in texts]
    )

    def call(*flags):
        folders = ["--model", tmp_path / "model", "--output", tmp_path / "out", "--report", tmp_path / "docs/frontier"]
        sizes = "--betas 0.5 --samples 4 --epochs 4".split()
        sparsepo_frontier.main([*map(str, folders), *sizes, *flags])
        return [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]

    return call


def test_runs_once_and_goes_on(run, tmp_path):
    first = run("--methods", "TDPO1", "--seeds", "1")
    assert [r["method"] for r in first] == ["reference", "TDPO1"]
    assert first[0]["kl"] == first[0]["logratio"] == 0.0 and first[1]["kl"] > 0
    assert len(first[1]["by_opening"]["kl"]) == 8 and "loss" in first[1]["history"][0]
    more = run("--methods", "TDPO1", "SparsePO common", "--seeds", "1", "2")
    assert more[:2] == first and len(more) == 5
    report = (tmp_path / "docs" / "frontier.md").read_text()
    assert "| TDPO1 | 0.5 | 0." in report and "[" in report
    assert (tmp_path / "docs" / "frontier.svg").read_text().count("<svg") == 1
    with pytest.raises(ValueError, match="samples"):
        run("--samples", "6")


def test_the_kl_is_the_sum_of_exact_divergences_along_the_sample(run, tmp_path):
    run("--methods", "TDPO1", "--seeds", "1")
    experiment = object.__new__(sparsepo_frontier.Experiment)
    experiment.tokenizer, policy = build_tokenizer(), tiny_llama(330, seed=7)
    experiment.fixed = tiny_llama(330)
    prompt, ids = "the quick", [9, 30, 41]
    found = experiment._kl(policy, prompt, Sample("", ids, True))
    start, total, ratio = experiment.tokenizer(prompt).input_ids, 0.0, 0.0
    for t, token in enumerate(ids):
        row = torch.tensor([start + ids[:t]])
        ours, theirs = (m(row).logits[0, -1].double().softmax(-1) for m in (policy, experiment.fixed))
        total += float((ours * (ours / theirs).log()).sum())
        ratio += float((ours[token] / theirs[token]).log())
    assert found == pytest.approx((total, ratio), rel=1e-4)


def test_rewards_are_compared_at_equal_kl_only_where_both_lines_reach():
    def line(method, seed, offset):
        return [{"method": method, "seed": seed, "kl": kl, "reward": 0.1 * kl + offset} for kl in (3.0, 11.0)]

    records = [r for s in (1, 2) for r in line("DPO", s, 0.1 * s)] + line("MaPO", 1, 0.3) + line("MaPO", 2, 0.2)
    found = at_equal_kl(records)["MaPO"]
    assert found["6"]["mean"] == pytest.approx((0.2 + 0.0) / 2) and found["6"]["count"] == 2
    assert found["12"] is None
