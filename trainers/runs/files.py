"""Files that survive a kill at any moment: an append-only journal of JSON lines, and atomic replacement."""

import gzip
import json
import os
from collections.abc import Iterable
from pathlib import Path


def append_records(path: str | Path, records: Iterable[dict]) -> None:
    """Appends one JSON line per record and returns when they are on disk. One process per file."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with open(path, "ab") as file:
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())


def repair_journal(path: str | Path) -> None:
    """Cuts off a last line that a kill left unfinished, so that the next append starts on a line of its own."""
    with open(path, "rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)


def read_journal(path: str | Path) -> list[dict]:
    """All complete records; an unfinished last line does not count.

    Raises:
        ValueError: a complete line that is not JSON, which no kill of a writer explains.
    """
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: delete the file to make its part again.") from error
    return records


def write_atomic(path: str | Path, data: bytes) -> None:
    """Puts `data` at `path` so that a reader, or a kill, sees the old content or the new one and nothing between."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: str | Path, content: dict) -> None:
    """Atomic, indented JSON."""
    write_atomic(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """Atomic JSON lines, compressed when the name ends in .gz; the same rows give the same bytes."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    write_atomic(path, gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data)


def read_rows(path: str | Path) -> list[dict]:
    """Rows of a .jsonl or .jsonl.gz file. Raises ValueError naming the line that is not a JSON object."""
    data = Path(path).read_bytes()
    text = (gzip.decompress(data) if str(path).endswith(".gz") else data).decode()
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} must be a JSON object with a `prompt`, got {type(row).__name__}.")
        rows.append(row)
    return rows
