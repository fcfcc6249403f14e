"""The count of what a pass over a dataset leaves out: no row and no response disappears without a reason.

A mapped function writes its reasons to a temporary column, and the column is tallied after the map. Counting inside
the mapped function would be wrong with several processes and would count nothing when the result comes from the cache.
"""

import hashlib
import inspect
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

EVENTS, KEPT = "_events", "_kept"  # temporary columns: list of "kind: reason", and whether the row stays


class Drop(Exception):
    """Raised by an adapter to leave out a row; the message is the reason under which it is counted.

    A generator function yields it instead, and with `kind="response"` for a response that it leaves out of the row
    that it yields next.
    """

    def __init__(self, reason: str, kind: str = "row"):
        super().__init__(reason)
        self.kind = kind


@dataclass
class DropReport:
    """What a pass over a dataset left out, counted by reason.

    `reasons` counts rows, `responses_dropped` counts responses (of kept and of dropped rows), and `notes` counts what
    was changed but kept, such as truncated responses. Where several rows of the source make one row, `source_rows` is
    their number and `rows_in` counts the rows made.
    """

    source_rows: int | None = None
    rows_in: int = 0
    rows_out: int = 0
    reasons: Counter = field(default_factory=Counter)
    responses_dropped: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)

    def add(self, kept: bool, reasons: Iterable[str]) -> None:
        """Count one row of the pass; a reason is "row: ...", "response: ..." or "note: ..."."""
        self.rows_in += 1
        self.rows_out += kept
        counters = {"row": self.reasons, "response": self.responses_dropped, "note": self.notes}
        for event in reasons:
            kind, _, reason = event.partition(": ")
            counters[kind][reason] += 1

    def __str__(self) -> str:
        grouped = "" if self.source_rows is None else f"{self.source_rows} rows of the source, grouped: "
        lines = [f"{grouped}{self.rows_in} rows in, {self.rows_out} kept, {self.rows_in - self.rows_out} dropped"]
        for title, counts in (("rows dropped", self.reasons), ("responses dropped", self.responses_dropped)):
            lines += [f"  {title}: {count} ({reason})" for reason, count in counts.most_common()]
        lines += [f"  {count} {note}" for note, count in self.notes.most_common()]
        return "\n".join(lines)

    def log(self, logger: logging.Logger, title: str) -> None:
        """Print the report once: on the first process only, as a warning if anything was dropped or changed."""
        if not is_first_process():
            return
        level = logging.WARNING if self.reasons or self.responses_dropped or self.notes else logging.INFO
        logger.log(level, "%s: %s", title, self)


@contextmanager
def collected_reports() -> Iterator[list[tuple[str, DropReport]]]:
    """Gives the list of (title, DropReport) that the data path logs inside the block, and keeps them off the log."""
    found = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if isinstance(record.args, tuple) and record.args and isinstance(record.args[-1], DropReport):
                found.append(record.args)
            elif record.levelno >= logging.WARNING:
                logging.lastResort.handle(record)

    logger, handler = logging.getLogger(__package__), Collector()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def split_off_drops(mapped: Dataset) -> tuple[Dataset, DropReport]:
    """Tally and remove the temporary columns of a mapped dataset, and remove the rows that were marked as dropped."""
    report, kept = DropReport(), []
    for index, (keep, events) in enumerate(zip(mapped[KEPT], mapped[EVENTS], strict=True)):
        report.add(keep, events)
        if keep:
            kept.append(index)
    if not kept:
        raise ValueError(f"no usable row is left.\n{report}")
    dataset = mapped.remove_columns([EVENTS, KEPT])
    return (dataset if len(kept) == len(mapped) else dataset.select(kept)), report


def without_format(dataset: Dataset) -> Dataset:
    """Its values as Python has them, whatever they were set to come as; a transform of one's own is kept."""
    return dataset if dataset.format["type"] == "custom" else dataset.with_format(None)


def unsigned(values: list, kept: list[bool], feature: Any) -> list | np.ndarray:
    """A column as `datasets` takes it: integers from 2**63 on as an array only. Rows that go may hold anything."""
    if feature != Value("uint64") or any(keep and v is None for v, keep in zip(values, kept, strict=True)):
        return values
    return np.array([value or 0 for value in values], dtype=np.uint64)


def batch_to_rows(batch: dict[str, list]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def refuse(where: str, reason: str) -> None:
    """Raise for a row that `invalid="error"` does not let pass."""
    raise ValueError(f"{where}: {reason.removeprefix('row: ')}. Repair it, or leave it out with invalid_rows='drop'.")


def is_first_process() -> bool:
    """Whether this process should print; the launchers of torch and accelerate set RANK."""
    return os.environ.get("RANK", "0") == "0"


def check_invalid(invalid: str) -> None:
    if invalid not in ("drop", "error"):
        raise ValueError(f"invalid_rows must be 'drop' or 'error', not {invalid!r}.")


def with_event_columns(features: dict[str, Any]) -> Features:
    clash = sorted({EVENTS, KEPT} & set(features))
    if clash:
        raise ValueError(f"column {clash[0]!r} has a name this package uses; rename it.")
    return Features({**features, EVENTS: List(Value("string")), KEPT: Value("bool")})


def source_digest(*functions: Callable | None) -> str:
    """Digest of the source of this package and of the files of the functions.

    `datasets` hashes an imported function by its name alone, so without this an edited adapter (or a new version of
    this package) would be answered from the cache of the old one.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    for function in functions:
        try:
            digest.update(inspect.getsource(inspect.getmodule(function)).encode())
        except (TypeError, OSError):  # None, or defined in an interactive session, where it is hashed by value
            continue
    return digest.hexdigest()
