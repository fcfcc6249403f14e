"""scripts/train.py: going on after a kill, and leaving a finished run as it is."""

import json
import shutil

import pytest
from datasets import Dataset

import train
from helpers import build_tokenizer, tiny_llama
from test_trainer import rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    tiny_llama(len(tokenizer)).save_pretrained(folder / "model")
    Dataset.from_list(rows(8)).to_json(folder / "rows.jsonl")
    return folder


def run(inputs, output, **changes):
    flags = {
        "trainer": "SWEPOTrainer", "model_name_or_path": inputs / "model", "dataset_name": inputs / "rows.jsonl",
        "dataset_test_split": "train[:4]", "output_dir": output, "use_cpu": True, "report_to": "none",
        "per_device_train_batch_size": 2, "max_steps": 3, "save_strategy": "steps", "save_steps": 1,
        "logging_steps": 1, "disable_tqdm": True, "learning_rate": 0.01, **changes,
    }  # fmt: skip
    train.main([str(part) for name, value in flags.items() for part in (f"--{name}", value)])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_left_as_it_is(inputs, tmp_path, capsys):
    run(inputs, tmp_path)  # 3 steps end in the middle of an epoch of 4
    before = contents(tmp_path)
    run(inputs, tmp_path, resume_from_checkpoint=True)
    assert contents(tmp_path) == before and "is finished: nothing is trained" in capsys.readouterr().out
    run(inputs, tmp_path, resume_from_checkpoint=True, max_steps=4)
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 4


def test_a_checkpoint_that_a_kill_cut_short_is_not_taken(inputs, tmp_path):
    run(inputs, tmp_path / "whole")
    run(inputs, tmp_path / "cut")
    weights = (tmp_path / "whole/model.safetensors").read_bytes()
    for name in ("checkpoint-3/trainer_state.json", "README.md", "model.safetensors"):
        (tmp_path / "cut" / name).unlink()
    run(inputs, tmp_path / "cut", resume_from_checkpoint=True)
    assert (tmp_path / "cut/model.safetensors").read_bytes() == weights


def test_a_run_that_was_killed_before_its_model_was_saved_is_ended(inputs, tmp_path):
    run(inputs, tmp_path, max_steps=4)
    weights = (tmp_path / "model.safetensors").read_bytes()
    for name in ("README.md", "model.safetensors"):
        (tmp_path / name).unlink()
    shutil.rmtree(tmp_path / "checkpoint-1")
    run(inputs, tmp_path, max_steps=4, resume_from_checkpoint=True)
    assert (tmp_path / "model.safetensors").read_bytes() == weights
