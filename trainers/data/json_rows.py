"""Rows of local JSON files with exactly the values that stand there.

The reader of `datasets` works block by block and casts later blocks to the types of the first, and it reads dates and
mixed columns into other values: the text "007" may come back as 7, a list of messages as text. Here Python's own
reader is used, and every column must have one type in all rows of all files. Numbers may be whole in some rows and not
in others, and a value may be missing. What messages hold beside text may differ (`structured`).
"""

import gzip
import hashlib
import json
import logging
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
from datasets import Dataset, Features, IterableDataset, Json
from tqdm.auto import tqdm

from .drops import is_first_process
from .faults import explained
from .rows import Row, describe, to_canonical
from .structured import TEMPLATE, blanked, packed, with_json

logger = logging.getLogger(__name__)

CHUNK = 1000  # rows whose types are worked out at once
MOST_KEYS = 200  # of records in a column; the tables of `datasets` take very long for more
EXACT = 2**53  # integers beyond it are rounded among floats
NO_VALUE = object()
MISFITS = (pyarrow.ArrowException, OverflowError, UnicodeEncodeError, RecursionError)


def json_dataset(paths: list[Path], strict: Collection[str] | None = None) -> Dataset:
    """The rows of all files, one after the other.

    Args:
        strict: columns that must have one type; one that is not among them becomes JSON text where it has several,
            or very many keys, with a warning. Default: all.

    Raises:
        ValueError: a row is no JSON object, or its type differs from those before it; the message names file and row.
    """
    columns, digests = _Columns(strict), []
    for path in paths:
        with explained(path):
            columns.add(path)
            digests.append(file_digest(path))
    if not columns.types and not columns.texts:
        raise ValueError(f"the rows of {paths[0].name!r} have no columns; give rows with named fields.")
    files = {"paths": tuple(map(str, paths)), "digests": tuple(digests)}
    with explained(paths[0]):
        features = columns.features()
        gen_kwargs = {**files, "texts": tuple(columns.texts), "columns": dict(features)}
        return Dataset.from_generator(_typed_rows, features=features, gen_kwargs=gen_kwargs)


def json_stream(paths: list[Path]) -> IterableDataset:
    """The same row by row, each with its own types."""
    return IterableDataset.from_generator(_all_rows, gen_kwargs={"paths": tuple(map(str, paths))})


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _all_rows(paths: tuple[str, ...]) -> Iterator[Row]:
    for path in map(Path, paths):
        with explained(path):
            yield from _rows(path)


def _typed_rows(
    paths: tuple[str, ...], digests: tuple[str, ...], texts: tuple[str, ...], columns: dict[str, Any]
) -> Iterator[Row]:
    """`digests` of the files are there for the cache of `datasets`, which must not mistake a changed file."""
    for row in _all_rows(paths):
        yield packed(row, columns) | {name: _as_text(row[name]) for name in texts if row.get(name) is not None}


def _as_text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if any("\ud800" <= letter <= "\udfff" for letter in text) else text


# Types.


class _Columns:
    """The type of each column, wide enough for all rows that were added."""

    def __init__(self, strict: Collection[str] | None):
        self.strict, self.types, self.texts = strict, {}, {}
        self._large: set[str] = set()  # columns with an integer that a float cannot hold
        self._records: set[str] = set()  # keys of messages that hold records

    def features(self) -> Features:
        for name, why in self.texts.items():
            self.types[name] = pyarrow.string()
            if is_first_process():
                logger.warning("Column %r %s: it is carried along as JSON text, and nothing reads it.", name, why)
        features = Features.from_arrow_schema(pyarrow.schema(self.types))
        return Features({
            name: Json() if name in TEMPLATE else with_json(part, self._records) for name, part in features.items()
        })  # fmt: skip

    def add(self, path: Path) -> None:
        """Raises ValueError for a row that does not fit."""
        shown = tqdm(_rows(path), desc=f"Reading {path.name}", unit=" rows", disable=not is_first_process())
        start, rows = 0, iter(shown)
        while chunk := list(islice(rows, CHUNK)):
            for name in dict.fromkeys(name for row in chunk for name in row):
                if name not in self.texts:
                    self._add_values(path, name, chunk, start)
            start += len(chunk)

    def _add_values(self, path: Path, name: str, chunk: list[Row], start: int) -> None:
        values, before = [row.get(name) for row in chunk], self.types.get(name, pyarrow.null())
        values = [None] * len(chunk) if name in TEMPLATE else blanked(values, self._records)
        try:
            self.types[name] = _wider(before, values)
            self._refuse_rounding(name, values)
            if _keys(self.types[name]) > MOST_KEYS:
                raise pyarrow.ArrowInvalid("too many keys")
        except MISFITS as error:
            many = _keys(self.types.get(name, pyarrow.null())) > MOST_KEYS
            if self.strict is None or name in self.strict:
                if many:
                    message = f"column {name!r} of {path.name!r} has records with more than {MOST_KEYS} different keys"
                    raise ValueError(f"{message}; make them a list, or remove the column.") from error
                raise _misfit(path, name, before, chunk, values, start) from error
            self.texts[name] = f"has more than {MOST_KEYS} different keys" if many else "mixes types"

    def _refuse_rounding(self, name: str, values: list) -> None:
        """Raises ArrowInvalid for integers that would be rounded, because other rows of the column hold floats."""
        kind = str(self.types[name])
        if ("int64" in kind or "double" in kind) and name not in self._large:
            if any(isinstance(leaf, int) and abs(leaf) > EXACT for value in values for leaf in _leaves(value)):
                self._large.add(name)
        if name in self._large and "double" in kind:
            raise pyarrow.ArrowInvalid("large integers among floats")


