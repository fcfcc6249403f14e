"""Local files and folders of rows, and what is wrong with one that cannot be read."""

import glob
import gzip
import hashlib
import io
import logging
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

from . import csv_rows
from .drops import is_first_process, without_format
from .json_rows import explained, file_digest, json_stream, json_table

logger = logging.getLogger(__name__)

OF_FOLDERS = {"name", "data_files", "data_dir"}  # options of `load_dataset` that say which files are read
SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"} | dict.fromkeys(csv_rows.SUFFIXES, "csv")


def read_local(path: Path, split: str, streaming: bool = False, **options) -> Dataset | IterableDataset:
    """The rows of a file or folder; `options` are those of `load_dataset` that say what is read of a folder.

    A file ends in one of `SUFFIXES`, each also with .gz. A folder is one that `save_to_disk` wrote, or holds such
    files of one kind, whose splits are those that `datasets` finds.

    Raises:
        ValueError: naming the file, and for JSON and CSV the row, if there is nothing to read or it cannot be read. A
            stream of them raises it on its way.
    """
    with explained(path):
        is_saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        known = OF_FOLDERS if path.is_dir() and not is_saved else set()
        if strange := sorted(options.keys() - known):
            raise ValueError(f"{path.name!r} takes no {strange[0]}; leave it out.")
        if path.is_file():
            files = {"train": [path]}
        elif is_saved:
            saved = load_from_disk(str(path))
            rows = in_split(saved if isinstance(saved, DatasetDict) else {"train": saved}, split, path)
            return without_format(rows).to_iterable_dataset() if streaming else rows
        else:
            files = _files_of(path, options)
        kinds = {kind_of(file) for some in files.values() for file in some}
        if len(kinds) != 1 or None in kinds:
            raise ValueError(f"cannot read {path.name!r}; give files of one kind, ending in {', '.join(SUFFIXES)}.")
        return (_read_parquet if kinds == {"parquet"} else _read_text)(files, path, split, streaming)


def data_fingerprint(name: str) -> str | None:
    """Hash of the rows' files in a local file or folder, whose names and contents count; None for a hub id."""
    path = Path(name).expanduser()
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _has_rows(file))
    found = "".join(f"{file.relative_to(path)} {file_digest(file)} " for file in files)
    return hashlib.sha256(found.encode()).hexdigest()


def _has_rows(file: Path) -> bool:
    """Of a folder; in one of `save_to_disk`, `datasets` keeps its own copies as cache-*.arrow, which come and go."""
    saved = file.suffix == ".arrow" and not file.name.startswith("cache-")
    return file.is_file() and (saved or kind_of(file) is not None)


def kind_of(path: Path) -> str | None:
    """What a file holds, by its name."""
    return SUFFIXES.get(Path(path.stem).suffix if path.suffix == ".gz" else path.suffix)


def in_split(splits: dict[str, Dataset], split: str, path: Path) -> Dataset:
    """A split in the syntax of `datasets`: slices like train[:90%], and sums.

    Raises:
        ValueError: there is no such split, or it has no rows.
    """
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"unknown split {split!r} of {path.name!r}; give one of {sorted(splits)}.") from error
    chosen = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts if part.from_ < part.to]
    if not chosen:
        raise ValueError(f"split {split!r} of {path.name!r} has no rows: name another.")
    return chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)


def _files_of(folder: Path, options: dict) -> dict[str, list[Path]]:
    """The files of each split; `datasets` passes over those of other kinds and names, which are named in the log."""
    if any(letter in str(folder) for letter in "*?["):  # `datasets` would read those of another folder
        raise ValueError(f"{str(folder)!r} reads as a pattern of names: rename {folder.name!r} without *, ? and [.")
    splits = load_dataset_builder(str(folder), **options).config.data_files
    files = {str(name): [Path(file) for file in some if kind_of(Path(file))] for name, some in splits.items()}
    files = {name: some for name, some in files.items() if some}
    read = {file.resolve() for some in files.values() for file in some}
    names = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    left = [str(name) for name in names if (folder / name).resolve() not in read and not _is_no_data(name)]
    if left and is_first_process():
        shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        logger.warning("%s: %d file(s) are NOT read: %s. Name a file, or put them apart.", folder, len(left), shown)
    return files


def _is_no_data(name: Path) -> bool:
    """Hidden files, notes and the manifest of a prepared file."""
    return any(part.startswith(".") for part in name.parts) or name.name.endswith((".md", ".manifest.yaml", "LICENSE"))


def _read_text(files: dict[str, list[Path]], path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    if not streaming:
        wanted = [name for name in files if name in split]
        return in_split({name: json_table(files[name]) for name in wanted or files}, split, path)
    if split not in files:
        raise ValueError(f"a stream of {path.name!r} has whole splits: give one of {sorted(files)}, not {split!r}.")
    return json_stream(files[split])


def _read_parquet(files: dict[str, list[Path]], path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    if path.suffix == ".gz":  # `datasets` does not unpack these
        table = pyarrow.parquet.read_table(io.BytesIO(gzip.decompress(path.read_bytes())))
        rows = in_split({"train": Dataset(table)}, split, path)
        assert isinstance(rows, Dataset)
        return rows.to_iterable_dataset() if streaming else rows
    # A configuration of another name has a cache of its own: `datasets` knows a file by its size and date only.
    digests = "" if streaming else "".join(file_digest(file) for some in files.values() for file in some)
    return load_dataset(
        "parquet",
        f"rows-{hashlib.sha256(digests.encode()).hexdigest()[:16]}",
        data_files={name: [glob.escape(str(file)) for file in some] for name, some in files.items()},
        split=split,
        features=_common_features([file for some in files.values() for file in some]),
        streaming=streaming,
    )


def _common_features(files: list[Path]) -> Features:
    """The columns of parquet files, wide enough for all of them: integers and floats become floats."""
    common = pyarrow.schema([])
    for file in files:
        schema = pyarrow.parquet.read_schema(file)
        if len(files) == 1:
            return Features.from_arrow_schema(schema)
        try:
            common = pyarrow.unify_schemas([common, schema.remove_metadata()], promote_options="permissive")
        except pyarrow.ArrowException as error:
            raise ValueError(f"{file.name!r} differs from the files before it: {error}") from error
    return Features.from_arrow_schema(common)
