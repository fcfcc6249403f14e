"""The same numbers on one process and on two, under every engine: all trainers, full and LoRA, with checkpointing.

python tests/distributed_matrix.py [--engines ddp zero3] [--cells WORD ...] [--folder FOLDER]

prints a table: in each cell the largest relative difference to one process, or what went wrong. Rows "gone on" hold
the difference to a run that was not cut. Results lie in FOLDER as they come, and what is there is not run again. The
exit code is 1 if a cell disagrees or fails.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import processes

ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
TOLERANCE, FLOOR = 1e-4, 0.1  # a difference is relative to the number, or to 0.1 where that is larger
RESUMED = 1e-6  # largest difference of a run that goes on from a checkpoint to one that was not cut; 0 on one process
SILENCE = 600  # seconds without a finished cell after which a launch counts as hung; a start alone can take minutes

MASKS = {"mask_init": "dense", "mask_init_std": 0.5, "reward_l1": 0.01, "mask_learning_rate": 0.02}
SAMPLING = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "batch_size": 3}
EVOLVE = {"rounds": 2, "scorer": "sgpo_rows.vowels", "num_generations": 3, "held_out_generations": 2, **SAMPLING}
ROUNDS = {"as_chat": True, "self_enhance": EVOLVE}
FOLLOWS = {"sync_ref_model": True, "ref_model_sync_steps": 3}
STAGES = {
    "as_chat": True,
    "sampling": SAMPLING,
    "reviser_analysis": False,
    "max_length": 2000,
    "improver": {"learning_rate": 0.01},
    "scorer": "sgpo_rows.vowels",
}
TRAINERS = {
    "SWEPO": {},
    "LIRE": {},
    "DPO": {},
    "PlackettLuce": {},
    "InfoNCA": {},
    "NCA": {},
    "RRHF": {},
    "SparsePO": {"settings": MASKS},
    "EMDPO": {},
    "SGPO": {"settings": {"sft_weight": 0.2}},
}
TUNINGS = {
    "full": {},
    "full, checkpointing": {"checkpointing": True},
    "LoRA": {"peft": True},
    "LoRA, checkpointing": {"peft": True, "checkpointing": True},
}
# What the path of a batch depends on beside trainer and tuning.
MORE = {
    # The last batch of an epoch has one row, so a process has none.
    "SWEPO, 9 rows": {"rows": 9, "settings": {"sft_weight": 0.3}},
    "SWEPO, own sampler": {"drawn": [3, 0, 7, 7, 1, 10, 5, 2, 8]},  # again one row in the last batch, of 11 rows
    "SWEPO, accumulation": {"batch": 2, "accumulation": 2, "settings": {"sft_weight": 0.3}},
    "SWEPO, padded rows": {"layout": "rows"},
    "SWEPO, in parts": {"settings": {"sft_weight": 0.3, "tokens_per_backward": 30}},
    "SWEPO, in parts, accumulation": {"batch": 2, "accumulation": 2, "settings": {"tokens_per_backward": 30}},
    "SWEPO, LoRA, in parts, checkpointing": {
        "peft": True,
        "checkpointing": True,
        "settings": {"tokens_per_backward": 30},
    },
    "DPO, in parts, reference cache": {"precompute": True, "settings": {"tokens_per_backward": 30}},
    "SWEPO, reference cache": {"precompute": True},
    "SWEPO, LoRA, reference cache": {"peft": True, "precompute": True},
    "SWEPO, token budget": {"budget": 120, "rows": 12, "settings": {"sft_weight": 0.3}},
    "SWEPO, stream": {"stream": True, "settings": {"stream_buffer": 5}},
    "SparsePO, two masks": {"settings": {**MASKS, "independent": True}},
    "SparsePO, padded rows, checkpointing": {"checkpointing": True, "layout": "rows", "settings": MASKS},
    "SparsePO, activations": {"settings": {"mask": "activations"}},
    "SparsePO, LoRA on the LM head": {
        "peft": ["q_proj", "lm_head"],
        "settings": {**MASKS, "ranking": "plackett_luce"},
    },
    "SWEPO, pretrained LoRA on the LM head": {"pretrained": ["q_proj", "lm_head"]},
    "SWEPO, LoRA and a whole LM head": {"peft": ["q_proj"], "whole": ["lm_head"]},
    "SWEPO, LoRA on the LM head, tied embeddings": {"peft": ["q_proj", "lm_head"], "tied": True},
    "DPO, reference follows": {"settings": FOLLOWS},
    "DPO, LoRA, reference follows": {"peft": True, "settings": FOLLOWS},
    "SWEPO, probe": {"probe": True},
    "LIRE, in rounds": {"stages": True, "settings": ROUNDS},
    "DPO, LoRA, in rounds": {"stages": True, "peft": True, "settings": ROUNDS},
    "SGPO, in stages": {"stages": True, "settings": STAGES | {"policy_weight": 0.5}},
    "SGPO, LoRA, in stages": {"stages": True, "peft": True, "settings": STAGES | {"ref": "initial"}},
    "EMDPO, tied embeddings": {"tied": True},
    "EMDPO, halves": {"settings": {"score_on": "heldout_half", "rounds": 2, "sft_weight": 0.3}},
}


def resume_cells() -> dict[str, dict]:
    """Runs that go on from a checkpoint amid the second epoch, by the name of their row."""
    tunings = {"full": {}, "LoRA": {"peft": True}}
    cells = {f"{t}, {u}": {**TRAINERS[t], **tunings[u]} for t in TRAINERS if t != "EMDPO" for u in tunings}
    more = ("token budget", "reference cache", "stream")
    cells |= {f"SWEPO, {name}": MORE[f"SWEPO, {name}"] for name in more}
    cells |= {name: MORE[name] for name in ("DPO, reference follows", "DPO, LoRA, reference follows")}
    cells["SWEPO, pretrained LoRA"] = {"pretrained": True}
    return {f"{name}, gone on": {"cut": True, **cell} for name, cell in cells.items()}


def all_cells() -> dict[str, dict]:
    """{name of a row of the table: what the worker runs for it}."""
    cells = {f"{t}, {u}": {**TRAINERS[t], **TUNINGS[u]} for t in TRAINERS for u in TUNINGS} | MORE
    cells |= resume_cells()
    return {name: {"name": name, "trainer": name.split(",")[0] + "Trainer", **cell} for name, cell in cells.items()}


def run_engine(engine: str, cells: list[dict], folder: Path) -> dict[str, dict]:
    """{cell: its line of results} under one engine, in as few launches as there are crashes and one more."""
    folder = folder / engine
    folder.mkdir(parents=True, exist_ok=True)
    while left := [cell for cell in cells if cell["name"] not in read_results(folder)]:
        failure = _launch(engine, left, folder)
        done = read_results(folder)
        missing = [cell["name"] for cell in left if cell["name"] not in done]
        if missing and failure:  # blame the cell that was at work, and go on after it
            with open(folder / "results.jsonl", "a") as file:
                file.write(json.dumps({"cell": missing[0], "failed": failure}) + "\n")
    done = read_results(folder)
    return {cell["name"]: done[cell["name"]] for cell in cells}


def read_results(folder: Path) -> dict[str, dict]:
    path = folder / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["cell"]: line for line in lines}


def _launch(engine: str, cells: list[dict], folder: Path) -> str | None:
    """Runs the worker; returns why it ended before its last cell, or None."""
    options = {"engine": engine, "folder": str(folder), "cells": cells}
    started, results, log = time.time(), folder / "results.jsonl", folder / "log"
    log.unlink(missing_ok=True)
    workers = processes.start(work, options, log=log, count=1 if engine == "single" else 2)
    last = lambda: max(started, results.stat().st_mtime if results.exists() else 0)  # noqa: E731
    hung = processes.wait(workers, lambda: time.time() - last() > SILENCE)
    if hung:
        return f"hung: no result in {SILENCE} s\n{log.read_text()[-2000:]}"
    return f"crashed\n{log.read_text()[-6000:]}" if any(worker.exitcode for worker in workers) else None


def work(options: dict) -> None:
    import distributed_steps  # everything, torch included

    distributed_steps.main(options)
    distributed_steps.leave_processes()


def torchrun() -> list[str]:
    """The beginning of a command that runs a script on two processes of this machine."""
    options = ["--nproc_per_node", "2", "--standalone", "--local_addr", "127.0.0.1"]
    return [sys.executable, "-m", "torch.distributed.run", *options]


def difference(found: dict[str, float], expected: dict[str, float]) -> float:
    """Largest difference of two results, relative to the expected number; infinite if they name other numbers."""
    if found.keys() != expected.keys():
        return math.inf
    # Not `max`, which a NaN can slip through.
    parts = [abs(found[name] - value) / max(abs(value), FLOOR) for name, value in expected.items()]
    return math.nan if any(map(math.isnan, parts)) else max(parts)


def verdict(line: dict, alone: dict, engine: str) -> tuple[str, bool]:
    """What the table says of a cell, and whether it is equal to one process, or to the run that was not cut."""
    if "found" not in line:
        return line.get("failed", "refused").split("\n")[0], False
    if "whole" in line:
        worst, tolerance = difference(line["found"], line["whole"]), RESUMED if engine != "single" else 0.0
    elif engine == "single":
        return "", True  # what the others are compared with
    elif "found" not in alone:
        return "no result on one process", False
    else:
        worst, tolerance = difference(line["found"], alone["found"]), TOLERANCE
    return f"{worst:.0e}" if worst else "0", worst <= tolerance


def table(results: dict[str, dict[str, dict]]) -> str:
    """A Markdown table of `{engine: {cell: line}}`, and below it what was refused or failed, in full."""
    out = [f"| | {' | '.join(results)} |", "|---|" + "---|" * len(results)]
    messages = {}
    for name, alone in results["single"].items():
        row = []
        for engine, lines in results.items():
            text, good = verdict(lines[name], alone, engine)
            row.append(text if good else f"**{text}**")
            if message := lines[name].get("refused") or lines[name].get("failed"):
                messages.setdefault(message, []).append(f"{name} ({engine})")
        out.append(f"| {name} | {' | '.join(row)} |")
    told = [f"* {', '.join(where)}: {message}" for message, where in messages.items()]
    return "\n".join(out + ([""] + told if told else []))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--cells", nargs="+", default=[""], help="only rows of the table that contain one of these")
    parser.add_argument("--folder", help="where results are kept, and taken from; a new one by default")
    options = parser.parse_args(argv)
    cells = [c for name, c in all_cells().items() if any(word in name for word in options.cells)]
    folder = Path(options.folder or tempfile.mkdtemp(prefix="distributed-"))
    results, started = {}, time.monotonic()
    for engine in ("single", *options.engines):
        print(f"{engine}: {len(cells)} runs", file=sys.stderr, flush=True)
        results[engine] = run_engine(engine, cells, folder)
    print(table(results))
    good = [
        verdict(line, results["single"][name], e)[1] for e, lines in results.items() for name, line in lines.items()
    ]
    print(f"\n{sum(good)} of {len(good)} as they should be, in {(time.monotonic() - started) / 60:.1f} minutes.")
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
