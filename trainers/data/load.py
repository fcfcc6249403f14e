"""Read preference data from the hub, a folder or a file."""

import importlib
import logging
from difflib import get_close_matches
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

from .canonical import Adapter, canonical_stream, canonicalize
from .drops import is_first_process
from .files import SUFFIXES, explained, mixed_columns, read_file
from .formats import FORMATS, known_formats, recognise

logger = logging.getLogger(__name__)

AUTO = "auto"
OPTIONAL = ("weight", "annotator")


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
    source = read_dataset(str(name_or_path), split or "train", {**kwargs, "streaming": True} if streaming else kwargs)
    _refuse_mixed(source, str(name_or_path))
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


def detect_format(name_or_path: str, split: str | None = None, **kwargs) -> str:
    """The name of the format that `data_format="auto"` would read the data as; arguments as in `load_preferences`.

    Raises:
        ValueError: the columns fit no format or several; the message names them.
    """
    return _recognised(read_dataset(str(name_or_path), split or "train", kwargs), str(name_or_path))


def _refuse_mixed(source: Dataset | IterableDataset, title: str) -> None:
    read = {"prompt", "responses", "scores"}.union(*(found.columns | found.beside for found in FORMATS.values()))
    if mixed := [name for name in mixed_columns(source) if name in read]:
        raise ValueError(f"column {mixed[0]!r} of {title} mixes types; give the same type in every row.")


def _warn_of_misspellings(columns: list[str]) -> None:
    """Any further column is carried along, so a misspelled optional one would be ignored without a word."""
    for name in columns:
        near = get_close_matches(name, OPTIONAL, n=1, cutoff=0.8)
        if near and name != near[0]:
            logger.warning("Column %r is not used: did you mean %r?", name, near[0])


def read_dataset(name_or_path: str, split: str, kwargs: dict | None = None) -> Dataset | IterableDataset:
    """One split of a hub data set, a folder or a file as it is; for the rest see `load_preferences`."""
    kwargs = kwargs or {}
    try:
        path = Path(name_or_path).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a home that is not there, a null character
        raise FileNotFoundError(f"{name_or_path!r} can be no path ({error}); give an existing one.") from error
    if is_file:
        return read_file(path, split, kwargs)
    if is_folder:
        with explained(path):
            if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
                saved = _pick_split(load_from_disk(str(path)), split)
                return saved.to_iterable_dataset() if kwargs.get("streaming") else saved
            return load_dataset(str(path), split=split, **kwargs)
    if _looks_like_path(name_or_path):
        raise FileNotFoundError(f"no file or folder {name_or_path!r}; give an existing path or a hub id 'owner/name'.")
    return load_dataset(name_or_path, split=split, **kwargs)


def _pick_split(data: Dataset | DatasetDict, split: str) -> Dataset:
    if isinstance(data, Dataset):
        return data
    if split not in data:
        raise ValueError(f"unknown split {split!r}; give one of {sorted(data)}.")
    return data[split]


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
    return None


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
