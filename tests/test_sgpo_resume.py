"""SGPO killed with signal 9 in every stage, in stages and in two processes; refusal to mix settings."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import transformers

from distributed_matrix import torchrun
from processes import die_after
from sgpo_rows import command, finished_run, history, manifest, rows, same, weights
from trainers.cli import train
from trainers.forward import cache
from trainers.runs import files
from trainers.sgpo import revisers
from trainers.sgpo.config import STAGES
from trainers.sgpo.pipeline import STEPS
from trainers.sgpo.stages import Stage

ROOT = Path(__file__).resolve().parents[1]
SAMPLING = {"max_new_tokens": 24, "temperature": 1.0, "top_p": 1.0}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return finished_run(tmp_path_factory.getbasetemp() / "sgpo")[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory.getbasetemp() / "sgpo")[1]


# Resuming.


def run_and_die(argv, patch):
    """Runs the launcher in a forked process that kills itself with signal 9."""
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        try:
            patch()
            train.main(argv)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


def in_journal(part, count=1):
    def patch():
        append = die_after(files.append_records, count, lambda path, _: part in str(path))
        files.append_records = revisers.append_records = append

    return patch


def in_training(count):
    def patch():
        step = transformers.Trainer.training_step
        transformers.Trainer.training_step = die_after(step, count, lambda *args: True)

    return patch


def in_filter():
    cache.WRITE_EVERY = 1
    cache._write = die_after(cache._write, 1, lambda *args: True)


def before_manifest(name):
    def patch():
        finish = Stage.finish

        def wrapped(self, counts):
            if self.folder.name == name:
                os.kill(os.getpid(), signal.SIGKILL)
            finish(self, counts)

        Stage.finish = wrapped

    return patch


def assert_same_run(found, expected):
    for name in STAGES:
        one, other = manifest(found, name), manifest(expected, name)
        assert one == other, name
    for path in expected.glob("round-00/*/*.jsonl.gz"):
        assert (found / path.relative_to(expected)).read_bytes() == path.read_bytes()
    for name in ("sft", "improver", "dpo"):
        path = f"round-00/{name}/model"
        assert same(weights(found / path), weights(expected / path))
    assert same(weights(found), weights(expected))


def test_survives_kill_9_in_every_stage(inputs, finished, tmp_path):
    argv = command(inputs, tmp_path)
    kills = [
        ("sft", in_training(3)), ("before", before_manifest("before")), ("current", in_journal("current/samples")),
        ("targets", in_journal("targets/samples")), ("filter", in_filter), ("filter", before_manifest("filter")),
        ("improver", in_training(3)), ("improver", before_manifest("improver")),
        ("pairs", in_journal("pairs/rejected")), ("pairs", in_journal("pairs/chosen")), ("dpo", in_training(3)),
        ("measure", in_journal("measure/policy/rejected")), ("measure", in_journal("policy-scores")),
    ]  # fmt: skip
    for stage, patch in kills:
        run_and_die(argv, patch)
        done = [name for name in STAGES if (tmp_path / "round-00" / name / "manifest.json").exists()]
        assert done == list(STAGES[: STAGES.index(stage)])
        for journal in tmp_path.glob(f"round-00/{stage}/**/*.jsonl"):
            with open(journal, "ab") as file:
                file.write(b'{"prompt": 3, "ind')  # half a line, as a kill amid a write leaves it
    train.main(argv)
    assert_same_run(tmp_path, finished)


@pytest.mark.slow
def test_stages_run_one_at_a_time_give_the_same(inputs, finished, tmp_path, capsys):
    with pytest.raises(
        ValueError, match="stage='pairs' is not the next one: .*sft is not done. Run stage sft, or all"
    ):
        train.main(command(inputs, tmp_path, stage="pairs"))
    for name in STAGES:
        train.main(command(inputs, tmp_path, stage=name))
        assert (tmp_path / "round-00" / name / "manifest.json").exists()
        assert (tmp_path / "model.safetensors").exists() == (name == STAGES[-1])
    assert_same_run(tmp_path, finished)
    train.main(command(inputs, tmp_path, stage="dpo"))
    assert "there is no dpo left to run" in capsys.readouterr().out


def test_finished_stages_are_not_done_again(inputs, finished, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("round-*/**/*") if path.is_file()}
    monkeypatch.setattr("trainers.sgpo.pipeline.STEPS", _refusing())
    train.main(command(inputs, finished))
    assert {path: path.stat().st_mtime_ns for path in finished.glob("round-*/**/*") if path.is_file()} == before


def _refusing():
    def refuse(*args):
        raise AssertionError("a stage was done again")

    return {name: step._replace(work=refuse) for name, step in STEPS.items()}


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_make_the_same_data(inputs, tmp_path):
    """Samples, targets and filter do not depend on the number of processes; training sees other batches."""
    single, double = tmp_path / "single", tmp_path / "double"
    train.main(command(inputs, single, sft=None))
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys\nfrom trainers.cli import train\nfrom helpers import leave_processes\n"
        "train.main(sys.argv[1:])\nleave_processes()\n"
    )
    launch = [*torchrun(), str(worker), *command(inputs, double, sft=None)]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(launch, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("before", "current", "targets", "filter"):
        assert rows(double, name) == rows(single, name)
    journals = [double / f"round-00/current/samples/samples-0000{rank}.jsonl" for rank in (0, 1)]
    assert all(path.read_text() for path in journals)
    assert history(double, "dpo")[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert manifest(double, "measure")["counts"]["policy_scorer_win_rate"] >= 0


# Refusal to mix.


def test_other_settings_are_refused_by_name(inputs, finished, monkeypatch):
    for changes, message in [
        ({"beta": 0.2}, r"dpo/settings.json .*beta was 0.1 and is 0.2"),
        ({"revision": {"temperature": 0.9}}, r"targets/settings.json .*revision.temperature was 0.7 and is 0.9"),
        ({"seed": 4}, r"seed was 3 and is 4"),
        ({"improver": {"learning_rate": 0.02, "num_train_epochs": 2}}, r"improver.learning_rate was 0.01 and is 0.02"),
        ({"filter_factor": 2.0}, r"filter/settings.json .*filter_factor was 1.5 and is 2.0"),
        ({"preference_split": "train[5:9]"}, r"pairs/settings.json .*preference prompts"),
        ({"per_device_train_batch_size": 2}, r"sft/settings.json .*per_device_train_batch_size was 1 and is 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            train.main(command(inputs, finished, **changes))
    monkeypatch.setattr("trainers.sgpo.text.IMPROVER_V1", "Better: {prompt} {response}")
    with pytest.raises(ValueError, match=r"filter/settings.json .*template are others"):
        train.main(command(inputs, finished))


def test_how_the_model_is_read_is_held_by_stages_that_only_sample(inputs, tmp_path):
    options = {"sft": None, "stage": "before", "sampling": SAMPLING}
    train.main(command(inputs, tmp_path, **options))
    for changes, message in [
        ({"dtype": "bfloat16"}, "model_init_kwargs was .*'float32'.* and is .*'bfloat16'"),
        ({"attn_implementation": "eager"}, "model_init_kwargs was .* and is .*'eager'"),
        ({"model_revision": "v2"}, "model_init_kwargs was .*'main'.* and is .*'v2'"),
        ({"load_in_4bit": True}, "quantization_config was None and is "),
        ({"pad_token": "<|eot_id|>"}, r"padding token was None and is '<\|eot_id\|>'"),
        ({"sampling": SAMPLING | {"dtype": "bfloat16"}}, "sampling.dtype was None and is 'bfloat16'"),
    ]:
        with pytest.raises(ValueError, match=rf"before/settings.json .*{message}"):
            train.main(command(inputs, tmp_path, **options | {"stage": "current"} | changes))
    sampling = SAMPLING | {"batch_size": 1}
    train.main(command(inputs, tmp_path, **options | {"stage": "current", "sampling": sampling}))
    with pytest.raises(ValueError, match="sft is asked for, but .* such as .*round-00/before: leave sft out"):
        train.main(command(inputs, tmp_path))
    assert not (tmp_path / "round-00/sft").exists()


def test_rounds_are_not_taken_back(inputs, finished, tmp_path):
    """The policy of an earlier round would be put over that of the last one."""
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(run / "round-00", run / "round-01")
    (run / "model.safetensors").write_bytes(b"of round 2")
    with pytest.raises(ValueError, match=r"rounds=1, but .* holds stages of round 2: rounds can only be added"):
        train.main(command(inputs, run))
    assert (run / "model.safetensors").read_bytes() == b"of round 2"


def test_a_run_goes_on_from_a_training_whose_log_cannot_be_judged(inputs, finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    state = run / "round-00/dpo/model/trainer_state.json"
    content = json.loads(state.read_text())
    closing = {name: value for name, value in content["log_history"][0].items() if name != "loss"}
    state.write_text(json.dumps(content | {"log_history": [closing | {"train_runtime": 1.0}]}))
    for name in ("dpo", "measure"):
        (run / f"round-00/{name}/manifest.json").unlink()
    train.main(command(inputs, run))
    assert manifest(run, "dpo")["counts"] == {
        "pairs": manifest(finished, "dpo")["counts"]["pairs"], "steps": content["global_step"],
        "not_judged": ["chosen_fall", "early_accuracy"],
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "not judged: [chosen_fall, early_accuracy]" in said
    assert f"the policy is in {run}" in said and f"python scripts/sgpo_report.py {run}" in said


def test_another_model_and_changed_files_are_refused(inputs, finished, tmp_path):
    other = shutil.copytree(inputs, tmp_path / "inputs")
    run = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((other / "model/config.json").read_text())
    (other / "model/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    with pytest.raises(ValueError, match=r"sft/settings.json .*model files are others"):
        train.main(command(inputs, run, model_name_or_path=other / "model"))
    pairs = run / "round-00/pairs/rows.jsonl.gz"
    pairs.write_bytes(pairs.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="pairs/rows.jsonl.gz was changed after the stage had ended"):
        train.main(command(inputs, run))


def test_settings_that_change_nothing_are_not_compared(inputs, finished):
    train.main(command(inputs, finished, logging_steps=3, save_steps=5, sampling=SAMPLING | {"batch_size": 2}))
