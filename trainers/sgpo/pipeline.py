"""The stages of SGPO in their order. Each is a folder (stages.py says what every one holds):

    round-00/sft/        supervised fine-tuning of the start, if asked for
    round-00/before/     answers of the model before all rounds to held-out prompts
    round-00/current/    the policy's responses to the improver's prompts
    round-00/targets/    what the reviser makes of them
    round-00/filter/     rows.jsonl.gz: what the improver is trained on; dropped.jsonl.gz: the rest, with reasons
    round-00/improver/   model/: one model that answers prompts and improves answers
    round-00/pairs/      rows.jsonl.gz: improved responses over the responses they were made of
    round-00/dpo/        model/: the policy that the round ends with
    round-00/measure/    held-out answers of improver and policy in both modes, scores

A killed run goes on where it stopped when the same command is given again, and ends with the same pairs and the same
weights: a stage depends on nothing but its settings and the files of earlier stages. Every sample has a random stream
of its own, seeded by (seed, round, prompt), and every training starts from weights on disk.
"""

import shutil
from pathlib import Path

from ..runs.files import write_json
from . import measure, pairs, targets, training
from .config import STAGES
from .monitor import LIMITS, Limits, alarms
from .run import MODEL, Run, Step
from .stages import MANIFEST, Stage

STEPS: dict[str, Step] = {
    "sft": training.SFT,
    "before": measure.BEFORE,
    "current": targets.CURRENT,
    "targets": targets.TARGETS,
    "filter": targets.FILTER,
    "improver": training.IMPROVER,
    "pairs": pairs.PAIRS,
    "dpo": training.DPO,
    "measure": measure.MEASURE,
}
assert tuple(STEPS) == STAGES


def run_stages(run: Run) -> Path | None:
    """Does what is not done yet; returns the last policy's folder, or None where `args.stage` ends the run before.

    Once all stages are done, the last policy is copied to the run's folder.

    Raises:
        ValueError: a stage was made with other settings, `args.stage` is not the next one, no row is left to train on,
            a limit is crossed and `args.on_alarm` is stop, or the folder holds what this run cannot go on from.
    """
    check_folder(run)
    only, rounds = run.args.stage, run.args.rounds
    plan = [(index, name) for index in range(rounds) for name in stages_of(run, index)]
    for index, name in plan:
        stage = stage_of(run, name, index)
        if not stage.done():
            if only not in (None, name):
                raise ValueError(
                    f"stage={only!r} is not the next one: {stage.folder} is not done. Run stage {name}, or all."
                )
            run.processes.say(f"\nRound {index + 1} of {rounds}, {name}: {stage.folder}")
            stage.open()
            stage.finish(STEPS[name].work(run, stage, index))
            run.processes.say(describe(stage.manifest()["counts"]))
            only = only and "done"
        judge(run, name, stage)
        if only == "done" and (index, name) != plan[-1]:
            return None
    if only not in (None, "done"):
        run.processes.say(f"All stages in {run.folder} are done: there is no {only} left to run.")
    end = run.at("dpo", rounds - 1) / MODEL
    run.processes.main(lambda: shutil.copytree(end, run.folder, dirs_exist_ok=True))
    run.processes.say(
        f"\nAll stages are done: the policy is in {run.folder}. What each stage kept and what the monitor found: "
        f"python scripts/sgpo_report.py {run.folder}"
    )
    return end


def check_folder(run: Run) -> None:
    """Raises ValueError for a folder with stages that this run would pass over, or begin anew beneath."""
    held = sorted(path.parent for path in run.folder.glob(f"round-*/*/{MANIFEST}"))
    rounds = int(held[-1].parent.name.removeprefix("round-")) + 1 if held else 0
    if rounds > run.args.rounds:
        raise ValueError(
            f"rounds={run.args.rounds}, but {run.folder} holds stages of round {rounds}: rounds can only be added. "
            f"Raise it, delete the folders of later rounds, or choose another output_dir."
        )
    if run.conversations is not None and held and run.at("sft", 0) not in held:
        raise ValueError(
            f"sft is asked for, but {run.folder} holds stages that were made without it, such as {held[0]}: leave sft "
            "out, or choose another output_dir."
        )


def stages_of(run: Run, index: int) -> list[str]:
    """The stages of a round: fine-tuning and the answers before all rounds belong to the first one."""
    wanted = {
        "sft": index == 0 and run.conversations is not None,
        "before": index == 0 and bool(run.held_out),
        "measure": bool(run.held_out) or run.args.scorer is not None,
    }
    return [name for name in STEPS if wanted.get(name, True)]


def stage_of(run: Run, name: str, index: int) -> Stage:
    step = STEPS[name]
    common = {"stage": name, "round": index, "seed": run.args.seed, "model": run.model, "model files": run.model_files}
    return Stage(run.at(name, index), common | step.needs(run, index), step.outputs, run.processes)


def judge(run: Run, name: str, stage: Stage) -> None:
    """Warns of what is beyond its limit, or stops the run."""
    run.processes.main(lambda: write_json(run.folder / LIMITS, {"limits": run.args.limits}))
    counts = stage.manifest()["counts"]
    found = alarms({f"{name}/{key}": value for key, value in counts.items()}, Limits(**run.args.limits))
    for text in found:
        run.processes.say(f"  WARNING: {text}")
    if found and run.args.on_alarm == "stop":
        raise ValueError(f"on_alarm is stop, and the monitor found: {' '.join(found)}")


def describe(counts: dict) -> str:
    """Counts in a few lines."""
    shown = []
    for name, value in counts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {_short(v)}" for k, v in value.items()) or "none"
        shown.append(f"  {name.replace('_', ' ')}: {_short(value)}")
    return "\n".join(shown)


def _short(value) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
