"""Turns what benchmarks.run measured into docs/benchmarks.md (page.md.jinja has its text) and two pictures.

    python -m benchmarks.report runs/benchmark/results.json

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

from benchmarks.gpu import table as gpu_table
from benchmarks.ratios import NAMES, PARTS, Runs, by_variant, column, fastest, figures, ratios
from trainers.pages import plots
from trainers.pages.plots import Series
from trainers.pages.text import markdown

GREEN, PALE, GREY = "#0b6e4f", "#7fb69e", "#c0c0c0"
COLOURS = {"shared": GREEN, "parts": PALE, "cached": PALE, "rows": "#d9a441", "rows_full_logits": "#d9a441"}
KINDS = ("matrix products", "attention", "LM head and softmax", "elementwise", "gathers and copies", "other")
DRAFTS = "drafts and improved answers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder for benchmarks.md and its pictures")
    parser.add_argument("--gpu", type=Path, default=Path("runs/gpu/gpu.json"), help="what benchmarks.gpu wrote, if so")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.results.read_text())
    (args.output / "benchmarks.svg").write_text(speed_picture(results))
    (args.output / "benchmarks-memory.svg").write_text(memory_picture(results["memory"]))
    gpu = json.loads(args.gpu.read_text()) if args.gpu.is_file() else None
    (args.output / "benchmarks.md").write_text(page(results, gpu))
    print(f"{args.output / 'benchmarks.md'} is written.")


def page(results: dict, gpu: dict | None) -> str:
    """docs/benchmarks.md; `gpu` is what benchmarks.gpu found, which counts if it was no try on a CPU."""
    settings = by_setting(results)
    first, grown = next(iter(settings)), {name: runs for name, runs in settings.items() if name != DRAFTS}
    runs, products = settings[first], results["products"]
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    text = environment.get_template("page.md.jinja").render(
        **results,
        first=first,
        gpu={**gpu, "table": gpu_table(gpu["sections"])} if gpu and "--quick" not in gpu["command"] else None,
        lengths=lengths_text([run for run in results["runs"] if run["setting"] == first]),
        turns=1 + max(run["turn"] for run in results["runs"]),
        fed_pairs=max(run["fed_pairs"] for run in results["runs"]),
        speeds=speed_table(runs),
        times=time_table(runs),
        kinds=kind_table(next((run["kinds"] for run in results["runs"] if run["kinds"]), None)),
        products_table=product_table(products),
        growth=growth_table(grown),
        drafts=speed_table(settings[DRAFTS]) if DRAFTS in settings else "",
        memory_table=memory_table(results["memory"]),
        filling={name: spread(column(runs, name, "filling")) for name in ("cached", "trl_all_pairs_cached")},
        product=spread(fastest(products, turn) / 1e9 for turn in {entry["turn"] for entry in products}),
    )
    return text.rstrip() + "\n"


def by_setting(results: dict) -> dict[str, Runs]:
    """The figures of each setting, in the order in which they were measured."""
    names = dict.fromkeys(run["setting"] for run in results["runs"])
    return {
        name: by_variant([run for run in results["runs"] if run["setting"] == name], results["products"])
        for name in names
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


def speed_table(runs: Runs) -> str:
    """One row per variant: time, speed, time against `shared`, tokens of the policy, share of the machine's speed."""
    head = ["", "s per step", "prompts/s", "time, shared = 1", "tokens fed", "share of the product, %"]
    rows = [
        [NAMES[name], spread(column(runs, name, "s per step")), spread(column(runs, name, "prompts/s")),
         spread(ratios(runs, name)), number(median(column(runs, name, "fed")), 1),
         spread(column(runs, name, "share"))]
        for name in runs
    ]  # fmt: skip
    return markdown(head, rows)


def time_table(runs: Runs) -> str:
    """Where the seconds of a step go, in per cent of it."""
    parts = (*PARTS, "outside")
    rows = []
    for name in runs:
        shares = [[100 * run[part] / run["s per step"] for run in runs[name].values()] for part in parts]
        rows.append([NAMES[name], *(number(median(share)) for share in shares),
                     spread(column(runs, name, "share in the model"))])  # fmt: skip
    return markdown(
        ["% of a step", *PARTS, "outside the model", "operations needed in the model, % of the product"], rows
    )


def kind_table(kinds: dict | None) -> str:
    """Seconds of the profiled step by kind of operation and part."""
    if kinds is None:
        return ""
    parts, rows = PARTS[:3], []
    total = sum(kinds[part].get(kind, 0) for part in parts for kind in KINDS)
    for kind in KINDS:
        seconds = [kinds[part].get(kind, 0) for part in parts]
        rows.append([kind, *map(number, seconds), number(100 * sum(seconds) / total)])
    return markdown(["s", *parts, "% of the three"], rows)


