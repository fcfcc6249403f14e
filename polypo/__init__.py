"""The program `polypo`: `polypo train ...`, `polypo generate ...` and what else `COMMANDS` lists.

It lies outside of `trainers`, whose import takes seconds, so that a usage is there at once. `polypo train` starts
`accelerate launch` itself; any other command does so when it is given an option of `LAUNCH`.
"""

import argparse
import difflib
import importlib
import os
import sys

from . import recipes, usage
from .usage import LAUNCH

COMMANDS = {  # each is `main(argv)` of the module of this name in trainers/cli
    "train": "train with any method, from a recipe, from flags or from both",
    "generate": "sample responses to prompts, and score them",
    "prepare": "write a data set as canonical rows, to look at it or to train offline",
    "compare": "train several methods on the same rows and compare them on held-out prompts",
    "types": "choose the number of EM-DPO's types of annotators on held-out rows",
    "aggregate": "weigh or distil EM-DPO's policies into one that is fair to all types",
    "masks": "show SparsePO's masks token by token",
    "report": "write the page of a run: demo, rounds, SGPO, comparison, masks",
}


def main(argv: list[str] | None = None) -> None:
    """Run a command line, by default that of this process."""
    command, *argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(usage.program(COMMANDS))
        return
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        sys.exit(f"polypo has no command {command!r}: {f'did you mean {near[0]}?' if near else 'see polypo --help.'}")
    if {"-h", "--help"} & {*argv}:
        print(usage.train(argv) if command == "train" else usage.command(command))
        return
    sys.path.append(os.getcwd())  # where a user's own methods, formats and scorers are
    module = f"trainers.cli.{command}"
    launch, rest = split_launch(argv, needed=command == "train")
    if launch is None:
        importlib.import_module(module).main(rest)
        return
    from accelerate.commands.launch import launch_command, launch_command_parser  # imports torch

    launch_command(launch_command_parser().parse_args(["--quiet", *launch, "--module", module, *rest]))


def split_launch(argv: list[str], *, needed: bool) -> tuple[list[str] | None, list[str]]:
    """Options of `accelerate launch` and those of the command.

    The first are None where there are none, unless they are `needed`, and where a dry run needs no processes.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in (*LAUNCH, "accelerate_config"):
        parser.add_argument(*{f"--{name}", f"--{name.replace('_', '-')}"}, dest=name)
    parser.add_argument("--cpu", action="store_true")
    options, rest = parser.parse_known_args(argv)
    config, recipe = options.accelerate_config, {}
    if needed:
        flags, recipe = recipes.split_recipe(rest)
        if recipes.is_true(recipes.chosen("dry_run", flags, recipe)):
            return None, rest + (["--accelerate_config", config] if config else [])
    launch = [part for name in LAUNCH if (value := getattr(options, name)) for part in (f"--{name}", value)]
    launch += ["--cpu"] if options.cpu else []
    if config := config or recipe.get("accelerate_config"):
        launch += ["--config_file", recipes.accelerate_file(config)]
    return launch if launch or needed else None, rest
