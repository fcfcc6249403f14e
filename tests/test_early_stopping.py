"""A training that no longer gets better ends, its best weights are what is kept, and a resumed one counts on."""

import json
import shutil

import pytest
from peft import LoraConfig
from safetensors.torch import load_file

import processes
from helpers import flags, leave_processes, write_rows
from test_trainer import LORA, rows, trainer
from trainers import SGPOConfig, SWEPOConfig, SWEPOTrainer
from trainers.cli import train
from trainers.measuring import UnknownMetric
from trainers.running import EarlyStopping

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 8}
BEST = {**EVERY_STEP, "load_best_model_at_end": True, "early_stopping_patience": 2}
# The length of the data never changes, so the first evaluation is the best one.
CONSTANT = {**BEST, "metric_for_best_model": "eval_length/chosen"}

FOLDERS = ("checkpoint-1", "checkpoint-3")  # of the best weights there, and of the last


def launch(tmp_path, start, **options):
    """Arguments of the launcher for a run in `out`."""
    named = {
        "trainer": "DPOTrainer", "model_name_or_path": start, "dataset_test_split": "train[:4]", "use_cpu": "true",
        "dataset_name": write_rows(tmp_path / "rows.jsonl", rows()), "output_dir": tmp_path / "out",
        "report_to": "none",
    }  # fmt: skip
    return flags(**named | options)


def steps_made(tmp_path):
    return json.loads((tmp_path / "out/trainer_state.json").read_text())["global_step"]


@pytest.mark.parametrize("peft, file", [(None, "model.safetensors"), (LORA, "adapter_model.safetensors")])
def test_training_stops_and_the_best_weights_are_saved(tmp_path, tokenizer, peft, file, capsys):
    values = iter([1.0, 3.0, 2.0, 2.5, *[9.0] * 8])
    t = trainer(
        tmp_path, tokenizer, eval_data=rows(4, seed=2), peft_config=peft and LoraConfig(**peft),
        compute_metrics=lambda _: {"told": next(values)}, metric_for_best_model="eval_told", **BEST,
    )  # fmt: skip
    t.train_and_save()
    assert t.state.global_step == 4 and t.state.best_metric == 3.0
    told = (
        "ended at step 4, as eval_told had not become better in 2 evaluations. The weights of step 2 are kept (3.0000)"
    )
    assert told in capsys.readouterr().out
    saved, best, last = (load_file(tmp_path / folder / file) for folder in ("", "checkpoint-2", "checkpoint-4"))
    assert all(saved[name].equal(best[name]) for name in best)
    assert not all(last[name].equal(best[name]) for name in best)


@pytest.mark.parametrize("several", [False, True])
def test_a_metric_that_no_evaluation_has_ends_the_training_before_its_first_step(tmp_path, tokenizer, several):
    def make(metric):
        made = trainer(tmp_path, tokenizer, eval_data=rows(4, seed=2), **BEST | {"metric_for_best_model": metric})
        if several:
            made.eval_dataset = {"a": made.eval_dataset, "b": made.eval_dataset}
        return made

    wrong = make("ranking/ndgc")
    kept = {name: weight.clone() for name, weight in wrong.model.state_dict().items()}
    near = "eval_b_ranking/ndcg" if several else "eval_ranking/ndcg"
    with pytest.raises(UnknownMetric, match=f"metric_for_best_model: .* no eval_ranking/ndgc: did you mean {near}"):
        wrong.train()
    assert wrong.state.global_step == 0
    if several:
        with pytest.raises(
            UnknownMetric, match="metric_for_best_model: the evaluation has no eval_loss: did you mean"
        ):
            make("loss").train()
    assert all(weight.equal(kept[name]) for name, weight in wrong.model.state_dict().items())
    for metric in ("eval_a_ranking/ndcg" if several else "ranking/ndcg", "eval_a_loss" if several else "loss"):
        make(metric).train()


def test_asking_for_a_metric_changes_no_step(tmp_path, tokenizer):
    found = []
    for metric in ("loss", "ranking/ndcg"):
        t = trainer(tmp_path, tokenizer, eval_data=rows(4, seed=2), **EVERY_STEP, metric_for_best_model=metric)
        t.train()
        found.append([{n: v for n, v in log.items() if "runtime" not in n and "second" not in n}
                      for log in t.state.log_history])  # fmt: skip
    assert found[0] == found[1] and len(found[0]) > 16


def test_a_metric_of_the_users_own_is_looked_for_in_the_first_evaluation(tmp_path, tokenizer):
    own = {"compute_metrics": lambda _: {"told": 1.0}, "metric_for_best_model": "tald"}
    t = trainer(tmp_path, tokenizer, eval_data=rows(4, seed=2), **BEST, **own)
    with pytest.raises(UnknownMetric, match="no eval_tald: did you mean eval_told"):
        t.train()
    assert t.state.global_step == 1

    class Told(SWEPOTrainer):
        def evaluate(self, *arguments, **keywords):
            metrics = super().evaluate(*arguments, **keywords)
            return metrics | {"eval_told": 1.0}

    t = trainer(tmp_path, tokenizer, cls=Told, eval_data=rows(4, seed=2), metric_for_best_model="told", **EVERY_STEP)
    t.train()
    assert t.state.best_metric == 1.0


