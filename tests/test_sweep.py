"""Every combination is trained once, the best is named, and neither a kill nor a diverged run costs the others."""

import json
import re
import shlex
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

import processes
from helpers import flags, leave_processes, write_rows
from test_trainer import rows
from trainers.cli import config_files, sweep, train
from trainers.forward.cache import LogpsCache
from trainers.runs.files import read_json

VALUES = {"learning_rate": [0.0, 0.05], "beta": [0.1, 1.0]}


@pytest.fixture(scope="module")
def options(tmp_path_factory, start):
    folder = tmp_path_factory.mktemp("inputs")
    recipe = {
        "trainer": "DPOTrainer", "model_name_or_path": str(start), "dataset_test_split": "train[:4]",
        "dataset_name": write_rows(folder / "rows.jsonl", rows()), "precompute_ref_logps": True,
        "ref_cache_dir": str(folder / "cache"), "max_steps": 2, "use_cpu": True, "report_to": "none", "optim": "sgd",
        "lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.0,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(options, output, values, **more):
    sweep.main(["--config", str(options), *flags(output_dir=output, values=json.dumps(values), **more)])
    return read_json(output / "sweep.json")


def planned(options, output, values, **more):
    argv = ["--config", str(options), *flags(output_dir=output, **more)]
    return sweep.plan(sweep.SweepArguments(values), argv)[0]


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """A finished sweep, and how many rows the reference cache lacked whenever it was asked."""
    folder, lacked, missing = tmp_path_factory.mktemp("sweep"), [], LogpsCache.missing

    def counted(table, datasets):
        lacked.append(len(rows := missing(table, datasets)))
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LogpsCache, "missing", counted)
        run(options, folder, VALUES)
    return folder, lacked


def test_all_combinations_are_trained_and_the_best_is_named(options, finished):
    folder, _ = finished
    report = read_json(folder / "sweep.json")
    names = {f"learning_rate-{rate}_beta-{beta}" for rate in VALUES["learning_rate"] for beta in VALUES["beta"]}
    assert {Path(one["folder"]).name for one in report["runs"]} == names
    metric = "eval_ranking/pairwise_accuracy"
    told = {one["folder"]: one["value"] for one in report["runs"]}
    assert told == {name: read_json(Path(name) / "eval_results.json")[metric] for name in told}
    assert report["best"] == max(told, key=told.get) and list(told.values()) == sorted(told.values(), reverse=True)
    assert "learning_rate-0.05" in report["best"]
    table = (folder / "sweep.md").read_text().splitlines()
    assert table[0] == f"| learning_rate | beta | {metric} |" and len(table) == 6
    for one in report["runs"]:
        assert (Path(one["folder"]) / "model.safetensors").is_file()
        _, _, args, _ = train.parse(["--config", str(options), f"{one['folder']}/values.yaml"])
        assert (args.output_dir, args.learning_rate, args.beta) == (one["folder"], *one["values"].values())


def test_the_reference_scores_the_rows_once_for_all_runs(finished):
    _, lacked = finished
    first = lacked.index(0)
    assert set(lacked[:first]) == {len(rows())} and len(lacked) >= first + 3 and not any(lacked[first:])


def test_what_is_finished_is_left_and_what_is_added_is_made(options, finished, capsys):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    report = run(options, folder, VALUES | {"beta": [0.1, 1.0, 0.3]}, metric="loss")
    assert capsys.readouterr().out.count("done already") == 4
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    assert len(after) == 6 and before.items() <= after.items()
    values = [one["value"] for one in report["runs"]]
    assert (report["metric"], report["direction"]) == ("eval_loss", "minimize") and values == sorted(values)
    with pytest.raises(ValueError, match="was written with other settings: max_steps was 2 and is 3"):
        run(options, folder, VALUES, max_steps=3)
    with pytest.raises(ValueError, match="has no eval_rewards/accuracy: did you mean eval_rewards/accuracies"):
        run(options, folder, VALUES, metric="rewards/accuracy")


