"""The files of a run: who is of which type as CSV, what a round gave as JSON. Numbers are written without rounding."""

import csv
import io
from pathlib import Path

import numpy as np

from ..runs.files import read_json, write_atomic

TYPE, LIKELIHOOD = "type_", "log_likelihood_"  # columns type_0, type_1, ... of a posterior, and of a log-likelihood
ANNOTATORS, HELD_OUT = "annotators.csv", "held_out.csv"
MIXTURE = "mixture.json"  # what MixturePolicy and the aggregation read
START = "start"  # folder in a run of a model that was given loaded
ROUNDS = ("restart", "round", "rows_scored", "log_likelihood", "log_likelihood_per_item", "changed_type",
          "median_certainty")  # fmt: skip


def write_annotators(
    path: Path, names: list, items: np.ndarray, posterior: np.ndarray, log_likelihood: np.ndarray | None = None
) -> None:
    """One line per annotator: rows that counted, likeliest type, posterior (N,T) and log-likelihood (N,T), if any."""
    types = range(posterior.shape[1])
    head = ["annotator", "items", "type", "probability", *(f"{TYPE}{k}" for k in types)]
    known = [[""] * len(types)] * len(names) if log_likelihood is None else log_likelihood.tolist()
    _write(path, [*head, *(f"{LIKELIHOOD}{k}" for k in types)], (
        [name, int(count), int(np.argmax(row)), max(row), *row, *logps]
        for name, count, row, logps in zip(names, items, posterior.tolist(), known, strict=True)
    ))  # fmt: skip


def read_annotators(path: str | Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names as text, posterior (N,T), log-likelihood (N,T), as they were written; NaN where nothing was."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    posterior, log_likelihood = (
        np.array([[float(value or "nan") for name, value in row.items() if name.startswith(prefix)] for row in rows])
        for prefix in (TYPE, LIKELIHOOD)
    )
    return [row["annotator"] for row in rows], posterior, log_likelihood


def write_rounds(path: Path, manifests: list[dict]) -> None:
    """Log-likelihood and mixture weights of every round as CSV, for plotting."""
    held_out = "log_likelihood_per_annotator"
    head = [*ROUNDS, f"held_out_{held_out}", *(f"{TYPE}{k}" for k in range(len(manifests[0]["prior"])))]
    _write(path, head, (
        [*(m[name] for name in ROUNDS), m.get("held_out", {}).get(held_out, ""), *m["prior"]] for m in manifests
    ))  # fmt: skip


def _write(path: Path, head: list[str], rows) -> None:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *rows])
    write_atomic(path, out.getvalue().encode())


def read_mixture(run: str | Path) -> dict:
    """mixture.json of a finished run, with `base` the path or hub id of the model that the types started from.

    Raises:
        ValueError: there is none.
    """
    path = Path(run) / MIXTURE
    if not path.is_file():
        raise ValueError(f"{run} has no {MIXTURE}: give the output_dir of a finished EM-DPO run.")
    mixture = read_json(path)
    if mixture["base"] == START:  # lies in the run and moves with it
        mixture["base"] = str(Path(run) / START)
    return mixture