def _wider(before: pyarrow.DataType, values: list) -> pyarrow.DataType:
    """The type that holds what `before` holds and the values as well."""
    found = pyarrow.array(values).type
    if "double" in str(found) and any(isinstance(leaf, bool) for value in values for leaf in _leaves(value)):
        _refuse_flags(values)
    merged = [pyarrow.schema({"x": kind}) for kind in (before, found)]
    return pyarrow.unify_schemas(merged, promote_options="permissive").field("x").type


def _refuse_flags(values: list) -> None:
    """Arrow takes `true` for 1.0 after a float; written as text, the two have no common type."""
    pyarrow.array([_flags_as_text(value) for value in values])


def _flags_as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _flags_as_text(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_flags_as_text(item) for item in value]
    return str(value) if isinstance(value, bool) else value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def _keys(kind: pyarrow.DataType) -> int:
    """The largest number of keys of records in a type."""
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    own = len(inner) if pyarrow.types.is_struct(kind) else 0
    return max([own, *map(_keys, inner)])


def _misfit(path: Path, name: str, before: pyarrow.DataType, chunk: list[Row], values: list, start: int) -> ValueError:
    """What is wrong with the first row of the chunk whose value does not fit."""
    for index, (row, value) in enumerate(zip(chunk, values, strict=True), start):
        try:
            before = _wider(before, [value])
        except MISFITS:
            return ValueError(f"row {index} of {path.name!r}: {_fault(row, name)}")
    return ValueError(f"column {name!r} of {path.name!r} mixes types, or large integers and floats; give one type.")


def _fault(row: Row, name: str) -> str:
    if "responses" in row:
        try:
            to_canonical(row)
        except ValueError as error:
            return str(error)
    return f"{name!r} is {describe(row[name])}, which mixes types or differs from the rows before; give one type."


# Text.


def _rows(path: Path) -> Iterator[Row]:
    index = -1
    for index, row in enumerate(_values(path)):
        if not isinstance(row, dict):
            raise ValueError(f"row {index} of {path.name!r} is no JSON object; give one per row.")
        yield row
    if index < 0:
        raise ValueError(f"{path.name!r} is empty: give a file with at least one row.")


def _values(path: Path) -> Iterator[Any]:
    with _open(path) as lines:
        for index, line in enumerate(line for line in lines if line.strip()):
            value = _parsed(line, index, path)
            if value is NO_VALUE:  # one JSON value over many lines
                value = json.loads(_content(path))
                yield from value if isinstance(value, list) else [value]
                return
            yield from value if isinstance(value, list) else [value]


def _parsed(line: bytes, index: int, path: Path) -> Any:
    """The value in a line; NO_VALUE where the first line is not one, so that the file is not JSON Lines."""
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"row {index} of {path.name!r} is not UTF-8 ({error.reason}); save it as UTF-8.") from error
    except RecursionError as error:
        raise ValueError(f"row {index} of {path.name!r} is nested too deeply; give plain lists.") from error
    except json.JSONDecodeError as error:
        if index == 0:
            return NO_VALUE
        raise ValueError(f"row {index} of {path.name!r} is not valid JSON: {error}.") from error


def _content(path: Path) -> bytes:
    with _open(path) as file:
        return file.read()


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
