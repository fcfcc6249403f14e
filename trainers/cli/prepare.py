r"""Reads preference data of any format and writes canonical rows, for clusters without a network.

    polypo prepare --dataset_name openbmb/UltraFeedback --data_format ultrafeedback \
        --revision 40b436560ca83a8dba36114c22ab3c66e43f6d5e --output data/ultrafeedback.parquet

`load_preferences` reads the output as it is, and so does `polypo train --dataset_name data/ultrafeedback.parquet`.
What was dropped is printed by reason; it stands in `<output>.manifest.yaml` too, with the source, its revision, the
format, and digests. With `--streaming true` no copy of the source is kept.
"""

import json
from collections.abc import Iterable
from dataclasses import MISSING, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import yaml
from datasets import Features
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from pyarrow.parquet import ParquetWriter
from tqdm.auto import tqdm

from ..config import option
from ..data import detect_format, load_preferences
from ..data.canonical import in_columns
from ..data.drops import DropReport, collected_reports
from ..data.json_rows import file_digest
from ..runs.files import replacing, write_atomic, write_rows
from . import config_files

ROWS_PER_GROUP = 1000
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")


@dataclass
class PrepareArguments:
    """Options of `polypo prepare`."""

    dataset_name: str = option(MISSING, "Hub id, folder or file of preference data.")
    output: str = option(MISSING, "File to write: .parquet, .jsonl or .jsonl.gz.")
    data_format: str | None = option(
        None,
        "Name of a format or dotted path of an adapter; auto goes by the columns; left out: canonical rows and pairs.",
    )
    split: str = option("train", "Split to read; train_1+train_2 joins two.")
    name: str | None = option(None, "Configuration of a hub data set, such as utterances.")
    revision: str | None = option(None, "Commit, branch or tag of a hub data set.")
    max_rows: int | None = option(None, "Read at most so many rows of the source.")
    as_chat: bool = option(False, "Wrap plain texts as user and assistant messages.")
    invalid_rows: str = option("drop", "Drop and count what cannot be used, or stop.", choices=["drop", "error"])
    streaming: bool = option(False, "Read row by row, without a copy of the source.")
    num_proc: int | None = option(None, "Processes; not with streaming.")
    overwrite: bool = option(False, "Replace an earlier output.")


def main(argv: list[str]) -> None:
    (args,) = config_files.read(argv, PrepareArguments)
    manifest = prepare(args)
    print(f"{args.output}: {manifest['rows']} rows, described in {manifest_path(args.output)}")


def prepare(args: PrepareArguments) -> dict:
    """Write the rows and their manifest, which is returned.

    Raises:
        ValueError: an option that cannot be used, or a row, as in `load_preferences`.
    """
    output = Path(args.output)
    if not args.output.endswith(SUFFIXES):
        raise ValueError(f"--output {output}: give a name that ends in {', '.join(SUFFIXES)}.")
    if output.exists() and not args.overwrite:
        raise ValueError(f"--output {output} is there already: name another file, or set --overwrite true.")
    source = source_facts(args)
    named = {"name": args.name, "revision": source.get("commit")}
    options: dict[str, Any] = {n: value for n, value in named.items() if value} | {"streaming": args.streaming}
    if args.data_format == "auto":
        args.data_format = detect_format(args.dataset_name, args.split, **options)
    reading = {name: getattr(args, name) for name in ("as_chat", "invalid_rows", "max_rows")}
    with collected_reports() as reports:
        rows = load_preferences(
            args.dataset_name, args.split, args.data_format, num_proc=args.num_proc, **reading, **options
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        count = write(output, tqdm(rows, desc=f"Writing {output.name}", unit=" rows"), rows.features)
    report = sum((report for _, report in reports), DropReport())  # a stream has one for each shard
    print(report)
    manifest = {
        "file": output.name,
        "sha256": file_digest(output),
        "rows": count,
        "columns": {name: repr(feature) for name, feature in rows.features.items()},
        "source": source,
        "data_format": args.data_format,
        "split": args.split,
        **reading,
        "dropped": vars(report),
        "versions": {name: version(name) for name in ("polypo", "datasets", "pyarrow")},
    }
    plain = json.loads(json.dumps(manifest))  # counters become mappings
    write_atomic(manifest_path(output), yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).encode())
    return manifest


def source_facts(args: PrepareArguments) -> dict:
    """Where the rows come from: the digest of a file, or the commit of a hub data set."""
    path = Path(args.dataset_name).expanduser()
    facts = {"dataset_name": args.dataset_name, "name": args.name}
    if path.exists():
        digest = {"sha256": file_digest(path)} if path.is_file() else {}
        return facts | digest | {"commit": args.revision}  # which `load_preferences` refuses
    try:
        commit = HfApi().dataset_info(args.dataset_name, revision=args.revision).sha
    except (HfHubHTTPError, OSError):  # `datasets` may have it in its cache, or says what is wrong
        commit = args.revision
    return facts | {"revision": args.revision, "commit": commit}


def manifest_path(output: str | Path) -> Path:
    """No .json, which would be read as data where the folder of the output is."""
    return Path(f"{output}.manifest.yaml")


def write(output: Path, rows: Iterable[dict], features: Features) -> int:
    """Rows to a file that appears when it is complete; the same rows give the same bytes. Returns their number."""
    if output.suffix != ".parquet":
        return write_rows(output, rows, allow_nan=False)
    count, rows = 0, iter(rows)
    with replacing(output) as file, ParquetWriter(file, features.arrow_schema) as writer:
        while group := [in_columns(row, features) for row in islice(rows, ROWS_PER_GROUP)]:
            writer.write_table(pyarrow.Table.from_pylist(group, features.arrow_schema))
            count += len(group)
    return count
