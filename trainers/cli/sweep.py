"""Trains once with every combination of the values of some options, and names the best run.

    polypo sweep --config dpo/demo.yaml --sweep sweep.yaml [--any_field value]

All options are those of `polypo train`, and one of its runs is made for each combination. What follows stands in the
YAML file that --sweep names, or are flags. Every run has a folder in output_dir; the same command again leaves those
that are finished, goes on with one that was killed, and makes what was added.
"""

import itertools
import json
import math
import random
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from trl import get_peft_config, get_quantization_config

from polypo import recipes

from ..config import JSON, check_options, option
from ..data.files import data_fingerprint
from ..data.json_rows import digest
from ..generation.options import read_mapping
from ..measuring import UnknownMetric, metric_wanted
from ..pages.text import markdown
from ..runs.files import read_json, write_atomic, write_json
from ..runs.processes import Processes, free_memory
from ..runs.settings import policy_settings, run_settings
from ..runs.stage import MANIFEST, Stage
from . import config_files, train

SET_HERE = ("config", "output_dir", "resume_from_checkpoint")
NOT_OF_RESULT = ("dry_run", "probe", "accelerate_config")  # fields of `DataArguments`
LONGEST = 200  # bytes of a folder's name; file systems take 255


@dataclass
class SweepArguments:
    """Which runs are made, and which of them is the best."""

    values: JSON = option(MISSING, "Option -> list of its values, such as {beta: [0.05, 0.1]}.")
    draws: int | None = option(None, "Make only so many combinations, drawn at random; more add to them.", at_least=1)
    metric: str = option(
        "eval_ranking/pairwise_accuracy", "Of the evaluation at the end of a run: what the best is best in."
    )
    direction: str | None = option(
        None, "By default minimize for a metric that ends with loss, else maximize.", choices=["maximize", "minimize"]
    )

    def __post_init__(self):
        check_options(self)
        self.values = read_mapping("values", self.values)
        for name, values in self.values.items():
            if name in SET_HERE:
                raise ValueError(f"values: {name} is set by the sweep, leave it out.")
            if not isinstance(values, list) or not values:
                raise ValueError(f"values: {name} is {values!r}, give a list of values.")
        if not self.values:
            raise ValueError("values is empty: name an option and the values to try.")
        self.metric = "eval_" + self.metric.removeprefix("eval_")
        self.direction = self.direction or ("minimize" if self.metric.endswith("loss") else "maximize")

    def combinations(self) -> list[dict[str, Any]]:
        """The values of each run, by option."""
        assert isinstance(self.values, dict)
        made = [dict(zip(self.values, values, strict=True)) for values in itertools.product(*self.values.values())]
        if self.draws is None:
            return made
        random.Random(0).shuffle(made)  # so that more draws keep those that were made
        return made[: self.draws]


class Run(NamedTuple):
    """One combination, and the flags and the recipe of its training."""

    values: dict[str, Any]
    stage: Stage
    flags: list[str]
    recipe: dict[str, Any]


def main(argv: list[str]) -> None:
    own, rest = recipes.take(argv, "sweep")
    recipe = recipes.read_recipe([own.sweep] if own.sweep else [])
    arguments, rest = config_files.first(SweepArguments, rest, recipe)
    sweep(arguments, rest)


def sweep(arguments: SweepArguments, argv: list[str]) -> dict:
    """Makes the runs that are missing and returns what is written to sweep.json.

    Args:
        argv: the command line of `polypo train` that they have in common.

    Raises:
        ValueError: an option that cannot be used, a finished run of other settings, a metric that no run has, or no
            run that was trained to its end.
    """
    runs, folder = plan(arguments, argv)
    processes, tried = Processes(), []
    for number, run in enumerate(runs, 1):
        done = run.stage.done()
        processes.say(f"\n[{number}/{len(runs)}] {run.stage.folder.name}{': done already' if done else ''}")
        tried.append(_result(run, arguments.metric, None if done else measure(run, arguments.metric)))
    sign = -1 if arguments.direction == "maximize" else 1
    tried.sort(key=lambda run: math.inf if run["value"] is None else sign * run["value"])
    if tried[0]["value"] is None:
        raise ValueError(f"no run of {folder} was trained to its end: {tried[0]['error']}")
    report = {
        "metric": arguments.metric, "direction": arguments.direction, "best": tried[0]["folder"], "runs": tried,
    }  # fmt: skip
    processes.main(lambda: _write(folder, report))
    return report


def plan(arguments: SweepArguments, argv: list[str]) -> tuple[list[Run], Path]:
    """All runs and the folder of their folders; a wrong value of any ends it here."""
    output, rest = recipes.take(argv, "output_dir")
    flags, recipe = recipes.split_recipe(rest)
    folder = Path(output.output_dir or recipe.get("output_dir") or "runs/sweep")
    for name in arguments.values:
        if recipes.chosen(name, flags, {}) is not None:
            raise ValueError(f"{name} is a flag, which would win over its values in the sweep: leave one out.")
    runs: dict[str, Run] = {}
    names: dict[str, str] = {}  # of folders, by the values as they are read
    fingerprint = cache(data_fingerprint)
    for values in arguments.combinations():
        name = _folder(values)
        if name in runs:
            raise ValueError(f"values: two combinations give the same folder {name}: leave one out.")
        # Numbers and truth values as a recipe gives them to an option, which then reads its own kind only.
        texts = {option: json.dumps(v) if isinstance(v, bool | int | float) else v for option, v in values.items()}
        own = {"run_name": name} | recipe | texts | {"output_dir": str(folder / name), "resume_from_checkpoint": True}
        parts = train.read(flags, own)
        read = str([value for part in parts[1:] for option, value in vars(part).items() if option in values])
        if (other := names.setdefault(read, name)) != name:
            raise ValueError(f"values: {other} and {name} are the same run: leave one out.")
        stage = Stage(folder / name, _settings(*parts, fingerprint))
        runs[name] = Run(values, stage, flags, own)
    for run in runs.values():
        run.stage.done()  # other settings of any run end it here
    return [*runs.values()], folder


