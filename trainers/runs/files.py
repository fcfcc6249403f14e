"""Files that survive a kill at any moment: append-only journals of JSON lines, and atomic replacement."""

import contextlib
import gzip
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from .processes import Processes


class Journal:
    """Records of all processes under one name in a folder; each process appends to a file of its own.

    Without a folder nothing is kept.
    """

    def __init__(self, folder: str | Path | None, name: str):
        self.folder = None if folder is None else Path(folder)
        self.name, self.processes = name, Processes()

    def read(self) -> list[dict]:
        """All whole records. Every process must call this, and none may append before.

        Raises:
            ValueError: a complete line that is not JSON, which no kill of a writer explains.
        """
        if self.folder is None:
            return []
        self.processes.wait_for_everyone()
        paths = sorted(self.folder.glob(f"{self.name}-*.jsonl"))
        records = [record for path in paths for record in read_journal(path)]
        self.processes.wait_for_everyone()
        return records

    def append(self, records: Iterable[dict]) -> None:
        if self.folder is not None:
            append_records(self.folder / f"{self.name}-{self.processes.process_index:05d}.jsonl", records)


def append_records(path: str | Path, records: Iterable[dict]) -> None:
    """Appends one JSON line per record, in the place of a last line that a kill left unfinished.

    Returns when they are on disk. One process per file.
    """
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with open(path, "ab+") as file:
        if size := file.tell():
            file.seek(size - 1)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())


def read_journal(path: str | Path) -> list[dict]:
    """All complete records; an unfinished last line does not count. Raises ValueError as `read_rows` does."""
    return _parse(path, Path(path).read_bytes().split(b"\n")[:-1])


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when it is complete; a reader, or a kill, sees the old or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | Path, data: bytes) -> None:
    """Puts `data` at `path` as `replacing` does."""
    with replacing(path) as file:
        file.write(data)


def read_json(path: str | Path) -> dict:
    """The object in a file. Raises ValueError naming a file that is not JSON, as after a kill, or holds none."""
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): it was cut short or overwritten.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return content


def write_json(path: str | Path, content: dict | list) -> None:
    """Atomic, indented JSON."""
    write_atomic(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_rows(path: str | Path, rows: Iterable[dict], *, allow_nan: bool = True) -> int:
    """Atomic JSON lines, compressed when the name ends in .gz; the same rows give the same bytes. Returns how many."""
    count = 0
    with replacing(path) as file, contextlib.ExitStack() as stack:
        lines: IO[bytes] | gzip.GzipFile = file
        if str(path).endswith(".gz"):
            lines = stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0))
        for count, row in enumerate(rows, 1):  # noqa: B007
            lines.write((json.dumps(row, ensure_ascii=False, allow_nan=allow_nan) + "\n").encode())
    return count


def read_rows(path: str | Path) -> list[dict]:
    """Rows of a .jsonl or .jsonl.gz file. Raises ValueError naming the line that is not JSON."""
    data = Path(path).read_bytes()
    return _parse(path, (gzip.decompress(data) if str(path).endswith(".gz") else data).split(b"\n"))


def _parse(path: str | Path, lines: list[bytes]) -> list[dict]:
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}).") from error
    return records
