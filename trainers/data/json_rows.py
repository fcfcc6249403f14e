"""Rows of local JSON files with exactly the values that stand there.

The reader of `datasets` works block by block and casts later blocks to the types of the first, and it reads dates and
mixed columns into other values: the text "007" may come back as 7, a list of messages as text. Here Python's own
reader is used, and every column must have one type in all rows of all files. Numbers may be whole in some rows and not
in others, and a value may be missing.
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
from datasets import Dataset, Features, IterableDataset
from tqdm.auto import tqdm

from .drops import is_first_process
from .faults import explained
from .rows import Row, describe, to_canonical

logger = logging.getLogger(__name__)

CHUNK = 1000  # rows whose types are worked out at once
MISFITS = (pyarrow.ArrowException, OverflowError, UnicodeEncodeError)


def json_dataset(paths: list[Path], strict: Collection[str] | None = None) -> Dataset:
    """The rows of all files, one after the other.

    Args:
        strict: columns that must have one type; one that is not among them becomes JSON text where it has several,
            with a warning. Default: all.

    Raises:
        ValueError: a row is no JSON object, or its type differs from those before it; the message names file and row.
    """
    types, texts = {}, set()
    for path in paths:
        with explained(path):
            _add_types(path, types, texts, strict)
    for name in sorted(texts):
        types[name] = pyarrow.string()
        logger.warning("Column %r mixes types: it is carried along as JSON text, and nothing reads it.", name)
    features = Features.from_arrow_schema(pyarrow.schema(types))
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return Dataset.from_generator(
        _typed_rows, features=features,
        gen_kwargs={"paths": tuple(map(str, paths)), "texts": tuple(sorted(texts)), "digests": tuple(digests)},
    )  # fmt: skip


def json_stream(paths: list[Path]) -> IterableDataset:
    """The same row by row, each with its own types."""
    return IterableDataset.from_generator(_all_rows, gen_kwargs={"paths": tuple(map(str, paths))})


def _all_rows(paths: tuple[str, ...]) -> Iterator[Row]:
    for path in map(Path, paths):
        with explained(path):
            yield from _rows(path)


def _typed_rows(paths: tuple[str, ...], texts: tuple[str, ...], digests: tuple[str, ...]) -> Iterator[Row]:
    """`digests` of the files are there for the cache of `datasets`, which must not mistake a changed file."""
    for row in _all_rows(paths):
        yield row | {name: json.dumps(row[name], ensure_ascii=False) for name in texts if row.get(name) is not None}


# Types.


def _add_types(
    path: Path, types: dict[str, pyarrow.DataType], texts: set[str], strict: Collection[str] | None
) -> None:
    """Widens `types` by those of a file, and adds to `texts` the columns that mix them."""
    shown = tqdm(_rows(path), desc=f"Reading {path.name}", unit=" rows", disable=not is_first_process())
    start, rows = 0, iter(shown)
    while chunk := list(islice(rows, CHUNK)):
        for name in dict.fromkeys(name for row in chunk for name in row):
            if name in texts:
                continue
            values, before = [row.get(name) for row in chunk], types.get(name, pyarrow.null())
            try:
                types[name] = _wider(before, values)
            except MISFITS as error:
                if strict is None or name in strict:
                    raise _misfit(path, name, before, chunk, start) from error
                texts.add(name)
        start += len(chunk)


def _wider(before: pyarrow.DataType, values: list) -> pyarrow.DataType:
    """The type that holds what `before` holds and the values as well."""
    found = pyarrow.array(values).type
    merged = [pyarrow.schema({"x": kind}) for kind in (before, found)]
    return pyarrow.unify_schemas(merged, promote_options="permissive").field("x").type


def _misfit(path: Path, name: str, before: pyarrow.DataType, chunk: list[Row], start: int) -> ValueError:
    """What is wrong with the first row of the chunk whose value does not fit."""
    for index, row in enumerate(chunk, start):
        try:
            before = _wider(before, [row.get(name)])
        except MISFITS:
            return ValueError(f"row {index} of {path.name!r}: {_fault(row, name)}")
    return ValueError(f"column {name!r} of {path.name!r} mixes types; give the same type in every row.")


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
            if value is None:  # one JSON value over many lines
                value = json.loads(_content(path))
                yield from value if isinstance(value, list) else [value]
                return
            yield from value if isinstance(value, list) else [value]


def _parsed(line: bytes, index: int, path: Path) -> Row | list | None:
    """The value in a line; None where the first line is not a value, so that the file is not JSON Lines."""
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"row {index} of {path.name!r} is not UTF-8 ({error.reason}); save it as UTF-8.") from error
    except RecursionError as error:
        raise ValueError(f"row {index} of {path.name!r} is nested too deeply; give plain lists.") from error
    except json.JSONDecodeError as error:
        if index == 0:
            return None
        raise ValueError(f"row {index} of {path.name!r} is not valid JSON: {error}.") from error


def _content(path: Path) -> bytes:
    with _open(path) as file:
        return file.read()


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
