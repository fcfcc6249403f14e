"""The figures of a comparison, from runs.json of its folder: results.json, table.md, plot.svg, parts of its page."""

from pathlib import Path

import numpy as np
import torch

from ..metrics import ndcg, pairwise_accuracy
from ..pages import plots
from ..pages.page import Sections, blocks
from ..pages.plots import Series
from ..pages.text import interval, markdown
from ..runs.files import read_json, write_atomic, write_json
from ..runs.record import Run
from ..statistics import bootstrap_interval, t_interval

LONGER, BASE = "longer response first", "base model"
COLUMNS = {  # name: title and form
    "accuracy": ("accuracy, log-ratio", ".3f"),
    "ndcg": ("NDCG, log-ratio", ".3f"),
    "own_accuracy": ("accuracy, own rewards", ".3f"),
    "own_ndcg": ("NDCG, own rewards", ".3f"),
    "accuracy_over_length": ("accuracy minus longer-first", "+.3f"),
    "reward": ("reward of samples", ".3f"),
    "kl": ("KL to base", ".2f"),
    "tokens": ("tokens per sample", ".1f"),
    "train_seconds": ("training, s", ".0f"),
    "seconds": ("whole run, s", ".0f"),
}
SAMPLED = {"kl": "logratios", "tokens": "tokens", "reward": "rewards"}


def read(folder: Path) -> tuple[str, Sections, list[Run]]:
    """Aggregates the runs in `folder`/runs.json and writes the files beside it.

    Returns:
        title and parts of the page, and of each method the training with the first seed.
    """
    report = read_json(folder / "runs.json")
    figures = aggregate(report)
    write_json(folder / "results.json", figures)
    head, rows, remarks = *table(figures), notes(figures)
    write_atomic(folder / "table.md", (markdown(head, rows) + "\n" + "".join(f"- {n}\n" for n in remarks)).encode())
    picture = plot(figures) if figures["config"]["samples"]["prompts"] else ""
    if picture:
        write_atomic(folder / "plot.svg", picture.encode())
    parts = [blocks.table(head, rows), blocks.figures([picture]), *remarks]
    first = {run["name"]: run for run in reversed(report["runs"])}
    runs = [
        Run(name, first[name].get("record", {}), first[name].get("log_history", [])) for name in figures["methods"]
    ]
    return f"Comparison: {', '.join(figures['methods'])}", {"": parts}, runs


def aggregate(report: dict) -> dict:
    """Each method's figures with a t interval over seeds, and those of the baselines."""
    (scores, mask), (lengths, _) = padded(report["scores"]), padded(report["lengths"])
    by_name: dict[str, list[dict]] = {}
    for run in report["runs"]:
        by_name.setdefault(run["name"], []).append(run)
    base = by_name.pop(BASE)
    reference, _ = padded(base[0]["logps"])

    def ranked(rewards: torch.Tensor) -> dict[str, np.ndarray]:
        return {
            "accuracy": pairwise_accuracy(rewards, scores, mask).numpy(),
            "ndcg": ndcg(rewards, scores, mask).numpy(),
        }

    rankings = {
        LONGER: lengths,
        "base model's log-probability": reference,
        "base model's log-probability per token": reference / lengths.clamp(min=1),
    }
    baselines = {name: {k: bootstrap_interval(v) for k, v in ranked(r).items()} for name, r in rankings.items()}
    baselines[BASE] = {name: t_interval(values) for name, values in sample_means(base).items()}
    longer, methods = ranked(lengths)["accuracy"], {}
    for name, runs in by_name.items():
        by_seed = [ranked(padded(run["logps"])[0] - reference) for run in runs]
        seeds = {
            **{k: [float(np.nanmean(values[k])) for values in by_seed] for k in ("accuracy", "ndcg")},
            **sample_means(runs),
            "own_accuracy": [run["own_rewards"]["pairwise_accuracy"] for run in runs],
            "own_ndcg": [run["own_rewards"]["ndcg"] for run in runs],
            **{k: [run[k] for run in runs] for k in ("train_seconds", "seconds")},
        }
        methods[name] = {
            **{k: t_interval(values) for k, values in seeds.items()},
            "accuracy_over_length": bootstrap_interval(np.mean([v["accuracy"] for v in by_seed], 0) - longer),
            "seeds": seeds,
            "steps": sorted({run["steps"] for run in runs}),
            "needs_reference": runs[0]["needs_reference"],
        }
    return {"methods": methods, "baselines": baselines} | {
        name: report[name] for name in ("data", "config", "machine")
    }


