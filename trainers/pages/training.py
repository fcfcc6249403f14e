"""What a page says of any training: curves, warning signs, data that was left out, settings; of several, compared."""

from collections.abc import Sequence
from itertools import product

from ..data.drops import sentences
from ..runs.record import Run
from . import plots
from .page import Sections, blocks
from .plots import COLOURS, Series
from .signs import Sign, evaluations, last_third, points, signs

SIDES = ("chosen", "rejected")
CURVES: tuple[tuple[str, tuple[str, ...], tuple[float, str] | None], ...] = (  # title, metrics, level
    ("Loss", ("loss",), None),
    ("Reward margin, best minus worst response", ("rewards/margins",), (0, "nothing learned")),
    ("Pairwise ranking accuracy", ("ranking/pairwise_accuracy",), (0.5, "chance")),
    ("Implicit rewards", ("rewards/chosen", "rewards/rejected"), None),
    ("Log-probability of a response, nats", ("logps/chosen", "logps/rejected"), None),
    ("Tokens of a response", ("length/chosen", "length/rejected"), None),
    ("Learning rate", ("learning_rate",), None),
    ("Gradient norm", ("grad_norm",), None),
)
SHOWN = [name for _, names, _ in CURVES for name in names]
OTHERS = ("rewards/accuracies", "ranking/ndcg", "ranking/kendall_tau", "prompts/without_signal")  # in the table alone
CARDS = {"loss": "Loss", "ranking/pairwise_accuracy": "Ranking accuracy", "rewards/margins": "Reward margin"}
TIMES = ("_runtime", "_per_second", "_preparation_time")  # ends of what an evaluation says of itself
POINTS = "Lines are training logs, points in their colour evaluations."
MARKS = ("o:", "s:", "^:", "D:")  # of several data sets to evaluate on
TITLES = {  # of pictures with chosen and rejected
    "mask_sparsity": "Exact zeros among the masks of response tokens, %",
    "mask_mean": "Mean mask value",
    "kl": "KL of a response, nats",
    "masked_kl": "Masked KL of a response, nats",
}
STARTS = ("trainer", "model", "start_adapter", "reference")  # of run.json
PLACES = ("output_dir", "run_name", "logging_dir")  # which tell two runs apart, and not what they do


def sections(runs: Sequence[Run], samples: Sequence[str] = ()) -> Sections:
    """The parts of a page on one training, or on several of them beside each other; `samples` are parts of it."""
    one = len(runs) == 1
    own = [name for name in metrics(runs) if name not in SHOWN and name not in OTHERS and not bookkeeping(name)]
    told = {run.name: signs(run.history) for run in runs}
    return {
        "": [*(about(run, named=not one) for run in runs), cards(runs[0]) if one else ""],
        "Warning signs": warnings(told),
        "Training": [POINTS if any(run.history for run in runs) else "", blocks.figures(curves(runs))],
        "What the method logs": [blocks.figures(own_curves(runs, own))],
        "Figures at the end": final(runs),
        "Samples on held-out prompts": [*samples],
        "Data that was left out": data(runs),
        "Settings": settings(runs),
    }


def about(run: Run, named: bool) -> str:
    """What was trained, and how far it got."""
    known, data = run.record, run.record.get("data", {}).get("dataset_name")
    model = known.get("model") or "a model without a path"
    start = f"{adapter} on {model}" if (adapter := known.get("start_adapter")) else model
    parts = [
        f"{known['method']} from {start}" if "method" in known else "",
        f"on {data if isinstance(data, str) else ' and '.join(data)}" if data else "",
        f"step {run.step} of {run.steps}" if run.steps else "",
        f"the log is that of {run.checkpoint}, the newest checkpoint" if run.checkpoint else "",
        "" if run.history else "nothing is logged yet: a log is written with every checkpoint (save_steps)",
    ]
    told = ", ".join(filter(None, parts))
    return f"{run.name}: {told}." if named and told else f"{told}." if told else ""


