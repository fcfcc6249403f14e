"""A pass over a data set: every row through its adapter and the checks, and the count of what is left out.

An adapter is a plain function `row -> row or None`. Where one row of the data set is not yet one prompt with all its
responses, the adapter is a generator function instead: it reads the rows one after the other and yields canonical
rows. Both raise (a generator yields) `Drop(reason)` for what they leave out.

The columns of the result have one fixed type each: texts, or JSON for messages, and float64 for scores. Further
columns keep the type that they have in a table; those of JSON or an adapter get one of `column_type`.
"""

import inspect
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, List, Value
from datasets.exceptions import DatasetGenerationError

from .drops import (
    COUNTED,
    EVENTS,
    GIVE_UP,
    KEPT,
    Drop,
    DropReport,
    none_usable,
    refuse,
    source_digest,
    split_off_drops,
    without_format,
)
from .json_rows import EXACT, column_type, is_json, rows_in, rows_of, types_of, undecoded
from .rows import NO_WEIGHT, TEMPLATE, UNFINISHED, Row, checked_row, describe, unpadded

logger = logging.getLogger(__name__)

Adapter = Callable[[Row], Row | None] | Callable[[Iterable[Row]], Iterator[Row | Drop]]
Result = tuple[Row | None, list[str]]  # the row to keep or None, and what was left out of it

SAMPLE = 1024  # kept rows from which the columns of JSON or an adapter are taken
FIXED = {"weight": Value("float64"), UNFINISHED: List(Value("bool")), **dict.fromkeys(TEMPLATE, Json())}
CHECKED = {"responses", "scores", *FIXED}  # whose types the check of a row sees to
KINDS: dict[str, Any] = {"string": str, "large_string": str, "bool": bool, "int64": (), "float64": float}
WHOLE = {"int64": range(-(2**63), 2**63), "float64": range(-EXACT, EXACT + 1)}  # whole numbers that fit


class Misfit(ValueError):
    """A row does not fit the columns that were taken from the first rows."""


def canonicalize(
    dataset: Dataset,
    adapter: Adapter | None = None,
    invalid: str = "drop",
    num_proc: int | None = None,
    as_chat: bool = False,
) -> tuple[Dataset, DropReport]:
    """Turn a dataset into canonical rows and count what is left out.

    Args:
        adapter: plain function from a row of the dataset to a canonical row or a TRL pair. It returns None or raises
            `Drop(reason)` for rows to leave out. Or a generator function from all rows to canonical rows. Default: the
            rows are canonical rows or TRL pairs already.
        invalid: `"drop"` leaves out and counts unusable rows and responses, `"error"` refuses the first one.
        num_proc: processes; a generator function runs in one.
        as_chat: wrap text prompts and responses in user and assistant messages.

    Raises:
        ValueError: naming the row index and the field, if a row is built wrongly, if `invalid="error"` and a row is
            unusable, or if no row is left.
    """
    if len(dataset) == 0:
        raise ValueError("the dataset has no rows.")
    dataset = without_format(dataset)
    options: dict[str, Any] = {"adapter": adapter, "invalid": invalid, "as_chat": as_chat}
    is_text = adapter is None and is_json(dataset)
    try:  # most files are of one kind, and a pass over all of their values takes long
        mapped = _mapped(dataset, {} if is_text or adapter else dataset.features, num_proc, options)
    except Misfit:
        if not is_text:
            raise
        mapped = _mapped(dataset, types_of(dataset), num_proc, options)
    kept, report = split_off_drops(mapped)
    report.source_rows = len(dataset) if inspect.isgeneratorfunction(adapter) else None
    return kept, report


def _mapped(dataset: Dataset, known: dict[str, Any], num_proc: int | None, options: dict[str, Any]) -> Dataset:
    """All rows, with the columns of `COUNTED`; Misfit if one goes neither with the first ones nor with `known`."""
    sample = Reading(rows_of(dataset), dataset.features)
    columns = row_features(_results(sample, **options), known)
    features = Features({**columns, **COUNTED})
    options = {"columns": columns, "code": source_digest(options["adapter"]), **options}
    if inspect.isgeneratorfunction(options["adapter"]):
        try:
            keywords = {"dataset": dataset, **options}
            return Dataset.from_generator(_counted_groups, features=features, gen_kwargs=keywords)
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None
    shards = min(num_proc or 1, len(dataset))
    return undecoded(dataset).map(
        _counted_batch,
        with_indices=True,
        batched=True,
        remove_columns=dataset.column_names,
        features=features,
        num_proc=shards if shards > 1 else None,
        fn_kwargs={"source": dict(dataset.features), **options},
        desc="Reading",
    )


