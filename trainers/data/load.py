"""Read preference data from the hub, a folder or a file."""

import importlib
import logging
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol

from datasets import Dataset, IterableDataset, load_dataset
from transformers import TrainingArguments

from .canonical import Adapter, canonical_stream, canonicalize
from .drops import is_first_process
from .files import SUFFIXES, read_file, read_folder
from .formats import FORMATS, known_formats, recognise
from .structured import TEMPLATE, mixes_types

logger = logging.getLogger(__name__)


class Splits(Protocol):
    """Where `load_split` reads from beside a mapping: the data arguments of the command line."""

    def load(self, args: TrainingArguments, name: str) -> Dataset | None: ...


AUTO = "auto"
OPTIONAL = ("weight", "annotator", *TEMPLATE)
# Columns of canonical rows and of pairs.
OWN = {"prompt", "responses", "scores", "chosen", "rejected", *OPTIONAL}


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
    **kwargs,
) -> Dataset | IterableDataset:
    """Load preference data as canonical rows; what is dropped is counted by reason and logged.

    Args:
        name_or_path: hub id, local folder, or a .jsonl, .json or .parquet file (each also with .gz).
        split: split to read, in the syntax of `datasets` (`"train[:100]"` works). Default: `"train"`.
        data_format: name of a format (`trainers.data.formats.FORMATS`), or the dotted import path of any function
            `row -> row or None` or generator function `rows -> rows`. `"auto"` goes by the columns and logs its
            choice. Default: the columns are those of canonical rows or of TRL pairs.
        as_chat: wrap text prompts and responses in user and assistant messages.
        invalid_rows: `"drop"` leaves out and counts unusable rows and responses, `"error"` refuses the first one.
        num_proc: processes for reading the rows.
        max_rows: read at most this many rows of the source, counted before any is dropped.
        streaming: return an `IterableDataset` that reads the rows one by one and keeps none. What is dropped is logged
            at the end of each pass over it.
        kwargs: further arguments of `datasets.load_dataset`, such as `name`, `revision` or `data_files`.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: naming the row and the field, if the data is not what `data_format` says.
    """
    adapter = _find_adapter(data_format)
    if streaming and num_proc is not None:
        raise ValueError("num_proc has no effect on a stream: leave it out.")
    strict = OWN if data_format in (None, "rows", "pairs") else None  # nobody knows what an adapter reads
    options = {**kwargs, "streaming": True} if streaming else kwargs
    source = read_dataset(str(name_or_path), split or "train", options, strict)
    if max_rows is not None:
        source = source.take(max_rows) if streaming else source.select(range(min(max_rows, len(source))))
    if adapter is None:
        adapter = _adapter_by_columns(source, str(name_or_path), auto=data_format == AUTO)
    if streaming:
        dataset = canonical_stream(source, adapter, invalid_rows, as_chat, title=str(name_or_path))
    else:
        dataset, report = canonicalize(source, adapter, invalid_rows, num_proc, as_chat)
        report.log(logger, str(name_or_path))
    _warn_of_misspellings(dataset.column_names)
    return dataset


def load_split(data: Mapping[str, Dataset] | Splits, args: TrainingArguments, name: str) -> Dataset | None:
    """The rows of a split, such as "train" or "test"; None where there are none.

    Args:
        data: data sets by the names of their splits, or an object whose `load(args, name)` reads one.
        args: the config of the method.
    """
    return data.get(name) if isinstance(data, Mapping) else data.load(args, name)


def name_of(data) -> str | list[str] | None:
    """What a model card calls the `data` of `load_split`; a mapping has no name."""
    return None if isinstance(data, Mapping) else data.dataset_name


def detect_format(name_or_path: str, split: str | None = None, **kwargs) -> str:
    """The name of the format that `data_format="auto"` would read the data as; arguments as in `load_preferences`.

    Raises:
        ValueError: the columns fit no format or several; the message names them.
    """
    return _recognised(read_dataset(str(name_or_path), split or "train", kwargs), str(name_or_path))


def _warn_of_misspellings(columns: list[str]) -> None:
    """Any further column is carried along, so a misspelled optional one would be ignored without a word."""
    for name in columns:
        near = get_close_matches(name, OPTIONAL, n=1, cutoff=0.8)
        if near and name != near[0]:
            logger.warning("Column %r is not used: did you mean %r?", name, near[0])


