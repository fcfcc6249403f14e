"""The count of what a pass over a dataset leaves out: no row and no response disappears without a reason.

A pass writes its reasons to a temporary column, which is tallied afterwards. Counting inside the pass would be wrong
with several processes and would count nothing when the result comes from the cache.
"""

import hashlib
import inspect
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, List, Value

EVENTS, KEPT = "_events", "_kept"  # temporary columns: list of "kind: reason", and whether the row stays
COUNTED = {EVENTS: List(Value("string")), KEPT: Value("bool")}
GIVE_UP = 10_000  # rows of a stream one after the other of which none can be used
_collected: ContextVar[tuple[list, str] | None] = ContextVar("collected", default=None)  # the list, and of what


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
        """Count a row of the pass; a reason is "row: ...", "response: ...", "note: ..." or, 9 times, "note 9: ..."."""
        self.rows_in += 1
        self.rows_out += kept
        counters = {"row": self.reasons, "response": self.responses_dropped, "note": self.notes}
        for event in reasons:
            what, _, reason = event.partition(": ")
            kind, _, times = what.partition(" ")
            counters[kind][reason] += int(times or 1)

    def __add__(self, other: "DropReport") -> "DropReport":
        """What two passes left out."""
        counts = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "source_rows"}
        rows = [n for n in (self.source_rows, other.source_rows) if n is not None]
        return DropReport(sum(rows) if rows else None, **counts)

    def __str__(self) -> str:
        grouped = "" if self.source_rows is None else f"{self.source_rows} rows of the source, grouped: "
        head = f"{grouped}{self.rows_in} rows in, {self.rows_out} kept, {self.rows_in - self.rows_out} dropped"
        return "\n  ".join([head, *sentences(vars(self))])

    def log(self, logger: logging.Logger, title: str) -> None:
        """Print the report once: on the first process only, as a warning if anything was dropped or changed."""
        changed = self.reasons or self.responses_dropped or self.notes
        log_report(logger, title, self, logging.WARNING if changed else logging.INFO)


def counted(report: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Of the fields of a `DropReport`, or of one in a file: what was done ("" for notes), why, and how often."""
    for name, done in (("reasons", "rows dropped: "), ("responses_dropped", "responses dropped: "), ("notes", "")):
        for reason, count in Counter(report.get(name, {})).most_common():
            yield done, reason, count


def sentences(report: Mapping[str, Any]) -> list[str]:
    """The same in words, one for each reason."""
    return [f"{done}{count} ({reason})" if done else f"{count} {reason}" for done, reason, count in counted(report)]


def log_report(logger: logging.Logger, title: str, report: Any, level: int = logging.WARNING) -> None:
    """Print what became of rows, on the first process only; `collected_reports` takes it too, or instead."""
    reports, of = _collected.get() or (None, "")
    if reports is not None:
        reports.append((f"{title}, {of}" if of else title, report))
    if (reports is None or of) and is_first_process():
        logger.log(level, "%s: %s", title, report)


@contextmanager
def collected_reports(into: list | None = None, *, of: str = "") -> Iterator[list[tuple[str, Any]]]:
    """Gives the list of (title, report) of the data path inside the block, and keeps them off the log.

    They are added to the list `into` where one is given. A report is a `DropReport`, or the `Shares` of a mixture.
    With `of`, such as "training rows", they are logged too, and titles in the list end with it.
    """
    reports: list[tuple[str, Any]] = [] if into is None else into
    token = _collected.set((reports, of))
    try:
        yield reports
    finally:
        _collected.reset(token)


def split_off_drops(mapped: Dataset) -> tuple[Dataset, DropReport]:
    """Tally and remove the temporary columns of a mapped dataset, and remove the rows that were marked as dropped.

    Raises:
        ValueError: no row is left; the message holds the counts.
    """
    report, kept = DropReport(), []
    for index, (keep, events) in enumerate(zip(mapped[KEPT][:], mapped[EVENTS][:], strict=True)):
        report.add(keep, events)
        if keep:
            kept.append(index)
    if not kept:
        raise ValueError(f"no usable row is left.\n{report}")
    dataset = mapped.remove_columns([EVENTS, KEPT])
    return (dataset if len(kept) == len(mapped) else dataset.select(kept)), report


def none_usable(count: int, report: DropReport) -> ValueError:
    """A stream gives no row that can be used, and may never give one."""
    return ValueError(f"no usable row is in the last {count} rows of the stream.\n{report}")


def without_format(dataset: Dataset) -> Dataset:
    """Its values as Python has them, whatever they were set to come as; a transform of one's own is kept."""
    return dataset if dataset.format["type"] == "custom" else dataset.with_format(None)


def refuse(where: str, reason: str) -> None:
    """Raise for a row that `invalid="error"` does not let pass."""
    raise ValueError(f"{where}: {reason.removeprefix('row: ')}. Repair it, or leave it out with invalid_rows='drop'.")


def is_first_process() -> bool:
    """Whether this process should print; the launchers of torch and accelerate set RANK."""
    return os.environ.get("RANK", "0") == "0"


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
            if (module := inspect.getmodule(function)) is not None:
                digest.update(inspect.getsource(module).encode())
        except (TypeError, OSError):  # builtin, or defined in an interactive session, where it is hashed by value
            continue
    return digest.hexdigest()
