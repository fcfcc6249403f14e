"""What the page shows that `make demo` ends with, from results.json of its folder."""

from pathlib import Path

import numpy as np

from ..pages import plots
from ..pages.page import Sections, blocks
from ..pages.plots import AFTER, BEFORE, Series
from ..pages.text import interval
from ..runs.files import read_json
from ..runs.record import Run, read_run
from .answers import MEASURES, per_prompt

RANKINGS = {
    "after": "Trained policy: log-ratio to the base model",
    "before": "The same before training: all log-ratios are 0, so chance by construction",
}
COURSE = {  # measure of a checkpoint: its title and form
    "reward": ("Reward", ".2f"),
    "gain at equal length": ("Gain at equal length", "+.2f"),
    "KL": ("KL, nats", ".1f"),
    "length in tokens": ("Tokens", ".0f"),
    "share cut off at the limit": ("Cut off", ".0%"),
}
SAMPLES_PER_GROUP = 3
SIDES = ("before", "after")


def read(folder: Path) -> tuple[str, Sections, list[Run]]:
    """Title and parts of the page, and the training."""
    results = read_json(folder / "results.json")
    sections = {
        "": headline(results),
        "Is there a trivial explanation?": explanations(results),
        "Answers to prompts that were not trained on": [blocks.figures(pictures(results))],
        "When to stop": course(results["course"]),
        "Side by side": side_by_side(results["answers"]),
        "Settings": settings(results),
    }
    return "What SWEPO taught a small language model", sections, [read_run(folder)]


def headline(results: dict) -> list[str]:
    reward, ranking = results["generation"]["reward"], results["ranking"]["after"]
    gain, clear = reward["gain"], "clear of" if reward["gain"]["low"] > 0 else "not clear of"
    return [
        f"A LoRA adapter was trained on {Path(results['config']['model_name_or_path']).name} with scored answers of "
        "the model itself. The reward is the sentiment of the text by VADER, so the lesson is to sound more positive. "
        f"All figures are from {len(results['answers'])} prompts that were not trained on, each sampled "
        f"{results['sampling']['num_generations']} times with the same random streams before and after. Intervals are "
        "bootstrapped over prompts.",
        blocks.cards([
            ("Mean reward", f"{reward['before']['mean']:.2f} → {reward['after']['mean']:.2f}",
             "sentiment, from -1 to 1"),
            ("Gain", f"{gain['mean']:+.2f}",
             f"95 % interval [{gain['low']:+.2f}, {gain['high']:+.2f}], {clear} zero"),
            ("Ranking accuracy", f"{ranking['mean']:.2f}",
             f"95 % interval [{ranking['low']:.2f}, {ranking['high']:.2f}]; chance is 0.50"),
        ]),
    ]  # fmt: skip


def explanations(results: dict) -> list[str]:
    """The checks that could explain a gain away, as tables."""
    rows = []
    for name, row in results["generation"].items():
        form = ".1f" if row["before"]["mean"] > 10 else ".3f"
        rows.append([name, *(f"{row[side]['mean']:{form}}" for side in SIDES), interval(row["gain"], "+" + form)])
    return [
        "A higher score could come from answers that are only longer, cut off, repetitive or full of exclamation "
        "marks.",
        blocks.table(["Mean over prompts", "Before", "After", "Change, 95 % interval"], rows),
        f"Share of pairs of given answers to {results['ranking']['after']['count']} of these prompts that are put in "
        "the order of their scores, ranked by:",
        intervals("Ranking by", {RANKINGS.get(name, name): value for name, value in results["ranking"].items()}),
        "The gain with both answers of a pair cut to the length of the shorter one, and how far the trained model's "
        "answers are from the base model's language:",
        intervals("Estimate", results["checks"]),
    ]


def intervals(title: str, values: dict[str, dict]) -> str:
    return blocks.table([title, "Value, 95 % interval"], [[name, interval(value)] for name, value in values.items()])


