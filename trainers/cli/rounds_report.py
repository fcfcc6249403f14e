"""What the rounds of a self-enhancement run gave on held-out prompts: rounds.md, rounds.svg and parts of its page.

Every policy answered the same prompts with the same random streams. Intervals are 95 % bootstrap over prompts.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ..generation.scorer import asks_server, load_scorer
from ..pages import plots
from ..pages.page import Sections, blocks
from ..pages.plots import AFTER, BEFORE, Series
from ..pages.text import interval, markdown
from ..runs.files import Journal, read_json, write_atomic
from ..runs.record import Run, read_run
from ..statistics import bootstrap_interval
from .answers import MEASURES, Answer, matched_gain, per_prompt

REWARD, *OTHERS = MEASURES
HEAD = ["policy", REWARD, "gain of the round", "gain since the start", "the same at equal length", *OTHERS,
        "training steps"]  # fmt: skip


def read(folder: Path) -> tuple[str, Sections, list[Run]]:
    """Title and parts of the page, and the trainings of the rounds; writes rounds.md and rounds.svg.

    Raises:
        ValueError: the folder holds no finished round.
    """
    rounds = [path.parent for path in sorted(folder.glob("round-*/manifest.json"))]
    if not rounds:
        raise ValueError(f"{folder} holds no finished round yet.")
    title, trained = f"Self-enhancement: {folder.name}", enumerate((path / "checkpoint" for path in rounds), 1)
    runs = [read_run(path, f"round {number}") for number, path in trained if path.is_dir()]
    rounds = [path for path in rounds if (path / "held-out/samples").is_dir()]
    if not rounds:
        return title, {"": ["No held-out prompts were answered, which held_out_generations asks for."]}, runs
    settings = read_json(folder / "self_enhance.json")["settings"]
    policies = [read_answers(folder / "before"), *(read_answers(path / "held-out") for path in rounds)]
    manifests = [read_json(path / "manifest.json") for path in rounds]
    names = ["start", *(f"round {number}" for number in range(1, len(policies)))]
    measured = [{name: per_prompt(answers, of) for name, of in MEASURES.items()} for answers in policies]
    spec, rows = settings["self_enhance.scorer"], []
    scorer = None if asks_server(spec) else load_scorer(spec)  # a report pays for nothing
    for number, (name, values) in enumerate(zip(names, measured, strict=True)):
        gains, steps = ["", "", ""], ""
        if number:
            paired = [bootstrap_interval(values[REWARD] - measured[other][REWARD]) for other in (number - 1, 0)]
            gains = [interval(gain, "+.3f") for gain in paired]
            cut = scorer and matched_gain(policies[0], policies[number], scorer)
            gains.append(interval(cut, "+.3f") if cut else "not asked")
            steps = str(manifests[number - 1]["training"]["steps"])
        others = [f"{values[other].mean():.3g}" for other in OTHERS]
        rows.append([name, interval(bootstrap_interval(values[REWARD])), *gains, *others, steps])
    pictures = draw(names, measured, [manifest["samples"]["mean_score"] for manifest in manifests])
    write_atomic(folder / "rounds.md", markdown(HEAD, rows).encode())
    write_atomic(folder / "rounds.svg", pictures[0].encode())
    about = (
        f"{len(policies[0])} held-out prompts were answered with the same random streams by the policy before the "
        "first round and after each. Intervals are 95 % bootstrap intervals over these prompts; gains are paired."
    )
    parts = [about, blocks.table(HEAD, rows), blocks.figures(pictures)]
    return title, {"": parts}, runs


def read_answers(folder: Path) -> list[list[Answer]]:
    """The sampled answers of one policy with their scores, by prompt and then in the order they were drawn."""
    samples, scores = (Journal(folder / name, name).read() for name in ("samples", "scores"))
    drawn = {
        (s["prompt"], s["index"]): {n: s[n] for n in ("text", "truncated")} | {"tokens": len(s["token_ids"])}
        for s in samples
    }
    return [
        [drawn[record["prompt"], index] | {"score": score} for index, score in enumerate(record["scores"])]
        for record in sorted(scores, key=lambda record: record["prompt"])
    ]


def draw(names: list[str], measured: list[dict[str, np.ndarray]], pools: list[float]) -> list[str]:
    """Reward of every policy with its interval, and what could explain the reward away."""
    steps = list(range(len(names)))
    start = Series("training prompts, as the round starts", steps[:-1], pools, "s--", BEFORE)
    looks: dict[str, tuple[str, list[Series], dict[str, Any]]] = {
        REWARD: ("Mean reward of fresh samples", [start], {"ymargin": 0.3}),
        "length in tokens": ("Tokens per answer", [], {"ylim": (0, None)}),
        "share cut off at the limit": ("Share cut off at the limit", [], {"ylim": (-0.03, 1.03)}),
    }
    charts = []
    for name, (title, more, look) in looks.items():
        held_out = Series(
            "held-out prompts", steps, [bootstrap_interval(values[name]) for values in measured], colour=AFTER
        )
        charts.append(plots.chart(title, "", [held_out, *more], xticks=steps, xticklabels=names, **look))
    return charts
