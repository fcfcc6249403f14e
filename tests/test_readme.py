"""The sixth method of the README runs as it stands there, through the launcher."""

import json
import re
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from helpers import build_tokenizer, tiny_llama
from test_trainer import rows
from trainers.cli import train

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)


def test_the_sixth_method_trains_through_the_launcher(tmp_path, monkeypatch, capsys):
    code = next(block for block in BLOCKS if "class HingeTrainer" in block)
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "hinge.py").write_text(code)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    Dataset.from_list(rows()).to_json(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    train.main([
        "--trainer", "my_lab.hinge.HingeTrainer", "--model_name_or_path", "model", "--dataset_name", "rows.jsonl",
        "--output_dir", "out", "--margin", "2.0", "--max_steps", "2", "--use_cpu", "--report_to", "none",
        "--logging_steps", "1", "--learning_rate", "0.1", "--dataset_test_split", "train[:4]",
        "--per_device_train_batch_size", "8",
    ])  # fmt: skip
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [log["loss"] for log in history if "loss" in log]
    assert losses[0] == pytest.approx(2.0, abs=1e-5)  # the margin, while policy and reference are equal
    assert losses[1] != pytest.approx(2.0, abs=1e-3)
    for name in ("model.safetensors", "tokenizer.json", "README.md", "train_results.json", "eval_results.json"):
        assert (tmp_path / "out" / name).is_file()


def test_the_quick_start_is_at_most_twelve_lines_and_parses():
    code = next(block for block in BLOCKS if "load_preferences(" in block)
    compile(code, "README.md", "exec")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
