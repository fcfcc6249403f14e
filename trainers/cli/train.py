"""Train with any method: accelerate launch scripts/train.py --config configs/swepo/demo.yaml [--any_field value]

The YAML is flat: a key is a field of the method's config, of `DataArguments` or of `ModelArguments`, and a flag of the
same name on the command line wins. `--config` takes several files, of which a later one wins. `trainer` is a class of
`trainers` or any dotted import path.
"""

import copy
import importlib
import json
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml
from datasets import Dataset
from peft import PeftModel
from trl import TrlParser, get_peft_config, get_quantization_config

from .. import PreferenceConfig, PreferenceTrainer
from .. import rounds as enhance
from ..data.rows import refuse_template_options
from ..estimate import plan_from_environment
from ..forward.policy import load_tokenizer, set_pad_token
from ..generation.options import EnhanceOptions
from ..generation.scorer import check_scorer
from ..generation.start import load_for_sampling, load_start
from ..inputs import prepare_rows
from ..runs.checkpoints import last_checkpoint, refuse_other_run, was_loaded_alike
from ..runs.settings import model_fingerprint, rows_digest, run_settings
from .arguments import DataArguments, ModelArguments, load_split, set_model_options
from .config_files import check_keys, read_files
from .dry_run import build_model, describe


def main(argv: list[str]) -> None:
    trainer_class, data, args, model = parse(argv)
    refuse_lost_processes(args.world_size, os.environ)
    if not model.model_name_or_path:
        raise ValueError("model_name_or_path is missing: name a model on the hub or a folder.")
    if not data.dataset_name:
        raise ValueError("dataset_name is missing: name a data set on the hub, a file or a folder.")
    set_model_options(args, model)
    if data.dry_run:
        report = describe(trainer_class, data, args, model, load=lambda name: load_split(data, args, name))
        if args.process_index == 0:
            print(report)
        return
    train(trainer_class, data, args, model)


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


def train(trainer_class: type[PreferenceTrainer], data: DataArguments, args, model: ModelArguments) -> None:
    """Load, train, evaluate and save model, tokenizer, config, metrics and model card; in rounds if that is asked."""
    if run_stages := getattr(trainer_class, "run_stages", None):  # a method whose recipe is more than one training
        own = {"quantization_config": get_quantization_config(model), "peft_config": get_peft_config(model)}
        run_stages(args, data, model, fit=lambda trainer, checkpoint: fit(trainer, data, checkpoint), **own)
        return
    splits = {name: load_split(data, args, name) for name in ("train", "test")}
    if getattr(args, "self_enhance", None):  # a field of the methods that can be trained in rounds
        train_in_rounds(trainer_class, data, args, model, splits)
        return
    enhance.refuse_folder_of_rounds(args.output_dir)
    checkpoint = _checkpoint(args, trainer_class)
    if checkpoint and _ended(args, checkpoint) and _is_same_run(trainer_class, args, model, splits, checkpoint):
        if args.process_index == 0:
            print(f"The run in output_dir={args.output_dir} is finished: nothing is trained.")
        return
    trainer = trainer_class(
        model.model_name_or_path,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    fit(trainer, data, checkpoint)


def fit(trainer: PreferenceTrainer, data: DataArguments, checkpoint: str | None) -> None:
    """Train from `checkpoint` or from the start, evaluate, and write everything to the trainer's output folder."""
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_model()  # before the evaluation, which may cast the weights
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_state()
    trainer.create_model_card(dataset=data.dataset_name)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset=data.dataset_name)


