"""What the rounds of a self-enhancement run gave on held-out prompts: report.html, rounds.md and rounds.svg.

Every policy answered the same prompts with the same random streams. Intervals are 95 % bootstrap over prompts.
"""

import json
from pathlib import Path
from typing import Any

from ..generation.scorer import load_scorer
from ..pages import page, plots
from ..pages.plots import AFTER, BEFORE, Series
from ..pages.text import interval, markdown
from ..runs.files import read_journal, write_atomic
from ..statistics import bootstrap_interval
from .answers import MEASURES, Answer, matched_gain, per_prompt

HEAD = ["policy", "reward", "gain of the round", "gain since the start", "the same at equal length",
        *list(MEASURES)[1:], "training steps"]  # fmt: skip


def write_report(folder: Path) -> Path:
    """Writes the three files and returns the page's path.

    Raises:
        ValueError: the folder holds no finished round that was measured on held-out prompts.
    """
    rounds = [path.parent for path in sorted(folder.glob("round-*/manifest.json"))]
    rounds = [path for path in rounds if (path / "held-out/samples").is_dir()]
    if not rounds:
        raise ValueError(f"{folder} holds no finished round with held-out samples: set held_out_generations.")
    settings = json.loads((folder / "self_enhance.json").read_text())["settings"]
    policies = [read_answers(folder / "before"), *(read_answers(path / "held-out") for path in rounds)]
    manifests = [json.loads((path / "manifest.json").read_text()) for path in rounds]
    rows = table(policies, manifests, load_scorer(settings["self_enhance.scorer"]))
    pictures = draw(policies, manifests)
    write_atomic(folder / "rounds.md", markdown(HEAD, rows).encode())
    write_atomic(folder / "rounds.svg", pictures[0].encode())
    return page.write(
        folder / "report.html",
        f"Self-enhancement: {folder.name}",
        f"{len(policies[0])} held-out prompts were answered with the same random streams by the policy before the "
        "first round and after each. Intervals are 95 % bootstrap intervals over these prompts; gains are paired.",
        page.table(HEAD, rows),
        page.figures(pictures),
    )


def read_answers(folder: Path) -> list[list[Answer]]:
    """The sampled answers of one policy with their scores, by prompt and then in the order they were drawn."""
    samples, scores = (
        [record for path in (folder / name).glob(f"{name}-*.jsonl") for record in read_journal(path)]
        for name in ("samples", "scores")
    )
    answers = {(record["prompt"], record["index"]): record for record in samples}
    return [
        [
            {"text": answer["text"], "score": score, "tokens": len(answer["token_ids"]),
             "truncated": answer["truncated"]}
            for index, score in enumerate(record["scores"])
            for answer in [answers[record["prompt"], index]]
        ]
        for record in sorted(scores, key=lambda record: record["prompt"])
    ]  # fmt: skip


def table(policies: list[list[list[Answer]]], manifests: list[dict], scorer) -> list[list[str]]:
    """A row per policy, the untrained one first."""
    rewards = [per_prompt(answers, MEASURES["reward"]) for answers in policies]
    rows = []
    for number, answers in enumerate(policies):
        gains, steps = ["", "", ""], ""
        if number:
            paired = [bootstrap_interval(rewards[number] - rewards[other]) for other in (number - 1, 0)]
            gains = [interval(gain, "+.3f") for gain in (*paired, matched_gain(policies[0], answers, scorer))]
            steps = str(manifests[number - 1]["training"]["steps"])
        others = [f"{per_prompt(answers, measure).mean():.3g}" for measure in list(MEASURES.values())[1:]]
        rows.append([name_of(number), interval(bootstrap_interval(rewards[number])), *gains, *others, steps])
    return rows


def name_of(number: int) -> str:
    return f"round {number}" if number else "start"


def draw(policies: list[list[list[Answer]]], manifests: list[dict]) -> list[str]:
    """Reward of every policy with its interval, and what could explain the reward away."""
    steps = list(range(len(policies)))
    ticks: dict[str, Any] = {"xticks": steps, "xticklabels": list(map(name_of, steps))}

    def measured(name: str) -> Series:
        values = [bootstrap_interval(per_prompt(answers, MEASURES[name])) for answers in policies]
        return Series("held-out prompts", steps, values, colour=AFTER)

    pools = [manifest["samples"]["mean_score"] for manifest in manifests]
    start = Series("training prompts, as the round starts", steps[:-1], pools, "s--", BEFORE)
    return [
        plots.chart("Mean reward of fresh samples", "", [measured("reward"), start], ymargin=0.3, **ticks),
        plots.chart("Tokens per answer", "", [measured("length in tokens")], ylim=(0, None), **ticks),
        plots.chart("Share cut off at the limit", "", [measured("share cut off at the limit")], ylim=(-0.03, 1.03),
                    **ticks),
    ]  # fmt: skip
