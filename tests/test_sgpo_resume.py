"""SGPO killed with signal 9 in every stage and in two processes; refusal to mix settings."""

import os
import signal

import pytest
import transformers

import processes
from helpers import leave_processes
from sgpo_rows import SAMPLING, command, counts, finished_run, history, rows, same, weights
from trainers.cli import train
from trainers.forward import cache
from trainers.runs import files
from trainers.runs.stage import Stage
from trainers.sgpo.stages import STAGES


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return finished_run(tmp_path_factory.getbasetemp())[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory.getbasetemp())[1]


def die_and_train(argv, stage, where):
    """Train until the process kills itself: in a training, among scores or samples, or before a stage has ended."""
    if where == "training":
        transformers.Trainer.training_step = processes.die_after(transformers.Trainer.training_step, 3)
    elif where == "scores":
        cache.WRITE_EVERY, cache._write = 1, processes.die_after(cache._write, 1)
    elif where == "manifest":
        finish = Stage.finish

        def wrapped(self, **content):
            if self.folder.name == stage:
                os.kill(os.getpid(), signal.SIGKILL)
            finish(self, **content)

        Stage.finish = wrapped
    else:
        files.append_records = processes.die_after(files.append_records, 1, lambda path, _: where in str(path))
    train.main(argv)


def train_and_leave(argv):
    train.main(argv)
    leave_processes()


def test_survives_kill_9_in_every_stage(inputs, finished, tmp_path):
    argv = command(inputs, tmp_path)
    kills = [
        ("sft", "training"), ("current", "current/samples"), ("targets", "targets/samples"), ("filter", "scores"),
        ("filter", "manifest"), ("improver", "training"), ("improver", "manifest"), ("pairs", "pairs/rejected"),
        ("pairs", "pairs/chosen"), ("gate", "gate/before"), ("gate", "improver-scores"), ("dpo", "training"),
        ("measure", "measure/policy/rejected"), ("measure", "policy-scores"),
    ]  # fmt: skip
    for stage, where in kills:
        codes, output = processes.run(die_and_train, argv, stage, where)
        assert codes == [-signal.SIGKILL], output
        done = [name for name in STAGES if (tmp_path / "round-00" / name / "manifest.json").exists()]
        assert done == list(STAGES[: STAGES.index(stage)])
        for journal in tmp_path.glob(f"round-00/{stage}/**/*.jsonl"):
            with open(journal, "ab") as file:
                file.write(b'{"prompt": 3, "ind')  # half a line, as a kill amid a write leaves it
    train.main(argv)
    for name in STAGES:
        assert counts(tmp_path, name) == counts(finished, name), name
    for path in finished.glob("round-00/*/*.jsonl.gz"):
        assert (tmp_path / path.relative_to(finished)).read_bytes() == path.read_bytes()
    for path in ("", "round-00/sft/model", "round-00/improver/model", "round-00/dpo/model"):
        assert same(weights(tmp_path / path), weights(finished / path))


def test_finished_stages_are_not_done_again(inputs, finished):
    def times():
        return {path: path.stat().st_mtime_ns for path in finished.glob("round-*/**/*") if path.is_file()}

    before = times()
    # Settings that change nothing are not compared.
    train.main(command(inputs, finished, logging_steps=3, save_steps=5, sampling=SAMPLING | {"batch_size": 2}))
    assert times() == before


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_make_the_same_data(inputs, tmp_path):
    """Samples, targets and filter do not depend on the number of processes; training sees other batches."""
    single, double = tmp_path / "single", tmp_path / "double"
    train.main(command(inputs, single, sft=None))
    codes, output = processes.run(train_and_leave, command(inputs, double, sft=None), count=2)
    assert codes == [0, 0], output
    for name in ("current", "targets", "filter"):
        assert rows(double, name) == rows(single, name)
    journals = [double / f"round-00/current/samples/samples-0000{rank}.jsonl" for rank in (0, 1)]
    assert all(path.read_text() for path in journals)
    assert history(double, "dpo")[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert counts(double, "measure")["policy_scorer_win_rate"] >= 0


# Refusal to mix.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"beta": 0.2}, "dpo/settings.json .*beta was 0.1 and is 0.2"),
        ({"revision": {"temperature": 0.9}}, "targets/settings.json .*revision.temperature was 0.7 and is 0.9"),
        ({"improver": {"learning_rate": 0.02, "num_train_epochs": 2}}, "improver/settings.json .*learning_rate was"),
        ({"filter_factor": 2.0}, "filter/settings.json .*filter_factor was 1.5 and is 2.0"),
        ({"preference_split": "train[5:9]"}, "pairs/settings.json .*prompts are others"),
        ({"sft": None}, "current/settings.json .*earlier stages"),
        ({"scorer": None}, "gate/settings.json .*scorer was .* delete the folders gate and measure"),
        ({"dtype": "bfloat16"}, "sft/settings.json .*model_init_kwargs was"),
    ],
)
def test_other_settings_are_refused_by_name(inputs, finished, changes, message):
    with pytest.raises(ValueError, match=message):
        train.main(command(inputs, finished, **changes))


def test_another_template_is_refused_by_name(inputs, finished, monkeypatch):
    monkeypatch.setattr("trainers.sgpo.text.IMPROVER_V1", "Better: {prompt} {response}")
    with pytest.raises(ValueError, match="filter/settings.json .*template are others"):
        train.main(command(inputs, finished))
