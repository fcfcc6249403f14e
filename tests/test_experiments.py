"""The frame of the experiments: contrasts at equal KL and their verdicts, exact divergences, and runs that go on."""

import importlib
import json
import runpy
import sys

import numpy as np
import pytest
import torch

from experiments import frame, stories
from experiments.frame import Contrast, Experiment, at, differences, verdict
from experiments.stories import MODEL
from experiments.worlds import exact_kl, sample
from helpers import tiny_llama

PRIMARY = Contrast("new", "old", 0.1, at=2.0)


def toy(calls: list) -> Experiment:
    """Arms whose difference at 2 nats is 0.1, and 0 where both are at their last step."""

    def run(seed, quick):
        calls.append(seed)
        old = [{"kl": kl, "reward": 0.1 * kl + 0.01 * seed} for kl in (0.0, 4.0)]
        new = [
            {"kl": kl, "reward": value + 0.01 * seed}
            for kl, value in ((0.0, 0.0), (1.5, 0.225), (2.5, 0.375), (4.0, 0.4))
        ]
        return {"old": old, "new": new}

    return Experiment(name="toy", claim="new beats old", run=run, primary=PRIMARY, settings={"size": 1},
                      secondary=(Contrast("new", "old"), Contrast("new", "old", at=9.0)), seeds=(1, 2),
                      columns=("greedy",))  # fmt: skip


def test_a_finished_seed_is_not_run_again_and_the_report_has_the_contrasts(tmp_path):
    calls = []
    places = ["--output", str(tmp_path / "out"), "--report", str(tmp_path / "report")]
    frame.main(toy(calls), places)
    found = frame.main(toy(calls), [*places, "--seeds", "1", "2", "3"])
    assert calls == [1, 2, 3] and found["seeds"] == [1, 2, 3]
    primary, last, far = found["contrasts"]
    assert primary["gain"]["mean"] == pytest.approx(0.1) and primary["gain"]["verdict"] == "confirmed here"
    assert last["gain"]["mean"] == pytest.approx(0.0, abs=1e-12) and far["gain"] is None
    assert json.loads((tmp_path / "report/summary.json").read_text())["curves"]["2"]["old"][1]["kl"] == 4.0
    table = (tmp_path / "report/table.md").read_text()
    assert "**primary** new minus old, at 2" in table and "greedy" not in table  # which no arm measured
    assert (tmp_path / "report/plot.svg").read_text().count("<svg") == 1
    with pytest.raises(ValueError, match="quick"):
        frame.main(toy(calls), [*places, "--quick"])


def test_a_part_of_the_seeds_leaves_the_published_report_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame.main(toy([]), ["--seeds", "2"])
    assert not (tmp_path / "docs").exists()
    assert json.loads((tmp_path / "runs/experiments/toy/report/summary.json").read_text())["seeds"] == [2]
    frame.main(toy([]), [])
    assert json.loads((tmp_path / "docs/results/toy/summary.json").read_text())["seeds"] == [1, 2]


def test_a_curve_is_read_between_its_points_and_nowhere_else():
    points = [{"kl": 0.0, "reward": 0.0}, {"kl": 3.0, "reward": 0.6}, {"kl": 2.0, "reward": 0.5}]
    assert at(points, "kl", "reward", 1.0) == pytest.approx(0.25) and at(points, "kl", "reward", None) == 0.5
    assert np.isnan(at(points, "kl", "reward", 3.5))


def test_only_seeds_whose_curves_reach_the_place_count():
    def line(end, reward):
        return [{"kl": 0, "reward": 0.0}, {"kl": end, "reward": reward}]

    runs = [{"curves": {"old": line(end, 1.0), "new": line(4, 4.0)}} for end in (4, 1, 2)]
    found = differences(toy([]), PRIMARY, runs)
    assert found["count"] == 2 and found["mean"] == pytest.approx(((2 - 0.5) + (2 - 1.0)) / 2)
    known = differences(toy([]), Contrast("new", "old", at=1.0, known="cannot be below 0"), runs)
    assert known["count"] == 3 and known["verdict"] == "cannot be below 0"


