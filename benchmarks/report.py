"""Turns what benchmarks.run measured into docs/benchmarks.md (page.md.jinja has its text) and a picture.

    python -m benchmarks.report runs/benchmark/results*.json

Ratios are taken turn by turn, between variants that ran one after another on the same rows; what is shown is their
median with the smallest and the largest.
"""

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.ratios import NAMES, Runs, by_variant, growth, peak_flops, ratios, share_reached
from trainers.pages import plots
from trainers.pages.plots import Series
from trainers.pages.text import markdown

GREEN, PALE, GREY = "#0b6e4f", "#7fb69e", "#c0c0c0"
SPREAD = ("s per step", "prompts/s")  # of the table of speeds, with their range
MIDDLE = ("response tokens/s", "reference, s", "outside the model, %", "peak, GiB", "of it training")
IDEALS = ("FLOP-ideal, no padding", "FLOP-ideal, as padded")
RATIOS = ("step", "policy part", "reference pass", *IDEALS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder for benchmarks.md and its pictures")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    results = sorted((json.loads(path.read_text()) for path in args.results), key=lambda r: r["preset"])
    for result in results:
        (args.output / picture(result)).write_text(draw(result))
    (args.output / "benchmarks.md").write_text(page(results))
    print(f"{args.output / 'benchmarks.md'} is written.")


def page(results: list[dict]) -> str:
    """docs/benchmarks.md."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    measured = any(result["preset"] != "cpu" for result in results)
    text = environment.get_template("page.md.jinja").render(sections=map(section, results), gpu_measured=measured)
    return text.rstrip() + "\n"


def picture(result: dict) -> str:
    return f"benchmarks-{result['preset']}.svg"


def section(result: dict) -> dict:
    """Everything about one machine, for the template."""
    names = dict.fromkeys(run["setting"] for run in result["runs"])
    settings = {name: [run for run in result["runs"] if run["setting"] == name] for name in names}
    grown, gpu = growth(settings.pop("growth", [])), result["machine"]["gpu"] if result["preset"] != "cpu" else None
    return {
        **result,
        "gpu": gpu,
        "first": result["runs"][0],
        "picture": picture(result),
        "settings": [setting_parts(name, runs, gpu) for name, runs in settings.items()],
        "growth": growth_table(grown),
    }


def setting_parts(name: str, measured: list[dict], gpu: str | None) -> dict:
    runs = by_variant(measured)
    compared = {"shared", "rows"} <= runs.keys()
    return {
        "title": "On real rows" if name == "main" else name,
        "lengths": lengths_text(measured),
        "speeds": speed_table(runs, gpu),
        "ratios": markdown(
            ["shared prompts against", *RATIOS],
            [[NAMES[v], *(spread(ratios(runs, v, column)) for column in RATIOS)] for v in runs if v != "shared"],
        ),
        "reached": [spread((100 * x for x in share_reached(runs, ideal)), 2) for ideal in IDEALS] if compared else [],
        "memory": memory(runs),
        "failed": [run for run in measured if "error" in run],
    }


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Median, and the range if there are several values."""
    values = sorted(values)
    if not values:
        return "-"
    middle = number(median(values), digits)
    return middle if len(values) == 1 else f"{middle} ({number(values[0], digits)} to {number(values[-1], digits)})"


def number(value: float, digits: int = 3) -> str:
    """So many significant digits, never with an exponent, whole numbers in full."""
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{decimals}f}"


def column(runs: Runs, variant: str, figure: str) -> list[float]:
    """A figure of a variant in all turns."""
    return [turn[figure] for turn in runs[variant].values()]


def speed_table(runs: Runs, gpu: str | None) -> str:
    """One row per variant; on a GPU also the operations per second, and their share of the peak if it is known."""
    peak, middle = peak_flops(gpu), [*MIDDLE, *(["TFLOP/s"] if gpu else [])]
    rows = [
        [NAMES[name], *(spread(column(runs, name, figure)) for figure in SPREAD),
         *(number(median(column(runs, name, figure))) for figure in middle),
         *([number(100 * median(column(runs, name, "TFLOP/s")) / peak)] if peak else [])]
        for name in runs
    ]  # fmt: skip
    return markdown(["", *SPREAD, *middle, *(["MFU, %"] if peak else [])], rows)


