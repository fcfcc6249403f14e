"""The same posterior on one process, under DDP and under ZeRO-3; the same mixture under DDP."""

import copy
import json
import shutil
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors.torch import load_file

import aggregate
from emdpo_rows import opposed_rows
from emdpo_runs import em
from test_distributed import launch
from trainers.em.aggregate import refuse_sharding

SCRIPT = Path(__file__).parent / "emdpo_steps.py"
MIXTURE_SCRIPT = SCRIPT.with_name("emdpo_mixture_steps.py")
OPTIONS = {"full": {}, "lora": {"peft": True}, "halves": {"score_on": "heldout_half"}}
ALWAYS = [("ddp", "halves"), ("zero3", "halves")]  # halves have rows that two processes do not divide
CASES = [
    pytest.param(engine, name, marks=() if (engine, name) in ALWAYS else pytest.mark.slow)
    for engine in ("ddp", "zero2", "zero3")
    for name in OPTIONS
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    @cache
    def run(name):
        return launch("single", OPTIONS[name], tmp_path_factory.mktemp(name), script=SCRIPT)

    return lambda name: copy.deepcopy(run(name))


@pytest.mark.distributed
@pytest.mark.parametrize("engine, name", CASES)
def test_posterior_does_not_depend_on_the_processes(engine, name, tmp_path, alone):
    expected, found = alone(name), launch(engine, OPTIONS[name], tmp_path, script=SCRIPT)
    posterior = np.array(expected["posterior"])
    np.testing.assert_allclose(np.array(found["posterior"]), posterior, atol=1e-4)
    assert 0.01 < posterior.max(1).min() and (np.abs(posterior - posterior[:1]) > 0.1).any()
    for figure in ("log_likelihood", "held_out"):
        assert found[figure] == pytest.approx(expected[figure], rel=1e-3)


@pytest.mark.slow
@pytest.mark.distributed
def test_zero3_without_whole_weights_on_disk_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="zero3_save_16bit_model"):
        launch("zero3", {"gather": False}, tmp_path, script=SCRIPT)
    assert not (tmp_path / "out" / "emdpo.json").exists()


@pytest.mark.distributed
def test_mixture_and_distilled_policy_do_not_depend_on_the_processes(start, tmp_path, monkeypatch):
    monkeypatch.setattr(aggregate, "distill", partial(aggregate.distill, optim="sgd"))  # as the script does
    em(tmp_path / "one", start, learning_rate=0.02).train()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    # Five prompts, which two processes do not divide; each answer once in the one policy's training.
    Dataset.from_list([{"prompt": row["prompt"]} for row in opposed_rows()]).to_json(tmp_path / "prompts.jsonl")
    own = ["--dataset_name", str(tmp_path / "prompts.jsonl"), "--max_prompts", "5", "--num_generations", "4",
           "--max_new_tokens", "6", "--distill", "--distill_learning_rate", "0.1"]  # fmt: skip
    aggregate.main(["--run", str(tmp_path / "one"), *own, "--distill_batch_size", "4"])
    two = ["--run", str(tmp_path / "two"), *own, "--distill_batch_size", "2"]
    assert launch("ddp", {"arguments": two}, tmp_path, script=MIXTURE_SCRIPT) == {"processes": 2}
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


def test_sharded_policies_are_refused_in_the_aggregation():
    for engine in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        with pytest.raises(ValueError, match="does not run under"):
            refuse_sharding(engine)
    refuse_sharding(DistributedType.MULTI_CPU)