@pytest.mark.parametrize(
    ("low", "high", "expected", "said"),
    [(0.02, 0.2, 0.1, "confirmed here"), (-0.2, -0.1, 0.1, "refuted here: the opposite"),
     (-0.04, 0.05, 0.1, "refuted here: excludes the expected effect"), (-0.04, 0.2, 0.1, "cannot tell"),
     (0.1, 0.2, None, "differs from 0"), (-0.1, 0.2, 0.0, "no effect seen, as expected"),
     (-0.2, -0.1, 0.0, "refuted here: excludes the expected effect"), (-0.1, 0.2, None, "cannot tell"),
     (0.12, 0.25, 0.06, "same sign, larger than expected"), (-0.25, -0.12, -0.06, "same sign, larger than expected"),
     (0.02, 0.08, 0.1, "same sign, smaller than expected"), (0.06, 0.25, 0.06, "confirmed here")],
)  # fmt: skip
def test_verdicts(low, high, expected, said):
    assert verdict({"mean": (low + high) / 2, "low": low, "high": high}, expected) == said


def test_a_missing_story_model_is_told_with_the_way_to_one(tmp_path, monkeypatch):
    monkeypatch.setattr(stories, "MODEL", tmp_path)
    with pytest.raises(FileNotFoundError, match="set POLYPO_STORIES to a folder of stories260K"):
        stories.story_model()


@pytest.mark.parametrize("name", ["emdpo_demo_rows", "sparsepo_heatmap"])
def test_help_writes_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_module(f"experiments.{name}", run_name="__main__")
    assert "usage:" in capsys.readouterr().out and not [*tmp_path.iterdir()]


def test_kl_is_the_sum_of_exact_divergences_along_samples_of_prompts_of_any_length():
    policy, reference, prompts = tiny_llama(50, seed=7), tiny_llama(50), [[5, 6, 7], [9]]
    samples, logits = sample(policy, prompts, 2, 4, seed=3)
    assert samples.shape == (2, 2, 4) and logits.shape == (2, 2, 4, 50)
    assert torch.equal(samples, sample(policy, prompts, 2, 4, seed=3)[0])
    found = exact_kl(logits, reference, prompts, samples)
    for p, prompt in enumerate(prompts):
        for k, response in enumerate(samples[p].tolist()):
            total = 0.0
            for t in range(4):
                row = torch.tensor([prompt + response[:t]])
                ours, theirs = (m(row).logits[0, -1].double().softmax(-1) for m in (policy, reference))
                total += (ours * (ours / theirs).log()).sum().item()
            assert found[p, k] == pytest.approx(total, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["swepo", "swepo_sft", "lire", "sparsepo", "sparsepo_stories", "emdpo", "emdpo_regret", "sgpo"]
)
def test_every_experiment_gives_numbers(name, tmp_path):
    module = importlib.import_module(f"experiments.{name}")
    if name in ("swepo", "swepo_sft", "lire", "sparsepo_stories") and not MODEL.exists():
        pytest.skip(f"needs {MODEL}")
    found = frame.main(module.EXPERIMENT, ["--quick", "--output", str(tmp_path)])
    assert found["contrasts"][0]["title"] == module.EXPERIMENT.primary.title
    values = [v for curves in found["curves"].values() for points in curves.values() for point in points
              for v in point.values()]  # fmt: skip
    assert np.isfinite(values).all()
    for curves in found["curves"].values() if name == "emdpo" else ():  # all rounds beside those up to the chosen one
        chosen, rounds = curves["ranking of 3"], curves["ranking of 3, last round"]
        assert len(rounds) == 2 and chosen == rounds[: len(chosen)]
        assert chosen[-1]["held_out"] == max(point["held_out"] for point in rounds)
