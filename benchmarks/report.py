"""Turns what benchmarks/run.py measured into docs/benchmarks.md and a picture.

    python benchmarks/report.py runs/benchmark/results*.json

Ratios are taken turn by turn, between variants that ran one after another on the same rows; what is shown is their
median with the smallest and the largest.
"""

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import matplotlib

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

GIB = 2**30
GREEN, PALE = "#0b6e4f", "#7fb69e"


# Text.


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


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


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
    return table(["", *speed, *middle], rows)


def ratio_table(runs: list[dict]) -> str:
    head = ["shared prompts against", "step", "policy part", "reference pass", "FLOP-ideal, no padding",
            "FLOP-ideal, as padded"]  # fmt: skip
    groups, rows = by_variant(runs), []
    for name in groups:
        if name == "shared":
            continue
        rows.append([NAMES[name], *(spread(ratios(runs, name, part)) for part in ("seconds", "policy", "reference"))])
        for padding in (False, True):
            rows[-1].append(spread(ideals(runs, name, padding=padding)))
    return table(head, rows)


def memory_text(runs: list[dict]) -> str:
    """Peak memory of `shared` against padded rows with all logits."""
    groups = by_variant(runs)
    if "rows_full_logits" not in groups or "shared" not in groups:
        return ""
    ours, theirs = groups["shared"], groups["rows_full_logits"]
    peaks = median(r["peak"] for r in ours) / median(r["peak"] for r in theirs)
    added = median(r["peak"] - r["before"] for r in ours) / median(r["peak"] - r["before"] for r in theirs)
    return (
        f"Memory of shared prompts against padded rows with all logits: {peaks:.2f} of the peak, {added:.2f} of what "
        "training adds.\n"
    )


def growth_table(runs: list[dict]) -> str:
    groups, rows = by_variant(runs), []
    if len(groups) < 2:
        return ""
    both = zip(growth_points(runs, "shared"), growth_points(runs, "rows"), groups["rows"][0]["lengths"], strict=True)
    for i, ((k, prompt, ours), (_, _, theirs), group) in enumerate(both):
        found = [r["steps"][i]["seconds"] / s["steps"][i]["seconds"]
                 for r, s in zip(groups["rows"], groups["shared"], strict=False)]  # fmt: skip
        shape = groups["rows"][0]["shape"]
        ideal = sum(sequence_flops(shape, *s) for s in sequences("rows", group, 0)) / shared_flops(shape, group)
        rows.append([str(k), str(prompt), str(group[1][0]), number(ours, 3), number(theirs, 3), spread(found),
                     number(ideal, 3)])  # fmt: skip
    return table(["K", "prompt tokens", "response tokens", "shared, s", "padded rows, s", "ratio", "FLOP-ideal"], rows)


def check_text(run: dict) -> str:
    ours, rounding = run["shared"], run["one by one"]
    verdict = "agree" if ours["logps"] <= run["limit"] else "**DISAGREE**"
    return (
        f"\nShared prompts and padded rows {verdict} ({run['dtype']}, {run['tokens']} response tokens): mean "
        f"difference of log-probabilities {ours['logps']:.2g} per token, relative difference of gradients "
        f"{ours['gradients']:.2g}. The two use different attention kernels, which round differently; padded rows with "
        f"one response per forward use the same one and differ by {rounding['logps']:.2g} and "
        f"{rounding['gradients']:.2g}. That both layouts are equally near to float64 is a test "
        "(tests/test_forward.py).\n"
    )


# The page.