def canonical_stream(
    source: IterableDataset,
    adapter: Adapter | None,
    invalid: str = "drop",
    as_chat: bool = False,
    title: str = "",
    in_shards: bool = True,
    keep_dropped: bool = False,
) -> IterableDataset:
    """The same for a stream. What is left out is counted while the rows are read, and logged when a shard ends.

    The first rows are read once more than the others, for the types of the columns.

    Args:
        in_shards: the result has the shards of the source, unless the adapter is a generator function. Else it is one:
            `datasets` would take an equal part of `source.take(n)` from each.
        keep_dropped: leave counting to the reader: what is left out stays as a row of nulls, and every row has the
            columns of `COUNTED`.

    Raises:
        ValueError: as in `canonicalize`; for a row in the middle, when it is read; `GIVE_UP` rows one after the other
            are left out.
    """
    options: dict[str, Any] = {"adapter": adapter, "invalid": invalid, "as_chat": as_chat}
    known = source.features or {} if adapter is None else {}
    # A list in the keywords of a generator is dealt out: who goes on amid the stream reads only the shard again.
    count = source.num_shards if in_shards and not inspect.isgeneratorfunction(adapter) else 1
    shards = [source.shard(num_shards=count, index=i) for i in range(count)] if count > 1 else [source]
    titles = [f"{title}, shard {i + 1} of {count}" for i in range(count)] if count > 1 else [title]
    sample = Reading(_rows_of_shards(shards), source.features)
    columns = row_features(_results(sample, **options), known, give_up=GIVE_UP)
    keywords = {"shards": shards, "titles": titles, "columns": columns, "keep_dropped": keep_dropped, **options}
    features = Features(columns | (COUNTED if keep_dropped else {}))
    return IterableDataset.from_generator(_reported, features=features, gen_kwargs=keywords)


def row_features(results: Iterable[Result], known: dict[str, Any], *, give_up: int | None = None) -> dict[str, Any]:
    """The columns of canonical rows, and their types; those of further columns are `known`, or go by the first rows.

    Raises:
        ValueError: there is no row, or none among the first `give_up`; the message holds the counts.
    """
    report = DropReport()
    sample = list(islice(_kept(results, report, give_up), SAMPLE))
    if not sample:
        raise ValueError(f"no usable row is left.\n{report}")
    chat = isinstance(sample[0]["prompt"], list)
    features = {
        "prompt": Json() if chat else Value("string"),
        "responses": Json() if chat else List(Value("string")),
        "scores": List(Value("float64")),
    }
    names = dict.fromkeys(name for row in sample for name in row)
    for name in [*names, *(name for name in known if name not in ("chosen", "rejected"))]:
        kind = FIXED.get(name) or known.get(name) or column_type([row.get(name) for row in sample], name)
        features.setdefault(name, Json() if kind == Value("uint64") else kind)
    if features.get("annotator") == Json():
        raise ValueError("column 'annotator' mixes types; give text, or integers of 64 bits, in every row.")
    return features


def _kept(results: Iterable[Result], report: DropReport, give_up: int | None) -> Iterator[Row]:
    dropped = 0
    for row, reasons in results:
        report.add(row is not None, reasons)
        dropped = dropped + 1 if row is None else 0
        if row is not None:
            yield row
        elif dropped == give_up:
            raise none_usable(dropped, report)


# Rows.


class Reading:
    """Rows of a source with these columns, the last of them, and how many there were."""

    def __init__(self, rows: Iterable[Row], features: dict[str, Any] | None, start: int = 0):
        self.rows, self.features, self.count = rows, features or {}, start
        self.last: Row = {}

    def __iter__(self) -> Iterator[Row]:
        for row in self.rows:
            self.last = unpadded(row, self.features)
            self.count += 1
            yield self.last


def _rows_of_shards(shards: Iterable[IterableDataset]) -> Iterator[Row]:
    """Also in a worker of a data loader: plainly iterated, each of several would read a part of each shard."""
    for shard in shards:
        size = 1 if shard.features is None else 128  # a batch gives all its rows the same columns
        for batch in shard.iter(batch_size=size):
            yield from rows_in(batch)


def _results(
    rows: Reading, adapter: Callable | None, invalid: str, as_chat: bool, columns: Collection[str] = ()
) -> Iterator[Result]:
    """What becomes of each row, or of what a generator function makes; `columns` are those known from the first rows.

    Dropped responses of a generator function count for the row that follows them.
    """
    grouped = inspect.isgeneratorfunction(adapter)
    pending: list[str] = []
    row: Row | None
    for source in (_groups if grouped else _adapted)(rows, adapter):
        where = _where(rows, grouped)
        if isinstance(source, Drop):
            row, reasons = None, [f"{source.kind if grouped else 'row'}: {source}"]
        else:
            row, reasons = checked_row(source, where, as_chat=as_chat)
        if row is not None and "weight" in columns and row.get("weight") is None:
            row, reasons = None, [*reasons, f"row: {NO_WEIGHT}"]
        if reasons and invalid == "error":
            refuse(where, reasons[0])
        pending += reasons
        if not (grouped and isinstance(source, Drop) and source.kind == "response"):
            yield row, pending
            pending = []
    if pending:
        yield None, [*pending, "row: no row follows the last dropped response"]


