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

from benchmarks.ratios import (
    NAMES,
    by_variant,
    growth_points,
    ideals,
    peak_flops,
    ratios,
    sequence_flops,
    sequences,
    share_reached,
    shared_flops,
    step_flops,
    total,
)
from trainers.pages import plots
from trainers.pages.plots import Series
from trainers.pages.text import markdown

GIB = 2**30
GREEN, PALE, GREY = "#0b6e4f", "#7fb69e", "#c0c0c0"


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


def by_setting(result: dict) -> tuple[dict[str, list[dict]], list[dict]]:
    """The runs of each setting in the order they were first measured, and those of growth apart."""
    names = dict.fromkeys(run["setting"] for run in result["runs"])
    groups = {name: [run for run in result["runs"] if run["setting"] == name] for name in names}
    growth = groups.pop("growth", [])
    return groups, growth


def section(result: dict) -> dict:
    """Everything about one machine, for the template."""
    groups, growth = by_setting(result)
    gpu = result["machine"]["gpu"] if result["preset"] != "cpu" else None
    first = next(iter(groups.values()), growth)[0]
    return {
        "title": f"GPU: {gpu}" if gpu else "CPU",
        "gpu": gpu,
        "picture": picture(result),
        "conditions": conditions(result),
        "groups": [group_parts(name, runs, gpu) for name, runs in groups.items()],
        "growth": growth_table(growth),
        "micro": "one prompt" if first["micro_trl"] == 1 else f"{first['micro_trl']} prompts",
        "dtype": first["dtype"],
        "left_out": result["left_out"],
    }


