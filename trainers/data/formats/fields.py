"""What the adapters share: fields with a known type, messages, and groups of rows that follow each other."""

from collections.abc import Iterable, Iterator

from ..rows import Row, as_list, checked_number, describe, encodable


def user(content: str | None) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str | None) -> dict:
    return {"role": "assistant", "content": content}


def text(row: Row, name: str) -> str | None:
    """The text in a field.

    Raises:
        ValueError: it holds something else.
    """
    value = row[name]
    if value is None or isinstance(value, str):
        return encodable(value, name)
    raise ValueError(f"{name!r} is {describe(value)}; give text.")


def carried(row: Row, name: str) -> str | None:
    """The text in a field that may be absent: it is kept beside the row and not used."""
    return text(row, name) if name in row else None


def key(row: Row, name: str) -> str:
    """The text in a field that may not be empty.

    Raises:
        ValueError: it is.
    """
    value = text(row, name)
    if not value:
        raise ValueError(f"{name!r} is empty; give every row one.")
    return value


def flag(row: Row, name: str) -> bool:
    """The truth value in a field; false where it is null or absent.

    Raises:
        ValueError: it holds something else.
    """
    value = row.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise ValueError(f"{name!r} is {describe(value)}; give true or false.")


def number(row: Row, name: str) -> float | None:
    return checked_number(row[name], name)


def items(row: Row, name: str) -> list:
    """The list in a field; an empty one where the field is null."""
    return as_list(row[name], name)


def records(row: Row, name: str) -> list[dict]:
    """The list of records in a field.

    Raises:
        ValueError: it holds something else.
    """
    found = items(row, name)
    for k, item in enumerate(found):
        if not isinstance(item, dict):
            raise ValueError(f"'{name}[{k}]' is {describe(item)}; give a record with named fields.")
    return found


def same_length(row: Row, name: str, other: str) -> None:
    """Raises ValueError where two lists of a row do not have one item per response each."""
    n, m = len(items(row, name)), len(items(row, other))
    if n != m:
        raise ValueError(f"{name!r} has {n} items but {other!r} has {m}; give one per response in both.")


def in_runs(rows: Iterable[Row], name: str) -> Iterator[list[Row]]:
    """Rows that follow each other and are equal in a column, one list at a time."""
    run: list[Row] = []
    for row in rows:
        if run and row[name] != run[0][name]:
            yield run
            run = []
        run.append(row)
    if run:
        yield run


def in_groups(rows: Iterable[Row], name: str) -> Iterator[list[Row]]:
    """The same where every value of the column may occur in one run only. Keeps one run, and the values seen.

    Raises:
        ValueError: the rows of a value are not together.
    """
    seen = set()
    for run in in_runs(rows, name):
        value = key(run[0], name)
        if value in seen:
            raise ValueError(
                f"the rows with {name} {value!r} do not follow each other (the others lie before this row); sort the "
                f"data by {name!r} first."
            )
        seen.add(value)
        yield run
