"""The count of what a pass over a dataset leaves out: no row and no response disappears without a reason.

A mapped function writes its reasons to a temporary column, and the column is tallied after the map. Counting inside
the mapped function would be wrong with several processes and would count nothing when the result comes from the cache.
"""

import hashlib
import inspect
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, Features, List, Value

EVENTS, KEPT = "_events", "_kept"  # temporary columns: list of "kind: reason", and whether the row stays


class Drop(Exception):
    """Raised by an adapter to leave out a row; the message is the reason under which it is counted."""


@dataclass
class DropReport:
    """What a pass over a dataset left out, counted by reason.

    `reasons` counts rows, `responses_dropped` counts responses (of kept and of dropped rows), and `notes` counts what
    was changed but kept, such as truncated responses.
    """

    rows_in: int = 0
    rows_out: int = 0
    reasons: Counter = field(default_factory=Counter)
    responses_dropped: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.rows_in} rows in, {self.rows_out} kept, {self.rows_in - self.rows_out} dropped"]
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


def split_off_drops(mapped: Dataset) -> tuple[Dataset, DropReport]:
    """Tally and remove the temporary columns of a mapped dataset, and remove the rows that were marked as dropped."""
    kept = [index for index, keep in enumerate(mapped[KEPT]) if keep]
    report = DropReport(rows_in=len(mapped), rows_out=len(kept))
    counters = {"row": report.reasons, "response": report.responses_dropped, "note": report.notes}
    for event, count in Counter(event for events in mapped[EVENTS] for event in events).items():
        kind, _, reason = event.partition(": ")
        counters[kind][reason] += count
    if not kept:
        raise ValueError(f"no usable row is left.\n{report}")
    dataset = mapped.remove_columns([EVENTS, KEPT])
    return (dataset if len(kept) == len(mapped) else dataset.select(kept)), report


def batch_to_rows(batch: dict[str, list]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def refuse(index: int, reason: str) -> None:
    """Raise for a row that `invalid="error"` does not let pass."""
    raise ValueError(
        f"row {index}: {reason.removeprefix('row: ')}. Repair it, or leave it out with invalid_rows='drop'."
    )


def is_first_process() -> bool:
    """Whether this process should print; the launchers of torch and accelerate set RANK."""
    return os.environ.get("RANK", "0") == "0"


def check_invalid(invalid: str) -> None:
    if invalid not in ("drop", "error"):
        raise ValueError(f"invalid must be 'drop' or 'error', not {invalid!r}.")


def with_event_columns(features: dict[str, Any]) -> Features:
    clash = sorted({EVENTS, KEPT} & set(features))
    if clash:
        raise ValueError(f"column {clash[0]!r} has a name this package uses; rename it.")
    return Features({**features, EVENTS: List(Value("string")), KEPT: Value("bool")})


def source_digest(*functions: Callable | None) -> str:
    """Digest of the source files of the functions.

    `datasets` hashes an imported function by its name alone, so without this an edited adapter (or a new version of
    this package) would be answered from the cache of the old one.
    """
    digest = hashlib.sha256()
    for function in functions:
        try:
            digest.update(inspect.getsource(inspect.getmodule(function)).encode())
        except (TypeError, OSError):  # None, or defined in an interactive session, where it is hashed by value
            continue
    return digest.hexdigest()