def read_dataset(
    name_or_path: str, split: str, kwargs: dict | None = None, strict: Collection[str] | None = None
) -> Dataset | IterableDataset:
    """One split of a hub data set, a folder or a file as it is; for the rest see `load_preferences`.

    `strict` are the columns of local files that must have one type in all rows, by default all.
    """
    kwargs = kwargs or {}
    try:
        path = Path(name_or_path).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a home that is not there, a null character
        raise FileNotFoundError(f"{name_or_path!r} can be no path ({error}); give an existing one.") from error
    if (is_file or is_folder) and kwargs.get("revision"):
        raise ValueError(f"revision has no effect on the local path {name_or_path!r}: leave it out.")
    if is_file:
        return read_file(path, split, kwargs, strict)
    if is_folder:
        return read_folder(path, split, kwargs, strict)
    if _looks_like_path(name_or_path):
        raise FileNotFoundError(f"no file or folder {name_or_path!r}; give an existing path or a hub id 'owner/name'.")
    found = load_dataset(name_or_path, split=split, **kwargs)
    _refuse_mixed(found, name_or_path, strict)
    return found


def _refuse_mixed(found: Dataset | IterableDataset, name: str, strict: Collection[str] | None) -> None:
    """`datasets` keeps a column whose types differ as raw JSON, which turns the text "2" into a number."""
    for column, feature in (found.features or {}).items():
        if mixes_types(feature, column) and (strict is None or column in strict):
            raise ValueError(f"column {column!r} of {name} mixes types; give the same type in every row.")


def _looks_like_path(name: str) -> bool:
    stem = name.removesuffix(".gz")
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or stem.endswith(tuple(SUFFIXES)) or "\\" in name


def _adapter_by_columns(source: Dataset | IterableDataset, title: str, *, auto: bool) -> Adapter | None:
    """The adapter that `auto` finds; None, for canonical rows and TRL pairs, which need none, without it."""
    if auto:
        return FORMATS[_recognised(source, title)].adapter
    columns = _columns(source)
    if not ({"prompt", "responses", "scores"} <= set(columns) or {"chosen", "rejected"} <= set(columns)):
        raise ValueError(
            f"columns {sorted(columns)} are neither canonical rows (prompt, responses, scores) nor TRL pairs (prompt, "
            f"chosen, rejected); set data_format to 'auto' or to {known_formats()}."
        )
    _warn_of_richer_format(source, columns, title)
    return None


def _warn_of_richer_format(source: Dataset | IterableDataset, columns: list[str], title: str) -> None:
    """Pairs may lie beside all responses, or beside their scores."""
    try:
        name = recognise(columns, next(iter(source), {}))
    except ValueError:
        return
    if name not in ("rows", "pairs", "hh_rlhf") and is_first_process():
        read = "rows" if "responses" in columns else "pairs with the scores 1 and 0"
        logger.warning(
            "%s is read as %s, though its columns are those of %s too: set data_format to %r to read it as that.",
            title, read, FORMATS[name].of, name,
        )  # fmt: skip


def _recognised(source: Dataset | IterableDataset, title: str) -> str:
    name = recognise(_columns(source), next(iter(source), {}))
    if is_first_process():
        logger.warning(
            "%s: data_format 'auto' reads it as %r (%s). Set data_format to this name, or to another, to fix it.",
            title, name, FORMATS[name].of,
        )  # fmt: skip
    return name


def _columns(source: Dataset | IterableDataset) -> list[str]:
    return source.column_names or sorted(next(iter(source), {}))  # a stream of JSON does not know its columns


def _find_adapter(data_format) -> Adapter | None:
    if data_format is None or data_format == AUTO or callable(data_format):
        return None if data_format == AUTO else data_format
    if data_format in FORMATS:
        return FORMATS[data_format].adapter
    module, _, name = data_format.rpartition(".")
    if not module:
        raise ValueError(f"unknown data_format {data_format!r}; set it to 'auto' or to {known_formats()}.")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"data_format {data_format!r} cannot be imported: {error}.") from error
