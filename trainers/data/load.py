"""Read preference data from the hub, a folder or a file."""

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeAlias

from datasets import Dataset, IterableDataset, load_dataset
from transformers import TrainingArguments

from .canonical import Adapter, canonical_stream, canonicalize
from .drops import is_first_process
from .files import SUFFIXES, read_local
from .formats import FORMATS, known_formats, recognise
from .json_rows import columns_of

logger = logging.getLogger(__name__)

AUTO = "auto"
Rows: TypeAlias = Dataset | IterableDataset


class Splits(Protocol):
    """Where `load_split` reads from beside a mapping: the data arguments of the command line."""

    dataset_name: str | list[str] | None

    def load(self, args: TrainingArguments, name: str) -> Rows | None: ...


def load_split(data: Mapping[str, Rows] | Splits, args: TrainingArguments, name: str) -> Rows | None:
    """The rows of a split, such as "train" or "test"; None where there are none.

    Args:
        data: data sets by the names of their splits, or an object whose `load(args, name)` reads one.
        args: the config of the method.
    """
    return data.get(name) if isinstance(data, Mapping) else data.load(args, name)


def refuse_unknown_splits(data: Mapping[str, Rows] | Splits, *known: str) -> None:
    """Raises ValueError for a mapping with splits that a run would not read."""
    unknown = [name for name in data if name not in known] if isinstance(data, Mapping) else []
    if unknown:
        raise ValueError(f"data: the split {unknown[0]!r} is not known; those that are read are {', '.join(known)}.")


def name_of(data: Mapping[str, Rows] | Splits) -> str | list[str] | None:
    """What a model card calls the `data` of `load_split`; a mapping has no name."""
    return None if isinstance(data, Mapping) else data.dataset_name


def load_preferences(
    name_or_path: str,
    split: str | None = None,
    data_format: str | Adapter | None = None,
    *,
    as_chat: bool = False,
    invalid_rows: str = "drop",
    num_proc: int | None = None,
    max_rows: int | None = None,
    streaming: bool = False,
    keep_dropped: bool = False,
    **kwargs,
) -> Dataset | IterableDataset:
    """Load preference data as canonical rows; what is dropped is counted by reason and logged.

    Args:
        name_or_path: hub id, local folder, or a .jsonl, .json, .parquet, .csv or .tsv file (each also with .gz).
        split: split to read, in the syntax of `datasets` (`"train[:100]"` works). Default: `"train"`.
        data_format: name of a format (`trainers.data.formats.FORMATS`), or the dotted import path of any function
            `row -> row or None` or generator function `rows -> rows`. `"auto"` goes by the columns and logs its
            choice. Default: the columns are those of canonical rows or of TRL pairs.
        as_chat: wrap text prompts and responses in user and assistant messages.
        invalid_rows: `"drop"` leaves out and counts unusable rows and responses, `"error"` refuses the first one.
        num_proc: processes for reading the rows; a stream has one.
        max_rows: read at most this many rows of the source, counted before any is dropped.
        streaming: return an `IterableDataset` that reads the rows one by one and keeps none. What is dropped is logged
            at the end of each shard.
        keep_dropped: of a stream: do not log that, but leave a row of nulls for each, for a trainer that counts them.
        kwargs: further arguments of `datasets.load_dataset`, such as `name`, `revision` or `data_files`.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: naming the row and the field, if the data is not what `data_format` says.
    """
    title, adapter = str(name_or_path), _find_adapter(data_format)
    options = {**kwargs, "streaming": True} if streaming else kwargs
    source = read_dataset(title, split or "train", **options)
    if max_rows is not None:
        source = source.take(max_rows) if streaming else source.select(range(min(max_rows, len(source))))
    if data_format == AUTO:
        adapter = FORMATS[_recognised(source, title)].adapter
    elif adapter is None:
        _check_columns(source, title)
    try:
        if streaming:
            how = {"in_shards": max_rows is None, "keep_dropped": keep_dropped}
            return canonical_stream(source, adapter, invalid_rows, as_chat, title, **how)
        dataset, report = canonicalize(source, adapter, invalid_rows, num_proc, as_chat)
    except ValueError as error:
        raise ValueError(f"{title}: {error}") from error
    report.log(logger, title)
    return dataset


def detect_format(name_or_path: str, split: str | None = None, **kwargs) -> str:
    """The name of the format that `data_format="auto"` would read the data as; arguments as in `load_preferences`.

    Raises:
        ValueError: the columns fit no format or several; the message names them.
    """
    return _recognised(read_dataset(str(name_or_path), split or "train", **kwargs), str(name_or_path))


def read_dataset(name_or_path: str, split: str, **kwargs) -> Dataset | IterableDataset:
    """One split of a hub data set, a folder or a file as it is; for the rest see `load_preferences`."""
    path = Path(name_or_path).expanduser()
    if path.exists():
        if kwargs.get("revision"):
            raise ValueError(f"revision has no effect on the local path {name_or_path!r}: leave it out.")
        return read_local(path, split, **kwargs)
    if _looks_like_path(name_or_path):
        raise FileNotFoundError(f"no file or folder {name_or_path!r}; give an existing path or a hub id 'owner/name'.")
    return load_dataset(name_or_path, split=split, **kwargs)


def _looks_like_path(name: str) -> bool:
    stem = name.removesuffix(".gz")
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or stem.endswith(tuple(SUFFIXES)) or "\\" in name


def _check_columns(source: Dataset | IterableDataset, title: str) -> None:
    """Refuse columns of neither canonical rows nor TRL pairs, and point out those of another format."""
    columns = columns_of(source)
    if not ({"prompt", "responses", "scores"} <= set(columns) or {"chosen", "rejected"} <= set(columns)):
        raise ValueError(
            f"columns {sorted(columns)} are neither canonical rows (prompt, responses, scores) nor TRL pairs (prompt, "
            f"chosen, rejected); set data_format to 'auto' or to {known_formats()}."
        )
    try:
        name = recognise(columns, next(iter(source), {}))
    except ValueError:
        return
    if name not in ("rows", "pairs", "hh_rlhf") and is_first_process():
        # Pairs may lie beside all responses, or beside their scores.
        logger.warning(
            "%s is read as %s, though its columns are those of %s too: set data_format to %r to read it as that.",
            title,
            "rows" if "responses" in columns else "pairs with the scores 1 and 0",
            FORMATS[name].of,
            name,
        )


def _recognised(source: Dataset | IterableDataset, title: str) -> str:
    name = recognise(columns_of(source), next(iter(source), {}))
    if is_first_process():
        logger.warning(
            "%s: data_format 'auto' reads it as %r (%s). Set data_format to this name, or to another, to fix it.",
            title,
            name,
            FORMATS[name].of,
        )
    return name


def _find_adapter(data_format: str | Adapter | None) -> Adapter | None:
    if data_format in (None, AUTO):
        return None
    if callable(data_format):
        return data_format
    if data_format in FORMATS:
        return FORMATS[data_format].adapter
    module, _, name = data_format.rpartition(".")
    if not module:
        raise ValueError(f"unknown data_format {data_format!r}; set it to 'auto' or to {known_formats()}.")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"data_format {data_format!r} cannot be imported: {error}.") from error