def train_in_rounds(trainer_class, data: DataArguments, args, model: ModelArguments, splits: dict) -> None:
    """Self-enhancement: `fit` once per round on scored samples of the policy that the round before left.

    A method with a reference takes the policy at the start of the round for it.
    """
    enhance.refuse_unsupported(args)
    options = EnhanceOptions.parse(args.self_enhance)
    check_scorer(options.scorer)  # before anything is sampled for it
    name, quantization = model.model_name_or_path, get_quantization_config(model)
    rows, held_out = (list(splits[split] or []) for split in ("train", "test"))
    for row in [*rows, *held_out]:
        refuse_template_options(row)

    def load(start: Path | None) -> tuple:
        return load_for_sampling(name, start, args, dtype=options.dtype, quantization_config=quantization)

    def train_round(rows: list[dict], index: int, start: Path | None, folder: Path) -> None:
        keywords = {"init_kwargs": args.model_init_kwargs, "quantization_config": quantization}
        policy = load_start(name, start, trainable=True, **keywords)
        trainer = trainer_class(
            policy,
            args=round_arguments(args, options.iterations, index, folder),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=splits["test"],
            peft_config=get_peft_config(model) if start is None else None,
            processing_class=load_tokenizer(policy),
        )
        fit(trainer, data, last_checkpoint(folder))

    more = {f"model.{field}": value for field, value in vars(model).items()}
    more |= {"trainer": data.trainer, "model files": model_fingerprint(name)}
    settings = enhance.run_settings(args, rows, held_out, **more)
    enhance.Loop(options, rows, args.output_dir, settings, load, train_round, held_out, seed=args.seed).run()


def round_arguments(args, iterations: int, index: int, folder: Path):
    """The training arguments of a round: its own folder and order of the rows, `iterations` times the length."""
    own = copy.copy(args)
    own.output_dir, own.seed, own.model_init_kwargs = str(folder), args.seed + index, None
    own.self_enhance = None
    own.num_train_epochs = args.num_train_epochs * iterations
    own.max_steps = args.max_steps * iterations if args.max_steps > 0 else args.max_steps
    return own


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


def _ended(args, checkpoint: str) -> bool:
    """Whether the run was written to its end, the model card last, and `checkpoint` is that of its last step."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    if args.max_steps > 0:
        trained = state["global_step"] >= args.max_steps
    else:
        trained = state["global_step"] >= state["max_steps"] and state["num_train_epochs"] >= args.num_train_epochs
    return trained and (Path(args.output_dir) / "README.md").is_file()


def _is_same_run(trainer_class, args, model: ModelArguments, splits: dict, checkpoint: str) -> bool:
    """Whether a run that ended is this one, as far as can be told without its weights.

    It is not where the model has another path or was loaded in another way: then the weights must be looked at.

    Raises:
        ValueError: method, settings, adapter or rows are others; the message names what differs.
    """
    policy = build_model(model, args, plan_from_environment(os.environ))
    tokenizer = load_tokenizer(policy, args.model_init_kwargs)
    set_pad_token(tokenizer, args.pad_token)
    rows = prepare_rows(splits["train"], tokenizer, args)
    adapter = policy.active_peft_config if isinstance(policy, PeftModel) else None
    own = {"trainer": trainer_class.__name__, "training rows": rows_digest(rows)}
    refuse_other_run(checkpoint, run_settings(args, length=False, adapter=adapter, **own))
    return was_loaded_alike(checkpoint, policy.config.name_or_path, args.model_init_kwargs)


def _checkpoint(args, trainer_class: type[PreferenceTrainer]) -> str | None:
    """`resume_from_checkpoint: true` takes the last complete checkpoint of the output folder, if there is one."""
    wanted = args.resume_from_checkpoint
    if str(wanted).lower() in ("none", "false", ""):
        return None
    last = str(wanted).lower() in ("true", "last")
    if trainer_class.resumes_by_itself:
        if not last:
            raise ValueError(
                f"resume_from_checkpoint={wanted!r} cannot be used with {trainer_class.__name__}, which finds in "
                "output_dir what is done: leave the option out, and give the output_dir of the run to go on with."
            )
        return None
    if last:
        found = last_checkpoint(args.output_dir)
        if found is None and args.process_index == 0:
            print(f"There is no checkpoint in output_dir={args.output_dir}: training begins at step 0.")
        return found
    if not Path(wanted).is_dir():
        raise ValueError(
            f"resume_from_checkpoint={wanted!r} is not a folder: name a checkpoint, or true for the last."
        )
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise ValueError(f"resume_from_checkpoint={wanted!r} was not saved to its end: name another, or true.")
    return wanted


if __name__ == "__main__":
    main(sys.argv[1:])
