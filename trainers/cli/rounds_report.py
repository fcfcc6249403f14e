"""What the rounds of a self-enhancement run gave on held-out prompts: rounds.md and rounds.svg in its folder.

    python scripts/rounds_report.py runs/lire-self-enhance

Every policy answered the same prompts with the same random streams. Intervals are 95 % bootstrap over prompts.
"""

import json
import os
import sys
from pathlib import Path

from matplotlib.figure import Figure

from ..generation.scorer import load_scorer
from ..runs.files import read_journal, write_atomic
from ..statistics import bootstrap_interval
from .answers import MEASURES, Answer, matched_gain, per_prompt
from .compare_report import to_svg

GREEN, GREY = "#0b6e4f", "#8c959f"


def write_report(folder: Path) -> str:
    """Writes both files and returns the table.

    Raises:
        ValueError: the folder holds no finished round that was measured on held-out prompts.
    """
    folder = Path(folder)
    rounds = [path.parent for path in sorted(folder.glob("round-*/manifest.json"))]
    measured = [(path, path / "held-out") for path in rounds if (path / "held-out/samples").is_dir()]
    if not measured:
        raise ValueError(f"{folder} holds no finished round with held-out samples: set held_out_generations.")
    settings = json.loads((folder / "self_enhance.json").read_text())["settings"]
    policies = [read_answers(folder / "before"), *(read_answers(path) for _, path in measured)]
    manifests = [json.loads((path / "manifest.json").read_text()) for path, _ in measured]
    text = table(policies, manifests, load_scorer(settings["self_enhance.scorer"]))
    write_atomic(folder / "rounds.md", text.encode())
    write_atomic(folder / "rounds.svg", plot(policies, manifests).encode())
    return text


def read_answers(folder: Path) -> list[list[Answer]]:
    """The sampled answers of one policy with their scores, by prompt and then in the order they were drawn."""
    records = {
        (record["prompt"], record["index"]): record
        for path in (folder / "samples").glob("samples-*.jsonl")
        for record in read_journal(path)
    }
    scores = {
        record["prompt"]: record["scores"]
        for path in (folder / "scores").glob("scores-*.jsonl")
        for record in read_journal(path)
    }
    return [
        [answer(records[prompt, index], score) for index, score in enumerate(scores[prompt])]
        for prompt in sorted(scores)
    ]


def answer(record: dict, score: float) -> Answer:
    return {
        "text": record["text"],
        "score": score,
        "tokens": len(record["token_ids"]),
        "truncated": record["truncated"],
    }


def table(policies: list[list[list[Answer]]], manifests: list[dict], scorer) -> str:
    """Markdown: a row per policy, the untrained one first."""
    gains = ["gain of the round", "gain since the start", "the same at equal length"]
    head = ["policy", "reward", *gains, *list(MEASURES)[1:], "training steps"]
    rows, first = [], per_prompt(policies[0], MEASURES["reward"])
    for number, answers in enumerate(policies):
        rewards = per_prompt(answers, MEASURES["reward"])
        cells = ["start" if number == 0 else f"round {number}", interval(bootstrap_interval(rewards))]
        if number:
            last = per_prompt(policies[number - 1], MEASURES["reward"])
            found = bootstrap_interval(rewards - last), bootstrap_interval(rewards - first)
            cells += [interval(gain, "+") for gain in (*found, matched_gain(policies[0], answers, scorer))]
        else:
            cells += [""] * len(gains)
        cells += [f"{per_prompt(answers, measure).mean():.3g}" for measure in list(MEASURES.values())[1:]]
        rows.append([*cells, str(manifests[number - 1]["training"]["steps"]) if number else ""])
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def interval(value: dict, sign: str = "") -> str:
    return f"{value['mean']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def plot(policies: list[list[list[Answer]]], manifests: list[dict]) -> str:
    """Reward of every policy with its interval, and beside it what could explain the reward away."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = range(len(policies))
    rewards = [bootstrap_interval(per_prompt(answers, MEASURES["reward"])) for answers in policies]
    means = [value["mean"] for value in rewards]
    spread = [[v["mean"] - v["low"] for v in rewards], [v["high"] - v["mean"] for v in rewards]]
    left.errorbar(steps, means, yerr=spread, fmt="o-", color=GREEN, capsize=4, label="held-out prompts")
    pools = [manifest["samples"]["mean_score"] for manifest in manifests]
    left.plot(
        range(len(pools)), pools, "s--", color=GREY, label="training prompts, samples that the round starts with"
    )
    left.set(ylabel="mean reward of fresh samples")
    left.margins(y=0.25)
    tokens, cut = (
        [per_prompt(answers, MEASURES[name]).mean() for answers in policies]
        for name in ("length in tokens", "share cut off at the limit")
    )
    right.plot(steps, tokens, "o-", color=GREEN)
    right.set(ylabel="tokens per answer", ylim=(0, None))
    other = right.twinx()
    other.plot(steps, cut, "s--", color=GREY)
    other.set(ylim=(0, 1))
    other.set_ylabel("share cut off at the limit (dashed)", color=GREY)
    for axes in (left, right):
        axes.set_xticks(list(steps), ["start", *(f"round {number}" for number in steps[1:])])
        axes.grid(color="#e3e7ee")
        axes.set_axisbelow(True)
    left.legend(frameon=False, fontsize=8, loc="upper left")
    return to_svg(figure)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/rounds_report.py FOLDER")
    sys.path.append(os.getcwd())  # a scorer may lie there
    print(write_report(Path(sys.argv[1])))
