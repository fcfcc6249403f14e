"""The same posterior on one process, under DDP and under ZeRO-3."""

import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from test_distributed import launch

SCRIPT = Path(__file__).parent / "emdpo_steps.py"
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