INTRO = """# Benchmarks

Written by `make benchmark` from the JSON that it measured; do not edit by hand.

One optimizer step with the reference in the loop, through the real `Trainer.train()` on each side, in a process of its
own, on the same prompts, the same responses (token by token) and the same starting weights. A step of the same rows
warms up first (TRL: one micro-batch of them, the largest) and is not timed. Every number is the median over the turns;
times, speeds and ratios show the smallest and the largest in brackets unless they were measured once. Each turn has
other prompts, and a ratio is taken within a turn, where the variants ran one after another on the same prompts: the
range is that of the data and of the machine. What was measured once has the prompts of the first turn:
compare it through its ratio.
"""
ROWS = """
What the rows mean:

* **PolyPO, shared prompts**: SWEPO, `layout: shared`. Every prompt goes through the model once, K responses follow.
* **PolyPO, padded rows**: SWEPO, `layout: rows`. One padded row per response.
* **padded rows with all logits**: the same rows, the model's own logits and a softmax over every position, as plain
  implementations do.
* **TRL, best against each other**: `DPOTrainer` on K-1 pairs per prompt, the best response against each other one.
* **TRL, all pairs**: `DPOTrainer` on the K(K-1)/2 pairs of the same K responses. TRL's collator is given the same
  token ids; a micro-batch holds the pairs of {micro}, and gradients are accumulated over the prompts of the step.
  Weights are in {dtype} as in PolyPO, {checkpointing}.
* **its defaults**: float32 weights, bf16 autocast, gradient checkpointing. Fewer turns, and not the same arithmetic.

What the columns mean:

* *response tokens*: those of the K responses, counted once however often they are fed.
* *reference*: the forward of the reference inside the step; *policy part* is the rest of the step.
* *outside the model*: the part of a step that is neither forward, backward nor optimizer (for the rows with all logits
  the softmax is in it).
* *peak*: {peak}; *of it training*: what is above the state before the first
  step, that is gradients, optimizer, activations and logits.
* *FLOP-ideal*: ratio of the operations of a forward, with the LM head on response tokens only. *No padding* counts
  real tokens: what is left is sharing, and for TRL the responses that are fed several times. *As padded* counts every
  micro-batch padded to its longest row, as it is fed.{mfu}
"""
MFU = """
* *TFLOP/s*, *MFU*: operations per second that the step needs (reference, forward, backward; padding and recomputation
  not counted), and their share of the dense bf16 peak of the GPU where that is known.
"""
CPU_NOTES = """
Honest notes:

* TRL computes its LM head with kernels made for GPUs, which are slow on CPUs: **a ratio to TRL on a GPU will be
  smaller**. The ratio to PolyPO's own padded rows does not depend on that. Never quote one for the other.
* The losses differ (SWEPO sees K responses at once, DPO sees pairs); what is equal is the data of a step. Speed says
  nothing about which loss trains the better model.
* A ratio above *FLOP-ideal, as padded* comes from other causes than the number of operations.
* Responses of one prompt differ in length, so that a part of the gain over padded rows is padding saved, not sharing.
"""
NO_GPU = "\n## GPU\n\n**Not measured yet.** No GPU was at hand. One call measures everything on a machine with one:\n\
`python benchmarks/run.py --preset gpu-7b`.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder for benchmarks.md and its pictures")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    results = sorted((json.loads(path.read_text()) for path in args.results), key=lambda r: r["preset"])
    for result in results:
        draw(result, args.output / picture(result))
    (args.output / "benchmarks.md").write_text(page(results))
    print(f"{args.output / 'benchmarks.md'} is written.")


def page(results: list[dict]) -> str:
    """docs/benchmarks.md."""
    text = INTRO + "".join(section(result) for result in results)
    return text if any(result["preset"] != "cpu" for result in results) else text + NO_GPU


def picture(result: dict) -> str:
    return f"benchmarks-{result['preset']}.svg"


def settings(result: dict) -> dict[str, list[dict]]:
    """The runs of each setting, in the order they were first measured."""
    names = dict.fromkeys(run["setting"] for run in result["runs"])
    return {name: [run for run in result["runs"] if run["setting"] == name] for name in names}


