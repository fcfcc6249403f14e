"""What the adapters share: messages, and groups of rows that follow each other."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter

from ..rows import Row


def user(content: str | None) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str | None) -> dict:
    return {"role": "assistant", "content": content}


def in_runs(rows: Iterable[Row], name: str) -> Iterator[list[Row]]:
    """Rows that follow each other and are equal in a column, one list at a time."""
    return (list(run) for _, run in groupby(rows, key=itemgetter(name)))


def in_groups(rows: Iterable[Row], name: str) -> Iterator[list[Row]]:
    """The same where every value of the column may occur in one run only. Keeps one run, and the values seen.

    Raises:
        ValueError: the rows of a value are not together, or have none.
    """
    seen = set()
    for run in in_runs(rows, name):
        value = run[0][name]
        if not value:
            raise ValueError(f"{name!r} is empty; give every row one.")
        if value in seen:
            raise ValueError(
                f"the rows with {name} {value!r} do not follow each other (the others lie before this row); sort the "
                f"data by {name!r} first."
            )
        seen.add(value)
        yield run
