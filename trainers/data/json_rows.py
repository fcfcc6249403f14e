"""Rows of local JSON files with exactly the values that stand there; those of CSV files go the same way.

The reader of `datasets` works block by block and casts later blocks to the types of the first, and it reads dates and
mixed columns into other values: the text "007" may come back as 7, a list of messages as text. Here Python's own
reader is used, line by line.
"""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from datasets import Dataset, IterableDataset, Json, List, Value
from datasets.exceptions import DatasetGenerationError

from . import csv_rows

TEXT = "_json"  # the one column of a table of JSON rows, which are decoded as they are read
EXACT = 2**53  # integers beyond it are rounded among floats
LARGE, HUGE, BEYOND = "large", "huge", "beyond"  # kinds of integers: beyond EXACT, beyond int64, beyond uint64
DTYPES = {str: "string", bool: "bool", int: "int64", LARGE: "int64", float: "float64"}

LEFT_OUT = {"prompt", "responses", "scores", "chosen", "rejected"}  # whose types are fixed anyway
Kinds = set[tuple[int, Any]]  # of the leaves of a column: in how many lists they lie, and what they are


def json_table(paths: Sequence[Path]) -> Dataset:
    """The rows of files as text in a table, which gives them as Python reads them.

    Raises:
        ValueError: naming file and row, for what is no JSON.
    """
    # The digests are for the cache of `datasets`, which must not mistake a changed file.
    keywords = {"paths": tuple(map(str, paths)), "digests": tuple(map(file_digest, paths))}
    table = Dataset.from_generator(_texts, gen_kwargs=keywords)
    return table.with_transform(_decoded)


def json_stream(paths: Sequence[Path]) -> IterableDataset:
    """The same to go through only, with nothing kept; it raises on its way."""
    return IterableDataset.from_generator(_rows, gen_kwargs={"paths": list(map(str, paths))})  # a shard each


def is_json(rows: Dataset | IterableDataset) -> bool:
    """Whether it is a table of `json_table`."""
    return rows.column_names == [TEXT]


def columns_of(rows: Dataset | IterableDataset) -> list[str]:
    """The columns of a data set; JSON has those of its first row."""
    return sorted(next(iter(rows), {})) if rows.column_names is None or is_json(rows) else rows.column_names


def types_of(rows: Dataset) -> dict[str, Any]:
    """The types that `column_type` gives the columns of JSON, by all of their values."""
    kinds: dict[str, Kinds] = {}
    for row in rows_of(rows):
        for name, value in row.items():
            kinds.setdefault(name, set()).update(() if name in LEFT_OUT else _kinds(value))
    return {name: _type(some, name) for name, some in kinds.items()}


def rows_of(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Its rows one by one, read many at a time; those of JSON have the columns that stand in them."""
    for batch in undecoded(dataset).iter(batch_size=1000):
        yield from rows_in(batch)


def rows_in(batch: Mapping[str, list]) -> Iterator[dict[str, Any]]:
    """The rows of a batch of `undecoded`."""
    if list(batch) == [TEXT]:
        return map(json.loads, batch[TEXT])
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def undecoded(dataset: Dataset) -> Dataset:
    """The texts of JSON rows in place of the rows: a batch of rows would give all of them the same columns."""
    return dataset.with_format(None) if is_json(dataset) else dataset


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What the readers of `datasets`, Arrow and gzip raise becomes a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, ValueError) and path.name in str(cause):
            raise cause from None  # one of ours
        raise ValueError(f"cannot read {path.name!r} ({type(cause).__name__}: {cause}).") from error


def plain(value):
    """As JSON gives it back, so that it compares equal with what was read from a file."""
    return json.loads(json.dumps(value, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))


def digest(content) -> str:
    """sha256 of anything that JSON can hold, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


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
    dtypes = {"float64"} if leaves == {int, float} else {DTYPES.get(kind) for kind in leaves} or {"string"}
    if len(dtypes) > 1 or None in dtypes or any(depth < deepest for depth, kind in kinds if kind is not None):
        return Json()
    feature: Value | List = Value(dtypes.pop())
    for _ in range(deepest):
        feature = List(feature)
    return feature


# Text.


def _texts(paths: Sequence[str], digests: Sequence[str]) -> Iterator[dict[str, str]]:
    for row, line in _all_rows(paths):
        # The line itself, unless it may be in another encoding or hold half a character, whose bytes begin with ED.
        as_it_is = line.startswith(b'{"') and b"\xed" not in line
        yield {TEXT: line.decode() if as_it_is else json.dumps(row)}


def _rows(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    return (row for row, _ in _all_rows(paths))


def _decoded(batch: dict[str, list[str]]) -> dict[str, list]:
    rows = [json.loads(text) for text in batch[TEXT]]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _all_rows(paths: Sequence[str]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The rows of files, each with its line, or b"" where it has none for itself."""
    for path in map(Path, paths):
        index = -1
        with explained(path), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            is_csv = path.name.removesuffix(".gz").endswith(csv_rows.SUFFIXES)
            for index, (row, line) in enumerate((_csv_values if is_csv else _values)(file, path.name)):
                if not isinstance(row, dict):
                    raise ValueError(f"row {index} of {path.name!r} is no JSON object; give one per row.")
                yield row, line
            if index < 0:
                raise ValueError(f"{path.name!r} is empty: give a file with at least one row.")


def _csv_values(file: BinaryIO | gzip.GzipFile, name: str) -> Iterator[tuple[Any, bytes]]:
    return ((row, b"") for row in csv_rows.csv_rows(file, name))


def _values(file: BinaryIO | gzip.GzipFile, name: str) -> Iterator[tuple[Any, bytes]]:
    """The values of all lines, or of the one value over many lines; those of lists one by one."""
    for index, line in enumerate(line for line in file if line.strip()):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if index or not isinstance(error, json.JSONDecodeError):
                raise ValueError(f"row {index} of {name!r} is not valid JSON ({error}).") from error
            file.seek(0)
            value, line = json.load(file), b""  # to the end, where the loop ends too
        yield from ((item, b"") for item in value) if isinstance(value, list) else [(value, line)]
