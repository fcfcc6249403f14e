"""The figures of a comparison: results.json, table.md and plot.svg from the runs.json of its folder.

python scripts/compare_report.py runs/compare-demo
"""

import io
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from ..metrics import ndcg, pairwise_accuracy
from ..runs.files import write_atomic, write_json
from ..statistics import bootstrap_interval, t_interval

LONGER, BASE = "longer response first", "base model"
COLUMNS = {
    "accuracy": "accuracy, log-ratio",
    "ndcg": "NDCG, log-ratio",
    "own_accuracy": "accuracy, own rewards",
    "own_ndcg": "NDCG, own rewards",
    "accuracy_over_length": "accuracy minus longer-first",
    "reward": "reward of samples",
    "kl": "KL to base",
    "tokens": "tokens per sample",
    "train_seconds": "training, s",
    "seconds": "whole run, s",
}
DIGITS = {"reward": 3, "kl": 2, "tokens": 1, "train_seconds": 0, "seconds": 0}
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#0a7b83", "#57606a")


def write_report(folder: Path) -> dict:
    """Aggregates the runs in `folder`/runs.json, writes the three files beside it and returns the figures.

    Raises:
        ValueError: there is no runs.json.
    """
    path = Path(folder) / "runs.json"
    if not path.is_file():
        raise ValueError(f"there is no {path}: run scripts/compare.py first.")
    report = json.loads(path.read_text())
    figures = aggregate(report)
    write_json(path.with_name("results.json"), figures)
    text = table(figures)
    write_atomic(path.with_name("table.md"), text.encode())
    if figures["config"]["samples"]["prompts"]:
        write_atomic(path.with_name("plot.svg"), plot(figures).encode())
    print(f"\n{text}")
    return figures


def aggregate(report: dict) -> dict:
    """Each method's figures with a t interval over seeds, and those of the baselines."""
    scores, lengths = padded(report["scores"])[0], padded(report["lengths"])[0]
    mask = padded(report["scores"])[1]
    base = next(run for run in report["runs"] if run["name"] == BASE)
    reference = padded(base["logps"])[0]

    def ranked(rewards: torch.Tensor) -> dict[str, np.ndarray]:
        arguments = rewards, scores, mask
        return {"accuracy": pairwise_accuracy(*arguments).numpy(), "ndcg": ndcg(*arguments).numpy()}

    rankings = {
        LONGER: lengths,
        "base model's log-probability": reference,
        "base model's log-probability per token": reference / lengths.clamp(min=1),
    }
    baselines = {name: {k: bootstrap_interval(v) for k, v in ranked(r).items()} for name, r in rankings.items()}
    baselines[BASE] = _sampled([base])
    longer, methods = ranked(lengths)["accuracy"], {}
    for name in dict.fromkeys(run["name"] for run in report["runs"] if run["name"] != BASE):
        runs = [run for run in report["runs"] if run["name"] == name]
        found = [ranked(padded(run["logps"])[0] - reference) for run in runs]
        means = {k: [float(np.nanmean(one[k])) for one in found] for k in ("accuracy", "ndcg")}
        sampled = _sampled(runs)
        methods[name] = {
            **{k: t_interval(values) for k, values in means.items()},
            "own_accuracy": t_interval([run["own_rewards"]["pairwise_accuracy"] for run in runs]),
            "own_ndcg": t_interval([run["own_rewards"]["ndcg"] for run in runs]),
            "accuracy_over_length": bootstrap_interval(np.mean([one["accuracy"] for one in found], 0) - longer),
            **sampled,
            "seeds": means | sampled.get("seeds", {}),
            **{k: t_interval([run[k] for run in runs]) for k in ("train_seconds", "seconds")},
            "steps": sorted({run["steps"] for run in runs}),
            "needs_reference": runs[0]["needs_reference"],
        }
    same = {name: report[name] for name in ("data", "config", "machine")}
    return {"methods": methods, "baselines": baselines, **same}


def _sampled(runs: list[dict]) -> dict:
    """Means over the samples of each run; `seeds` hold them one by one, for the plot."""
    if "samples" not in runs[0]:
        return {}
    columns = {"kl": "logratios", "tokens": "tokens", "reward": "rewards"}
    means = {
        name: [float(np.mean(run["samples"][key])) for run in runs]
        for name, key in columns.items()
        if key in runs[0]["samples"]
    }
    return {**{name: t_interval(values) for name, values in means.items()}, "seeds": means}


