"""Usages, read from the source of the dataclasses: importing them would take ten seconds."""

import argparse
import ast
import importlib.util
import os
import sys
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from .recipes import chosen, nearest, split_recipe

# What most runs set, of the many options of TRL's ModelConfig and of TrainingArguments.
MODEL = (
    "model_name_or_path", "model_revision", "dtype", "attn_implementation", "use_peft", "lora_r", "lora_alpha",
    "lora_dropout", "lora_target_modules", "load_in_4bit",
)  # fmt: skip
TRAINING = (
    "output_dir", "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "bf16", "optim",
    "weight_decay", "max_grad_norm", "seed", "logging_steps", "report_to", "eval_strategy", "eval_steps",
    "save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint", "push_to_hub", "use_cpu",
)  # fmt: skip
LAUNCH = {  # options of `accelerate launch`, which it names alike
    "num_processes": "Processes in all, one for each GPU.",
    "num_machines": "Machines in all.",
    "machine_rank": "Number of this machine, from 0.",
    "main_process_ip": "Address of machine 0.",
    "main_process_port": "A free port of machine 0.",
    "gpu_ids": "GPUs of this machine to use, such as 0,1.",
}
TRAIN = "polypo train --config a.yaml [b.yaml ...] [--any_field value] [--accelerate_config zero3]"


class Option(NamedTuple):
    """A field as its source says."""

    type: str
    default: str
    help: str


def show(text: str) -> None:
    """Print a usage, whose reader (`| head`) may leave before its end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end


def program(commands: dict[str, str]) -> str:
    """The usage of `polypo`."""
    lines = [f"  {name:9}  {text}" for name, text in commands.items()]
    return "\n".join(["usage: polypo COMMAND ...", "", *lines, "", "polypo COMMAND --help lists a command's options."])


def train(argv: list[str]) -> str:
    """The usage of `polypo train` for the trainer that `argv` names: what most runs set, or `--help all` options."""
    everything = "all" in argv
    flags, recipe = split_recipe([part for part in argv if part not in ("-h", "--help", "all")])
    trainer = chosen("trainer", flags, recipe, "SWEPOTrainer")
    trainers = _file("trainers")
    method, config = config_of(trainer), options("PreferenceConfig", trainers)
    shared = options("TrainingArguments", _file("transformers"))
    data, model = (options(f"{name}Arguments", trainers.parent / "cli/arguments.py") for name in ("Data", "Model"))
    groups = {
        f"{trainer} (--trainer names another, a class of `trainers` or a dotted path)": method.keys() - config.keys(),
        "data": data,
        "every method": config.keys() - shared.keys(),
        "model": model if everything else MODEL,
        "training": shared if everything else TRAINING,
        "processes, of accelerate launch": LAUNCH,
    }
    known = data | model | method | {name: Option("TEXT", "None", text) for name, text in LAUNCH.items()}
    rest = "" if everything else "polypo train --help all lists all options, those of transformers and TRL included."
    return _format(TRAIN, {title: {n: known[n] for n in known if n in names} for title, names in groups.items()}, rest)


def command(name: str) -> str:
    """The usage of another command: what its module says, and the fields of its own dataclasses."""
    path = _file(f"trainers.cli.{name}")
    tree, own = _tree(path), {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments"):
            own |= options(node.name, path)
    groups: dict[str, dict[str, Option]] = {"required": {}, "options": {}}
    for option, field in own.items():
        groups["required" if field.default == "MISSING" else "options"][option] = field
    return _format(f"polypo {name} ...", groups, about=ast.get_docstring(tree))


def _format(usage: str, groups: dict[str, dict[str, Option]], rest: str = "", about: str | None = None) -> str:
    shape = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=119)
    own = {"usage": usage, "description": about, "epilog": rest}
    parser = argparse.ArgumentParser(**own, add_help=False, formatter_class=shape)
    for title, group in groups.items():
        section = parser.add_argument_group(title)
        for name, (kind, default, told) in group.items():
            shown = "" if default in ("None", "MISSING", "") else f" [{default}]"
            told = " ".join(told.split()).replace("%", "%%") + shown
            section.add_argument(f"--{name}", metavar=kind.replace(" | None", ""), help=told)
    return parser.format_help()


# Reading source.


def config_of(trainer: str) -> dict[str, Option]:
    """The options of the config class of a trainer, a class of `trainers` or a dotted path."""
    module, _, name = trainer.rpartition(".")
    path = _file(module or "trainers")
    while True:
        node, path = find_class(name, path)
        for line in node.body:
            if isinstance(line, ast.Assign) and line.targets[0].id == "config_class":
                return options(line.value.id, path)
        name = node.bases[0].id


def options(name: str, path: Path) -> dict[str, Option]:
    """The fields of the dataclass that a file calls `name`, those of its bases first."""
    node, path = find_class(name, path)
    fields = {}
    for base in node.bases:
        fields |= options(base.id, path)
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and not line.target.id.startswith("_"):
            fields[line.target.id] = _option(line)
    return fields


def find_class(name: str, path: Path) -> tuple[ast.ClassDef, Path]:
    """The definition of a class that a file has or imports, and the file where it is.

    Raises:
        ValueError: it has none.
    """
    tree = _tree(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, path
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            module = node.module or ""
            return find_class(name, _file(module, path.parents[node.level - 1] if node.level else None))
    known = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    raise ValueError(f"{path} has no class {name}: {nearest(name, known, 'see --help.')}")


def _file(module: str, folder: Path | None = None) -> Path:
    """The file of a module, below `folder` or installed; of a package its `__init__`."""
    if folder is None:
        top, _, module = module.partition(".")
        spec = importlib.util.find_spec(top)  # of a top-level name, which imports nothing
        if spec is None or not (spec.submodule_search_locations or spec.origin):
            raise ValueError(f"there is no module {top}.")
        folder = Path(next(iter(spec.submodule_search_locations or [spec.origin])))  # a folder may lack __init__.py
    path = folder.joinpath(*filter(None, module.split(".")))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _option(line: ast.AnnAssign) -> Option:
    """From `name: type = field(default=..., metadata={"help": ...})`, `= option(default, help)` or `= default`."""
    given = {"default": line.value}
    if isinstance(line.value, ast.Call):
        given = dict(zip(("default", "help"), line.value.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in line.value.keywords}
        if isinstance(metadata := given.get("metadata"), ast.Dict):
            given |= {key.value: value for key, value in zip(metadata.keys, metadata.values, strict=True)}
    default = given.get("default") or given.get("default_factory")
    value = _literal(default)
    if isinstance(value, list):  # as a flag takes them
        value = " ".join(map(str, value))
    elif isinstance(default, ast.Name) and value != "MISSING":  # its value stands elsewhere
        value = None
    choices, text = _literal(given.get("choices")), given.get("help")
    kind = "|".join(choices) if isinstance(choices, list) else ast.unparse(line.annotation)
    return Option(kind, str(value), "" if text is None else str(_literal(text)))


def _literal(node: ast.expr | None):
    node = node.body if isinstance(node, ast.Lambda) else node
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