def test_a_metric_that_no_run_would_have_ends_it_before_a_step(options, tmp_path):
    with pytest.raises(ValueError, match="metric: the evaluation has no eval_los: did you mean eval_loss"):
        run(options, tmp_path, VALUES, metric="los")
    assert not [*tmp_path.rglob("*.safetensors")] and len([*tmp_path.glob("*/")]) == 1
    assert len(run(options, tmp_path, {"beta": [0.1]}, metric="loss")["runs"]) == 1


def test_runs_that_diverge_or_fail_are_recorded_and_the_others_made(options, tmp_path, capsys):
    values = {"learning_rate": [1e30, 0.05], "max_length": [2, 64]}
    for again in (False, True):
        report = run(options, tmp_path / "out", values)
        errors = {Path(one["folder"]).name: one["error"] for one in report["runs"]}
        assert (
            report["best"].endswith("learning_rate-0.05_max_length-64")
            and errors.pop(Path(report["best"]).name) is None
        )
        assert [one["value"] for one in report["runs"][1:]] == [None] * 3
        assert errors["learning_rate-1e+30_max_length-64"].startswith("FloatingPointError: The loss of step 2 is")
        assert all("no usable row is left" in errors[f"learning_rate-{rate}_max_length-2"] for rate in ("1e+30", 0.05))
        # What diverged would do so again; what failed may have failed for another reason.
        assert capsys.readouterr().out.count("done already") == 2 * again
    assert "| 1e+30 | 64 | FloatingPointError: The loss of step 2" in (tmp_path / "out/sweep.md").read_text()
    with pytest.raises(ValueError, match="no run of .* was trained to its end: ValueError: no usable row is left"):
        run(options, tmp_path / "none", {"max_length": [2]})


def test_a_tie_for_the_best_is_told(options, tmp_path, capsys):
    run(options, tmp_path, {"beta": [0.1, 1.0]}, learning_rate=0.0)
    assert "; 2 runs tie, of which it is the first)" in capsys.readouterr().out


