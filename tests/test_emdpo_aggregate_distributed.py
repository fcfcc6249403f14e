"""The aggregation on one process and on two: the same mixture, and the same distilled policy."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
from datasets import Dataset
from safetensors.torch import load_file

import processes
from emdpo_runs import em, opposed_rows
from helpers import leave_processes
from trainers.cli import aggregate


def aggregate_with_sgd(arguments):
    aggregate.distilled = partial(aggregate.distilled, optim="sgd")  # Adam magnifies the rounding of small gradients
    aggregate.main(arguments)
    leave_processes()


@pytest.mark.distributed
def test_mixture_and_distilled_policy_do_not_depend_on_the_processes(start, tmp_path, monkeypatch):
    monkeypatch.setattr(aggregate, "distilled", partial(aggregate.distilled, optim="sgd"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    em(tmp_path / "one", start, learning_rate=0.02).train()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    # Five prompts, which two processes do not divide; each answer once in the one policy's training.
    Dataset.from_list([{"prompt": row["prompt"]} for row in opposed_rows()]).to_json(tmp_path / "prompts.jsonl")
    own = ["--dataset_name", str(tmp_path / "prompts.jsonl"), "--max_prompts", "5", "--num_generations", "4",
           "--max_new_tokens", "6", "--distill", "--distill_learning_rate", "0.1"]  # fmt: skip
    aggregate.main(["--run_dir", str(tmp_path / "one"), *own, "--distill_batch_size", "4"])
    two = ["--run_dir", str(tmp_path / "two"), *own, "--distill_batch_size", "2"]
    codes, output = processes.run(aggregate_with_sgd, two, count=2)
    assert codes == [0, 0], output
    expected, found = (json.loads((tmp_path / run / "aggregate/aggregate.json").read_text()) for run in ("one", "two"))
    np.testing.assert_allclose(found["mixture"], expected["mixture"], atol=1e-4)
    types = np.array(expected["regret"])[:, :2]
    assert np.abs(types).max() > 0.1
    np.testing.assert_allclose(np.array(found["regret"])[:, :2], types, atol=1e-4)
    trained = [load_file(tmp_path / run / "aggregate/distilled/model.safetensors") for run in ("one", "two")]
    began = load_file(start / "model.safetensors")
    for name, value in trained[0].items():
        np.testing.assert_allclose(trained[1][name], value, atol=1e-5)
    assert max(float((trained[0][name] - value).abs().max()) for name, value in began.items()) > 1e-3
