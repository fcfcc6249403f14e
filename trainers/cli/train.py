"""Train with any method: accelerate launch scripts/train.py --config configs/swepo/demo.yaml [--any_field value]

The YAML is flat: a key is a field of the method's config, of `DataArguments` or of `ModelArguments`, and a flag of the
same name on the command line wins. `--config` takes several files, of which a later one wins. `trainer` is a class of
`trainers` or any dotted import path.
"""

import importlib
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml
from trl import TrlParser, get_peft_config, get_quantization_config

from .. import PreferenceConfig, PreferenceTrainer
from .arguments import DataArguments, ModelArguments, set_model_options
from .config_files import check_keys, read_files, refuse_dropped
from .dry_run import describe


def main(argv: list[str]) -> None:
    trainer_class, data, args, model = parse(argv)
    refuse_lost_processes(args.world_size, os.environ)
    if not model.model_name_or_path:
        raise ValueError("model_name_or_path is missing: name a model on the hub or a folder.")
    if not data.dataset_name:
        raise ValueError("dataset_name is missing: name a data set on the hub, a file or a folder.")
    set_model_options(args, model, planned_for=data.accelerate_config if data.dry_run else None)
    if data.dry_run:
        report = describe(trainer_class, data, args, model)
        if args.process_index == 0:
            print(report)
        return
    if data.probe:
        from .probe import probe  # reads counters that not every system has

        report = probe(trainer_class, data, args, model)
        if args.process_index == 0:
            print(report)
        return
    trainer_class.run(
        args,
        data,
        model.model_name_or_path,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def parse(argv: list[str]) -> tuple[type[PreferenceTrainer], DataArguments, PreferenceConfig, ModelArguments]:
    """Read the command line. Which fields exist depends on the trainer, so its name is read first."""
    flags, files = _split_files([part for argument in argv for part in _split_flag(argument)])
    found = read_files(files)
    with tempfile.TemporaryDirectory() as folder:
        argv = [*flags, *(["--config", _write(found, folder)] if files else [])]
        parser = TrlParser((DataArguments,), add_help=False, allow_abbrev=False)
        first, _ = parser.parse_args_and_config(argv, return_remaining_strings=True)
        trainer_class = find_trainer(first.trainer)
        classes = (DataArguments, trainer_class.config_class, ModelArguments)
        refuse_dropped([*found, *(flag[2:].split("=")[0] for flag in flags if flag.startswith("--"))], classes)
        check_keys(found, classes)
        if first.dry_run:
            argv = [*argv, "--use_cpu", "true"]  # without it, a machine without a GPU refuses bf16
        elif os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or {"deepspeed", "--deepspeed"} & {*found, *flags}:
            refuse_missing_compiler()  # before the arguments, which may start the engine
        parser = TrlParser(classes, allow_abbrev=False)
        return trainer_class, *parser.parse_args_and_config(argv)


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


def refuse_missing_compiler() -> None:
    """On CPUs DeepSpeed compiles an operator when it starts, and takes minutes to fail where it cannot.

    Raises:
        ValueError: there is no GPU, and something that compiling needs is missing.
    """
    from deepspeed.accelerator import get_accelerator  # seconds, which other runs need not wait

    if get_accelerator().device_name() != "cpu":
        return
    commands = {shlex.split(os.environ.get("CXX") or "c++")[0]: "a C++ compiler", "ninja": "ninja"}
    missing = [f"{what} ({name})" for name, what in commands.items() if shutil.which(name) is None]
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("Python's headers (Python.h)")
    if missing:
        raise ValueError(
            f"ZeRO on CPUs compiles an operator of DeepSpeed, and this machine has not {', '.join(missing)}. Install "
            "it, on Debian and Ubuntu with `sudo apt install g++ ninja-build python3-dev`, or run without DeepSpeed."
        )


def find_trainer(name: str) -> type[PreferenceTrainer]:
    """`SWEPOTrainer` or `my_lab.dro.DROTrainer` -> the class.

    Raises:
        ValueError: there is no such module or class, or it is no PreferenceTrainer.
    """
    module, _, attribute = name.rpartition(".")
    if os.getcwd() not in sys.path:  # `accelerate launch scripts/train.py` puts only scripts/ there
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module or "trainers"), attribute)
    except (ImportError, AttributeError) as error:
        known = [n for n in importlib.import_module("trainers").__all__ if n.endswith("Trainer")]
        raise ValueError(
            f"trainer={name!r} was not found ({error}). Use a dotted import path or one of: {', '.join(known)}."
        ) from error
    if not (isinstance(found, type) and issubclass(found, PreferenceTrainer)):
        raise ValueError(f"trainer={name!r} is not a PreferenceTrainer.")
    return found


def _split_flag(argument: str) -> list[str]:
    """`--config=path` -> `--config path`, which the parser needs."""
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def _split_files(argv: list[str]) -> tuple[list[str], list[str]]:
    """Flags, and the files after `--config`, which takes several and can be given again."""
    flags, files, to_files = [], [], False
    for argument in argv:
        if argument.startswith("--"):
            to_files = argument == "--config"
        if to_files and argument != "--config":
            files.append(argument)
        elif not to_files:
            flags.append(argument)
    if "--config" in argv and not files:
        raise ValueError("--config names a file that does not exist: name a YAML file after it.")
    return flags, files


def _write(found: dict[str, tuple], folder: str) -> str:
    """One file of all keys, as the parser wants it."""
    path = Path(folder, "config.yaml")
    path.write_text(yaml.safe_dump({key: value for key, (value, _) in found.items()}, sort_keys=False))
    return str(path)


if __name__ == "__main__":
    main(sys.argv[1:])