def course(points: list[dict]) -> list[str]:
    """What every further step gave and cost, on prompts that are held out for this."""
    rows = [[str(p["step"]), *(interval(p[name], form) for name, (_, form) in COURSE.items())] for p in points]
    kl, steps, drawn = [p["KL"]["mean"] for p in points], [f"step {p['step']}" for p in points], []
    for title, (first, *others) in (
        ("Reward against distance from the base model", ("reward", "gain at equal length")),
        ("Answers cut off at the limit", ("share cut off at the limit",)),
    ):
        lines = [Series(first, kl, [p[first] for p in points], colour=AFTER, notes=steps)]
        lines += [Series(name, kl, [p[name] for p in points], colour=BEFORE) for name in others]
        drawn.append(plots.chart(title, "KL to the base model, nats per answer", lines))
    return [
        "Checkpoints of the training answer prompts that are neither trained on nor used above. KL is the mean "
        "log-ratio of these answers to the base model: what the policy has moved. Where the reward grows more slowly "
        "than KL, and answers are cut off, more training stops paying.",
        blocks.figures(drawn),
        blocks.table(["Step", *(title for title, _ in COURSE.values())], rows),
    ]


def pictures(results: dict) -> list[str]:
    """Rewards and lengths before and after, and the change prompt by prompt."""
    answers, drawn = results["answers"], []
    for title, field, unit, longest in (
        ("Reward of the answers", "score", "sentiment", 1),
        ("Length of the answers", "tokens", "tokens", results["sampling"]["max_new_tokens"]),
    ):
        values = {side: [answer[field] for row in answers for answer in row[side]] for side in SIDES}
        groups = {f"{side}, mean {np.mean(x):.2f}": x for side, x in values.items()}
        bins = np.linspace(-1 if field == "score" else 0, longest, 17)
        drawn.append(plots.histogram(title, groups, bins, (BEFORE, AFTER), xlabel=unit, ylabel="answers"))
    before, after = (per_prompt([row[side] for row in answers], MEASURES["reward"]) for side in SIDES)
    bins, title = np.linspace(-2, 2, 33), "Change of the mean reward, prompt by prompt"
    changes = {"after minus before": after - before}
    return [*drawn, plots.histogram(title, changes, bins, marks=[0], xlabel="sentiment", ylabel="prompts")]


def side_by_side(answers: list[dict]) -> list[str]:
    """Samples picked by a rule, so that they are no advertisement."""
    rows = [(row["prompt"], row["before"][0], row["after"][0]) for row in answers]
    rows.sort(key=lambda row: row[2]["score"] - row[1]["score"], reverse=True)
    size = SAMPLES_PER_GROUP
    middle = max(len(rows) // 2 - size // 2, 0)
    groups = {
        "Largest gains": rows[:size],
        "In the middle": rows[middle : middle + size],
        "Largest losses": rows[-size:][::-1],
    }
    parts = [
        f"The first answer to each prompt, sorted by the change of its reward: the {size} largest gains, the {size} "
        f"in the middle and the {size} largest losses. Nothing was picked by hand."
    ]
    for name, group in groups.items():
        parts.append(blocks.heading(name, 3))
        for prompt, *pair in group:
            sides = []
            for side, answer in zip(SIDES, pair, strict=True):
                cut = ", cut off" if answer["truncated"] else ""
                caption = f"{side}, reward {answer['score']:+.2f}, {answer['tokens']} tokens{cut}"
                sides.append((side, caption, answer["text"].strip()))
            parts.append(blocks.pair(prompt, sides))
    return parts


def settings(results: dict) -> list[str]:
    tables = {
        "Training": results["config"],
        "Sampling and scoring": results["sampling"],
        "Time of each stage": {name: f"{value:.0f} s" for name, value in results["seconds"].items()},
        "Machine and versions": results["machine"] | results["versions"],
    }
    return [
        f"Made {results['created']} by make demo; training ran: {results['train_command']}",
        results["estimate"],
        *(part for title, values in tables.items() for part in (blocks.heading(title, 3), blocks.settings(values))),
    ]
