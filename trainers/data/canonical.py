"""A pass over a data set: every row through its adapter and the checks, and the count of what is left out.

An adapter is a plain function `row -> row or None`. Where one row of the data set is not yet one prompt with all its
responses, the adapter is a generator function instead: it reads the rows one after the other and yields canonical
rows. Both raise (a generator yields) `Drop(reason)` for what they leave out.
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, List, Value
from datasets.exceptions import DatasetGenerationError

from .drops import (
    EVENTS,
    KEPT,
    Drop,
    DropReport,
    batch_to_rows,
    check_invalid,
    refuse,
    source_digest,
    split_off_drops,
    unsigned,
    with_event_columns,
    without_format,
)
from .rows import NO_WEIGHT, Row, chat_row, clean_row, describe, response_faults, to_canonical
from .structured import TEMPLATE, TEXT, blanked, packed, padded_columns, with_json, without_padding

logger = logging.getLogger(__name__)

Adapter = Callable[[Row], Row | None] | Callable[[Iterable[Row]], Iterator[Row | Drop]]
Result = tuple[Row | None, list[str]]  # the row to keep or None, and what was left out of it

FEATURE_SAMPLE = 64  # kept rows from which the column types are inferred
LONG_SAMPLE = 1024  # the same where a value is missing in all of those


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
        num_proc: processes for `Dataset.map`; a generator function runs in one.
        as_chat: wrap text prompts and responses in user and assistant messages.

    Raises:
        ValueError: naming the row index and the field, if a row is built wrongly, if `invalid="error"` and a row is
            unusable, or if no row is left.
    """
    check_invalid(invalid)
    if len(dataset) == 0:
        raise ValueError("the dataset has no rows.")
    dataset = without_format(dataset)
    padded = padded_columns(dataset.features)
    options = {"adapter": adapter, "invalid": invalid, "as_chat": as_chat, "padded": padded}
    features = _features(_results(dataset, **options), dataset.features, passed=adapter is None)
    keywords = {**options, "columns": features, "code": source_digest(adapter)}
    if inspect.isgeneratorfunction(adapter):
        try:
            mapped = Dataset.from_generator(
                _grouped_events, features=with_event_columns(features), gen_kwargs={"dataset": dataset, **keywords}
            )
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None
        kept, report = split_off_drops(mapped)
        report.source_rows = len(dataset)
        return kept, report
    mapped = dataset.map(
        _canonical_batch,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=with_event_columns(features),
        num_proc=num_proc,
        fn_kwargs=keywords,
        desc="Reading preference rows",
    )
    return split_off_drops(mapped)


def canonical_stream(
    source: IterableDataset, adapter: Adapter | None, invalid: str = "drop", as_chat: bool = False, title: str = ""
) -> IterableDataset:
    """The same for a stream. What is left out is counted while the rows are read, and logged when a pass ends.

    The first rows are read once more than the others, to infer the types of the columns.

    Raises:
        ValueError: as in `canonicalize`; for a row in the middle, when it is read.
    """
    check_invalid(invalid)
    options = {"adapter": adapter, "invalid": invalid, "as_chat": as_chat, "padded": padded_columns(source.features)}
    report = DropReport()
    results = _counted(_results(source, **options), report)
    features = _features(results, source.features or {}, passed=adapter is None)
    if not report.rows_out:
        raise ValueError(f"no usable row is left.\n{report}")
    keywords = {"source": source, "columns": features, "title": title, **options}
    return IterableDataset.from_generator(_reported, features=Features(features), gen_kwargs=keywords)


def _reported(source: IterableDataset, columns: dict[str, Any], title: str, **options) -> Iterator[Row]:
    report, source = DropReport(), _whole(source)
    rows = _counting_source(source, report) if inspect.isgeneratorfunction(options["adapter"]) else source
    try:
        results = (_weighed(result, columns, options["invalid"]) for result in _results(rows, **options))
        for index, (row, _) in enumerate(_counted(results, report)):
            if row is not None:
                yield _in_columns(row, columns, f"row {index}")
    finally:  # also where the reader stops before the end
        report.log(logger, title)


def _whole(source: IterableDataset) -> Iterator[Row]:
    """All rows, also in the one worker of a data loader that has this pass: it would read a part of the files."""
    shards = source.num_shards
    for index in range(shards):
        yield from source.shard(num_shards=shards, index=index) if shards > 1 else source


def _counting_source(rows: Iterable[Row], report: DropReport) -> Iterator[Row]:
    report.source_rows = 0
    for row in rows:
        report.source_rows += 1
        yield row


def _counted(results: Iterable[Result], report: DropReport) -> Iterator[Result]:
    for row, reasons in results:
        report.add(row is not None, reasons)
        yield row, reasons


