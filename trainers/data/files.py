"""Local files and folders of rows, and what is wrong with one that cannot be read."""

import glob
import gzip
import hashlib
import io
import logging
from collections.abc import Collection
from pathlib import Path

import pyarrow
import pyarrow.parquet
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)

from .drops import is_first_process, without_format
from .faults import explained
from .json_rows import file_digest, json_dataset, json_stream

logger = logging.getLogger(__name__)

Rows = Dataset | IterableDataset

SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
OF_FOLDERS = ("name", "data_files", "data_dir")  # arguments of `load_dataset` that say which files are read


def read_file(
    path: Path, split: str, kwargs: dict, strict: Collection[str] | None = None
) -> Dataset | IterableDataset:
    """The rows of a .jsonl, .json or .parquet file, each also with .gz; `kwargs` are those of `load_dataset`.

    Raises:
        ValueError: the file cannot be read; for JSON the message names the row. A stream raises it on its way.
    """
    kind, streaming = kind_of(path), kwargs.get("streaming", False)
    if kind is None:
        raise ValueError(f"cannot read {path.name!r}; give a file ending in {', '.join(SUFFIXES)}, or these with .gz.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: give a file with at least one row.")
    if kind == "parquet" and path.suffix != ".gz" and "name" not in kwargs:
        return _read_parquet({"train": [path]}, path, split, kwargs)
    if options := sorted(set(kwargs) - {"streaming"}):
        raise ValueError(f"{path.name!r} takes no {options[0]}; leave it out.")
    if kind == "json":
        return _read_json({"train": [path]}, path, split, streaming, strict)
    with explained(path):
        # datasets does not unpack a packed parquet file
        table = pyarrow.parquet.read_table(io.BytesIO(gzip.decompress(path.read_bytes())))
    found = in_split({"train": Dataset(table)}, split, path)
    return found.to_iterable_dataset() if streaming else found


def read_folder(
    path: Path, split: str, kwargs: dict, strict: Collection[str] | None = None
) -> Dataset | IterableDataset:
    """A folder of files, whose splits are those that `datasets` finds; or what `save_to_disk` wrote.

    Raises:
        ValueError: there is nothing to read, or the files differ in the types of a column.
    """
    streaming = kwargs.get("streaming", False)
    if any(letter in str(path) for letter in "*?["):
        raise ValueError(f"{str(path)!r} reads as a pattern of several names: rename the folder without *, ? and [.")
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        if strange := sorted(set(kwargs) - {"streaming"}):
            raise ValueError(f"the saved data set {path.name!r} takes no {strange[0]}; leave it out.")
        with explained(path):
            saved = load_from_disk(str(path))
        found = in_split(saved if isinstance(saved, DatasetDict) else {"train": saved}, split, path)
        return without_format(found).to_iterable_dataset() if streaming else found
    if strange := sorted(set(kwargs) - {"streaming", *OF_FOLDERS}):
        raise ValueError(f"the folder {path.name!r} takes no {strange[0]}; leave it out.")
    with explained(path):
        options = {name: value for name, value in kwargs.items() if name != "streaming"}
        found = load_dataset_builder(str(path), **options).config.data_files
    files = {str(name): [Path(file) for file in some if kind_of(Path(file))] for name, some in found.items()}
    read = {file for some in files.values() for file in some}
    _warn_of_unread(path, read)
    kinds = {kind_of(file) for file in read}
    if len(kinds) != 1:
        what = "holds JSON and parquet: put them apart" if kinds else f"has no file ending in {', '.join(SUFFIXES)}"
        raise ValueError(f"{str(path)!r} {what}.")
    if kinds == {"json"}:
        return _read_json(files, path, split, streaming, strict)
    return _read_parquet(files, path, split, {"features": _common_features(files), "streaming": streaming})


def kind_of(path: Path) -> str | None:
    return SUFFIXES.get(Path(path.stem).suffix if path.suffix == ".gz" else path.suffix)


def in_split(splits: dict[str, Dataset], split: str, path: Path, known: Collection[str] | None = None) -> Dataset:
    """A split in the syntax of `datasets`: slices like train[:90%], and sums. `known` names all, for the message.

    Raises:
        ValueError: there is no such split.
    """
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"unknown split {split!r} of {path.name!r}; give one of {sorted(known or splits)}."
        ) from error
    found = [
        rows if (part.from_, part.to) in ((None, None), (0, len(rows))) else rows.select(range(part.from_, part.to))
        for part in parts
        for rows in [splits[part.splitname]]
    ]
    return found[0] if len(found) == 1 else concatenate_datasets(found)


def _read_json(
    files: dict[str, list[Path]], path: Path, split: str, streaming: bool, strict
) -> Dataset | IterableDataset:
    if streaming:
        if split not in files:
            raise ValueError(
                f"a stream of {path.name!r} has whole splits only; give one of {sorted(files)}, not {split!r}."
            )
        return json_stream(files[split])
    files = {name: some for name, some in files.items() if some}
    wanted = [name for name in files if name in split] or list(files)
    return in_split({name: json_dataset(files[name], strict) for name in wanted}, split, path, known=files)


def _read_parquet(files: dict[str, list[Path]], path: Path, split: str, kwargs: dict) -> Dataset | IterableDataset:
    names = {name: [glob.escape(str(file)) for file in some] for name, some in files.items() if some}
    name = None
    if not kwargs.get("streaming"):
        # A configuration of another name has a cache of its own: `datasets` knows a file by its size and date only.
        digests = "".join(file_digest(file) for some in files.values() for file in some)
        name = "rows-" + hashlib.sha256(digests.encode()).hexdigest()[:16]
    with explained(path):
        return load_dataset("parquet", name, data_files=names, split=split, **kwargs)


def _common_features(files: dict[str, list[Path]]) -> Features:
    """The columns of parquet files, wide enough for all of them.

    Raises:
        ValueError: two files have different types in a column.
    """
    common = pyarrow.schema([])
    for file in (file for found in files.values() for file in found):
        with explained(file):
            schema = pyarrow.parquet.read_schema(file).remove_metadata()
        try:
            common = pyarrow.unify_schemas([common, schema], promote_options="permissive")
        except pyarrow.ArrowException as error:
            raise ValueError(f"{file.name!r} differs from the files before it: {error}") from error
    return Features.from_arrow_schema(common)


def _warn_of_unread(folder: Path, read: set[Path]) -> None:
    """`datasets` takes the files of one kind, or those whose names are those of splits, and passes over the others."""
    read = {file.resolve() for file in read}
    names = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    left = [str(name) for name in names if (folder / name).resolve() not in read and not _is_no_data(name)]
    if left and is_first_process():
        shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        logger.warning("%s: %d file(s) are NOT read: %s. Name a file, or put them apart.", folder, len(left), shown)


def _is_no_data(name: Path) -> bool:
    """Hidden files, notes and what scripts/prepare_data.py says of a file."""
    return any(part.startswith(".") for part in name.parts) or name.name.endswith((".md", ".manifest.yaml", "LICENSE"))
