"""Pairs of the model's own: its response is rejected, what it makes of it in improver mode is chosen."""

from pathlib import Path

from ..runs.settings import digest
from . import filters
from .data import count_drops
from .improver import length_faults
from .records import rewrite_metrics, sample_columns
from .run import DROPPED, ROWS, Run, Stage, Step


def _needs(run: Run, index: int) -> dict:
    names = ("separate_improver", "reference_in_input", "max_length")
    return run.inputs(index, "start", "improver") | run.sampled("sampling", "revision") | {
        **{name: getattr(run.args, name) for name in names},
        "preference prompts": digest(run.prompts),
        "template": run.template(),
        "hygiene": filters.VERSION,
    }  # fmt: skip


def _pairs(run: Run, stage: Stage, index: int) -> dict:
    rows = rewrite(run, stage, stage.folder, run.policy(index), run.improver(index), run.prompts, index)
    reasons = [_fault(row) for row in rows]
    at = [i for i, reason in enumerate(reasons) if reason is None]
    for name in ("chosen", "rejected"):
        faults = length_faults([(rows[i]["prompt"], rows[i][name]) for i in at], run.tokenizer, run.args.max_length)
        for i, reason in zip(at, faults, strict=True):
            reasons[i] = reasons[i] or (reason and f"{name}: {reason}")
    run.write_kept(stage.folder, rows, reasons)
    kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    # Rates are of all pairs; what DPO learns of length is in the pairs that stay.
    after = {f"kept_{k}": v for k, v in rewrite_metrics(kept, "rejected", "chosen").items() if k.endswith("ratio")}
    return count_drops(reasons) | rewrite_metrics(rows, "rejected", "chosen") | after


def rewrite(run: Run, stage: Stage, folder: Path, policy: Path | None, improver: Path | None, rows: list[dict],
            round: int) -> list[dict]:  # fmt: skip
    """Rows with `rejected`, a response of `policy`, and `chosen`, what `improver` makes of it; None without room."""
    options = {"round": round, "settings_hash": stage.key}
    prompts = [row["prompt"] for row in rows]
    drawn = run.sampler.draw(folder / "rejected", policy, prompts, run.args.sampling_options(), **options)
    rows = [row | sample_columns("rejected", sample) for row, sample in zip(rows, drawn, strict=True)]
    at = [i for i, row in enumerate(rows) if row["rejected"] is not None]
    asked = [run.ask_improver(rows[i], "rejected") for i in at]
    drawn = run.sampler.draw(folder / "chosen", improver, asked, run.args.revision_options(), **options)
    made = dict(zip(at, drawn, strict=True))
    return [row | sample_columns("chosen", made.get(i)) for i, row in enumerate(rows)]


def _fault(row: dict) -> str | None:
    if row["rejected"] is None:
        return f"rejected: {filters.TOO_LONG}"
    if row["chosen"] is None:
        return f"chosen: {filters.TOO_LONG}"
    rejected = filters.fault(row["rejected"], truncated=row["rejected_truncated"])
    if rejected:
        return f"rejected: {rejected}"
    chosen = filters.fault(row["chosen"], truncated=row["chosen_truncated"], before=row["rejected"])
    return chosen and f"chosen: {chosen}"


PAIRS = Step(_needs, _pairs, (ROWS, DROPPED))
