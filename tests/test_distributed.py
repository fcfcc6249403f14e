"""The same numbers on one process and on two, under every engine: losses, gradient norms, evaluation."""

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "distributed_steps.py"
ENGINES = ["ddp", "zero2", "zero3", "fsdp2"]
OPTIONS = {
    "full": {},
    "lora": {"peft": True},
    "checkpointing": {"checkpointing": True},
    "lora checkpointing": {"peft": True, "checkpointing": True},
    "accumulation": {"batch": 2, "accumulation": 2},
    "rows": {"layout": "rows"},
    "cache": {"precompute": True},
    "lora cache": {"peft": True, "precompute": True},
    "budget": {"budget": 120},
}
ALWAYS = [("ddp", "budget"), ("zero2", "lora cache"), ("zero3", "cache"), ("fsdp2", "checkpointing")]


def launch(engine: str, options: dict, folder: Path, script: Path = SCRIPT) -> dict:
    """Run the script, by default five steps of a trainer, and return what its first process printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = 1 if engine == "single" else 2
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(port),
    ]
    options = json.dumps({"engine": engine, "folder": str(folder), **options})
    command = [*torchrun, "--nproc_per_node", str(processes), str(script), options]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[0].removeprefix("RESULT "))


@cache
def alone(name: str, folder: Path) -> dict:
    return launch("single", OPTIONS[name], folder)


def flat(result: dict) -> list[float]:
    return [*result["losses"], *result["margins"], *result["norms"], *result["eval"].values()]


def case(engine, name):
    return pytest.param(engine, name, marks=() if (engine, name) in ALWAYS else pytest.mark.slow)


@pytest.fixture(scope="module")
def single_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("single")


@pytest.mark.distributed
@pytest.mark.parametrize("engine, name", [case(engine, name) for engine in ENGINES for name in OPTIONS])
def test_two_processes_give_the_numbers_of_one(engine, name, tmp_path, single_folder):
    expected, found = alone(name, single_folder), launch(engine, OPTIONS[name], tmp_path)
    assert len(flat(found)) == len(flat(expected)) == 18
    assert found["losses"][0] != pytest.approx(found["losses"][-1], rel=0.01)
    assert flat(found) == pytest.approx(flat(expected), rel=1e-4, abs=1e-5)
