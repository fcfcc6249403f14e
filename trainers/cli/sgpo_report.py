"""What the page of an SGPO run shows: what each stage kept, what the monitor found, curves, edits word by word."""

import re
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np

from ..data.facts import plain
from ..pages import plots
from ..pages.page import Sections, blocks
from ..pages.plots import Series
from ..pages.training import curve
from ..runs.files import read_json, read_rows
from ..runs.record import Run, read_run
from ..runs.stage import MANIFEST, SETTINGS
from ..sgpo.filters import OUTLIER
from ..sgpo.monitor import RULES, alarms
from ..sgpo.stages import STAGES

SAMPLES = 6
TEXTS = (
    ("Improver's data: draft and target", "filter/rows.jsonl.gz", "current", "target"),
    ("Pairs: rejected and chosen", "pairs/rows.jsonl.gz", "rejected", "chosen"),
    ("Held-out prompts: before all rounds and after the last", "measure/policy.jsonl.gz", "answer", "rejected"),
)


def read(folder: Path) -> tuple[str, Sections, list[Run]]:
    """Title and parts of the page, also of a run that is not finished, and the DPO stages of its rounds.

    Raises:
        ValueError: no stage of the folder is finished.
    """
    paths = sorted(folder.glob("round-*"))
    rounds = [{s: read_json(p / s / MANIFEST)["counts"] for s in STAGES if (p / s / MANIFEST).exists()}
              for p in paths]  # fmt: skip
    if not any(rounds):
        raise ValueError(f"{folder} holds no finished stage of a run of SGPO.")
    metrics = [{f"{s}/{k}": v for s, counts in stages.items() for k, v in counts.items()} for stages in rounds]
    names = dict.fromkeys(name for values in metrics for name, value in values.items() if isinstance(value, float))
    figures = [[name, *(short(values.get(name)) for values in metrics)] for name in names]
    about = (
        "A model improves its own answers and is then trained to prefer the improved ones. Figures are of "
        f"{len(rounds)} round(s); shares are of all texts of a stage, before anything is dropped."
    )
    last = paths[-1]
    improver = [read_run(path) for path in [last / "improver/model"] if path.is_dir()]
    pictures = [histogram(last), *(curve("Improver: loss per token", [run], ["loss"]) for run in improver)]
    sections = {
        "": [about],
        "What the monitor found": warnings(paths, rounds),
        "What each stage kept": [blocks.table(["Round, stage", "Rows", "Dropped", "Filter"], kept(rounds), False)],
        "Over the rounds": [
            blocks.table(["Metric", *(f"round {i}" for i, _ in enumerate(rounds, 1))], figures),
            blocks.figures(curves(metrics) if len(rounds) > 1 else []),
        ],
        "The last round": [blocks.figures(pictures)],
    }
    trained = {f"round {i}": path / "dpo/model" for i, path in enumerate(paths, 1) if (path / "dpo/model").is_dir()}
    runs = [read_run(path, name) for name, path in trained.items()]
    return f"SGPO: {folder.name}", sections | samples(last), runs


def warnings(paths: list[Path], rounds: list[dict]) -> list[str]:
    """Stages that did not end, and alarms."""
    sentences = []
    for number, (path, stages) in enumerate(zip(paths, rounds, strict=True), 1):
        for stage in (path / name for name in STAGES if (path / name / SETTINGS).exists() and name not in stages):
            dropped = read_rows(stage / "dropped.jsonl.gz") if (stage / "dropped.jsonl.gz").exists() else []
            reasons = ", ".join(sorted({row["reason"] for row in dropped}))
            sentences.append(
                f"Round {number}, {stage.name}: begun, and not finished. {reasons and f'Dropped: {reasons}.'}"
            )
        sentences += [f"Round {number}: {text}" for name, counts in stages.items() for text in alarms(name, counts)]
    none = "Nothing is beyond the limits of trainers/sgpo/monitor.py."
    return [blocks.alarm(text) for text in sentences] or [none]


def kept(rounds: list[dict]) -> list[list[str]]:
    rows = []
    for number, stages in enumerate(rounds, 1):
        for name, counts in stages.items():
            sizes = ", ".join(f"{value} {key}" for key, value in counts.items() if isinstance(value, int))
            dropped = ", ".join(f"{count} {reason}" for reason, count in counts.get("dropped", {}).items())
            fences = counts.get("fences", {"reason": " "})
            between = fences["reason"] or f"kept from {short(fences['lower'])} to {short(fences['upper'])}"
            rows.append([f"{number}, {name}", sizes, dropped, between])
    return rows


def short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def curves(metrics: list[dict]) -> list[str]:
    """A picture for each figure that the monitor watches, with its limit."""
    charts = []
    for name, limit in {name: limit for name, _, limit, _ in RULES}.items():
        points = {number: values[name] for number, values in enumerate(metrics, 1) if name in values}
        series = [Series(name, [*points], [*points.values()])]
        charts.append(plots.chart(name, "round", series, level=(limit, "limit"), ymargin=0.3))
    return charts


def histogram(last: Path) -> str:
    """The filtered statistic with its fences: what stays, and what is dropped."""
    if not (last / "filter" / MANIFEST).exists():
        return ""
    inside = [row["statistic"] for row in read_rows(last / "filter/rows.jsonl.gz") if "statistic" in row]
    outside = [row["statistic"] for row in read_rows(last / "filter/dropped.jsonl.gz") if row["reason"] == OUTLIER]
    if not inside:
        return ""
    fences = read_json(last / "filter" / MANIFEST)["counts"]["fences"]
    marks = [fences[side] for side in ("lower", "upper") if fences[side] is not None]
    bins = np.histogram_bin_edges([*inside, *outside], 20)
    labels = {"xlabel": "gain in log-probability per token", "ylabel": "examples"}
    groups = {"kept": inside, "dropped": outside}
    return plots.histogram("Filtered statistic, fences dashed", groups, bins, marks=marks, **labels)


def samples(last: Path) -> dict[str, list[str]]:
    """Prompts with the texts before and after, from the improver's data, the pairs and the held-out answers."""
    return {
        title: [edit(row["prompt"], row[before], row[after]) for row in read_rows(last / path)[:SAMPLES]]
        for title, path, before, after in TEXTS
        if (last / path).exists()
    }


def edit(prompt, before: str | None, after: str | None) -> str:
    texts = map(blocks.edits, word_diff(before or "", after or ""))
    sides = [*zip(("", "after"), ("before", "after"), texts, strict=True)]
    return blocks.pair(plain(prompt), sides)


def word_diff(before: str, after: str) -> tuple[list, list]:
    """Both texts as (tag, text): words that go are "del", words that come "ins"; white space is not compared."""
    a, b = (re.findall(r"\s*\S+\s*", text) for text in (before, after))
    words = [[part.strip() for part in parts] for parts in (a, b)]
    left, right = [], []
    for kind, i, j, k, m in SequenceMatcher(a=words[0], b=words[1], autojunk=False).get_opcodes():
        left.append(("" if kind == "equal" else "del", "".join(a[i:j])))
        right.append(("" if kind == "equal" else "ins", "".join(b[k:m])))
    return [part for part in left if part[1]], [part for part in right if part[1]]