def _adapted(rows: Reading, adapter: Callable | None) -> Iterator[Row | Drop]:
    for source in rows:
        row: Row | Drop | None
        try:
            row = source if adapter is None else adapter(source)
        except Drop as drop:
            row = drop
        except Exception as error:
            raise _explained(error, rows, adapter, grouped=False) from error
        yield Drop(f"left out by {_name(adapter)}") if row is None else row


def _groups(rows: Reading, adapter) -> Iterator[Row | Drop]:
    try:
        yield from adapter(iter(rows))
    except Exception as error:
        raise _explained(error, rows, adapter, grouped=True) from error


def _where(rows: Reading, grouped: bool) -> str:
    return f"{'the group that was read up to ' if grouped else ''}row {rows.count - 1}"


def _explained(error: Exception, rows: Reading, adapter: Callable | None, grouped: bool) -> Exception:
    """The error of an adapter with the row and, as far as it is known, the field."""
    where = _where(rows, grouped)
    if isinstance(error, KeyError):
        return ValueError(f"{where}: no field {error} for this data_format; found columns {sorted(rows.last)}.")
    if isinstance(error, ValueError):
        return ValueError(f"{where}: {error}")
    return ValueError(
        f"{where}: {_name(adapter)} cannot read it ({type(error).__name__}: {error}); repair the row, or name the "
        "data_format that fits."
    )


def _name(adapter: Callable | None) -> str:
    return getattr(adapter, "__name__", "the adapter")  # a partial function has none


# Columns.


def _counted_batch(batch: dict[str, list], indices: list[int], source: dict[str, Any], **options) -> dict[str, list]:
    counted = list(_counted(Reading(rows_in(batch), source, indices[0]), **options))
    return {name: [row[name] for row in counted] for name in counted[0]}


def _counted_groups(dataset: Dataset, **options) -> Iterator[Row]:
    return _counted(Reading(rows_of(dataset), dataset.features), **options)


def _counted(rows: Reading, columns: dict[str, Any], code: str, **options) -> Iterator[Row]:
    for row, reasons in _results(rows, columns=columns, **options):
        packed = in_columns(row or {}, columns, f"row {rows.count - 1}")
        yield {**packed, EVENTS: reasons, KEPT: row is not None}


def _reported(
    shards: Sequence[IterableDataset], titles: Sequence[str], columns: dict[str, Any], keep_dropped: bool, **options
) -> Iterator[Row]:
    for shard, title in zip(shards, titles, strict=True):
        report, rows = DropReport(), Reading(_rows_of_shards([shard]), shard.features)
        try:
            if keep_dropped:
                yield from _counted(rows, columns, "", **options)
                continue
            for row in _kept(_results(rows, columns=columns, **options), report, GIVE_UP):
                yield in_columns(row, columns, f"row {rows.count - 1}")
        except ValueError as error:
            raise ValueError(f"{title}: {error}") from error
        finally:  # also where the reader stops before the end
            report.source_rows = rows.count if inspect.isgeneratorfunction(options["adapter"]) else None
            if not keep_dropped:
                report.log(logger, title)


def in_columns(row: Row, columns: dict[str, Any], where: str = "a row") -> Row:
    """The row as a table takes it: all columns, and JSON text where they say JSON.

    Raises:
        ValueError: a value does not fit the type of its column, which `datasets` would turn into another value.
    """
    if new := sorted(row.keys() - columns.keys()):
        raise Misfit(f"{where}: column {new[0]!r} is not in the rows before it; give it in every row.")
    for name in sorted(row.keys() - CHECKED):
        value, kind = row[name], columns[name]
        if not (isinstance(value, list) if name == "prompt" and isinstance(kind, Json) else _fits(value, kind)):
            raise Misfit(f"{where}: {name!r} is {describe(value)}, unlike in the rows before it; give one type.")
    return {name: as_json(row.get(name), kind) for name, kind in columns.items()}


def as_json(value: Any, kind: Any) -> Any:
    """JSON text in a JSON column: what `datasets` itself makes of texts and numbers there is not always the same."""
    return json.dumps(value) if isinstance(kind, Json) and value is not None else value


def _fits(value: Any, kind: Any) -> bool:
    if value is None:
        return True
    if isinstance(kind, List):
        return isinstance(value, list) and all(_fits(item, kind.feature) for item in value)
    if not isinstance(kind, Value) or kind.dtype not in KINDS:
        return True
    return value in WHOLE.get(kind.dtype, ()) if type(value) is int else isinstance(value, KINDS[kind.dtype])
