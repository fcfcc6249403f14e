"""The YAML files of a recipe, and the flags that go before them. Nothing here needs torch."""

import argparse
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent  # with configs/ and data/ beside it, in a checkout and in a wheel


class _Loader(yaml.SafeLoader):
    """Plain values, and no key twice, of which YAML would silently take the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if (name := self.construct_object(key, deep=True)) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


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
            raise ValueError(f"--config {name} does not exist: name a YAML file, or a recipe such as swepo/demo.yaml.")
        try:
            content = yaml.load(path.read_text(), _Loader)  # noqa: S506, it is a SafeLoader
        except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
            raise ValueError(f"--config {name} is no YAML of plain values: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"--config {name} is not a YAML mapping: write one `field: value` per line.")
        recipe |= {str(key): value for key, value in content.items()}
    return recipe


def split_recipe(argv: list[str]) -> tuple[list[str], dict]:
    """All flags but `--config`, which takes several files and can be given again, and what these files say."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="+", action="extend", default=[])
    options, flags = parser.parse_known_args(argv)
    return flags, read_recipe(options.config)


def chosen(name: str, flags: list[str], recipe: dict, default=None):
    """One option before all are known: of the flags, else of the recipe."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names = {f"--{name}", f"--{name.replace('_', '-')}"}
    parser.add_argument(*names, nargs="?", const="true", dest="option", default=recipe.get(name, default))
    return parser.parse_known_args(flags)[0].option


def is_true(option) -> bool:
    """Of a flag or of a recipe."""
    return str(option).lower() in ("true", "1", "yes")


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
