"""The YAML files of a recipe: several of them as one, with keys that are known and values of the right kind."""

import difflib
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

# Keys and flags of older releases, and what to do now.
DROPPED = {
    "gpu_tflops": "hours are no longer reckoned from an assumed speed: --probe measures them.",
    "utilisation": "hours are no longer reckoned from an assumed speed: --probe measures them.",
    "limits": "the limits of SGPO are constants of trainers/sgpo/monitor.py, and all figures are in its manifests.",
    "stage": "the stages of SGPO run one after the other, and a run that was stopped goes on where it was.",
    "separate_improver": "with SGPO one model is policy and improver, as the paper's abstract says.",
    "reference_in_input": "SGPO's improver must work where there is no reference, as on the prompts of the pairs.",
}
ENV = "env"  # a key that TRL's parser knows: environment variables to set


class _Loader(yaml.SafeLoader):
    """Plain values, and no key twice, of which YAML would silently take the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if (name := self.construct_object(key, deep=True)) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_files(paths: list[str]) -> dict[str, tuple[Any, str]]:
    """Key -> (value, the file it is from); a later file wins.

    Raises:
        ValueError: a file is missing or is no YAML mapping.
    """
    merged = {}
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"--config {path} does not exist: name a YAML file.")
        try:
            content = yaml.load(Path(path).read_text(), _Loader)  # noqa: S506, it is a SafeLoader
        except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
            raise ValueError(f"--config {path} is no YAML of plain values: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"--config {path} is not a YAML mapping: write one `field: value` per line.")
        merged |= {str(key): (value, path) for key, value in content.items()}
    return merged


def refuse_dropped(names: Iterable[str], classes: Iterable[type]) -> None:
    """Raises ValueError for the name of an option that is no longer there, and no field of the dataclasses either."""
    for name in names:
        if name in DROPPED and not any(name in cls.__dataclass_fields__ for cls in classes):
            raise ValueError(f"{name} is no option any more: {DROPPED[name]}")


def check_keys(found: dict[str, tuple[Any, str]], classes: list[type]) -> None:
    """Every key must be a field of one of the dataclasses, and its value of that field's kind.

    Raises:
        ValueError: one is not; the message names the file, the key and the fix.
    """
    hints = {name: hint for cls in reversed(classes) for name, hint in _fields(cls).items()}
    for key, (value, path) in found.items():
        if key == ENV:
            continue
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            meant = f"did you mean {near[0]}?" if near else "`--help` lists the known ones."
            raise ValueError(f"--config {path}: the key {key!r} is not known: {meant}")
        if not _fits(value, kinds := _kinds(hints[key])):
            wanted = " or ".join(sorted(kind.__name__ for kind in kinds))
            quoted = " (YAML reads yes, no, on and off as booleans: put quotes around a word)"
            raise ValueError(
                f"--config {path}: {key}: {value!r} is a {type(value).__name__}, but {key} takes {wanted}"
                + (quoted if isinstance(value, bool) and str in kinds else "")
                + "."
            )


def _fields(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {name: hints[name] for name, field in cls.__dataclass_fields__.items() if field.init}


def _kinds(hint) -> set[type]:
    """The plain types that a field may have."""
    origin = get_origin(hint)
    if hint is Any:
        return {object}
    if origin in (Union, types.UnionType):
        return set().union(*map(_kinds, get_args(hint)))
    if origin is Literal:
        return {type(value) for value in get_args(hint)}
    found = origin or hint
    return {found} if isinstance(found, type) and found.__module__ in ("builtins", "types") else {str}


def _fits(value, kinds: set[type]) -> bool:
    """A text fits everywhere, because the parser reads it as it reads a flag: 1e-5 is a text in YAML."""
    if isinstance(value, bool):  # which Python counts as an integer
        return bool in kinds or object in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return isinstance(value, str) or isinstance(value, tuple(kinds))
