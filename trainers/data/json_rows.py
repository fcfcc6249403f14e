"""Rows of local JSON files with exactly the values that stand there.

The reader of `datasets` works block by block and casts later blocks to the types of the first, and it reads dates and
mixed columns into other values: the text "007" may come back as 7, a list of messages as text. Here Python's own
reader is used, line by line.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow
from datasets import Json, List, Value
from datasets.exceptions import DatasetGenerationError
from tqdm.auto import tqdm

from .drops import is_first_process

LEFT_OUT = {"prompt", "responses", "scores", "chosen", "rejected"}  # whose types are fixed anyway
EXACT = 2**53  # integers beyond it are rounded among floats
LARGE, HUGE, BEYOND = "large", "huge", "beyond"  # kinds of integers: beyond EXACT, beyond int64, beyond uint64
TYPES = {
    frozenset(): "string",
    frozenset({str}): "string",
    frozenset({bool}): "bool",
    frozenset({int}): "int64",
    frozenset({LARGE}): "int64",
    frozenset({int, LARGE}): "int64",
    frozenset({float}): "float64",
    frozenset({int, float}): "float64",
}
FAULTS = (DatasetGenerationError, pyarrow.ArrowException, EOFError, zlib.error, OSError, RuntimeError, ValueError,
          KeyError, TypeError)  # fmt: skip

Kinds = set[tuple[int, Any]]  # of the leaves of a column: in how many lists they lie, and what they are


class Part(NamedTuple):
    """The rows from `start` to `stop` of some files, read one after the other."""

    paths: tuple[str, ...]
    digests: tuple[str, ...]  # for the cache of `datasets`, which must not mistake a changed file
    start: int = 0
    stop: int | None = None

    @property
    def rows(self) -> int:
        """Their number."""
        if self.stop is None:
            raise TypeError("the rows of a stream have no number")  # which `list` and tqdm do without
        return self.stop - self.start


@dataclass(frozen=True)
class JsonRows:
    """Rows of JSON files, parsed anew by every pass over them: never in memory, and never in a table.

    `kinds` are those of all columns in all rows of the files.
    """

    parts: tuple[Part, ...]
    kinds: dict[str, Kinds]

    @classmethod
    def read(cls, paths: Iterable[Path]) -> "JsonRows":
        """Raises ValueError, naming file and row, for what is no JSON."""
        paths, count = tuple(paths), 0
        kinds: dict[str, Kinds] = {}
        shown = tqdm(cls.stream(paths), desc="Reading JSON", unit=" rows", disable=not is_first_process())
        for row in shown:
            count += 1
            for name, value in row.items():
                kinds.setdefault(name, set()).update(() if name in LEFT_OUT else _kinds(value))
        return cls((Part(tuple(map(str, paths)), tuple(map(file_digest, paths)), 0, count),), kinds)

    @classmethod
    def stream(cls, paths: Iterable[Path]) -> "JsonRows":
        """Rows to go through only: their number and their columns are not known."""
        return cls((Part(tuple(map(str, paths)), ()),), {})

    @property
    def column_names(self) -> list[str]:
        return list(self.kinds)

    @property
    def features(self) -> dict[str, Any]:
        """The types that `column_type` gives the columns."""
        return {name: _type(kinds, name) for name, kinds in self.kinds.items()}

    def __len__(self) -> int:
        return sum(part.rows for part in self.parts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for part in self.parts:
            yield from islice((row for path in part.paths for row in _rows(Path(path))), part.start, part.stop)

    def take(self, count: int) -> "JsonRows":
        """The first rows; of a stream too."""
        [part] = self.parts
        return replace(self, parts=(part._replace(stop=count),))

    def select(self, rows: range) -> "JsonRows":
        """The rows of a range that counts up by one."""
        parts, before = [], 0
        for part in self.parts:
            first, last = (min(max(i - before, 0), part.rows) for i in (rows.start, rows.stop))
            parts += [part._replace(start=part.start + first, stop=part.start + last)] if first < last else []
            before += part.rows
        return replace(self, parts=tuple(parts))

    def __add__(self, other: "JsonRows") -> "JsonRows":
        names = self.kinds | other.kinds
        kinds = {name: self.kinds.get(name, set()) | other.kinds.get(name, set()) for name in names}
        return JsonRows(self.parts + other.parts, kinds)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What the readers of `datasets`, Arrow and gzip raise becomes a ValueError that names the file."""
    try:
        yield
    except FAULTS as error:
        if isinstance(error, ValueError) and path.name in str(error):
            raise  # one of ours
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        raise ValueError(f"cannot read {path.name!r} ({type(cause).__name__}: {cause}).") from error


def file_digest(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Types.


def column_type(values: Iterable[Any], name: str = "") -> Any:
    """Text, numbers, truth values, or lists of one of them; JSON where they mix, or are records.

    Whole numbers and others are one type, unless a whole number is too large for a float.

    Raises:
        ValueError: an integer takes more than 64 bits.
    """
    return _type(set().union(*map(_kinds, values)), name)


def _kinds(value: Any, depth: int = 0) -> Kinds:
    if isinstance(value, list):
        return set().union(*(_kinds(item, depth + 1) for item in value)) or {(depth + 1, None)}
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > EXACT:
        kind = LARGE if -(2**63) <= value < 2**63 else HUGE if 0 < value < 2**64 else BEYOND
        return {(depth, kind)}
    return {(depth, None if value is None else type(value))}


def _type(kinds: Kinds, name: str) -> Any:
    leaves = {kind for _, kind in kinds if kind is not None}
    if BEYOND in leaves:
        raise ValueError(f"column {name!r} holds an integer of more than 64 bits, which no table takes; give text.")
    deepest = max((depth for depth, _ in kinds), default=0)
    if frozenset(leaves) not in TYPES or any(depth < deepest for depth, kind in kinds if kind is not None):
        return Json()
    feature = Value(TYPES[frozenset(leaves)])
    for _ in range(deepest):
        feature = List(feature)
    return feature


# Text.


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    index = -1
    with explained(path):
        for index, row in enumerate(_values(path)):
            if not isinstance(row, dict):
                raise ValueError(f"row {index} of {path.name!r} is no JSON object; give one per row.")
            yield row
        if index < 0:
            raise ValueError(f"{path.name!r} is empty: give a file with at least one row.")


def _values(path: Path) -> Iterator[Any]:
    with _open(path) as lines:
        for index, line in enumerate(line for line in lines if line.strip()):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                if index or not isinstance(error, json.JSONDecodeError):
                    raise ValueError(f"row {index} of {path.name!r} is not valid JSON ({error}).") from error
                yield from _items(_whole(path))  # one JSON value over many lines
                return
            yield from _items(value)


def _items(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _whole(path: Path) -> Any:
    with _open(path) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path.name!r} is not valid JSON ({error}).") from error


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