# Rows.


def _results(
    rows: Iterable[Row], adapter: Adapter | None, invalid: str, as_chat: bool, padded: dict[str, Any]
) -> Iterator[Result]:
    rows = (without_padding(row, padded) for row in rows)
    if inspect.isgeneratorfunction(adapter):
        yield from _grouped(rows, adapter, invalid, as_chat)
        return
    for index, row in enumerate(rows):
        yield _read_row(index, row, adapter, invalid, as_chat)


def _read_row(index: int, source: Row, adapter, invalid: str, as_chat: bool) -> Result:
    where = f"row {index}"
    if adapter is None:
        return _checked(where, source, invalid, as_chat)
    try:
        row = adapter(source)
        row = Drop(f"left out by {_name(adapter)}") if row is None else row
    except Drop as drop:
        row = drop
    except Exception as error:
        raise _explained(error, where, source, adapter) from error
    return _checked(where, row, invalid, as_chat)


def _grouped(rows: Iterable[Row], adapter, invalid: str, as_chat: bool) -> Iterator[Result]:
    """The results of a generator function; its drops of responses count for the row that follows them."""
    index, source, pending = -1, {}, []

    def watched() -> Iterator[Row]:
        nonlocal index, source
        for index, source in enumerate(rows):  # noqa: B007
            yield source

    found = adapter(watched())
    while True:
        try:
            row = next(found)
        except StopIteration:
            break
        except Exception as error:
            raise _explained(error, f"the group that was read up to row {index}", source, adapter) from error
        where = f"the group that was read up to row {index}"
        if isinstance(row, Drop) and row.kind != "row":
            pending.append(f"{row.kind}: {row}")
            if invalid == "error" and row.kind == "response":
                refuse(where, str(row))
            continue
        kept, reasons = _checked(where, row, invalid, as_chat)
        yield kept, [*pending, *reasons]
        pending = []
    if pending:
        yield None, [*pending, "row: no row follows the last dropped response"]


def _checked(where: str, row: Row | Drop, invalid: str, as_chat: bool) -> Result:
    """Validate and clean what an adapter gave."""
    try:
        if isinstance(row, Drop):
            raise row
        row = to_canonical(row)
    except Drop as drop:
        row, clean, reasons = None, None, [f"row: {drop}"]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    else:
        clean, reasons = clean_row(row)
    if reasons and invalid == "error":
        faults = response_faults(row) if reasons[0].startswith("response") else {}
        refuse(where, next((f"responses[{k}]: {fault}" for k, fault in faults.items()), reasons[0]))
    return (chat_row(clean) if clean and as_chat else clean), reasons


def _explained(error: Exception, where: str, source: Row, adapter) -> Exception:
    """The error of an adapter with the row and, as far as it is known, the field."""
    if isinstance(error, KeyError):
        return ValueError(f"{where}: no field {error} for this data_format; found columns {sorted(source)}.")
    if isinstance(error, ValueError):
        return ValueError(f"{where}: {error}")
    if isinstance(error, TypeError | AttributeError | IndexError):
        return ValueError(
            f"{where}: {_name(adapter)} cannot read it ({type(error).__name__}: {error}); repair the row, or name the "
            "data_format that fits."
        )
    return error


def _name(adapter) -> str:
    return getattr(adapter, "__name__", "the adapter")


# Columns.


def _canonical_batch(
    batch: dict[str, list],
    indices: list[int],
    adapter,
    invalid: str,
    as_chat: bool,
    padded: dict[str, Any],
    columns: dict[str, Any],
    code: str,
) -> dict[str, list]:
    results = (
        _read_row(index, without_padding(source, padded), adapter, invalid, as_chat)
        for index, source in zip(indices, batch_to_rows(batch), strict=True)
    )
    weighed = (_weighed(result, columns, invalid) for result in results)
    marked = [_marked(result, columns, f"row {index}") for index, result in zip(indices, weighed, strict=True)]
    out = {name: [row[name] for row in marked] for name in (*columns, EVENTS, KEPT)}
    return out | {name: unsigned(out[name], out[KEPT], kind) for name, kind in columns.items()}


def _grouped_events(dataset: Dataset, columns: dict[str, Any], code: str, **options) -> Iterator[Row]:
    for index, result in enumerate(_results(dataset, **options)):
        yield _marked(_weighed(result, columns, options["invalid"]), columns, f"group {index}")


def _marked(result: Result, columns: dict[str, Any], where: str) -> Row:
    row, reasons = result
    return {**_in_columns(row or {}, columns, where), EVENTS: reasons, KEPT: row is not None}


