"""EM-DPO runs: what a run finds and leaves, its E-step, restarts and resuming."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import TrainerCallback

from emdpo_runs import em, em_config, groups, opposed_rows, quick_collection, round_folder, same, trained, weights  # noqa: F401
from helpers import build_tokenizer
from test_pages import check_page
from trainers import PlackettLuceConfig, PlackettLuceTrainer
from trainers.cli.report import write_report
from trainers.emdpo.annotators import halves
from trainers.emdpo.mixture import match_types
from trainers.emdpo.tables import read_annotators


@pytest.fixture(scope="module")
def finished(tmp_path_factory, start):
    folder = tmp_path_factory.mktemp("finished")
    new = [row | {"annotator": "b" + row["annotator"]} for row in opposed_rows(annotators=3, seed=1)]
    trainer = trained(folder, start, eval_rows=[*opposed_rows(seed=1), *new], rounds=3)
    return trainer


def test_the_page_shows_types_rounds_and_the_training_of_each_type(finished, tmp_path):
    page = check_page(write_report(Path(finished.args.output_dir)).read_text())
    assert "3 round(s) of the likeliest of 1 restart(s)" in page.text and f"{len(opposed_rows())}" in page.text
    labels = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg"]
    assert "Loss" in labels and "num_types" in page.text
    assert "type-0" in page.text and "type-1" in page.text and "No setting differs." in page.text
    with pytest.raises(ValueError, match="--samples: .* is a run in stages"):
        write_report(Path(finished.args.output_dir), ["--samples", "1"])
    (tmp_path / "restart-0").mkdir()
    with pytest.raises(ValueError, match="no finished round of EM-DPO"):
        write_report(tmp_path)


def test_opposed_annotators_are_told_apart_and_the_files_say_so(finished):
    assert match_types(finished.posterior, groups(finished.annotators.names))[0] == 1
    folder = Path(finished.args.output_dir)
    names, posterior, likelihood = read_annotators(folder / "annotators.csv")
    assert names == list(map(str, finished.annotators.names)) and sorted(names) == [f"a{i}" for i in range(6)]
    np.testing.assert_array_equal(posterior, finished.posterior)
    rounds = list(csv.DictReader((folder / "rounds.csv").open()))
    assert len(rounds) == 3 and float(rounds[2]["log_likelihood"]) > float(rounds[0]["log_likelihood"]) + 5
    mixture = json.loads((folder / "mixture.json").read_text())
    assert mixture["prior"] == pytest.approx([0.5, 0.5], abs=1e-6)
    assert [folder / p for p in mixture["policies"]] == finished.policies
    for name in ("responsibilities.svg", "log_likelihood.svg", "held_out.csv", "tokenizer.json"):
        assert (folder / name).stat().st_size
    # Policies of earlier rounds are deleted, and their scores kept.
    assert not list(folder.glob("**/round-0[01]/*/policy")) and len(list(folder.glob("**/round-02/*/policy"))) == 2
    assert len(list(folder.glob("**/round-*/*/logps.parquet"))) == 6 and not list(folder.glob("**/training"))
    # The log-likelihood of the file is that of a fresh policy on the annotator's rows.
    rows = [row for row in opposed_rows() if row["annotator"] == "a1"]
    args = PlackettLuceConfig(output_dir=str(folder / "check"), use_cpu=True, report_to="none")
    judge = PlackettLuceTrainer(str(finished.policies[0]), ref_model=finished._name, args=args,
                                eval_dataset=Dataset.from_list(rows), processing_class=build_tokenizer())  # fmt: skip
    mean = judge.evaluate()["eval_loss"]
    assert likelihood[names.index("a1"), 0] == pytest.approx(-5 * mean, abs=1e-3)


def test_held_out_rows_are_scored_under_the_mixture(finished):
    """Annotators with training rows by their posterior, new ones by the mixture weights."""
    metrics = finished.evaluate()
    names, posterior, likelihood = read_annotators(Path(finished.args.output_dir) / "held_out.csv")
    known = dict(zip(map(str, finished.annotators.names), finished.posterior, strict=True))
    prior = np.stack([known.get(name, finished.posterior.mean(0)) for name in names])
    joint = np.log(np.maximum(prior, 1e-12)) + likelihood
    expected = np.logaddexp.reduce(joint, 1)
    np.testing.assert_allclose(posterior, np.exp(joint - expected[:, None]), atol=1e-9)
    assert metrics["eval_log_likelihood_per_annotator"] == pytest.approx(np.mean(expected))
    assert metrics["eval_items"] == 45 and metrics["eval_known_annotators"] == 6 and metrics["eval_annotators"] == 9
    assert metrics["eval_loss"] == pytest.approx(-np.sum(expected) / 45)


def test_weights_scale_the_likelihood_and_zero_removes_a_row(tmp_path, start):
    rows = opposed_rows()
    weighted = [row | {"weight": 0.0 if row["item"] == 2 else 2.0} for row in rows]
    for name, data in (("a", weighted), ("b", [row for row in rows if row["item"] != 2])):
        trained(tmp_path / name, start, data, rounds=1, num_types=1, max_steps=1, learning_rate=1e-9)
    one, other = (sorted(read_annotators(t / "annotators.csv")[2][:, 0]) for t in (tmp_path / "a", tmp_path / "b"))
    np.testing.assert_allclose(one, 2 * np.array(other), rtol=1e-4)
    rounds = [next(csv.DictReader((tmp_path / name / "rounds.csv").open())) for name in ("a", "b")]
    per_item = [float(r["log_likelihood_per_item"]) for r in rounds]
    assert per_item[0] == pytest.approx(per_item[1], rel=1e-4)  # per unit of weight
    assert per_item[1] == pytest.approx(sum(other) / 24, rel=1e-6)
    for name in ("a", "b"):
        lines = list(csv.DictReader((tmp_path / name / "annotators.csv").open()))
        assert [line["items"] for line in lines] == ["4"] * 6
    assert [r["rows_scored"] for r in rounds] == ["24", "24"]


def test_halves_train_on_one_half_and_score_the_other(tmp_path, start):
    steps = []

    class Count(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    trainer = trained(tmp_path, start, score_on="heldout_half", rounds=2, learning_rate=0.01, callbacks=[Count()])
    counts = [
        [int(row["items"]) for row in csv.DictReader((round_folder(trainer, i) / "annotators.csv").open())]
        for i in (0, 1)
    ]
    assert set(counts[0]) == {2, 3} and counts[1] == [5] * 6
    rounds = list(csv.DictReader((tmp_path / "rounds.csv").open()))
    assert [int(row["rows_scored"]) for row in rounds] == [sum(counts[0]), 30]
    # The second round trains on what the first one scored, and what is published on everything.
    assert steps == [-(-(30 - sum(counts[0])) // 4)] * 2 + [-(-sum(counts[0]) // 4)] * 2 + [-(-30 // 4)] * 2
    # Each row counts as it was scored by policies that had not seen it: half 1 in the first round, half 0 in the next.
    judged = trainer.judged
    half, expected = halves(judged.owner, trainer.args.seed), np.zeros((6, 2))
    for index in (0, 1):
        for k in (0, 1):
            logps = trainer.score(round_folder(trainer, index) / f"type-{k}", [judged], "")[0]
            rows = judged.log_likelihood(logps, beta=0.1, top=None)
            np.add.at(expected[:, k], judged.owner, np.where(half != index, rows, 0))
    found = read_annotators(round_folder(trainer, 1) / "annotators.csv")[2]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("peft", [False, True])
def test_policies_of_halves_are_trained_once_more_on_all_rows_with_the_final_posterior(tmp_path, start, peft):
    options = {"learning_rate": 0.01, "seed": 3, "eval_rows": opposed_rows(seed=1), "peft": peft}
    trainer = trained(tmp_path / "halves", start, score_on="heldout_half", rounds=2, **options)
    # One round from its posterior, with the seed that a third round would have.
    final = dict(zip(trainer.annotators.names, trainer.posterior.tolist(), strict=True))
    whole = trained(tmp_path / "whole", start, initial_posterior=final, rounds=1, **options | {"seed": 5})
    mixture = json.loads((tmp_path / "halves/mixture.json").read_text())
    for path, expected in zip(mixture["policies"], whole.policies, strict=True):
        same(weights(tmp_path / "halves" / path), weights(expected))
    assert mixture["prior"] == trainer.posterior.mean(0).tolist()
    # The held-out rows are judged by what is published.
    found, held_out = read_annotators(tmp_path / "halves/held_out.csv")[2], trainer.held_out
    expected = np.zeros((6, 2))
    for k, policy in enumerate(whole.policies):
        (policy.parent / "logps.parquet").unlink()  # scored alone, as in the other run
        logps = whole.score(policy.parent, [held_out], "")[0]
        np.add.at(expected[:, k], held_out.owner, held_out.log_likelihood(logps, beta=0.1, top=None))
    np.testing.assert_array_equal(found, expected)
    known = np.log(np.maximum(trainer.posterior, 1e-12))
    order = [trainer.annotators.names.index(name) for name in read_annotators(tmp_path / "whole/held_out.csv")[0]]
    mean = np.logaddexp.reduce(known[order] + found, 1).mean()
    assert trainer.evaluate()["eval_log_likelihood_per_annotator"] == pytest.approx(mean)
    assert len(list(tmp_path.glob("halves/**/policy"))) == 2


def test_policies_on_all_rows_go_on_after_a_kill_and_are_made_anew_for_more_rounds(tmp_path, start):
    options = {"score_on": "heldout_half", "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path / "whole", start, rounds=2, **options)

    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if "final/type-1" in args.output_dir and state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        em(tmp_path / "cut", start, rounds=2, callbacks=[Die()], **options).train()
    assert (tmp_path / "cut/restart-0/round-01/final/type-1/training/checkpoint-3").is_dir()
    em(tmp_path / "longer", start, rounds=1, **options).train()
    for name in ("cut", "longer"):
        again = trained(tmp_path / name, start, rounds=2, **options, stop_change=1e-12)  # may be another one
        np.testing.assert_array_equal(again.posterior, whole.posterior)
        for found, expected in zip(again.policies, whole.policies, strict=True):
            same(weights(found), weights(expected))
        assert len(list((tmp_path / name).glob("**/policy"))) == 2
    with pytest.raises(ValueError, match=r"round-00/type-0/policy was deleted when this run went further"):
        em(tmp_path / "longer", start, rounds=1, **options).train()
    assert all(policy.is_dir() for policy in again.policies)


def test_restarts_keep_the_likeliest_run(tmp_path, start):
    trainer = trained(tmp_path, start, init="dirichlet", restarts=3, rounds=1, learning_rate=0.01)
    assert len({path.read_text() for path in tmp_path.glob("restart-*/start.csv")}) == 3
    rounds = list(csv.DictReader((tmp_path / "rounds.csv").open()))
    best = max(rounds, key=lambda row: float(row["log_likelihood"]))
    assert f"restart-{best['restart']}/" in trainer.policies[0].as_posix()
    assert len({row["log_likelihood"] for row in rounds}) == 3
    assert len(list(tmp_path.glob("restart-*/*/*/policy"))) == 2


def test_a_run_stops_when_nothing_changes_any_more(tmp_path, start):
    trained(tmp_path, start, rounds=6, stop_change=50.0)
    assert len(list((tmp_path / "restart-0").glob("round-*"))) == 2
    em(tmp_path / "halves", start, rounds=6, stop_change=50.0, score_on="heldout_half").train()
    assert len(list((tmp_path / "halves/restart-0").glob("round-*"))) == 3  # the first one scores half of the rows


def test_finished_rounds_are_kept_and_more_can_be_asked_for(tmp_path, start):
    em(tmp_path, start, rounds=1).train()
    first = (tmp_path / "restart-0/round-00/manifest.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"beta was 0.1 and is 0.2"):
        em(tmp_path, start, rounds=1, beta=0.2).train()
    with pytest.raises(ValueError, match=r"training rows are others"):
        em(tmp_path, start, opposed_rows()[:-1], rounds=1).train()
    with pytest.raises(ValueError, match=r"model_init_kwargs was None and is \{'dtype': 'bfloat16'\}"):
        em(tmp_path, start, rounds=1, model_init_kwargs={"dtype": "bfloat16"}).train()
    trainer = trained(tmp_path, start, rounds=2)
    assert (tmp_path / "restart-0/round-00/manifest.json").stat().st_mtime_ns == first
    whole = trained(tmp_path / "whole", start, rounds=2)
    np.testing.assert_array_equal(trainer.posterior, whole.posterior)
    same(weights(trainer.policies[0]), weights(whole.policies[0]))
    for fewer in ({"rounds": 1}, {"rounds": 2, "stop_change": 1e9}):
        if "stop_change" in fewer:
            em(tmp_path, start, rounds=3).train()
        with pytest.raises(ValueError, match=r"round-0\d/type-0/policy was deleted when this run went further"):
            em(tmp_path, start, **fewer).train()