def sample_means(runs: list[dict]) -> dict[str, list[float]]:
    """Means over the samples of each run, one per seed; empty without samples."""
    first = runs[0].get("samples", {})
    return {
        name: [float(np.mean(run["samples"][key])) for run in runs] for name, key in SAMPLED.items() if key in first
    }


def padded(rows: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows to (N,K) float64 and the mask of what is real."""
    lengths = torch.tensor([len(row) for row in rows])
    tensors = [torch.tensor(row, dtype=torch.float64) for row in rows]
    values = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    return values, torch.arange(values.size(1)) < lengths.unsqueeze(-1)


def table(figures: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows: one per method and baseline."""
    rows = figures["methods"] | {f"baseline: {name}": values for name, values in figures["baselines"].items()}
    names = [name for name in COLUMNS if any(name in values for values in rows.values())]
    head = ["", *(COLUMNS[name][0] for name in names)]
    return head, [[row, *(interval(values.get(n), COLUMNS[n][1]) for n in names)] for row, values in rows.items()]


def notes(figures: dict) -> list[str]:
    """What the table cannot say of itself."""
    config, data, samples = figures["config"], figures["data"], figures["config"]["samples"]
    steps = sorted({step for method in figures["methods"].values() for step in method["steps"]})
    without = [name for name, method in figures["methods"].items() if not method["needs_reference"]]
    drawn = f"temperature {samples['temperature']}, top-p {samples['top_p']}"
    left_out = ", ".join(f"{n} ({reason})" for reason, n in data["rows_left_out"].items()) or "none"
    lines = [
        f"Every run: {figures['machine']}; {data['train_rows']} training rows, {' or '.join(map(str, steps))} steps, "
        f"{data['tokens_per_epoch']:,} tokens per epoch (each prompt counted once); {data['test_rows']} held-out "
        f"rows. Scores rescaled inside each row: {config['score_scale']}. Rows left out: {left_out}.",
        f"Means over seeds ({len(config['seeds'])}) with 95 % t intervals over seeds, which say how much training "
        "varies and not how much the held-out rows do. Accuracy minus longer-first and the rankings of baselines "
        "have 95 % bootstrap intervals over held-out prompts instead, after the mean over seeds.",
        "Accuracy: share of the held-out pairs with different scores that are ranked as scored, mean over prompts; "
        "0.5 is chance. By log-ratio: log pi(y|x) - log pi_base(y|x), for every method. By own rewards: those "
        "of the method itself: beta times the log-ratio for methods with a reference"
        + (f", and the policy's own log-probabilities for those without ({', '.join(without)})." if without else "."),
        f"{LONGER}: no model at all. What does not beat it has not been shown to rank by anything but length.",
    ]
    if samples["prompts"]:
        exact = samples["temperature"] == 1 and samples["top_p"] == 1
        lines.append(
            "KL to base: "
            + ("an unbiased estimate of KL(policy || base)" if exact
               else f"of samples at {drawn}, which is not the KL of the policy itself")
            + ": the sum over the tokens of a sample of log pi - log pi_base, mean over "
            f"{samples['prompts'] * samples['num_generations']} samples per run on held-out prompts ({drawn}, at most "
            f"{samples['max_new_tokens']} tokens, after which the sum ends), in nats."
        )  # fmt: skip
    return lines


def plot(figures: dict) -> str:
    """Reward of samples against KL, or without a scorer held-out accuracy against KL. One small dot per seed."""
    methods, baselines = figures["methods"], figures["baselines"]
    y = "reward" if "reward" in baselines[BASE] else "accuracy"
    figure, (axes,) = plots.panels(size=(8, 4.2))
    for (name, method), colour in zip(methods.items(), plots.COLOURS * len(methods), strict=False):
        axes.scatter(method["seeds"]["kl"], method["seeds"][y], color=colour, s=14, alpha=0.5)
        axes.scatter(method["kl"]["mean"], method[y]["mean"], color=colour, s=70, label=name, edgecolor="white")
    base = [Series(BASE, [0], [baselines[BASE]["reward"]["mean"]], "x", "black")] if y == "reward" else []
    level = None if base else (baselines[LONGER]["accuracy"]["mean"], LONGER)
    ylabel = "mean reward of fresh samples" if base else "held-out pairwise accuracy, log-ratio"
    plots.draw(axes, base, level=level, xlabel="KL to the base model, nats per response", ylabel=ylabel)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return plots.svg(figure, "What each method gains for the distance from the base model")
