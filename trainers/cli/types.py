"""How many types? Held-out annotators under mixtures of 1 to --max_types types, in one command:

polypo types --config configs/emdpo/demo.yaml --max_types 4 --held_out 0.25 [--any_field value]

A share of the annotators is held out with all their rows. Every number of types is one EM run in output_dir/types-T,
which goes on where a killed one stopped. Writes choose_types.json, table.md and plot.svg into output_dir.
"""

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from polypo import recipes

from .. import EMDPOTrainer
from ..config import check_options, option
from ..emdpo.mixture import annotator_log_likelihood
from ..pages.plots import Series, chart
from ..pages.text import interval, markdown
from ..runs.files import write_atomic, write_json
from ..statistics import FEWEST, about_intervals, bootstrap_interval
from . import config_files
from .arguments import DataArguments, ModelArguments, set_model_options
from .train import find_trainer


@dataclass
class TypesArguments:
    """What is tried; all options of `polypo train` with `--trainer EMDPOTrainer` apply as well."""

    max_types: int = option(4, "Try 1 to so many types.", at_least=1)
    held_out: float = option(0.25, "Share of the annotators who are held out.", above=0, below=1)

    def __post_init__(self):
        check_options(self)


def main(argv: list[str]) -> dict:
    flags, recipe = recipes.split_recipe(argv)
    trainer_class = find_trainer(recipes.chosen("trainer", flags, recipe, EMDPOTrainer.__name__))
    if trainer_class is not EMDPOTrainer:
        raise ValueError(f"polypo types looks for the types of EMDPOTrainer, not of {trainer_class.__name__}.")
    classes: list[type] = [TypesArguments, DataArguments, EMDPOTrainer.config_class, ModelArguments]
    options, data, args, model = config_files.parse(classes, flags, recipe)
    set_model_options(args, model)
    if data.dry_run or data.probe:
        raise ValueError("polypo types has no dry_run and no probe: ask polypo train, with --num_types.")
    if data.streaming:
        raise ValueError("streaming: annotators are held out of all rows, which are read before: leave it out.")
    rows = data.load(args, "train")
    held_out = held_out_annotators(rows["annotator"], options.held_out, args.seed)
    inside = np.array([name in held_out for name in rows["annotator"]])
    splits = {"train": rows.select(np.flatnonzero(~inside)), "test": rows.select(np.flatnonzero(inside))}
    folder = Path(args.output_dir)
    results: list[dict] = []
    for types in range(1, options.max_types + 1):
        own_args = copy.copy(args)
        own_args.num_types, own_args.output_dir = types, str(folder / f"types-{types}")
        trainer = EMDPOTrainer.run(own_args, splits, model.model_name_or_path, **model.of_trainer)
        assert isinstance(trainer, EMDPOTrainer)
        trainer.manifest["held_out"]["coin"] = coin(trainer)
        trainer.processes.main(partial(write_json, Path(own_args.output_dir) / "result.json", trainer.manifest))
        results.append(trainer.manifest)
    report = summarize(results)
    if args.process_index == 0:
        write_json(folder / "choose_types.json", report)
        write_atomic(folder / "table.md", table(report).encode())
        write_atomic(folder / "plot.svg", plot(report).encode())
        print(table(report))
    return report


def coin(trainer: EMDPOTrainer) -> dict:
    """Log-likelihood of each held-out annotator's rows if all rankings were equally likely: {name: nats}."""
    judged = trainer.held_out
    assert judged is not None and judged.reference is not None
    logps = judged.log_likelihood(judged.reference, beta=trainer.args.beta, top=trainer.args.top_q)
    total = annotator_log_likelihood(logps[:, None], judged.owner, len(judged.annotators))[:, 0]
    return dict(zip(map(str, judged.annotators.names), total.tolist(), strict=True))


def held_out_annotators(column: list, share: float, seed: int) -> set:
    """At least one annotator is held out and two stay."""
    names = sorted(set(column), key=str)
    if len(names) < 3:
        raise ValueError(f"{len(names)} annotators are too few to hold one out: 3 are the least.")
    count = min(max(1, round(share * len(names))), len(names) - 2)
    return {names[i] for i in np.random.default_rng((seed, 2)).permutation(len(names))[:count]}


def summarize(results: list[dict]) -> dict:
    """Log-likelihood per held-out annotator of each number of types and of a coin, and the paired gains.

    `results` are the last manifests of 1, 2, ... types with the "coin" of their held-out annotators.
    """
    names = list(results[0]["held_out"]["per_annotator"])
    values = np.array([[r["held_out"]["per_annotator"][n] for n in names] for r in results])
    chance = np.array([results[0]["held_out"]["coin"][n] for n in names])

    mean = partial(bootstrap_interval, fewest=FEWEST)
    return {
        "held_out_annotators": len(names),
        "coin_log_likelihood": float(chance.mean()),
        "held_out_items": results[0]["held_out"]["items"],
        "types": [
            {
                "num_types": t + 1,
                "train_log_likelihood_per_annotator": results[t]["log_likelihood_per_annotator"],
                "log_likelihood_per_item": results[t]["held_out"]["log_likelihood_per_item"],
                "log_likelihood": mean(values[t]),
                "gain_over_coin": mean(values[t] - chance),
                "gain_over_one_type": mean(values[t] - values[0]),
                "gain_over_one_less": mean(values[t] - values[max(t - 1, 0)]),
                "shares": results[t]["prior"],
            }
            for t in range(len(results))
        ],
        "best": int(values.mean(1).argmax()) + 1,
    }


def table(report: dict) -> str:
    """Markdown: each number of types beside a coin, with intervals and gains, and what they are."""
    head = ["types", "held-out log-likelihood per annotator", "per item", "gain over a coin",
            "gain over one type less", "shares of the types"]  # fmt: skip
    rows = [["*a coin*", f"{report['coin_log_likelihood']:.3f}", "", "", "", ""]]
    for row in report["types"]:
        gain = interval(row["gain_over_one_less"], "+.3f") if row["num_types"] > 1 else ""
        rows.append([str(row["num_types"]), interval(row["log_likelihood"]), f"{row['log_likelihood_per_item']:.4f}",
                     interval(row["gain_over_coin"], "+.3f"), gain,
                     ", ".join(f"{share:.2f}" for share in row["shares"])])  # fmt: skip
    lines = [
        markdown(head, rows),
        f"{report['held_out_annotators']} held-out annotators with {report['held_out_items']} rows; in nats, 95 % "
        "bootstrap intervals over them, gains paired. A gain whose interval holds 0 is no reason for another type. To "
        "a coin all rankings are equally likely.",
    ]
    if note := about_intervals(report["held_out_annotators"], "held-out annotators"):
        lines.append(note)
    if all(row["gain_over_coin"]["mean"] <= 0 for row in report["types"]):
        lines.append(
            "No number of types says more about new annotators than a coin: these gains are no reason for any of "
            "them. Train on more rows, or with other settings."
        )
    return "\n".join(lines) + "\n"


def plot(report: dict) -> str:
    """Gain over one type with its interval, which the spread between annotators does not hide."""
    types = [row["num_types"] for row in report["types"]]
    gains = [row["gain_over_one_type"] for row in report["types"]]
    level = (-report["types"][0]["gain_over_coin"]["mean"], "a coin")
    return chart("", "types", [Series("mixture", types, gains)], level=level, xticks=types,
                 ylabel="held-out log-likelihood per annotator,\ngain over one type, nats")  # fmt: skip
