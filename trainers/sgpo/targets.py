"""The improver's data: current responses, what a reviser makes of them, hygiene and the IQR filter."""

import math

import numpy as np

from ..runs.settings import digest, model_fingerprint
from . import filters
from .config import SGPOConfig, find_function
from .data import count_drops
from .edits import edit_metrics
from .improver import length_faults
from .records import count_samples, rewrite_metrics, sample_columns
from .revisers import collect_revisions
from .run import DROPPED, ROWS, Run, Stage, Step
from .text import free_marker, parse_revision, reviser_prompt, reviser_template, template_hash, turns


def _needs_current(run: Run, index: int) -> dict:
    return run.inputs(index, "start") | run.sampled("sampling") | {"improver prompts": digest(run.rows)}


def _current(run: Run, stage: Stage, index: int) -> dict:
    prompts, options = [row["prompt"] for row in run.rows], run.args.sampling_options()
    drawn = run.sampler.draw(
        stage.folder / "samples", run.start(index), prompts, options, index, settings_hash=stage.key
    )
    run.write(
        stage.folder / ROWS, [row | sample_columns("current", s) for row, s in zip(run.rows, drawn, strict=True)]
    )
    return count_samples(drawn)


def _needs_targets(run: Run, index: int) -> dict:
    args = run.args
    return run.inputs(index, "start", "current") | run.sampled("revision") | {
        "reviser": args.reviser,
        "reviser_model": args.reviser_model,
        "reviser files": model_fingerprint(args.reviser_model) if args.reviser_model else None,
        "reviser_function": args.reviser_function,
        "template": template_hash(reviser_template(analysis=args.reviser_analysis)),
    }  # fmt: skip


def _targets(run: Run, stage: Stage, index: int) -> dict:
    rows = run.read("current", index)
    # A draft that cannot be used is kept in the rows, so that the filter counts it with its reason.
    at = [i for i, row in enumerate(rows) if _draft_fault(row) is None]
    usable = [rows[i] for i in at]
    made = iter(_revise(run, stage, usable, index))
    targets = {i: next(made) for i in at}
    rows = [row | targets.get(i, sample_columns("target", None)) for i, row in enumerate(rows)]
    run.write(stage.folder / ROWS, rows)
    revised = [row for row in rows if row["target"] and row["target"].strip()]
    counts = {"drafts": len(rows), "usable_drafts": len(usable), "revised": len(revised)}
    nearer = [_nearer_to_reference(row) for row in revised]
    return counts | rewrite_metrics(revised, "current", "target") | (
        {"closer_to_reference": float(np.mean(nearer))} if nearer else {}
    )  # fmt: skip


def _revise(run: Run, stage: Stage, rows: list[dict], index: int) -> list[dict]:
    args, columns = run.args, [[row[name] for row in rows] for name in ("prompt", "current", "reference")]
    if args.reviser == "external":
        function = find_function("reviser_function", args.reviser_function)
        texts = collect_revisions(stage.folder / "revisions", function, *columns, run.processes)
        return [{"target": text, "target_truncated": False} for text in texts]
    prompts = [reviser_prompt(*parts, analysis=args.reviser_analysis) for parts in zip(*columns, strict=True)]
    drawn = run.sampler.draw(
        stage.folder / "samples", run.start(index), prompts, args.revision_options(), index,
        settings_hash=stage.key, model=args.reviser_model,
    )  # fmt: skip
    targets = [sample_columns("target", sample) for sample in drawn]
    for row, target in zip(rows, targets, strict=True):
        if target["target"] is not None:
            target["target"] = parse_revision(target["target"], _marker(row) if args.reviser_analysis else None)
    return targets


def _marker(row: dict) -> str:
    return free_marker([*(turn["content"] for turn in turns(row["prompt"])), row["current"], row["reference"]])


def _nearer_to_reference(row: dict) -> bool:
    to_reference, to_draft = (edit_metrics(row[name], row["target"]).ratio for name in ("reference", "current"))
    return to_reference < to_draft


