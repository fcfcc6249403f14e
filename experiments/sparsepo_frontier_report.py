"""Table and picture of scripts/sparsepo_frontier.py, from the journal of its folder.

python scripts/sparsepo_frontier_report.py runs/sparsepo-frontier docs/results/sparsepo-frontier
"""

import io
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from trainers.runs.files import read_journal, write_atomic
from trainers.statistics import bootstrap_interval, t_interval

EQUAL_KL = (6.0, 9.0, 12.0, 18.0)  # nats at which methods are compared
COLOURS = {"DPO": "#57606a", "TDPO1": "#9a6700", "MaPO": "#1a7f37", "SparsePO common": "#1f6feb",
           "SparsePO independent": "#d1242f"}  # fmt: skip
MARKERS = "osD^v*"


def write_report(folder: Path, target: Path) -> None:
    """Writes `target`.json (a summary), `target`.md (a table) and `target`.svg."""
    records = read_journal(Path(folder) / "results.jsonl")
    reference = next(r for r in records if r["method"] == "reference")
    trained = [r for r in records if r["method"] != "reference"]
    points = summarize(trained)
    settings = json.loads((Path(folder) / "manifest.json").read_text())["settings"]
    pairs = sum(1 for _ in open(Path(folder) / "pairs.jsonl"))
    summary = {"settings": settings, "pairs": pairs, "held_out_openings": len(reference["by_opening"]["reward"]),
               "reference": interval(reference), "points": points, "at_equal_kl": at_equal_kl(trained)}  # fmt: skip
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    tables = table(summary) + "\n" + equal_kl_table(summary["at_equal_kl"])
    for suffix, text in ((".json", json.dumps(summary, indent=1) + "\n"), (".md", tables), (".svg", plot(summary))):
        write_atomic(Path(f"{target}{suffix}"), text.encode())
    print(tables)


def interval(record: dict) -> dict:
    return {name: bootstrap_interval(values) for name, values in record["by_opening"].items()}


def summarize(records: list[dict]) -> list[dict]:
    """One point per method and beta: means over seeds with t intervals, and the masks at the end of training."""
    points = []
    for method in dict.fromkeys(r["method"] for r in records):
        for beta in sorted({r["beta"] for r in records if r["method"] == method}):
            runs = [r for r in records if (r["method"], r["beta"]) == (method, beta)]
            names = ("reward", "kl", "logratio", "tokens", "seconds")
            point = {"method": method, "beta": beta, "seeds": sorted(r["seed"] for r in runs)}
            point |= {name: t_interval([r[name] for r in runs]) for name in names}
            last = [r["history"][-1] if r["history"] else {} for r in runs]
            for name in ("rewards/accuracies", "mask_mean/reward_chosen", "mask_sparsity/reward_chosen",
                         "mask_mean/kl_chosen", "mask_sparsity/kl_chosen"):  # fmt: skip
                if all(name in log for log in last):
                    point[name] = sum(log[name] for log in last) / len(last)
            points.append(point)
    return points


def at_equal_kl(records: list[dict], baseline: str = "DPO") -> dict[str, dict]:
    """Reward of each method minus that of `baseline` at the same KL, both read off the seed's own line through beta.

    {method: {KL: t interval over the seeds whose two lines reach that KL, or None}}
    """
    lines = {}
    for record in records:
        lines.setdefault((record["method"], record["seed"]), []).append((record["kl"], record["reward"]))
    lines = {key: sorted(points) for key, points in lines.items() if len(points) > 1}

    def reward(key, kl) -> float | None:
        kls, rewards = zip(*lines.get(key, [(0.0, 0.0)]), strict=True)
        return float(np.interp(kl, kls, rewards)) if kls[0] <= kl <= kls[-1] else None

    found = {}
    for method in dict.fromkeys(m for m, _ in lines if m != baseline):
        found[method] = {}
        for kl in EQUAL_KL:
            pairs = [(reward((method, s), kl), reward((baseline, s), kl)) for m, s in lines if m == method]
            gains = [a - b for a, b in pairs if a is not None and b is not None]
            found[method][f"{kl:g}"] = t_interval(gains) if gains else None
    return found


def equal_kl_table(found: dict[str, dict]) -> str:
    """Markdown: gain in sentiment over DPO at the same KL."""
    lines = ["| minus DPO at the same KL | " + " | ".join(f"{kl:g} nats" for kl in EQUAL_KL) + " |"]
    lines.append("|" + " --- |" * (len(EQUAL_KL) + 1))
    for method, row in found.items():
        cells = ["not reached" if v is None else shown(v, 3, signed=True) + f" (n={v['count']})" for v in row.values()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown(value: dict, digits: int, *, signed: bool = False) -> str:
    mean = f"{value['mean']:{'+' if signed else ''}.{digits}f}"
    return mean if value["low"] is None else f"{mean} ± {value['high'] - value['mean']:.{digits}f}"


def table(summary: dict) -> str:
    """Markdown: one row per method and beta."""

    head = ["method", "beta", "sentiment", "KL, nats", "sampled log-ratio", "tokens", "mean m_u", "zeros in m_u, %",
            "training, s"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    base = {name: value["mean"] for name, value in summary["reference"].items()}
    lines.append(f"| reference | | {base['reward']:.3f} | 0 | 0 | {base['tokens']:.1f} | | | |")
    for point in summary["points"]:
        mask = [point.get(f"mask_{what}/reward_chosen") for what in ("mean", "sparsity")]
        cells = [point["method"], f"{point['beta']:g}", shown(point["reward"], 3), shown(point["kl"], 2)]
        cells += [shown(point["logratio"], 2), shown(point["tokens"], 1)]
        cells += [*("" if m is None else f"{m:.2f}" for m in mask), f"{point['seconds']['mean']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(summary: dict) -> str:
    """Reward against KL: a line per method through its betas, with the seeds' t intervals."""
    matplotlib.rcParams["svg.hashsalt"] = "polypo"
    figure = Figure(figsize=(8.2, 5.2), layout="constrained")
    axes, base = figure.add_subplot(), summary["reference"]["reward"]["mean"]
    for method, marker in zip(dict.fromkeys(p["method"] for p in summary["points"]), MARKERS, strict=False):
        points = sorted((p for p in summary["points"] if p["method"] == method), key=lambda p: p["kl"]["mean"])
        x, y = ([p[name]["mean"] for p in points] for name in ("kl", "reward"))
        colour = COLOURS.get(method, "#8250df")
        half = [[0 if p[n]["low"] is None else p[n]["high"] - p[n]["mean"] for p in points] for n in ("reward", "kl")]
        axes.errorbar(x, y, yerr=half[0], xerr=half[1], color=colour, marker=marker, ms=6, lw=1.4, elinewidth=0.6,
                      capsize=2, alpha=0.9, label=method)  # fmt: skip
        for point, a, b in zip(points, x, y, strict=True):
            axes.annotate(f"{point['beta']:g}", (a, b), textcoords="offset points", xytext=(5, 5), fontsize=7,
                          color=colour)  # fmt: skip
    axes.set(
        xlabel="KL(policy || reference) of whole responses, nats",
        ylabel=f"VADER sentiment (reference: {base:.2f})",
        title="Reward against KL; numbers are beta, bars 95 % t intervals over seeds",
    )
    axes.set_xlim(left=0)
    axes.grid(color="#e3e7ee")
    axes.legend(frameon=False, fontsize=9)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python scripts/sparsepo_frontier_report.py FOLDER TARGET")
    write_report(Path(sys.argv[1]), Path(sys.argv[2]))