def group_parts(name: str, runs: list[dict], gpu: str | None) -> dict:
    groups = by_variant(runs)
    shares = [share_reached(runs, padding=p) for p in (False, True)] if {"shared", "rows"} <= set(groups) else []
    return {
        "title": "On real rows" if name == "main" else name,
        "lengths": lengths_text(runs),
        "speed": speed_table(runs, gpu),
        "ratios": ratio_table(runs),
        "reached": [spread((100 * x for x in share), 2) for share in shares],
        "memory": memory(groups),
        "failed": [run for run in runs if "error" in run],
    }


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Median, and the range if there are several values."""
    values = sorted(values)
    if not values:
        return "-"
    middle = number(median(values), digits)
    return middle if len(values) == 1 else f"{middle} ({number(values[0], digits)} to {number(values[-1], digits)})"


def number(value: float, digits: int) -> str:
    """So many significant digits, never with an exponent, whole numbers in full."""
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{decimals}f}"


def speed_table(runs: list[dict], gpu: str | None) -> str:
    """One row per variant; on a GPU also the operations per second, and their share of the peak if it is known."""
    speed = {
        "s per step": lambda r: total(r, "seconds") / len(r["steps"]),
        "prompts/s": lambda r: len(r["lengths"]) / total(r, "seconds"),
    }
    middle = {
        "response tokens/s": lambda r: sum(sum(rs) for _, rs in r["lengths"]) / total(r, "seconds"),
        "reference, s": lambda r: total(r, "reference") / len(r["steps"]),
        "outside the model, %": lambda r: 100 * total(r, "overhead") / total(r, "seconds"),
        "peak, GiB": lambda r: r["peak"] / GIB,
        "of it training": lambda r: (r["peak"] - r["before"]) / GIB,
    }
    peak = peak_flops(gpu)
    if gpu:
        middle["TFLOP/s"] = lambda r: step_flops(r) / total(r, "seconds") / 1e12
    if peak:
        middle["MFU, %"] = lambda r: 100 * step_flops(r) / total(r, "seconds") / peak
    rows = [
        [NAMES[name], *(spread(column(run) for run in group) for column in speed.values())]
        + [number(median(column(run) for run in group), 3) for column in middle.values()]
        for name, group in by_variant(runs).items()
    ]
    return markdown(["", *speed, *middle], rows)


def ratio_table(runs: list[dict]) -> str:
    head = ["shared prompts against", "step", "policy part", "reference pass", "FLOP-ideal, no padding",
            "FLOP-ideal, as padded"]  # fmt: skip
    rows = [
        [NAMES[name], *(spread(ratios(runs, name, part)) for part in ("seconds", "policy", "reference")),
         *(spread(ideals(runs, name, padding=padding)) for padding in (False, True))]
        for name in by_variant(runs) if name != "shared"
    ]  # fmt: skip
    return markdown(head, rows)


def memory(groups: dict[str, list[dict]]) -> tuple[float, float] | None:
    """Memory of `shared` against padded rows with all logits: of the peak, and of what training adds."""
    if not {"rows_full_logits", "shared"} <= set(groups):
        return None
    sides = [groups["shared"], groups["rows_full_logits"]]
    peaks = [median(run["peak"] for run in runs) for runs in sides]
    added = [median(run["peak"] - run["before"] for run in runs) for runs in sides]
    return peaks[0] / peaks[1], added[0] / added[1]


def growth_table(runs: list[dict]) -> str:
    groups, rows = by_variant(runs), []
    if len(groups) < 2:
        return ""
    points = (growth_points(runs, variant) for variant in ("shared", "rows"))
    for i, ((k, prompt, ours), (_, _, theirs)) in enumerate(zip(*points, strict=True)):
        times = [r["steps"][i]["seconds"] / s["steps"][i]["seconds"]
                 for r, s in zip(groups["rows"], groups["shared"], strict=False)]  # fmt: skip
        shape, group = groups["rows"][0]["shape"], groups["rows"][0]["lengths"][i]
        ideal = sum(sequence_flops(shape, *s) for s in sequences("rows", group, 0)) / shared_flops(shape, group)
        cells = number(ours, 3), number(theirs, 3), spread(times), number(ideal, 3)
        rows.append([str(k), str(prompt), str(group[1][0]), *cells])
    return markdown(
        ["K", "prompt tokens", "response tokens", "shared, s", "padded rows, s", "ratio", "FLOP-ideal"], rows
    )


def conditions(result: dict) -> str:
    """Machine, versions, model and command."""
    machine, run = result["machine"], result["runs"][0]
    fast, why = machine["fast"]
    rows = [
        ["machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory'] / GIB:.0f} GiB"],
        ["instruction set", machine["instructions"]],
        ["fast dtype", f"{fast}: {why}" + ("" if fast == "bfloat16" else "; so TRL's defaults are not measured")],
        ["GPU", f"{machine['gpu']}, {machine['gpu_memory'] / GIB:.0f} GiB" if machine["gpu"] else "none"],
        ["versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())],
        ["model", f"{run['model']}, {run['dtype']}, {'LoRA' if run['lora'] else 'full fine-tuning'}"],
        ["data", result["data"] or "random token ids"],
        ["date, duration", f"{result['date']}, {result['minutes']:.1f} minutes"],
        ["command", f"`{result['command']}`"],
    ]
    return markdown(["", ""], rows)


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
    groups, growth = by_setting(result)
    figure, (left, middle, right) = plots.panels(3, size=(12, 3.6), width_ratios=[1.5, 1, 1])
    name, runs = next(iter(groups.items()), ("", []))
    bars(left, runs, "" if name == "main" else name)
    for axes, label, column, part in ((middle, "K", 0, slice(4)), (right, "prompt tokens", 1, slice(-5, None))):
        series = []
        for variant, colour in (("shared", GREEN), ("rows", PALE)):
            points = growth_points(growth, variant)[part]
            series.append(Series(NAMES[variant], [p[column] for p in points], [p[2] for p in points], "o-", colour))
        plots.draw(axes, series, xlabel=label, ylabel="s per step", ylim=(0, None))
    return plots.svg(figure, "Time of a step, and how it grows")


def bars(axes, runs: list[dict], title: str) -> None:
    values = {name: ratios(runs, name, "seconds") for name in by_variant(runs)}
    values = {name: v for name, v in values.items() if v}
    middles = [median(v) for v in values.values()]
    ranges = [[m - min(v), max(v) - m] for m, v in zip(middles, values.values(), strict=True)]
    colours = [GREEN if name == "shared" else PALE if name.startswith("rows") else GREY for name in values]
    axes.barh([NAMES[name] for name in values], middles, color=colours, xerr=list(zip(*ranges, strict=True)),
              error_kw={"capsize": 3, "linewidth": 1})  # fmt: skip
    for i, (middle, (_, above)) in enumerate(zip(middles, ranges, strict=True)):
        axes.annotate(number(middle, 3), (middle + above, i), (4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(title=title, xlabel="time of a step, shared prompts = 1")


if __name__ == "__main__":
    main()