def _needs_filter(run: Run, index: int) -> dict:
    names = ("filter_statistic", "filter_factor", "filter_side", "reference_in_input", "max_length")
    return run.inputs(index, "start", "targets") | run.loaded() | {name: getattr(run.args, name) for name in names} | {
        "sampling.dtype": run.args.sampling["dtype"],  # which the statistic is computed in
        "improver.max_length": run.args.improver["max_length"],
        "policy guard": run.args.policy_weight > 0,
        "template": run.template(),
        "hygiene": filters.VERSION,
    }  # fmt: skip


def _filter(run: Run, stage: Stage, index: int) -> dict:
    args, rows = run.args, run.read("targets", index)
    reasons = [_draft_fault(row) or _target_fault(row, args) for row in rows]
    _mark_long(run, rows, reasons)
    at = [i for i, reason in enumerate(reasons) if reason is None]
    values = _statistic(run, stage, [rows[i] for i in at], index)
    counts = {}
    if values:
        fences = filters.iqr_fences(values, args.filter_factor, args.filter_side)
        kept = filters.iqr_keep(values, args.filter_factor, args.filter_side)
        for i, value, keep in zip(at, values, kept, strict=True):
            rows[i] = rows[i] | {"statistic": value if math.isfinite(value) else None}
            if not keep:
                reasons[i] = filters.OUTLIER if math.isfinite(value) else filters.NOT_FINITE
        counts = {"fences": {k: None if v in (-math.inf, math.inf) else v for k, v in fences._asdict().items()}}
    run.write_kept(stage.folder, rows, reasons)
    return count_drops(reasons) | counts


def _draft_fault(row: dict) -> str | None:
    if row["current"] is None:
        return f"draft: {filters.TOO_LONG}"
    reason = filters.fault(row["current"], truncated=row["current_truncated"])
    return reason and f"draft: {reason}"


def _target_fault(row: dict, args: SGPOConfig) -> str | None:
    if row["target"] is None:
        return f"target: {_missing(row, args)}"
    reason = filters.fault(row["target"], truncated=row["target_truncated"], before=row["current"])
    return reason and f"target: {reason}"


def _missing(row: dict, args: SGPOConfig) -> str:
    """Why there is no target for a draft that can be used."""
    if args.reviser == "external":
        return filters.NONE
    if not row["target_tokens"]:  # nothing was sampled
        return filters.TOO_LONG
    if row["target_truncated"]:  # amid its analysis
        return filters.TRUNCATED
    return filters.UNPARSABLE if args.reviser_analysis else filters.EMPTY


def _mark_long(run: Run, rows: list[dict], reasons: list[str | None]) -> None:
    """What does not fit: m(x, y) with the target, x with the target, and x with y^s where that is trained on."""
    args, at = run.args, [i for i, reason in enumerate(reasons) if reason is None]
    budgets = [
        ([(run.ask_improver(rows[i], "current"), rows[i]["target"]) for i in at], args.improver["max_length"]),
        ([(rows[i]["prompt"], rows[i]["target"]) for i in at], args.max_length),
    ]
    if args.policy_weight:
        budgets.append(([(rows[i]["prompt"], rows[i]["reference"]) for i in at], args.improver["max_length"]))
    for examples, limit in budgets:
        for i, reason in zip(at, length_faults(examples, run.tokenizer, limit), strict=True):
            reasons[i] = reasons[i] or reason


def _statistic(run: Run, stage: Stage, rows: list[dict], index: int) -> list[float]:
    name = run.args.filter_statistic
    if name == "none" or not rows:
        return []
    texts = [(row["current"], row["target"]) for row in rows]
    if name == "edit_ratio":
        return filters.filter_statistic(name, [], [], texts)
    logps = run.sampler.logps(stage.folder, run.start(index), run.tokenizer, rows, ("current", "target"))
    return filters.filter_statistic(name, [pair[1] for pair in logps], [pair[0] for pair in logps])


CURRENT = Step(_needs_current, _current, (ROWS,))
TARGETS = Step(_needs_targets, _targets, (ROWS,))
FILTER = Step(_needs_filter, _filter, (ROWS, DROPPED))