def _settings(trainer, data, args, model, fingerprint: Callable[[str], str | None]) -> dict:
    """What a run depends on, its rows by their files. Raises ValueError for one that gives nothing to compare."""
    if data.dry_run or data.probe:
        raise ValueError("a sweep has no dry_run and no probe: ask polypo train, with one of its combinations.")
    if not trainer.single_training or args.self_enhance is not None:
        raise ValueError(
            f"A sweep compares single trainings: {trainer.method} in stages or rounds is none, start it by itself."
        )
    if not any(data.each("dataset_test_split")):
        raise ValueError("A sweep needs held-out rows: set dataset_test_split.")
    recipes.refuse_missing(model_name_or_path=model.model_name_or_path, dataset_name=data.dataset_name)
    of_data = {name: value for name, value in asdict(data).items() if name not in NOT_OF_RESULT}
    of_data["data files"] = digest([fingerprint(recipes.shipped(name)) for name in data.names])
    start = policy_settings(model.model_name_or_path, get_quantization_config(model), args.model_init_kwargs)
    return run_settings(args, adapter=get_peft_config(model), **of_data, **start)


def measure(run: Run, metric: str) -> str | None:
    """Trains, and finishes the stage with the evaluation; returns what went wrong, else None.

    A loss that is not finite is a result, which would come again. After any other error the next start tries again. In
    several processes an error ends the sweep, as it need not be in all of them.

    Raises:
        UnknownMetric: the evaluation would lack `metric`.
    """
    folder, error = run.stage.open(), None
    added = run.values | {"output_dir": str(folder)}  # with the recipe, the run as polypo train makes it
    run.stage.processes.main(lambda: (folder / "values.yaml").write_text(yaml.safe_dump(added, sort_keys=False)))
    try:
        with metric_wanted(metric):
            train.train(run.flags, run.recipe)
    except UnknownMetric:
        raise
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
        if isinstance(raised, FloatingPointError):
            write_json(folder / MANIFEST, {"hash": run.stage.key, "error": error})
        if run.stage.processes.num_processes > 1:
            raise
        traceback.print_exc()
    free_memory()  # outside of the block, whose error refers to the trainer
    if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
        wandb.finish()  # or the next training would log into this one's; other trackers end with theirs
    if error is None:
        run.stage.processes.wait_for_everyone()  # the first one writes what all read
        run.stage.finish(metrics=read_json(folder / "eval_results.json"))
    return error


def _result(run: Run, metric: str, error: str | None) -> dict:
    """What is told of a run; its value is None where there is none to compare."""
    manifest: dict[str, Any] = run.stage.manifest() if run.stage.done() else {"error": error}
    error, metrics, value = manifest.get("error"), manifest.get("metrics"), None
    if metrics is not None:
        UnknownMetric.refuse("metric", metric, metrics)
        value = metrics[metric] if math.isfinite(metrics[metric]) else None
        error = None if value is not None else f"{metric} is not finite"
    return {"folder": str(run.stage.folder), "values": run.values, "value": value, "error": error, "metrics": metrics}


def _folder(values: dict[str, Any]) -> str:
    """The name of a run's folder; the end of a long one is a hash."""
    name = "_".join(f"{option}-{_slug(value)}" for option, value in values.items())
    cut = name.encode()[:LONGEST].decode(errors="ignore")
    return name if cut == name else f"{cut}-{digest(values)[:8]}"


def _slug(value) -> str:
    slug = re.sub(r"[^\w.+-]+", "-", value if isinstance(value, str) else json.dumps(value))
    return slug if isinstance(value, int | float) else slug.strip("-")  # -1 is another value than 1


def _write(folder: Path, report: dict) -> None:
    runs, best = report["runs"], report["runs"][0]
    rows = [
        [*(str(value) for value in run["values"].values()),
         run["error"].splitlines()[0][:80] if run["error"] else f"{run['value']:.4f}"] for run in runs
    ]  # fmt: skip
    table = markdown([*best["values"], report["metric"]], rows)
    write_json(folder / "sweep.json", report)
    write_atomic(folder / "sweep.md", table.encode())
    trained = " ".join(run["folder"] for run in runs if run["value"] is not None)
    tied = sum(run["value"] == best["value"] for run in runs)
    also = f"; {tied} runs tie, of which it is the first" if tied > 1 else ""
    print(f"\n{table}\nbest: {best['folder']} ({report['metric']} {best['value']:.4f}{also})\npolypo report {trained}")
