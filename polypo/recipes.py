"""The YAML files of a recipe, and the flags that go before them. Nothing here needs torch."""

import argparse
import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent  # with configs/ and data/ beside it, in a checkout and in a wheel
CONFIG, ADAPTER = "config.json", "adapter_config.json"  # in the folder of a model, and of an adapter
BOOL, TEXT, DATE, *NUMBERS = (f"tag:yaml.org,2002:{name}" for name in ("bool", "str", "timestamp", "int", "float"))


class _Loader(yaml.SafeLoader):
    """Plain values, and no key twice, of which YAML would silently take the last.

    The value of an option stays the text that it is, to be read as a flag's: YAML would make False of a name `no` and
    1.1 of a version 1.10. What only YAML reads as a number (`.inf`, `0x10`) is written as Python does. Inside of lists
    and mappings, numbers are numbers.
    """

    def construct_document(self, node):
        for _, value in node.value if isinstance(node, yaml.MappingNode) else ():
            for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if part is value and part.tag in NUMBERS and re.search(r"inf|nan|0[xb]", part.value.lower()):
                    part.value = str(self.construct_object(part))
                if part.tag == BOOL or (part is value and part.tag in (DATE, *NUMBERS)):
                    part.tag = TEXT
        return super().construct_document(node)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if (name := self.construct_object(key, deep=True)) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def nearest(name: str, known: Iterable[str], otherwise: str, *, ending: str = "") -> str:
    """The end of a message about a name that is not known, which may lack the `ending` of those that are.

    A hint far from what was typed would mislead.
    """
    names = {alias.lower(): one for one in known for alias in (one, one.removesuffix(ending))}
    near = difflib.get_close_matches(name.lower(), names, 1, cutoff=0.75)
    return f"did you mean {names[near[0]]}?" if near else otherwise


def shipped(name: str, folder: str = "") -> str:
    """`name`, or where nothing is there, the file that this package has under that name, if it has one."""
    here = HERE / folder / name
    return str(here) if not Path(name).exists() and here.is_file() else name


def read_recipe(paths: list[str]) -> dict:
    """The keys of several files, of which a later one wins; a file that is not there is looked for among ours.

    Raises:
        ValueError: a file is missing or is no YAML mapping.
    """
    recipe = {}
    for name in paths:
        path = Path(shipped(shipped(name, "configs")))
        if not path.is_file():
            known = [str(ours.relative_to(HERE / "configs")) for ours in (HERE / "configs").rglob("*.yaml")]
            near = nearest(name, known, "name a YAML file, or a recipe such as swepo/demo.yaml.")
            raise ValueError(f"--config {name} does not exist: {near}")
        try:
            content = yaml.load(path.read_text(), _Loader)  # noqa: S506, it is a SafeLoader
        except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
            raise ValueError(f"--config {name} is no YAML of plain values: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"--config {name} is not a YAML mapping: write one `field: value` per line.")
        recipe |= {str(key): value for key, value in content.items()}
    return recipe


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def take(argv: list[str], *names: str, **options) -> tuple[argparse.Namespace, list[str]]:
    """Some options before all are known, and the rest of the command line."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), dest=name, **options)
    return parser.parse_known_args(argv)


def split_recipe(argv: list[str]) -> tuple[list[str], dict]:
    """All flags but `--config`, which takes several files and can be given again, and what these files say."""
    options, flags = take(argv, "config", nargs="+", action="extend", default=[])
    return flags, read_recipe(options.config)


def chosen(name: str, flags: list[str], recipe: dict, default=None):
    """One option before all are known: of the flags, else of the recipe."""
    options, _ = take(flags, name, nargs="?", const="true", default=recipe.get(name, default))
    return getattr(options, name)


def is_true(option) -> bool:
    """Of a flag or of a recipe."""
    return str(option).lower() in ("true", "t", "yes", "y", "on", "1")


def set_environment(recipe: dict) -> None:
    """Set the variables of the recipe's key `env`, as TRL does."""
    os.environ.update({name: str(value) for name, value in (recipe.get("env") or {}).items()})


def refuse_missing(**names) -> None:
    """Raises ValueError for `model_name_or_path` or `dataset_name` where none is given, or what `make demo` makes."""
    for name, value in names.items():
        if not value:
            raise ValueError(f"{name} is missing: name one on the hub, or a path.")
        if isinstance(value, str) and value.startswith("runs/") and not Path(value).exists():
            raise ValueError(
                f"{name}: {value} is not there. A recipe of the demo takes it from a checkout of this project, where "
                f"`make demo` makes it: run it there, or give --{name}, on the hub or a path."
            )


def holds_adapter(folder: str | Path) -> bool:
    """Whether a folder on disk holds an adapter; `trainers.forward.policy.is_adapter` asks the hub as well."""
    return Path(folder, ADAPTER).is_file()


def holds_policy(folder: str | Path) -> bool:
    """Whether a folder on disk holds a model or an adapter."""
    return Path(folder, CONFIG).is_file() or holds_adapter(folder)


def refuse_named_adapters(folder: str) -> None:
    """Raises ValueError for a folder without a model that holds adapters, saved by PEFT in folders of their names."""
    below = sorted(str(path.parent) for path in Path(folder).glob(f"*/{ADAPTER}"))
    if below and not Path(folder, CONFIG).is_file():
        raise ValueError(f"model_name_or_path: {folder} holds its adapters in folders: name {' or '.join(below)}.")


def refuse_missing_model(flags: list[str], recipe: dict) -> None:
    """Raises ValueError where no config of a model is found, before processes start that would all fail to load it."""
    names = ("model_name_or_path", "dataset_name", "model_revision", "model_init_kwargs")
    model, data, revision, keywords = (chosen(name, flags, recipe) for name in names)
    refuse_missing(model_name_or_path=model, dataset_name=data)
    if keywords:  # may say where else to look
        return
    from huggingface_hub import snapshot_download  # not for a usage

    options = {"revision": revision, "allow_patterns": [CONFIG, ADAPTER]}
    try:
        folder = model if Path(model).is_dir() else snapshot_download(model, **options)
    except (ValueError, OSError) as error:
        raise ValueError(f"model_name_or_path: {model} is no folder, and no model of the hub: {error}") from error
    if not holds_policy(folder):
        refuse_named_adapters(folder)
        raise ValueError(f"model_name_or_path: {model} has neither {CONFIG} nor {ADAPTER}.")


def accelerate_file(name: str) -> str:
    """A path, or the name of a file in configs/accelerate, such as zero3.

    Raises:
        ValueError: there is neither.
    """
    if Path(name).is_file():
        return name
    folder = HERE / "configs/accelerate"
    if not (path := folder / f"{name}.yaml").is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ValueError(f"--accelerate_config {name} is no file: name one, or one of {known}.")
    return str(path)
