"""What is wrong with a file or folder that cannot be read, in words that name it."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
from datasets.exceptions import DatasetGenerationError


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What the readers of `datasets`, Arrow and gzip raise becomes a ValueError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        if path.exists() and path.name not in str(error):
            raise ValueError(f"{str(path)!r} holds no data: give a file or a folder with rows.") from error
        raise
    except (DatasetGenerationError, pyarrow.ArrowException, EOFError, zlib.error, OSError, RuntimeError, ValueError,
            KeyError, TypeError) as error:  # fmt: skip
        if isinstance(error, ValueError) and path.name in str(error):
            raise  # one of ours
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if "corresponds to no data" in str(cause):
            raise ValueError(f"{path} has no rows: give a file with at least one.") from error
        raise ValueError(f"cannot read {path.name!r} ({cause}).") from error
