"""The program `polypo`: `polypo train ...`, `polypo generate ...` and what else `COMMANDS` lists.

It lies outside of `trainers`, whose import takes seconds, so that a usage is there at once. `polypo train` starts
`accelerate launch` itself, as does `polypo sweep`; any other command does so when it is given an option of `LAUNCH`.
"""

import argparse
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from . import recipes, usage
from .usage import LAUNCH

COMMANDS = {  # each is `main(argv)` of the module of this name in trainers/cli
    "train": "train with any method, from a recipe, from flags or from both",
    "generate": "sample responses to prompts, and score them",
    "inspect": "tell what a data set is before training: a page and JSON",
    "prepare": "write a data set as canonical rows, to look at it or to train offline",
    "sweep": "train with every combination of some options' values, and name the best run",
    "compare": "train several methods on the same rows and compare them on held-out prompts",
    "types": "choose the number of EM-DPO's types of annotators on held-out rows",
    "aggregate": "weigh or distil EM-DPO's policies into one that is fair to all types",
    "masks": "show SparsePO's masks token by token",
    "report": "write the page of any run, or of several side by side",
}


TRAINING = ("train", "sweep")  # which need the processes of accelerate, also without an option of `LAUNCH`
LAUNCHER = "POLYPO_LAUNCHER"  # variable that tells the processes of accelerate which one started them


def main(argv: list[str] | None = None) -> None:
    """Run a command line, by default that of this process."""
    command, *argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    sys.path.append(os.getcwd())  # where a user's own methods, formats and scorers are
    with mistakes_told():
        if command in ("-h", "--help"):
            usage.show(usage.program(COMMANDS))
        elif command == "--version":
            print(f"polypo {version('polypo')}")
        elif command not in COMMANDS:
            near = recipes.nearest(command, COMMANDS, "see polypo --help.")
            raise ValueError(f"polypo has no command {command!r}: {near}")
        elif {"-h", "--help"} & {*argv}:
            usage.show(usage.train(argv) if command == "train" else usage.command(command))
        else:
            start(command, argv)


@contextmanager
def mistakes_told() -> Iterator[None]:
    """A mistake of the user ends the program with a line: an error that comes before the first step and says why.

    So does Ctrl-C. Any other error keeps its traceback, and with POLYPO_TRACEBACK=1 all do.
    """
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get("POLYPO_TRACEBACK"):
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, ImportError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if os.environ.get("POLYPO_TRACEBACK") or any(frame.name == "_inner_training_loop" for frame in frames):
            raise
        sys.exit(f"error: {error}\n(POLYPO_TRACEBACK=1 shows where this was raised.)")


def start(command: str, argv: list[str]) -> None:
    """Run a command here, or hand it to accelerate."""
    launch, rest = split_launch(argv, needed=command in TRAINING)
    if launch is None:
        importlib.import_module(f"trainers.cli.{command}").main(rest)
        return
    if command in TRAINING:
        flags, recipe = recipes.split_recipe(rest)
        recipes.set_environment(recipe)  # a token or the visible GPUs count for what is asked here
        recipes.refuse_missing_model(flags, recipe)
    from accelerate.commands.launch import launch_command, launch_command_parser  # imports torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)  # it would list its defaults
    options = launch_command_parser().parse_args(["--quiet", *launch, "--module", "polypo.worker", command, *rest])
    refuse_missing_gpus(options)
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        launch_command(options)
    except ChildFailedError as error:  # whose own error stands above
        sys.exit(str(error))


def refuse_missing_gpus(options: argparse.Namespace) -> None:
    """Processes without a GPU each would find that out after minutes.

    Raises:
        ValueError: the accelerate file wants more GPUs than this machine has.
    """
    import torch
    from accelerate.commands.config.config_args import load_config_from_file

    if options.config_file is None or options.cpu:
        return
    config, there = load_config_from_file(options.config_file), torch.accelerator.device_count()
    machines = options.num_machines or config.num_machines
    wanted = (options.num_processes or config.num_processes) // machines
    if config.distributed_type in ("DEEPSPEED", "FSDP", "MULTI_GPU") and not config.use_cpu and wanted > there:
        raise ValueError(
            f"{options.config_file} asks for {wanted} GPUs of this machine ({config.distributed_type.value}), and it "
            f"has {there}: give --num_processes, or --accelerate_config single for one process."
        )


def split_launch(argv: list[str], *, needed: bool) -> tuple[list[str] | None, list[str]]:
    """Options of `accelerate launch` and those of the command.

    The first are None where there are none, unless they are `needed`, and where a dry run needs no processes.
    """
    options, rest = recipes.take(argv, *LAUNCH, "accelerate_config")
    on_cpus, rest = recipes.take(rest, "cpu", action="store_true")
    config, recipe = options.accelerate_config, {}
    if needed:
        flags, recipe = recipes.split_recipe(rest)
        if recipes.is_true(recipes.chosen("dry_run", flags, recipe)):
            return None, rest + (["--accelerate_config", config] if config else [])
    launch = [part for name in LAUNCH if (value := getattr(options, name)) for part in (f"--{name}", value)]
    launch += ["--cpu"] if on_cpus.cpu else []
    if config := config or recipe.get("accelerate_config"):
        launch += ["--config_file", recipes.accelerate_file(config)]
    return launch if launch or needed else None, rest