def product_table(products: list[dict]) -> str:
    """GFLOP/s of each size, over all turns, before and after."""
    sizes = products[0]["products"]
    rows = [[size, spread(entry["products"][size] / 1e9 for entry in products)] for size in sizes]
    return markdown(["rows x inner x columns", "GFLOP/s"], rows)


def growth_table(settings: dict[str, Runs]) -> str:
    """How a step grows with K and the prompt, and what the others take on the same rows."""
    others = ("rows", "trl_best_rest", "trl_all_pairs")
    head = ["", "tokens fed", "s per step", "s per 1,000 response tokens", "share of the product, %",
            *(f"{NAMES[name]}, times as long" for name in others)]  # fmt: skip
    rows = [
        [title, number(median(column(runs, "shared", "fed")), 1),
         *(spread(column(runs, "shared", figure)) for figure in ("s per step", "per 1,000", "share")),
         *(spread(ratios(runs, name)) for name in others)]
        for title, runs in settings.items()
    ]  # fmt: skip
    return markdown(head, rows)


def memory_table(memory: list[dict]) -> str:
    """Peak of the process by K, what training adds to it, and the seconds of the step."""
    head = ["K", *(f"{title}, {part}" for title in ("whole group", "in parts") for part in ("GiB", "training", "s"))]
    rows = []
    for k in dict.fromkeys(run["k"] for run in memory):
        both = [
            figures(run) for name in ("shared", "parts") for run in memory if (run["k"], run["variant"]) == (k, name)
        ]
        cells = [run[name] for run in both for name in ("peak, GiB", "of it training", "s per step")]
        rows.append([str(k), *map(number, cells)])
    return markdown(head, rows)


def lengths_text(runs: list[dict]) -> str:
    """What a step consists of."""
    groups = [group for run in runs if run["variant"] == "shared" for group in run["lengths"]]
    prompts, responses = [p for p, _ in groups], [r for _, rs in groups for r in rs]
    return (
        f"One prompt of {min(prompts)} to {max(prompts)} tokens per step, with {len(groups[0][1])} responses of "
        f"{min(responses)} to {max(responses)} (mean {sum(responses) / len(responses):.0f})."
    )


def memory_picture(memory: list[dict]) -> str:
    """Peak of memory over K."""
    series = []
    for variant, label, colour in (("shared", "whole group", GREY), ("parts", "in parts", GREEN)):
        runs = [run for run in memory if run["variant"] == variant]
        series.append(
            Series(label, [run["k"] for run in runs], [figures(run)["peak, GiB"] for run in runs], "o-", colour)
        )
    top = 1.1 * max(value for line in series for value in line.y)
    return plots.chart("Peak memory of the process", "K", series, ylabel="GiB", ylim=(0, top))


def speed_picture(results: dict) -> str:
    """Bars of relative time with their range, and how a step grows with its response tokens."""
    figure, (left, right) = plots.panels(2, size=(11.5, 3.8), width_ratios=[1.5, 1])
    settings = by_setting(results)
    name, series = next(iter(settings)), []
    bars(left, settings[name], name)
    ours = [run for run in results["runs"] if run["variant"] == "shared" and run["setting"] != DRAFTS]
    for prompt in (64, 256, 512, 2048):
        points = [(sum(run["lengths"][0][1]), figures(run)["s per step"]) for run in ours
                  if 0.8 * prompt <= run["lengths"][0][0] <= 1.2 * prompt]  # fmt: skip
        x, y = [tokens for tokens, _ in points], [seconds for _, seconds in points]
        series.append(Series(f"prompt of {prompt:,}", x, y, "o"))
    plots.draw(right, series, xlabel="response tokens of a step", ylabel="s per step", xlim=(0, None), ylim=(0, None))
    right.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    right.set_title("shared prompts", fontsize=10)
    return plots.svg(figure, "Time of a step against others, and how it grows")


def bars(axes, runs: Runs, title: str) -> None:
    values = {name: ratios(runs, name) for name in runs}
    middles = [median(v) for v in values.values()]
    ranges = [[m - min(v), max(v) - m] for m, v in zip(middles, values.values(), strict=True)]
    axes.barh([NAMES[name] for name in values], middles, color=[COLOURS.get(name, GREY) for name in values],
              xerr=list(zip(*ranges, strict=True)), error_kw={"capsize": 3, "linewidth": 1})  # fmt: skip
    for i, (middle, (_, above)) in enumerate(zip(middles, ranges, strict=True)):
        axes.annotate(number(middle), (middle + above, i), (4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="time of a step, shared prompts = 1")


if __name__ == "__main__":
    main()
