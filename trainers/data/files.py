"""Local files of rows, and what is wrong with one that cannot be read."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from .rows import Row, to_canonical

SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
BRACKETS = 500  # in one row, from which on its nesting is looked at: deep nesting ends the process in Arrow's reader


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What the readers of `datasets`, Arrow and gzip raise becomes a ValueError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (DatasetGenerationError, pyarrow.ArrowException, EOFError, zlib.error, OSError, RuntimeError, ValueError,
            KeyError, TypeError) as error:  # fmt: skip
        if isinstance(error, ValueError) and path.name in str(error):
            raise  # one of ours
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if "corresponds to no data" in str(cause):
            raise ValueError(f"{path} has no rows: give a file with at least one.") from error
        raise ValueError(f"cannot read {path.name!r} ({cause}); give a whole file or folder of rows.") from error


def read_file(path: Path, split: str, kwargs: dict) -> Dataset | IterableDataset:
    """The rows of a .jsonl, .json or .parquet file, each also with .gz; `kwargs` are those of `load_dataset`.

    Raises:
        ValueError: the file cannot be read; for JSON Lines the message names the row. A stream raises it on its way.
    """
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"cannot read {path.name!r}; give a file ending in {', '.join(SUFFIXES)}, or these with .gz.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: give a file with at least one row.")
    streaming = kwargs.get("streaming", False)
    with explained(path):
        if suffix == ".parquet" and path.suffix == ".gz":  # datasets does not unpack this combination
            table = pyarrow.parquet.read_table(io.BytesIO(gzip.decompress(path.read_bytes())))
            if split != "train":
                raise ValueError(f"Unknown split {split!r} of {path.name!r}; a packed parquet file has 'train' only.")
            return Dataset(table).to_iterable_dataset() if streaming else Dataset(table)
        if suffix == ".parquet":
            return load_dataset("parquet", data_files=str(path), split=split, **kwargs)
        _check_json(path)
        if streaming:
            return _json_stream(path, split, sorted(kwargs))
        try:
            dataset = load_dataset("json", data_files=str(path), split=split, **kwargs)
        except DatasetGenerationError:
            _find_json_fault(path)
            raise
        if mixed_columns(dataset):
            _find_json_fault(path)
    return dataset


def mixed_columns(dataset: Dataset | IterableDataset) -> list[str]:
    """Columns that `datasets` keeps as raw JSON because their types differ, which turns the text "2" into a number."""
    return sorted(name for name, feature in (dataset.features or {}).items() if "Json(" in repr(feature))


def _json_stream(path: Path, split: str, options: list[str]) -> IterableDataset:
    """Row by row with Python's own reader: that of `datasets` turns the text "2" into a number where types differ."""
    if split != "train" or options != ["streaming"]:
        raise ValueError(f"A stream of {path.name!r} has the split 'train' only and takes no options; leave them out.")
    return IterableDataset.from_generator(_json_rows, gen_kwargs={"path": str(path)})


def _json_rows(path: str) -> Iterator[Row]:
    with explained(Path(path)):
        for index, row in enumerate(_json_values(Path(path))):
            if not isinstance(row, dict):
                raise ValueError(f"row {index} of {Path(path).name!r} is no JSON object; give one per row.")
            yield row


def _json_values(path: Path) -> Iterator[Any]:
    with _open(path) as lines:
        for index, line in enumerate(line for line in lines if line.strip()):
            value = _parsed(line, index, path)
            if value is None:  # one JSON value over many lines
                value = json.loads(_content(path))
                yield from value if isinstance(value, list) else [value]
                return
            yield from value if isinstance(value, list) else [value]


def _check_json(path: Path) -> None:
    """Refuse what would end the process in Arrow's reader instead of raising: a first `null`, and deep nesting."""
    deep = ValueError(f"{path.name!r} is nested too deeply; give prompts, responses and scores as plain lists.")
    first = b""
    with _open(path) as lines:
        for line in lines:
            first = first or line.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            if first and first not in b"{[":
                raise ValueError(
                    f"row 0 of {path.name!r} is no JSON object; give one object per line, or a list of them."
                )
            if line.count(b"[") + line.count(b"{") > BRACKETS and _too_deep(line):
                raise deep
    if not first:
        raise ValueError(f"{path} is empty: give a file with at least one row.")
    if first == b"[" and _too_deep(_content(path)):
        raise deep


def _too_deep(text: bytes) -> bool:
    try:
        json.loads(text)
    except RecursionError:
        return True
    except ValueError:  # a fault that is named later, or a part of a value
        return False
    return False


def _content(path: Path) -> bytes:
    with _open(path) as file:
        return file.read()


def _find_json_fault(path: Path) -> None:
    """Raise for the first faulty row of a JSON Lines file, which the Arrow reader does not name."""
    with _open(path) as lines:
        for index, line in enumerate(line for line in lines if line.strip()):
            row = _parsed(line, index, path)
            if not isinstance(row, dict):
                return  # not JSON Lines
            if "responses" in row:
                try:
                    to_canonical(row)
                except ValueError as error:
                    raise ValueError(f"row {index} of {path.name!r}: {error}") from error


def _parsed(line: bytes, index: int, path: Path) -> Row | list | None:
    """The value in a line; None where the first line is not a value, so that the file is not JSON Lines."""
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"row {index} of {path.name!r} is not UTF-8 ({error.reason}); save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        if index == 0:
            return None
        raise ValueError(f"row {index} of {path.name!r} is not valid JSON: {error}.") from error


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