def test_a_killed_run_goes_on_from_its_checkpoint(options, tmp_path, monkeypatch, capsys):
    more = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    values = {"beta": [0.1, 0.2]}
    whole = run(options, tmp_path / "whole", values, **more)

    def killed(trainer, *arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("trainers.DPOTrainer.evaluate", killed)
        run(options, tmp_path / "out", values, **more)
    (tmp_path / "out/beta-0.1/checkpoint-3/trainer_state.json").unlink()
    capsys.readouterr()
    report = run(options, tmp_path / "out", values, **more)
    assert "Going on from" in capsys.readouterr().out
    assert [one["value"] for one in report["runs"]] == [one["value"] for one in whole["runs"]]


def test_every_run_is_one_of_its_own_in_wandb(options, tmp_path, monkeypatch):
    wandb, logged, train_one = types.ModuleType("wandb"), [], train.train
    wandb.__spec__, wandb.run = ModuleSpec("wandb", None), None

    def finish():
        wandb.run = None

    def logging(flags, recipe):
        wandb.run = wandb.run or recipe["run_name"]  # as the callback of transformers does
        train_one(flags, recipe)
        logged.append(wandb.run)

    wandb.finish = finish
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(train, "train", logging)
    run(options, tmp_path / "out", {"beta": [0.1, 0.2]})
    assert logged == ["beta-0.1", "beta-0.2"] and wandb.run is None


def sweep_and_leave(argv):
    sweep.main(argv)
    leave_processes()


def test_two_processes_make_one_sweep_and_one_that_diverged_ends_it_once(options, tmp_path):
    values = {"learning_rate": [1e30, 0.05, 0.0]}
    argv = ["--config", str(options), *flags(output_dir=tmp_path / "out", values=json.dumps(values))]
    codes, output = processes.run(sweep_and_leave, argv, count=2)
    assert any(codes) and "FloatingPointError: The loss of step 2" in output
    codes, output = processes.run(sweep_and_leave, argv, count=2)
    assert codes == [0, 0], output
    assert output.count("[1/3] learning_rate-1e+30: done already") == output.count("\nbest: ") == 1
    report = read_json(tmp_path / "out/sweep.json")
    assert [one["value"] is None for one in report["runs"]] == [False, False, True]
    assert report["best"].endswith("learning_rate-0.05")


def test_more_draws_add_to_those_that_were_made():
    def drawn(draws):
        return sweep.SweepArguments({"beta": [1, 2, 3], "seed": [1, 2, 3]}, draws).combinations()

    assert drawn(3) == drawn(9)[:3] == drawn(20)[:3] and len(drawn(20)) == 9
    assert drawn(9) != drawn(None) and sorted(map(str, drawn(9))) == sorted(map(str, drawn(None)))


def test_values_are_read_as_those_of_a_recipe(options, tmp_path):
    values = {"max_length": [None, "64"], "lora_target_modules": [["q_proj", "v_proj"]]}
    runs = planned(options, tmp_path, values, use_peft=True)
    assert [run.stage.folder.name for run in runs] == [
        f"max_length-{length}_lora_target_modules-q_proj-v_proj" for length in ("null", "64")
    ]
    assert [run.stage.settings["max_length"] for run in runs] == [None, 64]
    runs = planned(options, tmp_path, {"precompute_ref_logps": [True, False], "learning_rate": [1, "1e-30"]})
    assert [run.stage.settings["learning_rate"] for run in runs] == [1.0, 1e-30] * 2
    assert [run.recipe["precompute_ref_logps"] for run in runs] == ["true"] * 2 + ["false"] * 2
    runs = planned(options, tmp_path, {"max_steps": [-1, 1]})
    assert [run.stage.folder.name for run in runs] == ["max_steps--1", "max_steps-1"]


def test_long_values_are_told_apart_in_names_that_a_file_system_takes(options, tmp_path):
    common = "|".join(["\u00fcber_proj"] * 30)
    values = {"lora_target_modules": [f"{common}|q_proj", f"{common}|v_proj"]}
    runs = planned(options, tmp_path, values, use_peft=True)
    names = [run.stage.folder.name for run in runs]
    assert len({*names}) == 2 and all(200 < len(name.encode()) <= 209 for name in names)
    assert names == [run.stage.folder.name for run in planned(options, tmp_path, values, use_peft=True)]
    for one in runs:
        one.stage.open()


@pytest.mark.parametrize("kind", ["file", "folder", "saved"])
def test_a_run_over_other_rows_is_not_compared_with_those_that_are_done(kind, options, tmp_path, capsys):
    recipe, path = yaml.safe_load(options.read_text()), tmp_path / "rows.jsonl"
    name = {"file": path, "folder": tmp_path / "some", "saved": tmp_path / "saved"}[kind]

    def write(sign):
        changed = [row | {"scores": [sign * score for score in row["scores"]]} for row in rows()]
        if kind == "saved":
            Dataset.from_list(changed).save_to_disk(name)
        else:
            name.mkdir(exist_ok=True) if kind == "folder" else None
            write_rows(name / "a.jsonl" if kind == "folder" else name, changed)

    write(1)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"dataset_name": str(name), "max_steps": 1}))
    run(tmp_path / "recipe.yaml", tmp_path / "out", {"seed": [1]})
    run(tmp_path / "recipe.yaml", tmp_path / "out", {"seed": [1]})
    assert "done already" in capsys.readouterr().out
    write(-1)
    with pytest.raises(ValueError, match="was written with other settings: data files are others"):
        run(tmp_path / "recipe.yaml", tmp_path / "out", {"seed": [1, 2]})
    assert not (tmp_path / "out/seed-2").exists()


