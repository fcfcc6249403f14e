"""Rows of CSV files: all cells are text but those of the columns that hold numbers, lists or messages.

No type is guessed, because a guess would make 7 of the text 007 and nothing of NA.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

SUFFIXES = (".csv", ".tsv")
SEPARATORS = ",;\t"

NUMBER = re.compile(r"weight|helpfulness|score_(chosen|rejected|A\d+)|(chosen|rejected)(_avg_|-)rating")
JSON = {
    "responses", "scores", "unfinished_responses", "tools", "chat_template_kwargs", "completions", "answers",
    "all_generated_responses", "all_rm_scores", "all_responses", "overall_scores",
}  # fmt: skip
FIX = {
    "number": "write it as 7.5, or leave the cell empty where there is none",
    "JSON": "write the list with json.dumps",
    "messages as JSON": "write them with json.dumps",
}
TEXTS = re.compile(r"prompt|chosen|rejected|A\d+")  # or messages as JSON
# As JSON, or as Python shows them, which is an error.
MESSAGES = re.compile(r"""\s*\[?\s*\{\s*['"](role|content)['"]\s*:.*\}\s*\]?\s*""", re.DOTALL)


def csv_rows(lines: Iterable[bytes], name: str) -> Iterator[dict[str, Any]]:
    """The rows of the lines of a file whose first row names the columns.

    The separator is a comma, a semicolon or a tab, whichever gives the first row the most columns.

    Raises:
        ValueError: naming row and column.
    """
    csv.field_size_limit(2**31 - 1)  # of the module: 131,072 characters are too few for a text
    decoded = _decoded(lines, name)
    head = next(decoded, "")
    separator = max(SEPARATORS, key=lambda one: len(next(csv.reader([head], delimiter=one), [])))
    columns, index = next(csv.reader([head], delimiter=separator), []), 0
    if twice := [column for column in columns if columns.count(column) > 1]:
        raise ValueError(f"{name!r} has two columns {twice[0]!r}: rename one.")
    cells = csv.reader(decoded, delimiter=separator, strict=True)
    try:
        for row in filter(None, cells):
            if len(row) != len(columns):
                raise csv.Error(f"{len(row)} fields for {len(columns)} columns")
            yield {column: _value(column, cell, index, name) for column, cell in zip(columns, row, strict=True)}
            index += 1
    except csv.Error as error:
        raise ValueError(
            f"row {index} of {name!r}, which ends in line {cells.line_num + 1}, is no CSV ({error}): put a text with "
            f"{separator!r}, quotes or line breaks in quotes, and write quotes inside of it twice."
        ) from error


def _decoded(lines: Iterable[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except ValueError as error:
            raise ValueError(f"line {number} of {name!r} is no UTF-8 ({error}): save the file as UTF-8.") from error


def _value(column: str, cell: str, index: int, name: str) -> Any:
    """What a cell says in its column; an empty one says nothing, and in a column of text an empty text."""
    kind = "JSON" if column in JSON else "number" if NUMBER.fullmatch(column) else ""
    if not cell.strip() and (kind or column == "annotator"):
        return None
    if not kind and TEXTS.fullmatch(column) and MESSAGES.fullmatch(cell):
        kind = "messages as JSON"
    try:
        if kind == "number":
            return float(cell.replace("_", "?"))  # Python would read 1_0 as 10
        return json.loads(cell) if kind else cell
    except (ValueError, RecursionError) as error:
        shown = cell if len(cell) <= 60 else f"{cell[:57]}..."
        raise ValueError(
            f"row {index} of {name!r}: {column!r} is {shown!r}, which is no {kind} ({error}); {FIX[kind]}."
        ) from error