def cards(run: Run) -> str:
    """What counts most, as means over the last third of the logs, with the first third and the last evaluation."""
    rows = []
    for name, title in CARDS.items():
        values = points(run.history, name)[1]
        if len(values):
            held_out = {prefix: points(run.history, f"{prefix}_{name}")[1] for prefix in evaluations(run.history)}
            remarks = [f"in the first third {last_third(values[::-1]):.3g}"]
            remarks += [f"{prefix} {found[-1]:.3g}" for prefix, found in held_out.items() if len(found)]
            rows.append((f"{title}, last third", f"{last_third(values):.3g}", "; ".join(remarks)))
    return blocks.cards(rows) if rows else ""


# Warning signs.


def warnings(told: dict[str, list[Sign]]) -> list[str]:
    """A sentence for each sign that holds, and all rules with what was found in each run."""
    one, alarms, cells = len(told) == 1, [], []
    for of_runs in zip(*told.values(), strict=True):
        sign = of_runs[0]
        found = [of.found if one else f"{run}: {of.found}" for run, of in zip(told, of_runs, strict=True) if of.found]
        if found:
            alarms.append(blocks.alarm(" ".join([*found, sign.advice]), sign.name))
        cells.append([sign.name, *map(state, of_runs), sign.rule])
    rules = blocks.table(["Sign", *(["Here"] if one else told), "Rule"], cells, numbers=False)
    none = "None of the signs below holds in what is logged so far."
    return [*(alarms or [none]), blocks.details("All signs and their rules", rules)]


def state(sign: Sign) -> str:
    return "too few logs" if sign.found is None else "holds" if sign.found else "no"


# Curves.


def metrics(runs: Sequence[Run]) -> list[str]:
    """Names of what the steps of the trainings logged, in their order."""
    logs = [log for run in runs for log in run.history if "loss" in log]
    return list(dict.fromkeys(name for log in logs for name in log))


def bookkeeping(name: str) -> bool:
    return "/" not in name and not name.endswith("_loss")


def curves(runs: Sequence[Run]) -> list[str]:
    """The pictures that every training has; of several trainings each metric has one of its own."""
    drawn = []
    for title, names, level in CURVES:
        if len(runs) == 1 or len(names) == 1:
            drawn.append(curve(title, runs, names, level))
        else:
            drawn += [curve(f"{title}: {end(name)}", runs, (name,), level) for name in names]
    return drawn


