"""A page about a run of SGPO: what each stage kept, what the monitor found, curves, and edits word by word.

    python scripts/sgpo_report.py runs/sgpo/self

Writes report.html into the folder, also of a run that is not finished. The page needs nothing but itself.
"""

import argparse
import json
import re
import sys
from collections import Counter
from difflib import SequenceMatcher
from html import escape
from pathlib import Path

import numpy as np

from ..runs.files import read_rows, write_atomic
from ..sgpo.config import STAGES
from ..sgpo.filters import OUTLIER
from ..sgpo.monitor import LIMITS, Limits, alarms
from ..sgpo.stages import MANIFEST, SETTINGS
from ..sgpo.text import turns
from .old_page import AFTER, BEFORE, INK, STYLE, figures, new_figure, table, to_svg

SAMPLES = 6
STYLE += """
ins { background: #d7f5dd; text-decoration: none; border-radius: 3px; }
del { background: #fde2e1; border-radius: 3px; }
.alarm { border-left: 4px solid #d1242f; padding: 2px 0 2px 12px; margin: 6px 0; } .prompt { white-space: pre-wrap; }
"""
# Title, and by label the metric (stage/name) that is drawn over the rounds.
CURVES = (
    ("Share of copies", {"targets against drafts": "targets/copy_rate", "chosen against rejected": "pairs/copy_rate"}),
    ("Median edit ratio", {"targets": "targets/median_edit_ratio", "pairs": "pairs/median_edit_ratio"}),
    ("Words after / words before", {"targets": "targets/mean_word_ratio", "pairs": "pairs/mean_word_ratio",
                                    "policy against the start": "measure/policy_length_ratio"}),
    ("Share of text that speaks of the task", {
        "improver mode": "pairs/chosen_meta_text", "plain mode": "pairs/rejected_meta_text",
        "improver mode, held out, after DPO": "measure/policy_chosen_meta_text",
        "plain mode, held out, after DPO": "measure/policy_rejected_meta_text"}),
    ("Share cut off at the limit", {"drafts": "current/truncated", "targets": "targets/target_truncated",
                              "rejected": "pairs/rejected_truncated", "chosen": "pairs/chosen_truncated"}),
    ("Distinct word pairs", {"rejected": "pairs/rejected_distinct_2", "chosen": "pairs/chosen_distinct_2"}),
    ("Log-probability since the start of DPO, nats", {"chosen": "dpo/chosen_drift", "rejected": "dpo/rejected_drift"}),
    ("Outside score, improved minus plain", {"pairs": "measure/pairs_scorer_gain",
                                             "held out, improver": "measure/improver_scorer_gain",
                                             "held out, after DPO": "measure/policy_scorer_gain"}),
)  # fmt: skip
COLOURS = (AFTER, "#d1242f", BEFORE, "#0b6e4f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="output_dir of the run; report.html is written there.")
    try:
        print(f"{write_report(parser.parse_args().folder)} is ready.")
    except ValueError as error:
        sys.exit(f"error: {error}")


def write_report(folder: Path) -> Path:
    """Renders `folder`/report.html.

    Raises:
        ValueError: no stage of the folder is finished.
    """
    rounds = [read_round(path) for path in sorted(folder.glob("round-*"))]
    rounds = [stages for stages in rounds if stages]
    if not rounds:
        raise ValueError(f"{folder} holds no finished stage of a run of SGPO.")
    page = folder / "report.html"
    write_atomic(page, render(folder, rounds).encode())
    return page


def read_round(folder: Path) -> dict[str, dict]:
    """Counts of every finished stage."""
    paths = {name: folder / name / MANIFEST for name in STAGES}
    return {name: json.loads(path.read_text())["counts"] for name, path in paths.items() if path.exists()}


def render(folder: Path, rounds: list[dict[str, dict]]) -> str:
    last = folder / f"round-{len(rounds) - 1:02d}"
    metrics = [{f"{s}/{k}": v for s, counts in stages.items() for k, v in counts.items()} for stages in rounds]
    parts = [
        f"<h1>SGPO: {escape(folder.name)}</h1>",
        "<p>A model improves its own answers and is then trained to prefer the improved ones. Figures are of "
        f"{len(rounds)} round(s); shares are of all texts of a stage, before anything is dropped.</p>",
        "<h2>What the monitor found</h2>",
        found(folder, metrics),
        "<h2>What each stage kept</h2>",
        stages_table(rounds),
        "<h2>Over the rounds</h2>",
        numbers_table(metrics),
        figures([svg for svg in (curve(metrics, *c) for c in CURVES) if svg]) if len(rounds) > 1 else "",
        "<h2>The last round</h2>",
        figures([svg for svg in (histogram(last), training(last, "improver"), training(last, "dpo")) if svg]),
        *samples(last),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>SGPO</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def found(folder: Path, metrics: list[dict]) -> str:
    """Alarms, stages that did not end, and what could not be judged."""
    limits, which = limits_of(folder)
    warnings = [
        f"Round {number}: {text}" for number, values in enumerate(metrics, 1) for text in alarms(values, limits)
    ]
    open_stages = unfinished(folder)
    remarks = [] if warnings else [f"Nothing is beyond {which}{' so far' if open_stages else ''}."]
    remarks += [f"Compared with {which}."] if warnings else []
    for number, values in enumerate(metrics, 1):
        if names := values.get("dpo/not_judged"):
            remarks.append(f"Round {number}, dpo: the log says too little to judge {' and '.join(names)}.")
    shown = [f'<div class="alarm">{escape(text)}</div>' for text in (*open_stages, *warnings)]
    return "".join([*shown, *(f"<p>{escape(text)}</p>" for text in remarks)])


def limits_of(folder: Path) -> tuple[Limits, str]:
    """The limits that the run was last judged by, and their name."""
    path = folder / LIMITS
    if path.exists():
        return Limits(**json.loads(path.read_text())["limits"]), "the run's limits"
    return Limits(), "the default limits (the run's own were not kept)"


def unfinished(folder: Path) -> list[str]:
    """A sentence for each stage that was begun and has not ended."""
    begun = [round / name for round in sorted(folder.glob("round-*")) for name in STAGES]
    return [
        f"Round {int(path.parent.name.removeprefix('round-')) + 1}, {path.name}: {_state(path)}"
        for path in begun
        if (path / SETTINGS).exists() and not (path / MANIFEST).exists()
    ]


def _state(stage: Path) -> str:
    kept, dropped = stage / "rows.jsonl.gz", stage / "dropped.jsonl.gz"
    if not (dropped.exists() and kept.exists() and not read_rows(kept)):
        return "begun, and not finished."
    reasons = Counter(row["reason"] for row in read_rows(dropped)).most_common()
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons)
    return f"no row was kept, so the run ended there. Dropped: {counts}."


def stages_table(rounds: list[dict[str, dict]]) -> str:
    rows = []
    for number, stages in enumerate(rounds, 1):
        for name, counts in stages.items():
            dropped = "<br>".join(f"{n} {escape(reason)}" for reason, n in counts.get("dropped", {}).items())
            rows.append([f"{number}, {name}", size(counts), dropped, fences(counts.get("fences"))])
    head = "".join(f"<th>{name}</th>" for name in ("Round, stage", "Rows", "Dropped", "Filter"))
    cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{cells}</table>"


def numbers_table(metrics: list[dict]) -> str:
    """What the curves show, as numbers: a row per metric, a column per round."""
    rows = [
        [f"{escape(title)}: {escape(label)}", *(number(values.get(name)) for values in metrics)]
        for title, names in CURVES
        for label, name in names.items()
        if any(values.get(name) is not None for values in metrics)
    ]
    return table(["Metric", *(f"round {i}" for i in range(1, len(metrics) + 1))], rows)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def size(counts: dict) -> str:
    for name in ("kept", "examples", "pairs", "revised", "prompts"):
        if name in counts:
            steps = f", {counts['steps']} steps" if "steps" in counts else ""
            return f"{counts[name]} {name}{steps}"
    return ""


def fences(found: dict | None) -> str:
    if found is None:
        return ""
    if not found["applied"]:
        return f"not applied: {escape(found['reason'])}"
    shown = [f"{found[side]:.3g}" if found[side] is not None else "open" for side in ("lower", "upper")]
    return f"kept from {shown[0]} to {shown[1]}"


def curve(metrics: list[dict], title: str, names: dict[str, str]) -> str | None:
    names = {label: name for label, name in names.items() if any(name in values for values in metrics)}
    if not names:
        return None
    figure, axes = new_figure(title, "round")
    for (label, name), colour in zip(names.items(), COLOURS, strict=False):
        points = [(number, values[name]) for number, values in enumerate(metrics, 1) if values.get(name) is not None]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
    axes.set_xticks(range(1, len(metrics) + 1))
    axes.set_xlim(0.5, len(metrics) + 0.5)
    axes.margins(y=0.3)
    axes.legend(frameon=False, fontsize=8)
    return to_svg(figure, title)


def histogram(last: Path) -> str | None:
    """The filtered statistic with its fences: what stays, and what is dropped."""
    manifest = last / "filter/manifest.json"
    if not manifest.exists():
        return None
    kept = [row["statistic"] for row in read_rows(last / "filter/rows.jsonl.gz") if row.get("statistic") is not None]
    gone = [row["statistic"] for row in read_rows(last / "filter/dropped.jsonl.gz") if row["reason"] == OUTLIER]
    found = json.loads(manifest.read_text())["counts"].get("fences")
    if not kept:
        return None
    settings = json.loads((last / "filter/settings.json").read_text())["settings"]
    title = f"Filtered statistic: {settings['filter_statistic']}"
    figure, axes = new_figure(title, "value")
    bins = np.histogram_bin_edges([*kept, *gone], 20)
    axes.hist([kept, gone], bins, stacked=True, color=[AFTER, "#d1242f"], label=["kept", "dropped"])
    for side in ("lower", "upper"):
        if found and found[side] is not None:
            axes.axvline(found[side], color=INK, linestyle="--", linewidth=1)
    axes.set_ylabel("examples")
    axes.legend(frameon=False, fontsize=8, title="fences dashed", title_fontsize=8)
    return to_svg(figure, title)


def training(last: Path, name: str) -> str | None:
    path = last / name / "model/trainer_state.json"
    if not path.exists():
        return None
    logs = [log for log in json.loads(path.read_text())["log_history"] if "loss" in log]
    title = {"improver": "Improver: loss per token", "dpo": "DPO: loss and reward margin"}[name]
    figure, axes = new_figure(title, "step")
    steps = [log["step"] for log in logs]
    axes.plot(steps, [log["loss"] for log in logs], ".-", color=AFTER, label="loss")
    if name == "dpo":
        axes.plot(steps, [log["rewards/margins"] for log in logs], ".-", color="#0b6e4f", label="reward margin")
        axes.axhline(np.log(2), color=BEFORE, linestyle="--", linewidth=1, label="ln 2")
    axes.legend(frameon=False, fontsize=8)
    return to_svg(figure, title)


def samples(last: Path) -> list[str]:
    """Triples of prompt, before and after, from the improver's data, the pairs and the held-out answers."""
    parts = []
    for title, path, before, after in (
        ("Improver's data: draft and target", "filter/rows.jsonl.gz", "current", "target"),
        ("Pairs: rejected and chosen", "pairs/rows.jsonl.gz", "rejected", "chosen"),
    ):
        if (last / path).exists():
            rows = read_rows(last / path)[:SAMPLES]
            parts += [f"<h2>{title}</h2>", *(triple(row["prompt"], row[before], row[after]) for row in rows)]
    first, policy = last.with_name("round-00") / "before/rows.jsonl.gz", last / "measure/policy.jsonl.gz"
    if first.exists() and policy.exists():
        rows = list(zip(read_rows(first), read_rows(policy), strict=True))[:SAMPLES]
        parts.append("<h2>Held-out prompts: the model before all rounds and after the last</h2>")
        parts += [triple(old["prompt"], old["answer"], new["rejected"]) for old, new in rows]
    return parts


def triple(prompt, before: str | None, after: str | None) -> str:
    left, right = word_diff(before or "", after or "")
    shown = "\n".join(turn["content"] for turn in turns(prompt))
    return (
        f'<div class="sample"><p class="prompt"><b>{escape(shown)}</b></p><div class="pair">'
        f'<div class="answer"><small>before</small>{left}</div>'
        f'<div class="answer after"><small>after</small>{right}</div></div></div>'
    )


def word_diff(before: str, after: str) -> tuple[str, str]:
    """HTML of both texts: words that go in <del>, words that come in <ins>; white space is not compared."""
    a, b = (re.findall(r"\s*\S+\s*", text) for text in (before, after))
    words = [[part.strip() for part in parts] for parts in (a, b)]
    left, right = [], []
    for kind, *span in SequenceMatcher(a=words[0], b=words[1], autojunk=False).get_opcodes():
        for parts, out, tag in ((a[span[0] : span[1]], left, "del"), (b[span[2] : span[3]], right, "ins")):
            text = escape("".join(parts))
            out.append(text if kind == "equal" or not text else f"<{tag}>{text}</{tag}>")
    return "".join(left), "".join(right)


if __name__ == "__main__":
    main()
