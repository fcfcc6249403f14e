"""EM-DPO through the launcher, and killed with signal 9 at any moment."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import transformers
from datasets import Dataset

import processes
from emdpo_runs import OPTIONS, em_config, opposed_rows, quick_collection, same, weights  # noqa: F401
from helpers import flags
from trainers import EMDPOTrainer
from trainers.cli import train
from trainers.forward import cache


def arguments(start, output, **changes):
    options = {
        "trainer": "EMDPOTrainer", "model_name_or_path": start, "dataset_name": start / "rows.jsonl",
        "output_dir": output, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3,
        "save_total_limit": 2, "dataset_test_split": "train[:6]", "ref_tokens_per_batch": 40,
    }  # fmt: skip
    return flags(**OPTIONS | options | changes)


@pytest.fixture(scope="module")
def launched(tmp_path_factory, start):
    Dataset.from_list(opposed_rows(annotators=4, items=4)).to_json(start / "rows.jsonl")
    folder = tmp_path_factory.mktemp("launched")
    train.main(arguments(start, folder))
    return folder


def test_the_launcher_runs_the_whole_em_and_goes_on_by_itself(start, launched):
    for name in ("README.md", "train_results.json", "eval_results.json", "annotators.csv", "mixture.json"):
        assert (launched / name).is_file()
    results = json.loads((launched / "train_results.json").read_text())
    assert results["train_rounds"] == 2 and "train_smallest_type" in results
    assert not list(launched.glob("**/checkpoint-*"))
    policy = launched / "restart-0/round-01/type-0/policy/model.safetensors"
    before = policy.stat().st_mtime_ns
    train.main(arguments(start, launched, resume_from_checkpoint="true"))
    assert policy.stat().st_mtime_ns == before


def test_em_is_started_from_python(start, tmp_path):
    rows = Dataset.from_list(opposed_rows())
    trainer = EMDPOTrainer.run(em_config(tmp_path), {"train": rows, "test": rows}, str(start))
    assert trainer.posterior.shape == (6, 2) and (tmp_path / "README.md").is_file()
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_known_annotators"] == 6


def die_and_train(phase, count, argv):
    """Train until so many training steps or written parts of a score file."""
    if phase == "m-step":
        transformers.Trainer.training_step = processes.die_after(transformers.Trainer.training_step, count)
    else:
        cache.WRITE_EVERY = 1
        cache._write = processes.die_after(cache._write, count)
    train.main(argv)


def test_survives_kill_9_in_m_step_and_e_step(start, launched, tmp_path):
    argv = arguments(start, tmp_path)

    def run_and_die(phase, count):
        codes, output = processes.run(die_and_train, phase, count, argv)
        assert codes == [-signal.SIGKILL], output

    run_and_die("m-step", 8 + 5)  # 8 steps of type 0, 5 of type 1
    folder = tmp_path / "restart-0/round-00"
    assert (folder / "type-0/policy").is_dir() and (folder / "type-1/training/checkpoint-3").is_dir()
    half = folder / "type-1/training/checkpoint-4"
    shutil.copytree(folder / "type-1/training/checkpoint-3", half)
    (half / "trainer_state.json").unlink()
    kept = (folder / "type-0/policy/model.safetensors").stat().st_mtime_ns
    run_and_die("e-step", 2)  # parts of the first E-step
    assert (folder / "type-0/policy/model.safetensors").stat().st_mtime_ns == kept
    assert list((folder / "type-0/logps.parts").iterdir()) and not (folder / "manifest.json").exists()
    train.main(argv)
    for index in (0, 1):
        for name in ("annotators.csv", "manifest.json", "held_out.csv"):
            path = Path(f"restart-0/round-0{index}/{name}")
            assert (tmp_path / path).read_text() == (launched / path).read_text()
    for k in (0, 1):
        path = Path(f"restart-0/round-01/type-{k}/policy")
        same(weights(tmp_path / path), weights(launched / path))
