"""scripts/train.py: going on after a kill, and leaving a finished run as it is."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from helpers import flags, launch, save_start
from test_trainer import rows
from trainers import SWEPOTrainer
from trainers.cli import train
from trainers.forward.policy import find_adapter

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_start(folder / "model")
    Dataset.from_list(rows(8)).to_json(folder / "rows.jsonl")
    return folder


def run(inputs, output, **changes):
    options = {"dataset_test_split": "train[:4]", "per_device_train_batch_size": 2, "max_steps": 3, "save_steps": 1,
               "save_strategy": "steps", "logging_steps": 1, "learning_rate": 0.01}  # fmt: skip
    launch(inputs, output, **options | changes)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_left_as_it_is(inputs, tmp_path, capsys):
    run(inputs, tmp_path)  # 3 steps end in the middle of an epoch of 4
    before = contents(tmp_path)
    run(inputs, tmp_path, resume_from_checkpoint=True)
    assert contents(tmp_path) == before and "is finished: nothing is trained" in capsys.readouterr().out
    run(inputs, tmp_path, resume_from_checkpoint=True, max_steps=4)
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.parametrize("changes", [{}, {"resume_from_checkpoint": False}])
def test_the_same_command_again_does_not_begin_anew_over_checkpoints(changes, inputs, tmp_path):
    run(inputs, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="the newest checkpoint-3: set resume_from_checkpoint to true"):
        run(inputs, tmp_path, **changes)
    assert contents(tmp_path) == before


def test_a_run_where_another_has_ended_is_not_mixed_with_it(inputs, tmp_path, monkeypatch):
    """Nor is one that was killed and goes on."""
    adapter = {"use_peft": True, "lora_target_modules": "q_proj"}
    launch(inputs, tmp_path, dataset_test_split="train[:4]", save_strategy="no", max_steps=1, **adapter)
    first = json.loads((tmp_path / "all_results.json").read_text())
    assert first["eval_loss"] and {"swepo", "lora"} < {*ModelCard.load(tmp_path / "README.md").data.tags}
    second = {"trainer": "DPOTrainer", "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2}
    with monkeypatch.context() as patch:
        patch.setattr("trainers.running.remove_outcome", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            launch(inputs, tmp_path, **second)
    launch(inputs, tmp_path, resume_from_checkpoint=True, **second)
    results = [json.loads((tmp_path / f"{name}_results.json").read_text()) for name in ("all", "train")]
    assert results[0] == results[1] and not (tmp_path / "eval_results.json").exists()
    tags = {*ModelCard.load(tmp_path / "README.md").data.tags}
    assert "dpo" in tags and not {"swepo", "lora", "peft"} & tags
    assert find_adapter(str(tmp_path)) is None  # which would be taken for the policy


def test_a_prolonged_run_that_a_kill_cut_short_is_not_finished(inputs, tmp_path, monkeypatch):
    run(inputs, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(SWEPOTrainer, "log_metrics", lambda *arguments: 1 / 0)  # after the last step and its checkpoint
        with pytest.raises(ZeroDivisionError):
            run(inputs, tmp_path, resume_from_checkpoint=True, max_steps=4)
    run(inputs, tmp_path, resume_from_checkpoint=True, max_steps=4)
    model, last = (load_file(tmp_path / at / "model.safetensors") for at in ("", "checkpoint-4"))
    assert all(torch.equal(model[name], last[name]) for name in last)


def test_a_checkpoint_that_a_kill_cut_short_is_not_taken(inputs, tmp_path, capsys):
    run(inputs, tmp_path / "whole")
    run(inputs, tmp_path / "cut")
    weights = (tmp_path / "whole/model.safetensors").read_bytes()
    for name in ("checkpoint-3/trainer_state.json", "README.md", "model.safetensors"):
        (tmp_path / "cut" / name).unlink()
    run(inputs, tmp_path / "cut", resume_from_checkpoint=True)
    assert f"Going on from {tmp_path}/cut/checkpoint-2.\n" in capsys.readouterr().out
    assert (tmp_path / "cut/model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    "changes, told",
    [({"trainer": "NCATrainer"}, "trainer was"), ({"dataset_train_split": "train[:7]"}, "training rows are others"),
     ({"dtype": "bfloat16"}, "dtype was 'float32' and is 'bfloat16'")],
)  # fmt: skip
def test_a_finished_run_of_other_settings_is_no_finished_run(changes, told, inputs, tmp_path, capsys):
    run(inputs, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=told):
        run(inputs, tmp_path, resume_from_checkpoint=True, **changes)
    assert contents(tmp_path) == before and "is finished" not in capsys.readouterr().out


def test_an_adapter_folder_is_gone_on_with_and_described(inputs, tmp_path, capsys):
    run(inputs, tmp_path / "first", use_peft=True, lora_r=4, lora_target_modules=".*q_proj")
    common = {"model_name_or_path": tmp_path / "first"}
    run(inputs, tmp_path / "dry", dry_run=True, **common)
    weights = 2 * 2 * 4 * 32
    assert f"trained: {weights:,} (" in capsys.readouterr().out
    run(inputs, tmp_path / "second", **common)
    before, after = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("first", "second"))
    assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in before)
    card = ModelCard.load(tmp_path / "second/README.md")
    assert {"polypo", "swepo", "lora"} < {*card.data.tags} and card.data.datasets is None
    assert f"This model was trained from `{inputs / 'model'}` on the {inputs / 'rows.jsonl'} dataset" in card.text
    run(inputs, tmp_path / "second", resume_from_checkpoint=True, **common)
    assert "is finished: nothing is trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    "environment, lost",
    [({}, False), ({"ACCELERATE_USE_CPU": "True"}, False), ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, False),
     ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, True),
     ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "a", "MASTER_PORT": "1", "WORLD_SIZE": "1"}, False)],
)  # fmt: skip
def test_processes_that_the_launcher_did_not_start_are_missed(environment, lost):
    train.refuse_lost_processes(2, environment)
    with pytest.raises(ValueError, match="torchrun --nproc_per_node") if lost else contextlib.nullcontext():
        train.refuse_lost_processes(1, environment)


@pytest.mark.parametrize("program", [["polypo", "train"], ["accelerate.commands.accelerate_cli", "launch"]])
def test_accelerate_with_two_cpu_processes_is_stopped(program, inputs, tmp_path):
    launch = [sys.executable, "-m", *program, "--cpu", "--num_processes", "2"]
    options = flags(trainer="LIRETrainer", model_name_or_path=inputs / "model", dataset_name=inputs / "rows.jsonl",
                    output_dir=tmp_path, report_to="none")  # fmt: skip
    script = [] if program[0] == "polypo" else [ROOT / "scripts/train.py"]
    done = subprocess.run([*launch, *script, *options], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode != 0 and "several processes and started one" in done.stderr, done.stderr[-2000:]
    if program[0] == "polypo":
        assert "defaults used" not in done.stderr and "Traceback" not in done.stderr
