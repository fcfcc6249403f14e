"""What a round did to held-out prompts: answers of each model in both modes, and what an outside scorer says."""

import numpy as np

from ..generation.collect import collect_scores, open_folder
from ..generation.scorer import load_scorer
from ..runs.files import read_rows
from ..runs.settings import digest
from ..statistics import bootstrap_interval
from .edits import distinct_n
from .pairs import rewrite
from .records import count_samples, rewrite_metrics, sample_columns
from .run import MODEL, ROWS, Run, Stage, Step

ROUND = 0  # of the random streams: the same for every model, so that answers can be compared prompt by prompt


def _needs_before(run: Run, index: int) -> dict:
    return run.inputs(index, "start") | run.sampled("sampling") | {"held-out rows": digest(run.held_out)}


def _before(run: Run, stage: Stage, index: int) -> dict:
    prompts, options = [row["prompt"] for row in run.held_out], run.args.sampling_options()
    folder, start = stage.folder / "samples", run.start(index)
    drawn = run.sampler.draw(folder, start, prompts, options, ROUND, settings_hash=stage.key)
    rows = [row | sample_columns("answer", sample) for row, sample in zip(run.held_out, drawn, strict=True)]
    run.write(stage.folder / ROWS, rows)
    answers = [row["answer"] for row in rows if row["answer"] is not None]
    return count_samples(drawn) | {"distinct_2": distinct_n(answers)}


def _needs(run: Run, index: int) -> dict:
    inputs = run.inputs(index, *(["before"] if run.held_out else []), "improver", "pairs", "dpo")
    return inputs | run.sampled("sampling", "revision") | {
        "held-out rows": digest(run.held_out), "scorer": run.args.scorer, "template": run.template(),
    }  # fmt: skip


def _measure(run: Run, stage: Stage, index: int) -> dict:
    metrics = _scores(run, stage, "pairs", run.read("pairs", index))
    if not run.held_out:
        return metrics
    before = read_rows(run.at("before", 0) / ROWS)
    policies = {"improver": run.improver(index), "policy": run.at("dpo", index) / MODEL}
    for name, model in policies.items():  # both modes of both
        rows = rewrite(run, stage, stage.folder / name, model, model, run.held_out, ROUND)
        run.write(stage.folder / f"{name}.jsonl.gz", rows)
        found = rewrite_metrics(rows, "rejected", "chosen")
        metrics |= {f"{name}_{key}": value for key, value in found.items()} | _scores(run, stage, name, rows)
        metrics |= _against(before, rows, name)
    return metrics


def _against(before: list[dict], rows: list[dict], name: str) -> dict:
    """Plain answers of a model against those of the model before all rounds."""
    pairs = [(b["answer"], r["rejected"]) for b, r in zip(before, rows, strict=True)]
    pairs = [pair for pair in pairs if None not in pair]
    if not pairs:
        return {}
    first, second = (distinct_n([pair[i] for pair in pairs]) for i in (0, 1))
    lengths = [len(b.split()) / max(1, len(a.split())) for a, b in pairs]
    return {f"{name}_distinct_2_fall": 1 - second / first, f"{name}_length_ratio": float(np.mean(lengths))}


def _scores(run: Run, stage: Stage, name: str, rows: list[dict]) -> dict:
    """Mean score of chosen minus rejected with its interval over prompts; empty without a scorer."""
    rows = [row for row in rows if row["chosen"] is not None]
    if run.args.scorer is None or not rows:
        return {}
    folder = stage.folder / f"{name}-scores"
    open_folder(folder, {"stage": stage.key}, run.processes)
    scores = collect_scores(
        folder, lambda: load_scorer(run.args.scorer, device=run.processes.device), [row["prompt"] for row in rows],
        [[row["chosen"], row["rejected"]] for row in rows],
        columns={"reference": [row["reference"] for row in rows]}, accelerator=run.processes,
    )  # fmt: skip
    found = bootstrap_interval([chosen - rejected for chosen, rejected in scores])
    wins = [float(chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in scores]
    return {
        f"{name}_scorer_gain": found["mean"],
        f"{name}_scorer_gain_interval": [found["low"], found["high"]],
        f"{name}_scorer_win_rate": float(np.mean(wins)),
    }


BEFORE = Step(_needs_before, _before, (ROWS,))
MEASURE = Step(_needs, _measure, ())