def memory(runs: Runs) -> list[float]:
    """Memory of `shared` against padded rows with all logits: of the peak, and of what training adds."""
    if not {"rows_full_logits", "shared"} <= runs.keys():
        return []
    return [
        median(column(runs, "shared", figure)) / median(column(runs, "rows_full_logits", figure))
        for figure in ("peak, GiB", "of it training")
    ]


def growth_table(grown: list) -> str:
    rows = []
    for (prompt, responses), runs in grown:
        if {"shared", "rows"} <= runs.keys():
            seconds = [number(median(column(runs, variant, "step"))) for variant in ("shared", "rows")]
            times, ideal = ratios(runs, "rows", "step"), ratios(runs, "rows", IDEALS[0])
            sizes = [str(size) for size in (len(responses), prompt, responses[0])]
            rows.append([*sizes, *seconds, spread(times), number(ideal[0])])
    head = ["K", "prompt tokens", "response tokens", "shared, s", "padded rows, s", "ratio", "FLOP-ideal"]
    return markdown(head, rows) if rows else ""


def lengths_text(runs: list[dict]) -> str:
    """What a step consists of."""
    good = [run for run in runs if "error" not in run]
    if not good:
        return "Nothing could be measured."
    groups = [group for run in good if run["variant"] == good[0]["variant"] for group in run["lengths"]]
    responses = [r for _, rs in groups for r in rs]
    return (
        f"{good[0]['prompts']} prompts per step with K = {len(groups[0][1])} responses each; over all timed steps "
        f"prompts of {min(p for p, _ in groups)} to {max(p for p, _ in groups)} tokens (mean "
        f"{sum(p for p, _ in groups) / len(groups):.0f}) and responses of {min(responses)} to {max(responses)} (mean "
        f"{sum(responses) / len(responses):.0f})."
    )


def draw(result: dict) -> str:
    """Bars of relative time with their range, and the growth curves."""
    figure, (left, middle, right) = plots.panels(3, size=(12, 3.6), width_ratios=[1.5, 1, 1])
    grown = growth([run for run in result["runs"] if run["setting"] == "growth"])
    others = [run for run in result["runs"] if run["setting"] != "growth"]
    name = others[0]["setting"] if others else ""
    bars(left, by_variant([run for run in others if run["setting"] == name]), "" if name == "main" else name)
    sizes = [(len(responses), prompt) for (prompt, responses), _ in grown]
    for axes, label, place, part in ((middle, "K", 0, slice(4)), (right, "prompt tokens", 1, slice(-5, None))):
        series = []
        for variant, colour in (("shared", GREEN), ("rows", PALE)):
            points = [(size[place], median(column(runs, variant, "step")))
                      for size, (_, runs) in zip(sizes, grown, strict=True) if variant in runs][part]  # fmt: skip
            series.append(Series(NAMES[variant], [x for x, _ in points], [y for _, y in points], "o-", colour))
        plots.draw(axes, series, xlabel=label, ylabel="s per step", ylim=(0, None))
    return plots.svg(figure, "Time of a step, and how it grows")


def bars(axes, runs: Runs, title: str) -> None:
    values = {name: v for name in runs if (v := ratios(runs, name, "step"))}
    middles = [median(v) for v in values.values()]
    ranges = [[m - min(v), max(v) - m] for m, v in zip(middles, values.values(), strict=True)]
    colours = [GREEN if name == "shared" else PALE if name.startswith("rows") else GREY for name in values]
    axes.barh([NAMES[name] for name in values], middles, color=colours, xerr=list(zip(*ranges, strict=True)),
              error_kw={"capsize": 3, "linewidth": 1})  # fmt: skip
    for i, (middle, (_, above)) in enumerate(zip(middles, ranges, strict=True)):
        axes.annotate(number(middle), (middle + above, i), (4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(title=title, xlabel="time of a step, shared prompts = 1")


if __name__ == "__main__":
    main()
