"""Measures PolyPO against TRL's DPOTrainer side by side on this machine, with the machine's own speed beside them.

    python -m benchmarks.run            # 2 CPU cores, SmolLM2-135M, under 15 minutes

Writes runs/benchmark/results.json and docs/benchmarks.md from it. The variants of a setting run one after the other on
the same rows; a turn goes through all settings, and each turn has other rows. What would overrun --minutes is left
out, and named in the results.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.rows import Setting, write_synthetic

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "runs/models/smollm2-135m"
EVERY = (  # those that need most memory first
    "rows_full_logits", "rows", "shared", "parts", "cached", "trl_best_rest", "trl_all_pairs", "trl_all_pairs_cached",
)  # fmt: skip
SETTINGS = {  # the most important first
    "K = 8, prompt 256": Setting(8, 256, EVERY, pairs=2),
    "K = 4, prompt 256": Setting(4, 256, ("rows", "shared", "trl_all_pairs")),
    "drafts and improved answers": Setting(8, 256, ("shared", "trunk"), draft=0.6),
    "K = 16, prompt 256": Setting(16, 256, ("shared", "trl_all_pairs")),
    "K = 8, prompt 64": Setting(8, 64, ("shared", "trl_all_pairs")),
    "K = 8, prompt 512": Setting(8, 512, ("shared",)),
    "K = 8, prompt 2,048": Setting(8, 2048, ("shared", "trl_all_pairs")),
}
MEMORY = {k: (64, [64] * k) for k in (4, 8, 16, 32, 64)}  # tokens of the prompt and of the responses
MEMORY_PART = 64 + 2 * 64  # tokens at once: two responses, so that K = 4 is in parts as well


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    [machine] = lines("benchmarks.machine")
    fast, why = machine["fast"]
    args.dtype = fast if args.dtype == "fast" else args.dtype
    print(f"dtype: {args.dtype}; the fast one here is {fast}, because {why}", flush=True)
    results: dict = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.run", *map(shown, sys.argv[1:] if argv is None else argv)]),
        "machine": machine,
        "model": args.model.name,
        "dtype": args.dtype,
        "runs": [],
        "products": [],
        "memory": [],
        "left_out": [],
    }
    path = args.output / "results.json"
    job = {
        "model": str(args.model), "dtype": args.dtype, "device": machine["device"], "lora": False,
        "checkpointing": False, "prompts": 1, "micro": 1, "warm_up": 1, "pairs_at_once": 1, "short": True,
    }  # fmt: skip
    for k in MEMORY:
        results["memory"] += memory(job, k, args)
    left = args.minutes * 60 - (time.monotonic() - begin)
    cost: dict[tuple, float] = {}
    for turn in range(args.turns):
        started = time.monotonic()
        planned, left_out = within(measurements(turn, args), cost, left / (args.turns - turn))
        results["left_out"] += left_out
        for record in lines("benchmarks.step", {**job, "tokens": 1536, "measurements": planned}):
            results["products" if "products" in record else "runs"].append({**record, "turn": turn, "lora": False})
            if "variant" in record:
                cost[record["setting"], record["variant"]] = record["whole"]
                print(f"turn {turn}, {record['setting']}, {record['variant']}: {record['whole']:.0f} s", flush=True)
            results["minutes"] = (time.monotonic() - begin) / 60
            path.write_text(json.dumps(results, indent=1))
        left -= time.monotonic() - started
    report = [sys.executable, "-m", "benchmarks.report", str(path), "--output", str(args.docs)]
    return subprocess.run(report, check=True, env=environment()).returncode


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=MODEL, help="folder of a model")
    add("--minutes", type=float, default=15, help="leave out what would take longer than this in all")
    add("--turns", type=int, default=3, help="how often the variants take turns")
    add("--dtype", default="fast", help="of the weights; fast goes by machine")
    add("--pairs", type=int, help="pairs of a prompt that TRL is fed, in place of each setting's; 120 is all")
    add("--only", default="", help="run only settings whose name contains this")
    add("--output", type=Path, default=ROOT / "runs/benchmark", help="folder for the JSON")
    add("--docs", type=Path, default=ROOT / "docs", help="folder for benchmarks.md and its pictures")
    args = parser.parse_args(argv)
    if not (args.model / "config.json").is_file():
        parser.error(
            f"{shown(str(args.model))} holds no model: run `python scripts/get_smollm2.py` or name one with --model"
        )
    if not any(args.only in name for name in SETTINGS):
        parser.error(f"--only {args.only!r} is in the name of no setting: take one of {', '.join(SETTINGS)}")
    args.vocabulary = json.loads((args.model / "config.json").read_text())["vocab_size"]
    return args


def measurements(turn: int, args: argparse.Namespace) -> list[dict]:
    """All that a turn measures, in its order."""
    found = []
    for number, (name, setting) in enumerate(SETTINGS.items()):
        if args.only in name:
            path, lengths = args.output / f"rows-{number}-{turn}.json", [setting.lengths(turn)] * 2
            rows = write_synthetic(path, lengths, args.vocabulary, setting.draft)
            base = {"setting": name, "rows": rows, "pairs": args.pairs or setting.pairs}
            found += [{**base, "variant": variant} for variant in setting.variants]
    # Memory that is touched for the first time costs as much as the step itself on some machines.
    found[0]["short"] = turn > 0
    next(wanted for wanted in found if wanted["variant"] == "shared")["profiled"] = turn == 0
    return found


def within(planned: list[dict], cost: dict[tuple, float], seconds: float) -> tuple[list[dict], list[str]]:
    """The first measurements that fit into the seconds, by what each cost before, and the names of the others."""
    taken, left_out = [], []
    for wanted in planned:
        seconds -= cost.get((wanted["setting"], wanted["variant"]), 0)
        if seconds >= 0:
            taken.append(wanted)
        else:
            left_out.append(f"{wanted['setting']}, {wanted['variant']}")
    return taken, left_out


def memory(job: dict, k: int, args: argparse.Namespace) -> Iterator[dict]:
    """The peak of K responses, the whole group at once and in parts, each in a process of its own."""
    rows = write_synthetic(args.output / f"rows-memory-{k}.json", [MEMORY[k]] * 2, args.vocabulary)
    for variant in ("shared", "parts"):
        options = {"tokens_per_backward": MEMORY_PART} if variant == "parts" else {}
        wanted = {"setting": "memory", "variant": variant, "rows": rows, "options": options}
        [record] = lines("benchmarks.step", {**job, "measurements": [wanted]})
        print(f"memory, K = {k}, {variant}: {record['peak'] / 2**30:.2f} GiB", flush=True)
        yield {**record, "lora": False, "k": k}


def lines(module: str, job: dict | None = None) -> Iterator[dict]:
    """What a module prints as JSON lines, as they come."""
    command = [sys.executable, "-m", module, *([] if job is None else [json.dumps(job)])]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from (json.loads(line) for line in process.stdout if line.startswith('{"'))
    if process.returncode:
        sys.exit(f"error: {module} failed with exit status {process.returncode}; what it said stands above.")


def environment() -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}


def shown(argument: str) -> str:
    """An argument without the folders of this machine."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


if __name__ == "__main__":
    sys.exit(main())
