"""The files of a run: who is of which type as CSV, what a round gave as JSON. Numbers are written without rounding."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np

from ..runs.files import write_atomic
from .init import TYPE

LIKELIHOOD = "log_likelihood_"
MIXTURE = "mixture.json"  # what MixturePolicy and the aggregation read
START = "start"  # folder in a run of a model that was given loaded


def write_annotators(
    path: Path, names: list, items: np.ndarray, posterior: np.ndarray, log_likelihood: np.ndarray | None = None
) -> None:
    """One line per annotator: rows that counted, likeliest type, posterior (N,T) and log-likelihood (N,T), if any."""
    types = range(posterior.shape[1])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = [f"{TYPE}{k}" for k in types], [f"{LIKELIHOOD}{k}" for k in types]
    writer.writerow(["annotator", "items", "type", "probability", *head[0], *head[1]])
    written = [[""] * len(types)] * len(names) if log_likelihood is None else log_likelihood.tolist()
    for name, count, row, logps in zip(names, items, posterior.tolist(), written, strict=True):
        best = int(np.argmax(row))
        writer.writerow([name, int(count), best, row[best], *row, *logps])
    write_atomic(path, out.getvalue().encode())


def read_annotators(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names as text, posterior (N,T), log-likelihood (N,T), as they were written; NaN where nothing was."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = rows[0].keys()
    read = [
        np.array([[float(row[c] or "nan") for c in columns if c.startswith(prefix)] for row in rows])
        for prefix in (TYPE, LIKELIHOOD)
    ]
    return [row["annotator"] for row in rows], *read


def write_rounds(path: Path, manifests: list[dict]) -> None:
    """Log-likelihood and mixture weights of every round as CSV, for plotting."""
    out = io.StringIO()
    types = len(manifests[0]["prior"])
    writer = csv.writer(out, lineterminator="\n")
    own = ["restart", "round", "rows_scored", "log_likelihood", "log_likelihood_per_item", "changed_type",
           "median_certainty"]  # fmt: skip
    held_out = "log_likelihood_per_annotator"
    writer.writerow([*own, f"held_out_{held_out}", *(f"{TYPE}{k}" for k in range(types))])
    for m in manifests:
        writer.writerow([*(m.get(name, "") for name in own), m.get("held_out", {}).get(held_out, ""), *m["prior"]])
    write_atomic(path, out.getvalue().encode())


def read_json(path: Path) -> dict:
    return json.loads(Path(path).read_text())


def base_of(run: Path, mixture: dict) -> str:
    """Path or hub id of the model that the types started from; one that lies in the run moves with it."""
    inside = Path(run) / START
    return str(inside) if mixture["base"] == START and inside.is_dir() else mixture["base"]


def copy_if_there(source: Path, target: Path) -> None:
    if source.exists():
        write_atomic(target, source.read_bytes())


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
