"""Train with any method: polypo train --config swepo/demo.yaml [--any_field value]

`accelerate launch scripts/train.py --config configs/swepo/demo.yaml ...` does the same. The YAML is flat: a key is a
field of the method's config, of `DataArguments` or of `ModelArguments`, and a flag of the same name wins. `--config`
takes several files, of which a later one wins. `trainer` is a class of `trainers` or any dotted import path.
"""

import importlib
import os
import sys
from collections.abc import Mapping

from polypo import recipes, usage

from .. import PreferenceConfig, PreferenceTrainer
from . import config_files
from .arguments import DataArguments, ModelArguments, set_model_options
from .dry_run import describe
from .probe import probe


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & {*argv}:
        usage.show(usage.train(argv))
        return
    train(*recipes.split_recipe(argv))


def train(flags: list[str], recipe: dict) -> None:
    """One training, or what `dry_run` and `probe` say of it."""
    trainer_class, data, args, model = read(flags, recipe)
    refuse_lost_processes(args.world_size, os.environ)
    recipes.refuse_missing(model_name_or_path=model.model_name_or_path, dataset_name=data.dataset_name)
    if data.dry_run or data.probe:
        report = (describe if data.dry_run else probe)(trainer_class, data, args, model)
        if args.process_index == 0:
            print(report)
        return
    trainer_class.run(args, data, model.model_name_or_path, **model.of_trainer)


def parse(argv: list[str]) -> tuple[type[PreferenceTrainer], DataArguments, PreferenceConfig, ModelArguments]:
    """Read the command line; see `read`."""
    return read(*recipes.split_recipe(argv))


def read(
    flags: list[str], recipe: dict
) -> tuple[type[PreferenceTrainer], DataArguments, PreferenceConfig, ModelArguments]:
    """Read flags and recipe. Which fields exist depends on the trainer, so its name is read first.

    The model's options are in `args.model_init_kwargs` as well, with the dtype that they come to on this machine.
    """
    trainer_class = find_trainer(recipes.chosen("trainer", flags, recipe, DataArguments.trainer))
    if recipes.is_true(recipes.chosen("dry_run", flags, recipe)):
        flags = [*flags, "--use_cpu", "true"]  # without it, a machine without a GPU refuses bf16
    classes: list[type] = [DataArguments, trainer_class.config_class, ModelArguments]
    data, args, model = config_files.parse(classes, flags, recipe)
    set_model_options(args, model, planned_for=data.accelerate_config if data.dry_run else None)
    return trainer_class, data, args, model


def refuse_lost_processes(processes: int, environment: Mapping[str, str]) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and names a meeting point for two.

    Raises:
        ValueError: this is what happened.
    """
    asked = {"ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys()
    if processes == 1 and asked and not {"RANK", "WORLD_SIZE"} & environment.keys():
        raise ValueError(
            "accelerate was told of several processes and started one: on CPUs it needs mpirun for more. Start with "
            "`torchrun --nproc_per_node 2 scripts/train.py ... --use_cpu true`. For one process give --num_processes "
            "1, and unset MASTER_ADDR."
        )


def find_trainer(name: str) -> type[PreferenceTrainer]:
    """`SWEPOTrainer` or `my_lab.dro.DROTrainer` -> the class.

    Raises:
        ValueError: there is no such module or class, or it is no PreferenceTrainer.
    """
    module, _, attribute = name.rpartition(".")
    if os.getcwd() not in sys.path:  # `accelerate launch scripts/train.py` puts only scripts/ there
        sys.path.append(os.getcwd())
    known = [n for n in importlib.import_module("trainers").__all__ if n.endswith("Trainer")]
    all_of_them = f"use a dotted import path or one of {', '.join(known)}."
    fix = recipes.nearest(name, known, all_of_them, ending="Trainer")
    try:
        found = getattr(importlib.import_module(module or "trainers"), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"trainer={name!r} was not found ({error}): {fix}") from error
    if not (isinstance(found, type) and issubclass(found, PreferenceTrainer)):
        raise ValueError(f"trainer={name!r} is not a PreferenceTrainer: {fix}")
    return found