def padded(rows: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows to (N,K) float64 and the mask of what is real."""
    width = max(map(len, rows))
    values = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)
    lengths = torch.tensor([len(row) for row in rows])
    return values, torch.arange(width) < lengths.unsqueeze(-1)


def table(figures: dict) -> str:
    """Markdown: one row per method and baseline, and what the columns mean."""
    rows = {**figures["methods"], **{f"*{name}*": values for name, values in figures["baselines"].items()}}
    names = [name for name in COLUMNS if any(name in values for values in rows.values())]
    lines = [
        "| | " + " | ".join(COLUMNS[name] for name in names) + " |",
        "|---|" + "---|" * len(names),
        *(f"| {row} | " + " | ".join(cell(values.get(n), n) for n in names) + " |" for row, values in rows.items()),
    ]
    return "\n".join([*lines, "", *notes(figures)]) + "\n"


def cell(value: dict | None, name: str) -> str:
    if value is None:
        return ""
    digits, sign = DIGITS.get(name, 3), "+" if name == "accuracy_over_length" else ""
    mean, low, high = (None if value[k] is None else f"{value[k]:{sign}.{digits}f}" for k in ("mean", "low", "high"))
    return mean if low is None or low == high else f"{mean} [{low}, {high}]"


def notes(figures: dict) -> list[str]:
    """What the table cannot say of itself."""
    config, data = figures["config"], figures["data"]
    seeds, samples = len(config["seeds"]), config["samples"]
    steps = sorted({step for method in figures["methods"].values() for step in method["steps"]})
    without = [name for name, method in figures["methods"].items() if not method["needs_reference"]]
    exact = samples["temperature"] == 1 and samples["top_p"] == 1
    drawn = f"temperature {samples['temperature']}, top-p {samples['top_p']}"
    left_out = ", ".join(f"{n} ({reason})" for reason, n in data["rows_left_out"].items()) or "none"
    lines = [
        f"- Every run: {figures['machine']}; {data['train_rows']} training rows, "
        f"{' or '.join(map(str, steps))} steps, "
        f"{data['tokens_per_epoch']:,} tokens per epoch (each prompt counted once); {data['test_rows']} held-out "
        f"rows. Scores rescaled inside each row: {config['score_scale']}. Rows left out: {left_out}.",
        f"- Means over seeds ({seeds}) with 95 % t intervals over seeds, which say how much training varies and not "
        "how much the held-out rows do. `accuracy minus longer-first` and the rankings of baselines have 95 % "
        "bootstrap intervals over held-out prompts instead, after the mean over seeds.",
        "- Accuracy: share of the held-out pairs with different scores that are ranked as scored, mean over prompts; "
        "0.5 is chance. `log-ratio` ranks by log pi(y|x) - log pi_base(y|x) for every method. `own rewards` are those "
        "of the method itself: beta times the log-ratio for methods with a reference"
        + (f", and the policy's own log-probabilities for those without ({', '.join(without)})." if without else "."),
        f"- {LONGER}: no model at all. What does not beat it has not been shown to rank by anything but length.",
    ]
    if samples["prompts"]:
        kind = (
            "an unbiased estimate of KL(policy || base)" if exact else
            f"of samples at {drawn}, which is not the KL of the policy itself"
        )  # fmt: skip
        lines.append(
            f"- KL to base: {kind}: the sum over the tokens of a sample of log pi - log pi_base, mean over "
            f"{samples['prompts'] * samples['num_generations']} samples per run on held-out prompts ({drawn}, at most "
            f"{samples['max_new_tokens']} tokens, after which the sum ends), in nats."
        )
    return lines


def plot(figures: dict) -> str:
    """Reward of samples against KL, or without a scorer held-out accuracy against KL. One dot per seed."""
    methods = figures["methods"]
    rewarded = all("reward" in method for method in methods.values())
    y = "reward" if rewarded else "accuracy"
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, method), colour in zip(methods.items(), COLOURS * len(methods), strict=False):
        axes.scatter(method["seeds"]["kl"], method["seeds"][y], color=colour, s=14, alpha=0.5)
        axes.scatter(method["kl"]["mean"], method[y]["mean"], color=colour, s=70, label=name, edgecolor="white")
    if rewarded and "reward" in figures["baselines"][BASE]:
        axes.scatter(0, figures["baselines"][BASE]["reward"]["mean"], color="black", marker="x", label=BASE)
    elif not rewarded:
        longer = figures["baselines"][LONGER]["accuracy"]["mean"]
        axes.axhline(longer, color="black", linestyle="--", linewidth=1, label=LONGER)
    axes.set_xlabel("KL to the base model, nats per response")
    axes.set_ylabel("mean reward of fresh samples" if rewarded else "held-out pairwise accuracy, log-ratio")
    axes.grid(color="#e3e7ee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return to_svg(figure)


def to_svg(figure: Figure) -> str:
    """A file that is the same for the same figures."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "polypo", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/compare_report.py FOLDER")
    write_report(Path(sys.argv[1]))
