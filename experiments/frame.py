"""What all experiments share: draw by seed, train, evaluate every few steps, compare arms by seed at equal KL, report.

An experiment is a module with an `Experiment`: its claim, the one primary contrast with the effect that is expected,
and `run(seed, quick)`, which returns the curve of every arm. Each seed draws its own data, so that contrasts are
paired by seed. A finished seed is never repeated: a killed or extended experiment goes on.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import disable_progress_bars
from tqdm import tqdm
from transformers.utils import logging

from trainers.pages import plots
from trainers.pages.text import interval, markdown
from trainers.runs.files import write_atomic
from trainers.runs.stage import Stage
from trainers.statistics import t_interval

KL = "KL(policy || reference) of whole responses, nats"
QUICK_SEEDS = 2
Point = dict[str, float]  # what was measured at one moment of a training; "step" is the moment
Curves = dict[str, list[Point]]


@dataclass(frozen=True)
class Contrast:
    """The experiment's value in one arm minus that in another, paired by seed.

    Args:
        at: place on the experiment's x axis, where each seed's own curves are interpolated; None is the last point.
        expected: the effect that is expected, stated before the run; None for a secondary contrast without one.
        known: what is said in place of a verdict, where the sign of the difference is known without a run.
    """

    arm: str
    minus: str
    expected: float | None = None
    at: float | None = None
    known: str | None = None

    @property
    def title(self) -> str:
        return f"{self.arm} minus {self.minus}" + ("" if self.at is None else f", at {self.at:g}")


@dataclass(frozen=True)
class Experiment:
    """What is claimed, and how it is found out.

    Args:
        minutes: about how long all seeds take on two cores; the quick version takes one.
        run: (seed, quick) -> the curve of every arm; every point holds `x` and `value`.
        settings: sizes that a result depends on; a folder of other ones is refused.
        x, value: names in the points, and what the axes say.
        shown: the arms of the picture; all without it.
    """

    name: str
    claim: str
    run: Callable[[int, bool], Curves]
    primary: Contrast
    secondary: tuple[Contrast, ...] = ()
    seeds: tuple[int, ...] = tuple(range(101, 111))
    minutes: float = 60
    settings: dict = dataclasses.field(default_factory=dict)
    x: tuple[str, str] = ("kl", KL)
    value: tuple[str, str] = ("reward", "reward")
    shown: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()  # further values of the last points for the table of arms


def main(experiment: Experiment, argv: list[str] | None = None) -> dict:
    """Runs the seeds that are missing and writes the report; returns the summary."""
    parser = argparse.ArgumentParser(description=experiment.claim)
    parser.add_argument("--quick", action="store_true", help="a minute: does the pipeline give numbers?")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(experiment.seeds))
    parser.add_argument("--output", type=Path, default=None, help="folder of the seeds (runs/experiments/NAME)")
    parser.add_argument("--report", type=Path, default=None, help="of the report (docs/results/NAME for all seeds)")
    options = parser.parse_args(argv)
    disable_progress_bars()
    logging.disable_progress_bar()
    quick = options.quick
    seeds = options.seeds[:QUICK_SEEDS] if quick else options.seeds
    output = options.output or Path("runs/experiments") / (experiment.name + "-quick" * quick)
    published = not quick and set(seeds) == set(experiment.seeds)
    report = options.report or (Path("docs/results") / experiment.name if published else output / "report")
    primary = experiment.primary
    print(f"{experiment.name}: {len(seeds)} seeds, about {1 if quick else experiment.minutes:g} minutes in all.")
    print(f"Primary: {primary.title}, expected {primary.expected:+.3g}.", flush=True)
    runs = []
    for seed in tqdm(seeds, desc=experiment.name, unit="seed"):
        settings = {"experiment": experiment.name, "seed": seed, "quick": quick, **experiment.settings}
        stage = Stage(output / f"seed-{seed}", settings, ways_out="choose another --output")
        if not stage.done():
            stage.open()
            start = time.monotonic()
            curves = experiment.run(seed, quick)
            stage.finish(curves=curves, seconds=round(time.monotonic() - start, 1))
        runs.append(stage.manifest() | {"seed": seed})
    return write_report(experiment, runs, report)


# The comparison of arms.


def at(points: list[Point], x: str, value: str, place: float | None) -> float:
    """`value` at `place` on the straight lines between the points in the order of x; NaN outside of them."""
    if place is None:
        return float(points[-1][value])
    xs, values = zip(*sorted((point[x], point[value]) for point in points), strict=True)
    return float(np.interp(place, xs, values, left=np.nan, right=np.nan))


def differences(experiment: Experiment, contrast: Contrast, runs: list[dict]) -> dict | None:
    """The t interval of a contrast over the seeds whose curves reach it, with its verdict; None with no such seed."""
    (x, _), (value, _) = experiment.x, experiment.value
    gains = [
        at(run["curves"][contrast.arm], x, value, contrast.at)
        - at(run["curves"][contrast.minus], x, value, contrast.at)
        for run in runs
    ]
    reached = [gain for gain in gains if not np.isnan(gain)]
    if not reached:
        return None
    found = t_interval(reached) | {"by_seed": gains}
    return found | {"verdict": contrast.known or verdict(found, contrast.expected)}


def verdict(gain: dict, expected: float | None) -> str:
    """What an interval says of an expected effect, and without an expectation whether it excludes 0."""
    if gain["low"] is None:
        return "one seed"
    holds_zero = gain["low"] <= 0 <= gain["high"]
    if expected is None:
        return "cannot tell" if holds_zero else "differs from 0"
    if gain["low"] <= expected <= gain["high"]:
        if not holds_zero:
            return "confirmed here"
        return "no effect seen, as expected" if expected == 0 else "cannot tell"
    if holds_zero or expected == 0:
        return "refuted here: excludes the expected effect"
    if gain["mean"] * expected < 0:
        return "refuted here: the opposite"
    return f"same sign, {'larger' if abs(gain['mean']) > abs(expected) else 'smaller'} than expected"


def write_report(experiment: Experiment, runs: list[dict], folder: Path) -> dict:
    """Writes summary.json, table.md and plot.svg, and prints the table."""
    arms = runs[0]["curves"].keys()  # the quick version has fewer
    contrasts = [c for c in (experiment.primary, *experiment.secondary) if {c.arm, c.minus} <= arms]
    rows = [(contrast, differences(experiment, contrast, runs)) for contrast in contrasts]
    summary = {
        "experiment": experiment.name,
        "claim": experiment.claim,
        "settings": experiment.settings,
        "seeds": [run["seed"] for run in runs],
        "minutes": round(sum(run["seconds"] for run in runs) / 60, 1),
        "contrasts": [{"title": c.title, "expected": c.expected, "gain": gain} for c, gain in rows],
        "curves": {str(run["seed"]): run["curves"] for run in runs},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    rounded = json.loads(json.dumps(summary), parse_float=lambda number: round(float(number), 5))
    write_atomic(folder / "summary.json", (json.dumps(rounded) + "\n").encode())
    table = tables(experiment, rows, runs) + f"\n{len(runs)} seeds, {summary['minutes']:g} minutes of one process.\n"
    write_atomic(folder / "table.md", table.encode())
    write_atomic(folder / "plot.svg", picture(experiment, rows, runs).encode())
    print(table)
    return summary


def tables(experiment: Experiment, rows: list[tuple[Contrast, dict | None]], runs: list[dict]) -> str:
    """Markdown: the contrasts, the primary one first, and the last point of every arm."""
    contrasts = [
        [("**primary** " if contrast is experiment.primary else "") + contrast.title,
         "" if contrast.expected is None else f"{contrast.expected:+.3g}",
         interval(gain, "+.3f"), str(gain["count"]) if gain else "0", gain["verdict"] if gain else "not reached"]
        for contrast, gain in rows
    ]  # fmt: skip
    ends = {arm: [run["curves"][arm][-1] for run in runs] for arm in runs[0]["curves"]}
    names = dict.fromkeys([experiment.x[0], experiment.value[0], *experiment.columns])
    names = [name for name in names if any(name in points[0] for points in ends.values())]
    arms = [
        [arm, *(interval(t_interval([p[n] for p in points])) if n in points[0] else "" for n in names)]
        for arm, points in ends.items()
    ]
    head = ["contrast", "expected", "found [95 % t interval]", "seeds", "verdict"]
    return markdown(head, contrasts) + "\n" + markdown(["arm, at its end", *names], arms)


def picture(experiment: Experiment, rows: list[tuple[Contrast, dict | None]], runs: list[dict]) -> str:
    """The mean curves of the arms, and beside them the contrasts with their intervals and what was expected."""
    figure, (left, right) = plots.panels(2, size=(11, 0.42 * max(len(rows), 8) + 1))
    (x, xlabel), (value, ylabel) = experiment.x, experiment.value
    lines = []
    for arm in [arm for arm in experiment.shown if arm in runs[0]["curves"]] or runs[0]["curves"]:
        runs_of = [run["curves"][arm] for run in runs]
        steps = [[points[i] for points in runs_of if i < len(points)] for i in range(max(map(len, runs_of)))]
        held = [[points[min(i, len(points) - 1)] for points in runs_of] for i in range(len(steps))]  # one that stopped
        xs = [float(np.mean([point[x] for point in points])) for points in steps]
        ys = [float(np.mean([point[value] for point in points])) for points in held]
        lines.append(plots.Series(arm, xs, ys, "o-"))
    plots.draw(left, lines, xlabel=xlabel, ylabel=f"{ylabel}, mean over seeds")
    shown = [(contrast, gain) for contrast, gain in rows if gain is not None]
    places = range(len(shown))[::-1]
    found = plots.Series("found, 95 % t interval", [gain for _, gain in shown], list(places), "o", plots.COLOURS[0])
    expected = {place: c.expected for (c, _), place in zip(shown, places, strict=True) if c.expected is not None}
    marks = plots.Series("expected", list(expected.values()), list(expected), "D", plots.COLOURS[3])
    plots.draw(right, [found, marks], xlabel=f"difference in {ylabel}")
    right.axvline(0, color=plots.INK, linewidth=1)
    right.set_yticks(list(places), [c.title for c, _ in shown], fontsize=8)
    return plots.svg(figure, f"{experiment.name}: {experiment.claim}")