def _weighed(result: Result, columns: dict[str, Any], invalid: str) -> Result:
    """A row without a weight beside rows that have one is left out, like one whose weight is null."""
    row, reasons = result
    if row is not None and "weight" in columns and row.get("weight") is None:
        if invalid == "error":
            refuse("a row", NO_WEIGHT)
        return None, [*reasons, f"row: {NO_WEIGHT}"]
    return result


def _in_columns(row: Row, columns: dict[str, Any], where: str) -> Row:
    new = sorted(set(row) - set(columns))
    if new:
        raise ValueError(f"{where}: column {new[0]!r} is not in the rows before it; give it in every row.")
    for name, value in row.items():
        if not _fits(value, columns[name]):
            raise ValueError(f"{where}: {name!r} is {describe(value)}, unlike in the rows before it; give one type.")
    return packed({name: row.get(name) for name in columns}, columns)


def _fits(value: Any, feature: Any) -> bool:
    """Whether a column takes a value as it is; `datasets` would make text of messages and numbers of text."""
    if value is None:
        return True
    if isinstance(feature, List):
        return isinstance(value, list) and all(_fits(item, feature.feature) for item in value)
    if isinstance(feature, Json):
        return True
    if isinstance(feature, dict):
        return isinstance(value, dict) and all(
            item is None or (name in feature and _fits(item, feature[name])) for name, item in value.items()
        )
    kinds = {"string": str, "large_string": str, "bool": bool, "int64": int, "float64": int | float}
    expected = kinds.get(getattr(feature, "dtype", None), object)
    return isinstance(value, expected) and (expected is bool or expected is object or not isinstance(value, bool))


def _features(results: Iterable[Result], source: dict[str, Any], *, passed: bool) -> dict[str, Any]:
    """Column types of the result. Fixed before the pass, because inference batch by batch fails on columns that happen
    to be all None in the first batch. `passed`: further columns are those of the source, and so are their types."""
    kept = (row for row, _ in results if row is not None)
    sample = list(islice(kept, FEATURE_SAMPLE))
    if not sample:
        return {"prompt": Value("string"), "responses": List(Value("string")), "scores": List(Value("float64"))}
    own = ("prompt", "responses", "scores", "weight", *TEMPLATE)
    known = {name: kind for name, kind in source.items() if passed and name not in own}
    inferred = _types(sample, known)
    if "null" in repr(inferred):  # some value is missing in all of them
        inferred = _types([*sample, *islice(kept, LONG_SAMPLE - FEATURE_SAMPLE)], known)
    features = _without_null(inferred, _message_fields(source))
    for name in features.keys() & source.keys() - set(own):
        if inferred[name] == Value("null") or _alike(inferred[name], source[name]):
            features[name] = source[name]
    features["scores"] = List(Value("float64"))
    if "weight" in features:
        features["weight"] = Value("float64")
    return features


def _types(sample: list[Row], known: dict[str, Any]) -> dict[str, Any]:
    names = dict.fromkeys(name for row in sample for name in row)
    return {name: known.get(name) or _inferred(name, [row.get(name) for row in sample]) for name in names}


def _inferred(name: str, values: list) -> Any:
    if name in TEMPLATE:
        return Json()
    keys = set()
    try:
        return with_json(Dataset.from_dict({name: blanked(values, keys)}).features[name], keys)
    except Exception as error:  # whatever Arrow, or the values' own code, raises
        raise ValueError(
            f"column {name!r} of the first rows fits into no table ({error}); give plain values of one type."
        ) from error


def _alike(one: Any, other: Any) -> bool:
    """Whether an adapter passed a column through, as far as its type tells."""
    if isinstance(one, Value) and isinstance(other, Value):
        return ("string" in one.dtype) == ("string" in other.dtype)
    return type(one) is type(other)


def _message_fields(features: dict[str, Any]) -> dict[str, Any]:
    fields = {}
    for name in ("prompt", "responses", "chosen", "rejected"):
        feature = features.get(name)
        while isinstance(feature, List):
            feature = feature.feature
        for field, kind in feature.items() if isinstance(feature, dict) else ():
            kind = kind if isinstance(kind, Value) or field in TEXT else Json()
            fields[field] = kind if fields.get(field, Value("null")) == Value("null") else fields[field]
    return fields


def _without_null(feature: Any, message_fields: dict[str, Any]) -> Any:
    if isinstance(feature, dict):
        known = message_fields if "role" in feature else {}
        return {name: known.get(name) or _without_null(part, message_fields) for name, part in feature.items()}
    if isinstance(feature, List):
        return List(_without_null(feature.feature, message_fields))
    return Value("string") if feature == Value("null") else feature
