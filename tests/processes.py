"""Processes that start with everything imported: each is a fork of a template, which imports once.

Importing torch, transformers, TRL and DeepSpeed takes longer than most runs of a tiny model.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

_template = multiprocessing.get_context("forkserver")
# Only what reads nothing of a process's own environment, such as WORLD_SIZE, while it is imported.
_template.set_forkserver_preload(
    ["deepspeed", "pytest", *(f"trainers.cli.{name}" for name in ("aggregate", "generate", "train"))]
)


def start(target: Callable, *arguments, log: Path | str, count: int = 1) -> list[multiprocessing.Process]:
    """Begin `target(*arguments)`, a function of a module, in `count` processes; with several as torchrun does it."""
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = []
    for rank in range(count):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        own = {name: str(value) for name, value in own.items()} | meet if count > 1 else {}
        process = _template.Process(target=_work, args=(target, arguments, {**os.environ, **own}, str(log)))
        # The template is started with the first process, and finds modules as this process does.
        with _environment(PYTHONPATH=os.pathsep.join(filter(None, sys.path)), DS_ACCELERATOR="cpu"):
            process.start()
        started.append(process)
    return started


def wait(processes: list[multiprocessing.Process], expired: Callable[[], bool]) -> bool:
    """Wait until all ended. If one fails, the others are killed; if `expired()`, all are, and the result is True."""
    late = False
    while any(process.is_alive() for process in processes):
        late = expired()
        if late or any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
            break
        time.sleep(0.02)
    for process in processes:
        process.join()
    return late


def run(target: Callable, *arguments, count: int = 1, seconds: float = 300) -> tuple[list[int], str]:
    """Exit codes of `target(*arguments)` in `count` processes, -9 where one was killed, and what they printed."""
    end = time.monotonic() + seconds
    with tempfile.NamedTemporaryFile("r", errors="replace") as log:
        processes = start(target, *arguments, log=log.name, count=count)
        wait(processes, lambda: time.monotonic() > end)
        return [process.exitcode for process in processes], log.read()


def die_after(function: Callable, count: int, matches: Callable = lambda *args: True) -> Callable:
    """`function`, which kills its process with signal 9 at the end of its `count`th call that `matches`."""
    left = [count]

    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        left[0] -= bool(matches(*args))
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def _work(target: Callable, arguments: tuple, environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    target(*arguments)


@contextlib.contextmanager
def _environment(**changes: str):
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