def test_a_resumed_training_counts_on_and_one_that_had_stopped_keeps_its_best(tmp_path, tokenizer):
    def make():
        return trainer(tmp_path, tokenizer, eval_data=rows(4, seed=2), **CONSTANT)

    whole = make()
    whole.train()
    assert whole.state.global_step == 3
    best = load_file(tmp_path / "checkpoint-1/model.safetensors")
    for start, end in ((2, 3), (3, 4)):  # after one evaluation without a gain, and after the second
        resumed = make()
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{start}"))
        assert resumed.state.global_step == end
        weights = resumed.model.state_dict()
        assert all(weights[name].equal(value) for name, value in best.items())


@pytest.mark.parametrize("limit, kept", [
    ({}, ["checkpoint-1", "checkpoint-2", "checkpoint-3"]),
    ({"save_total_limit": 1}, ["checkpoint-1"]),
    ({"save_strategy": "best"}, ["checkpoint-1"]),
])  # fmt: skip
@pytest.mark.parametrize("early", [True, False])
def test_the_launcher_leaves_a_finished_run_as_it_is(tmp_path, start, capsys, limit, kept, early):
    """Also where its best checkpoint alone is kept."""
    out, options = tmp_path / "out", {**CONSTANT, **limit, "resume_from_checkpoint": "true"}
    if not early:
        options |= {"max_steps": 3}
        del options["early_stopping_patience"]
    for told in ("training begins at step 0", "is finished: nothing is trained"):
        train.main(launch(tmp_path, start, **options))
        assert told in capsys.readouterr().out and steps_made(tmp_path) == 3
        assert sorted(path.name for path in out.glob("checkpoint-*")) == kept
    if not early:
        train.main(launch(tmp_path, start, **options | {"max_steps": 5}))
        assert steps_made(tmp_path) == 5
    elif not limit:  # it had stopped, but not said so yet
        shutil.rmtree(out / "checkpoint-3")
        (out / "README.md").unlink()
        train.main(launch(tmp_path, start, **options))
        assert steps_made(tmp_path) == 3


def test_with_more_patience_a_run_that_had_stopped_goes_on(tmp_path, start):
    """As one that had as much from the start; with less it is finished."""
    options = {**CONSTANT, "resume_from_checkpoint": "true", "learning_rate": 0.01}
    train.main(launch(tmp_path, start, **options) + flags(output_dir=tmp_path / "whole", early_stopping_patience=4))
    for patience, steps in ((2, 3), (1, 3), (4, 5)):
        train.main(launch(tmp_path, start, **options | {"early_stopping_patience": patience}))
        assert steps_made(tmp_path) == steps
    one, other = (load_file(tmp_path / run / "checkpoint-5/model.safetensors") for run in ("whole", "out"))
    assert all(one[name].equal(value) for name, value in other.items())
    del options["early_stopping_patience"]
    train.main(launch(tmp_path, start, **options))
    assert steps_made(tmp_path) == 8


def train_and_leave(argv):
    train.main(argv)
    leave_processes()


def test_two_processes_stop_together_with_the_best_weights(tmp_path, start):
    arguments = launch(tmp_path, start, per_device_train_batch_size=2, learning_rate=0.01, **CONSTANT)
    codes, output = processes.run(train_and_leave, arguments, count=2)
    assert codes == [0, 0], output
    assert steps_made(tmp_path) == 3
    saved, best, last = (load_file(tmp_path / "out" / n / "model.safetensors") for n in ("", *FOLDERS))
    assert all(saved[name].equal(best[name]) for name in best) and any(not last[n].equal(best[n]) for n in best)


def test_where_it_has_no_best_weights_it_is_refused():
    with pytest.raises(ValueError, match="early_stopping_patience would keep the last weights"):
        SWEPOConfig(use_cpu=True, early_stopping_patience=2)
    with pytest.raises(ValueError, match="early_stopping_patience: SGPO's trainings are not evaluated"):
        SGPOConfig(use_cpu=True, **BEST)


def test_a_probe_measures_such_a_run(tmp_path, start, capsys):
    train.main([*launch(tmp_path, start, **BEST), "--probe"])
    assert "steps" in capsys.readouterr().out


def test_a_search_that_would_keep_the_old_reference_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="old reference, rows and checks.* make a trainer for each trial"):
        trainer(tmp_path, tokenizer).hyperparameter_search(n_trials=2)


def test_a_checkpoint_of_a_release_without_early_stopping_is_counted_from(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": {}}))
    stopping = EarlyStopping.at(str(tmp_path), 3)
    assert (stopping.early_stopping_patience, stopping.early_stopping_patience_counter) == (3, 0)