@pytest.mark.parametrize(
    "values, more, error",
    [
        ({"beta": 0.1}, {}, "values: beta is 0.1, give a list"),
        ({"beta": []}, {}, r"values: beta is \[\], give a list"),
        ({}, {}, "values is empty"),
        ({"output_dir": ["a"]}, {}, "output_dir is set by the sweep"),
        ({"beta": [0.1, -1]}, {}, "beta=-1.0 must be a finite number"),
        ({"max_steps": [1, True]}, {}, "max-steps: needs a whole number, not 'true'"),
        ({"dataset_name": [""]}, {}, "^dataset_name is missing"),
        ({"betta": [0.1]}, {}, "'betta' is not known: did you mean beta"),
        ({"beta": [0.1, 0.1]}, {}, "two combinations give the same folder beta-0.1"),
        (
            {"learning_rate": ["1e-5", 0.00001], "seed": [1, 2]},
            {},
            "1e-5_seed-1 and learning_rate-1e-05_seed-1 are the",
        ),
        ({"beta": [0.1]}, {"beta": 0.2}, "beta is a flag, which would win over its values"),
        ({"beta": [0.1]}, {"dry_run": "true"}, "no dry_run and no probe"),
        ({"seed": [1]}, {"trainer": "EMDPOTrainer"}, "compares single trainings: EM-DPO in stages or rounds is none"),
        ({"seed": [1]}, {"trainer": "SGPOTrainer"}, "compares single trainings: SGPO in stages or rounds is none"),
        ({"seed": [1]}, {"self_enhance": "{}"}, "compares single trainings: DPO in stages or rounds is none"),
        ({"dataset_test_split": [""]}, {}, "needs held-out rows: set dataset_test_split"),
        ({"beta": [0.1]}, {"draws": 0}, "draws=0 must be a finite number, at least 1"),
        ({"beta": [0.1]}, {"direction": "up"}, "direction='up' is unknown"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_is_trained(options, tmp_path, values, more, error):
    with pytest.raises(ValueError, match=error):
        run(options, tmp_path / "out", values, **more)
    assert not list(tmp_path.rglob("*.safetensors"))


# The page.

PAGE = (Path(__file__).parents[1] / "docs/sweeps.md").read_text()


def command(beginning):
    """The flags of the page's command that begins so."""
    return shlex.split(next(line for line in PAGE.splitlines() if line.startswith(beginning)))[2:]


@pytest.fixture
def local(tmp_path, start):
    """What stands in for the demo's model and rows."""
    return flags(
        model_name_or_path=start, dataset_name=write_rows(tmp_path / "rows.jsonl", rows(20)), use_cpu="true",
        dtype="float32", output_dir=tmp_path / "out", ref_cache_dir=tmp_path / "cache",
    )  # fmt: skip


def test_the_commands_of_the_page_run(tmp_path, local):
    sweep.main([*command("polypo sweep --config dpo"), *local])
    assert {one["values"]["beta"] for one in read_json(tmp_path / "out/sweep.json")["runs"]} == {0.1, 0.5}
    train.main([*command("polypo train --config dpo"), *local, "--learning_rate", "0", "--num_train_epochs", "20"])
    # Nothing changes, so the first evaluation is the best and two more end it.
    assert read_json(tmp_path / "out/trainer_state.json")["global_step"] == 12


def test_the_file_of_the_page_is_read(tmp_path):
    (tmp_path / "sweep.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE, flags=re.S)[1])
    [arguments] = config_files.read(["--config", str(tmp_path / "sweep.yaml")], sweep.SweepArguments)
    assert len(arguments.combinations()) == arguments.draws == 10
    assert (arguments.metric, arguments.direction) == ("eval_ranking/pairwise_accuracy", "maximize")


class StandIn:
    """Optuna, as far as the page needs it: trials with the lowest value of each option."""

    number, best_value, best_params = 0, None, None

    def create_study(self, direction):
        assert direction == "maximize"
        return self

    def suggest_float(self, name, low, high, log):
        self.best_params = (self.best_params or {}) | {name: low}
        return low

    def optimize(self, objective, n_trials, catch, gc_after_trial):
        for self.number in range(n_trials):
            self.best_value = objective(self)


def test_the_loop_for_optuna_runs_and_shares_the_reference(tmp_path, start, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", StandIn())
    code = re.search(r"```python\n(.*?)```", PAGE, flags=re.S)[1].replace("n_trials=10", "n_trials=2")
    own = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(start), "runs/optuna": str(tmp_path),
        "data/demo/preferences.jsonl.gz": write_rows(tmp_path / "rows.jsonl", rows(20)),
        "num_train_epochs=1": f"ref_cache_dir='{tmp_path}/cache', max_steps=2, use_cpu=True, report_to='none'",
    }  # fmt: skip
    for there, here in own.items():
        assert there in code
        code = code.replace(there, here)
    exec(compile(code, "docs/sweeps.md", "exec"), {})
    assert "'beta': " in capsys.readouterr().out
    assert len(list((tmp_path / "cache").rglob("*.parquet"))) == 1