def section(result: dict) -> str:
    """Everything about one machine."""
    machine, runs = result["machine"], settings(result)
    growth = runs.pop("growth", [])
    gpu = machine["gpu"] if result["preset"] != "cpu" else None
    title = f"GPU: {gpu}" if gpu else "CPU"
    parts = [f"\n## {title}\n\n![speed and growth]({picture(result)})\n\n{conditions(result)}"]
    for name, group in runs.items():
        timed = [run for run in group if run["variant"] != "check"]
        parts.append(f"\n### {'On real rows' if name == 'main' else name}\n\n{lengths_text(timed)}\n\n")
        parts.append(speed_table(timed, gpu) + "\n" + ratio_table(timed) + "\n" + reached_text(timed))
        parts.append(memory_text(timed))
        parts += [check_text(run) for run in group if run["variant"] == "check" and "error" not in run]
        parts += [f"Failed: {run['variant']}, {run['error']}.\n" for run in group if "error" in run]
    if growth:
        parts.append("\n### Growth with the number of responses and with the prompt\n\n" + growth_table(growth))
    first = next(iter(runs.values()), growth)[0]
    micro = "one prompt" if first["micro_trl"] == 1 else f"{first['micro_trl']} prompts"
    same = (
        "gradient checkpointing as there"
        if gpu
        else "gradient checkpointing off on both sides unless the heading says so"
    )
    peak = "`torch.cuda.max_memory_allocated`" if gpu else "the largest resident set of the process with its libraries"
    parts.append(
        ROWS.format(micro=micro, dtype=first["dtype"], checkpointing=same, peak=peak, mfu=MFU.rstrip() if gpu else "")
    )
    if not gpu:
        parts.append(CPU_NOTES)
    if result["left_out"]:
        parts.append("\nLeft out for lack of time: " + "; ".join(result["left_out"]) + ".\n")
    return "".join(parts)


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
    return table(["", ""], rows)


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


def reached_text(runs: list[dict]) -> str:
    if not {"shared", "rows"} <= set(by_variant(runs)):
        return ""
    bare, padded = (spread((100 * x for x in share_reached(runs, padding=p)), 2) for p in (False, True))
    return (
        "Share of the gain over padded rows that the operations allow (ideal - 1) which was reached: "
        f"{padded} % as padded, {bare} % of sharing alone.\n\n"
    )


def draw(result: dict, path: Path) -> None:
    """Bars of relative time with their range, and the growth curves."""
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "polypo", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    runs = settings(result)
    growth = runs.pop("growth", [])
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), width_ratios=[1.5, 1, 1], layout="constrained")
    name, group = next(iter(runs.items()), ("", []))
    bars(axes[0], group, "" if name == "main" else name)
    curves(axes[1], growth, "K", 0)
    curves(axes[2], growth, "prompt tokens", 1)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def bars(axis, runs: list[dict], title: str) -> None:
    found = {name: ratios(runs, name, "seconds") for name in by_variant(runs)}
    found = {name: values for name, values in found.items() if values}
    middles = [median(values) for values in found.values()]
    below = [m - min(v) for m, v in zip(middles, found.values(), strict=True)]
    above = [max(v) - m for m, v in zip(middles, found.values(), strict=True)]
    colors = [GREEN if name == "shared" else PALE if name.startswith("rows") else "#c0c0c0" for name in found]
    axis.barh([NAMES[name] for name in found], middles, color=colors)
    axis.errorbar(middles, range(len(found)), xerr=[below, above], fmt="none", color="black", capsize=3, lw=1)
    for i, (middle, high) in enumerate(zip(middles, above, strict=True)):
        axis.annotate(number(middle, 3), (middle + high, i), (4, 0), textcoords="offset points", va="center")
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set(title=title, xlabel="time of a step, shared prompts = 1")


def curves(axis, runs: list[dict], label: str, column: int) -> None:
    for variant, color in (("shared", GREEN), ("rows", PALE)):
        points = growth_points(runs, variant)
        points = points[len(points) - 5 :] if column else points[:4]
        axis.plot([p[column] for p in points], [p[2] for p in points], "o-", color=color, label=NAMES[variant])
    axis.set(xlabel=label, ylabel="s per step", ylim=(0, None))
    axis.legend(frameon=False)


if __name__ == "__main__":
    main()