def own_curves(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """A picture for each further metric; those of chosen and rejected share one."""
    groups: dict[str, list[str]] = {}
    for name in names:
        group = name.rpartition("/")[0] if len(runs) == 1 and name.endswith(SIDES) else name
        groups.setdefault(group, []).append(name)
    return [curve(TITLES.get(title, title), runs, group) for title, group in groups.items()]


def curve(title: str, runs: Sequence[Run], names: Sequence[str], level: tuple[float, str] | None = None) -> str:
    """Metrics of one run, or one metric of several, over the steps; points in its colour are evaluations."""
    series = []
    for number, (run, name) in enumerate(product(runs, names)):
        label = run.name if len(runs) > 1 else end(name) if len(names) > 1 else "training"
        colour = COLOURS[number % len(COLOURS)]
        series.append(line(run, name, label, "-", colour))
        for prefix, mark in zip(evaluations(run.history), MARKS, strict=False):
            told = "evaluation" if prefix == "eval" else prefix
            series.append(line(run, f"{prefix}_{name}", told if label == "training" else "", mark, colour))
    return plots.chart(title, "step", series, level=level)


def line(run: Run, name: str, label: str, style: str, colour: str) -> Series:
    steps, values = points(run.history, name)
    alone = len(steps) == 1 and style == "-"  # a line of one point would not be seen
    return Series(label, steps.tolist(), values.tolist(), "." if alone else style, colour)


def end(name: str) -> str:
    return name.rpartition("/")[2]


# Tables.


def final(runs: Sequence[Run]) -> list[str]:
    """The last values of all metrics, side by side; those that an evaluation alone has stand behind its others."""
    trained = [*SHOWN, *(name for name in metrics(runs) if name not in SHOWN and not bookkeeping(name))]
    prefixes = dict.fromkeys(f"{prefix}_" for run in runs for prefix in evaluations(run.history))
    logged = [name for run in runs for log in run.history if "loss" not in log for name in log]
    logged = [name for name in logged if not name.endswith(TIMES)]
    held_out = []
    for prefix in prefixes:
        held_out += [*(f"{prefix}{name}" for name in trained), *(name for name in logged if name.startswith(prefix))]
    rows = []
    for name in dict.fromkeys([*trained, *held_out]):
        values = [points(run.history, name)[1] for run in runs]
        shown = [f"{last_third(v) if name in trained else v[-1]:.4g}" if len(v) else "" for v in values]
        if any(shown):
            rows.append([name, *shown])
    if not rows:
        return []
    head = ["Metric", *(run.name if len(runs) > 1 else "Value" for run in runs)]
    about = (
        "Means over the last third of the training logs, and the last evaluation. docs/metrics.md says what each is."
    )
    table = blocks.table(head, rows)
    return [about, table if len(runs) > 1 else blocks.details("All metrics", table)]


def data(runs: Sequence[Run]) -> list[str]:
    """What each pass over the data left out or changed, by reason; once for runs in which it is the same."""
    parts: dict[str, list[str]] = {}
    for run in runs:
        parts.setdefault(left_out(run), []).append(run.name)
    told = len(parts) > 1
    return [part for text, names in parts.items() for part in (", ".join(names) + ":" if told else "", text)]


def left_out(run: Run) -> str:
    if "left_out" not in run.record:
        return "There is no run.json, which a run of this version writes: what was left out stands in the run's log."
    rows = []
    for one in run.record["left_out"]:
        counts = [str(one.get(name, "")) for name in ("rows_in", "rows_out")]
        rows.append([one["title"], *counts, one.get("told") or "; ".join(sentences(one)) or "nothing"])
    if not rows:
        return "Nothing was counted: the rows are a stream, which counts in the log."
    return blocks.table(["Pass over the data", "Rows in", "Kept", "Left out or changed"], rows, numbers=False)


def everything(run: Run) -> dict:
    """Settings of a run by name, with its start, its data and its adapter."""
    data = {name: value for name, value in run.record.get("data", {}).items() if value}
    adapter = {f"peft_config.{name}": value for name, value in (run.record.get("adapter") or {}).items() if value}
    own = {name: run.record[name] for name in STARTS if run.record.get(name)}
    return own | data | adapter | run.settings


def settings(runs: Sequence[Run]) -> list[str]:
    """What differs between runs; of what they have in common, what is not the default first, the rest folded up."""
    one, first = len(runs) == 1, runs[0]
    known = [everything(run) for run in runs]
    names = dict.fromkeys(name for of in known for name in of if one or name not in PLACES)
    values = {name: [str(of.get(name, "")) for of in known] for name in names}
    other = [[name, *of] for name, of in values.items() if len(set(of)) > 1]
    same = {name: of[0] for name, of in values.items() if len(set(of)) == 1}
    shown = {n: v for n, v in same.items() if n in first.record.get("changed", ()) or n not in first.settings}
    rest = {name: value for name, value in same.items() if name not in shown}
    alike = "" if one or not same else "No setting differs."
    title = "All other settings" if one else "What else all have in common"
    return [
        blocks.table(["Setting", *(run.name for run in runs)], other, numbers=False) if other else alike,
        blocks.settings(shown) if shown else "",
        blocks.details(title, blocks.settings(rest)) if rest else "",
    ]
