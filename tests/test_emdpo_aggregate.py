"""The aggregation as a user meets it: called again, with other settings, on a run that moved, with factors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from torch.distributed.run import get_args_parser

from emdpo_rows import opposed_rows, quick_collection  # noqa: F401
from emdpo_runs import em, same, weights
from helpers import tiny_llama
from trainers import MixturePolicy
from trainers.cli import aggregate
from trainers.emdpo.aggregate import compare
from trainers.emdpo.serve import MIXTURE

PROMPTS = ["the cat sat on", "a mat and saw", "over an old green hill"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, start):
    Dataset.from_list([{"prompt": p} for p in PROMPTS]).to_json(start / "prompts.jsonl")
    folder = tmp_path_factory.mktemp("finished")
    em(folder, start, learning_rate=0.02, rounds=1).train()
    return folder


@pytest.fixture
def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


def command(run, start, *more):
    return ["--run_dir", str(run), "--dataset_name", str(start / "prompts.jsonl"), "--max_new_tokens", "6",
            "--num_generations", "2", *map(str, more)]  # fmt: skip


def overview(folder):
    return json.loads((folder / "aggregate.json").read_text())


def test_the_distilled_policy_is_trained_anew_when_anything_about_it_changed(copied, start, capsys):
    distil = ("--distill", "--distill_learning_rate", "1e-2")
    aggregate.main(command(copied, start, *distil))
    folder = copied / "aggregate"
    first, report = weights(folder / "distilled"), overview(folder)
    assert not (folder / "distilled-training").exists() and "trained anew" not in capsys.readouterr().out
    made = (folder / "distilled/model.safetensors").stat().st_mtime_ns
    aggregate.main(command(copied, start, *distil))
    assert (folder / "distilled/model.safetensors").stat().st_mtime_ns == made and overview(folder) == report
    capsys.readouterr()
    for changed, name in (
        (("--distill", "--distill_learning_rate", "2e-2"), "distill_learning_rate"),
        ((*distil, "--distill_batch_size", "2"), "answers per step"),
        ((*distil, "--type_weights", "1", "50"), "mixture weights"),
    ):
        before = weights(folder / "distilled")
        aggregate.main(command(copied, start, *changed))
        said = next(line for line in capsys.readouterr().out.splitlines() if "is trained anew, because of" in line)
        assert name in said
        after = weights(folder / "distilled")
        assert max(float((after[n] - v).abs().max()) for n, v in before.items()) > 1e-5
    aggregate.main(command(copied, start, *distil))
    same(weights(folder / "distilled"), first)
    assert overview(folder) == report
    assert report["settings"]["distill_learning_rate"] == 1e-2
    assert report["settings"]["dataset_name"] == str(start / "prompts.jsonl")


def test_other_settings_need_another_folder_and_the_error_is_short(copied, start, tmp_path):
    aggregate.main(command(copied, start))
    with pytest.raises(ValueError, match="num_generations was 2 and is 3.*--output, or remove") as error:
        aggregate.main(command(copied, start, "--num_generations", "3"))
    assert "overwrite" not in str(error.value)
    with pytest.raises(ValueError, match="prompts was '3 with digest .*' and is '2 with digest .*'") as error:
        aggregate.main(command(copied, start, "--max_prompts", "2"))
    assert "cat sat" not in str(error.value)
    before = overview(copied / "aggregate")
    aggregate.main(command(copied, start, "--max_prompts", "2", "--output", tmp_path / "two"))
    assert overview(tmp_path / "two")["prompts"] == 2 and overview(copied / "aggregate") == before
    mixture = json.loads((copied / MIXTURE).read_text())
    assert mixture["weights_are"] == "min-max weights of ../two/aggregate.json"
    assert mixture["weights"] == overview(tmp_path / "two")["mixture"]


def test_a_run_may_be_moved_and_keeps_its_samples(start, tmp_path, monkeypatch):
    # A model that was given loaded lies in the run and moves with it.
    model = tiny_llama(len(json.loads((start / "tokenizer.json").read_text())["model"]["vocab"]))
    em(tmp_path / "old", model, rounds=1, learning_rate=0.02).train()
    aggregate.main(command(tmp_path / "old", start))
    report = overview(tmp_path / "old/aggregate")
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.setattr("trainers.emdpo.aggregate.load_start", None)  # nothing is sampled or scored again
    aggregate.main(command(tmp_path / "new", start))
    assert overview(tmp_path / "new/aggregate") == report
    assert len(MixturePolicy.from_pretrained(tmp_path / "new").models) == 2


def test_more_rounds_set_the_weights_back_and_say_so(copied, start, caplog):
    aggregate.main(command(copied, start))
    found = json.loads((copied / MIXTURE).read_text())
    assert found["weights"] != found["prior"]
    em(copied, start, learning_rate=0.02, rounds=1).train()
    assert json.loads((copied / MIXTURE).read_text()) == found and "set back" not in caplog.text
    em(copied, start, learning_rate=0.02, rounds=2).train()
    later = json.loads((copied / MIXTURE).read_text())
    assert later["weights"] == later["prior"]
    assert "(min-max weights of aggregate/aggregate.json) for the policies of an earlier round" in caplog.text
    with pytest.raises(ValueError, match="policy files are others.* another folder with --output"):
        aggregate.main(command(copied, start))
    aggregate.main(command(copied, start, "--output", copied / "aggregate-2"))


def test_factors_are_said_and_the_regrets_stay_in_nats():
    gains = np.array([[4.0, -1.0], [-2.0, 5.0]])[..., None] + np.random.default_rng(0).normal(0, 0.1, (2, 2, 30))
    report = compare(gains, ["type-0", "type-1"], [0.5, 0.5], [1.0, 3.0], resamples=20)
    report |= {"samples": {}, "settings": {"num_generations": 2, "max_new_tokens": 6}}
    text = aggregate.table(report)
    row = next(line for line in text.splitlines() if line.startswith("| min-max mixture |")).split("|")
    regret = report["table"]["min-max mixture"]["regret"]
    assert [float(cell) for cell in row[-3:-1]] == pytest.approx(regret, abs=1e-3)
    assert float(row[3]) == pytest.approx(max(regret[0], 3 * regret[1]), abs=1e-3)
    assert "minimise the largest regret after the factors: 1 x type 0, 3 x type 1." in text
    assert "factors" not in aggregate.table(report | {"type_weights": [1.0, 1.0]})


@pytest.mark.parametrize("prompts, says", [(4, "No intervals: 4 prompts"), (5, "(5) are too narrow"), (20, "")])
def test_a_handful_of_prompts_has_no_interval(prompts, says):
    gains = np.array([[4.0, -1.0], [-2.0, 5.0]])[..., None] + np.random.default_rng(0).normal(0, 1, (2, 2, prompts))
    report = compare(gains, ["type-0", "type-1"], [0.5, 0.5], resamples=20)
    report |= {"samples": {}, "settings": {"num_generations": 2, "max_new_tokens": 6}}
    text = aggregate.table(report)
    assert says in text and ("ntervals" in text) == (prompts < 20) and ("[" in text) == (prompts >= 5)
    assert (report["interval"] is None) == (prompts < 5) == ("low" not in report["table"]["uniform mixture"])


def test_a_distilled_policy_that_is_no_better_than_its_start_is_said():
    gains = np.zeros((2, 4, 10)) + np.array([[4.0, 0, 1, 0.5], [0, 4, 1, 0.5]])[..., None]
    names = ["type-0", "type-1", "base-model", "distilled"]
    for order, said in ((names, True), ([*names[:2], "distilled", "base-model"], False)):
        report = compare(gains, order, [0.5, 0.5], resamples=5)
        report |= {"samples": {}, "settings": {"num_generations": 2, "max_new_tokens": 6}}
        assert ("not better than the base model" in aggregate.table(report)) == said
    assert "its largest regret is 3.500, that of the base model 3.000" in aggregate.table(
        compare(gains, names, [0.5, 0.5], resamples=5)
        | {"samples": {}, "settings": {"num_generations": 2, "max_new_tokens": 6}}
    )


@pytest.mark.parametrize(
    "options, word",
    [
        (["--extra", "type-0={start}"], "the name 'type-0' is taken"),
        (["--extra", "distilled={start}"], "is taken"),
        (["--extra", "min-max mixture={start}"], "is taken"),
        (["--extra", "best single type (type-1)={start}"], "letters, digits"),
        (["--extra", "a={start}", "a={start}"], "the name 'a' is taken"),
        (["--extra", "={start}"], "letters, digits"),
        (["--extra", "a/b={start}"], "letters, digits"),
        (["--extra", "a=nowhere"], "not name=folder"),
        (["--max_prompts", "0"], "--max_prompts 0 must be at least 1"),
        (["--max_prompts", "-1"], "--max_prompts -1 must be at least 1"),
        (["--type_weights", "1"], "each of the 2 types"),
        (["--type_weights", "1", "nan"], "each of the 2 types"),
    ],
)
def test_names_and_numbers_that_cannot_be_used_are_refused_before_sampling(copied, start, options, word):
    with pytest.raises(ValueError, match=word):
        aggregate.main(command(copied, start, *(option.format(start=start) for option in options)))
    assert not (copied / "aggregate").exists()


def test_torchrun_takes_no_option_of_the_script_for_its_own():
    flags = [f"--{name}" for name in aggregate.AggregateArguments.__dataclass_fields__]
    args = [part for flag in flags for part in (flag, "x")]
    found = get_args_parser().parse_args(["--nproc_per_node", "2", "scripts/aggregate.py", *args])
    assert found.training_script_args == args
