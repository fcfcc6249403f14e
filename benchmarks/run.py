"""Measures PolyPO against TRL's DPOTrainer on the same prompts and responses, one process after another.

    python -m benchmarks.run                      # 2 CPU cores, SmolLM2-135M, under 15 minutes
    python -m benchmarks.run --preset gpu-7b      # one GPU with 80 GB, a 7B-shaped model, LoRA

Writes runs/benchmark/results.json (results-gpu-7b.json), and docs/benchmarks.md from all results found there. Variants
take turns and are compared within a turn; a turn that would overrun --minutes is left out and named in the results.
"""

import argparse
import datetime
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = (ROOT.parent / "shared/data/alpaca_eval_ranked.jsonl.gz", ROOT / "data/demo/preferences.jsonl.gz")
MODEL = ROOT / "runs/models/smollm2-135m"

COMPARED = ["shared", "rows", "rows_full_logits", "trl_best_rest", "trl_all_pairs"]
ONCE = ["trl_best_rest_default", "trl_all_pairs_default"]
RESPONSES = (2, 4, 8, 16)
PROMPTS = (64, 128, 256, 512, 1024)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    machine = run_script("benchmarks.rows", {})
    if args.preset != "cpu" and machine["gpu"] is None:
        sys.exit("error: this preset needs a CUDA device, and torch sees none.")
    fast, why = machine["fast"]
    args.dtype = fast if args.dtype == "fast" else args.dtype
    print(f"dtype: {args.dtype}; the fast one here is {fast}, because {why}", flush=True)
    defaults = fast == "bfloat16"  # in which TRL's defaults compute
    jobs = cpu_jobs(args, output, defaults=defaults) if args.preset == "cpu" else gpu_jobs(args, output)
    results = {
        "preset": args.preset,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.run", *map(shown, sys.argv[1:] if argv is None else argv)]),
        "machine": machine,
        "data": Path(args.data).name.split(".")[0] if args.preset == "cpu" else None,
        "runs": [],
        "left_out": [],
    }
    path = output / ("results.json" if args.preset == "cpu" else f"results-{args.preset}.json")
    cost: dict[tuple, float] = {}
    for number, job in enumerate(jobs, 1):
        kind = (job["setting"], job["variant"])
        label = f"[{number}/{len(jobs)}] {job['setting']}, turn {job['turn']}: {job['variant']}"
        if time.monotonic() - begin + cost.get(kind, 0) > args.minutes * 60:
            print(f"{label}: left out, no time", flush=True)
            results["left_out"].append(f"{job['setting']}, turn {job['turn']}: {job['variant']}")
            continue
        started = time.monotonic()
        record = {**job, **run_script("benchmarks.step", job)}
        cost[kind] = time.monotonic() - started
        results["runs"].append({**record, "model": Path(job["model"]).name, "rows": Path(job["rows"]).name})
        print(f"{label}: {summary(record)} ({cost[kind]:.0f} s in all)", flush=True)
        results["minutes"] = (time.monotonic() - begin) / 60
        path.write_text(json.dumps(results, indent=1))
    files = map(str, sorted(output.glob("results*.json")))
    report = [sys.executable, "-m", "benchmarks.report", *files, "--output", args.docs]
    subprocess.run(report, check=True)
    broken = [r for r in results["runs"] if "error" in r and "out of memory" not in r["error"]]
    return 1 if broken else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=["cpu", "gpu-7b"], default="cpu")
    add("--model", help="model folder (cpu) or random-7b (gpu-7b)")
    add("--data", default=str(next((p for p in DATA if p.exists()), DATA[-1])), help="rows, cpu only")
    add("--minutes", type=float, help="leave out what would take longer than this in all")
    add("--turns", type=int, default=3, help="how often the variants take turns")
    add("--max-response", type=int, default=400, help="responses are cut to this, cpu only")
    add("--dtype", default="fast", help="of the weights, except with TRL's defaults; fast goes by machine")
    add("--only", default="", help="run only settings whose name contains this, gpu-7b only")
    add("--micro-trl", type=int, default=1, help="prompts whose pairs TRL is fed at once, cpu only")
    add("--output", default=str(ROOT / "runs/benchmark"), help="folder for the JSON")
    add("--docs", default=str(ROOT / "docs"), help="folder for benchmarks.md and its picture")
    args = parser.parse_args(argv)
    args.model = args.model or (str(MODEL) if args.preset == "cpu" else "random-7b")
    args.minutes = args.minutes or (14 if args.preset == "cpu" else 90)
    if args.preset == "cpu" and not (Path(args.model) / "config.json").is_file():
        parser.error(
            f"{shown(args.model)} holds no model: run `python scripts/get_smollm2.py` or name one with --model"
        )
    return args


def cpu_jobs(args: argparse.Namespace, output: Path, *, defaults: bool) -> list[dict]:
    """All jobs, the most important first: what is compared, growth, what is measured once, further turns."""
    files = [output / f"rows-{turn}.json" for turn in range(args.turns)]
    common = {"model": args.model, "dtype": args.dtype, "device": "cpu", "lora": False, "checkpointing": False}
    data = {"k": 4, "prompts": 2, "max_response": args.max_response, "seed": 0}
    run_script("benchmarks.rows", {**data, "model": args.model, "data": args.data, "outputs": [str(f) for f in files]})
    main_jobs = [
        {"setting": "main", "turn": turn, "variant": variant, "rows": str(files[turn]), **common,
         "prompts": 2, "micro": 2, "micro_trl": args.micro_trl, "warm_up": 1}
        for turn in range(args.turns)
        for variant in COMPARED
    ]  # fmt: skip
    once = [{**main_jobs[0], "variant": variant} for variant in (ONCE if defaults else [])]
    recomputed = {**main_jobs[0], "setting": "With gradient checkpointing", "checkpointing": True}
    once += [{**recomputed, "variant": variant} for variant in ("shared", "rows_full_logits")]
    vocabulary = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    growth = growth_jobs(common, output, prompt=128, response=32, vocabulary=vocabulary, turns=2)
    second = 2 * len(COMPARED)
    return main_jobs[:second] + growth[:2] + once + main_jobs[second:] + growth[2:]


def gpu_jobs(args: argparse.Namespace, output: Path) -> list[dict]:
    """A 7B-shaped model with LoRA: two kinds of lengths, each with and without gradient checkpointing."""
    common = {"model": args.model, "dtype": args.dtype, "device": "cuda", "lora": True, "warm_up": 2}
    vocabulary, steps, jobs = 32000, 7, []
    for turn in range(args.turns):
        for name, prompts, micro in (("ultrafeedback", 8, 2), ("long", 2, 1)):
            draw = random.Random(turn)
            ragged = name == "ultrafeedback"
            lengths = [draw_lengths(draw) if ragged else (1024, [512] * 4) for _ in range(prompts * steps)]
            rows = write_synthetic(output / f"rows-{name}-{turn}.json", lengths, vocabulary)
            for checkpointing in (True, False):
                setting = f"{name}, checkpointing {'on' if checkpointing else 'off'}"
                sizes = {"prompts": prompts, "micro": prompts if checkpointing else micro, "micro_trl": 1}
                job = {**common, **sizes, "setting": setting, "turn": turn, "rows": rows}
                variants = COMPARED + (ONCE if turn == 0 and checkpointing else [])
                jobs += [{**job, "checkpointing": checkpointing, "variant": v} for v in variants]
    sizes = {**common, "checkpointing": True}
    jobs += growth_jobs(sizes, output, prompt=512, response=256, vocabulary=vocabulary, turns=2)
    return [job for job in jobs if args.only in job["setting"]]


def growth_jobs(common: dict, output: Path, *, prompt: int, response: int, vocabulary: int, turns: int) -> list[dict]:
    """One step for each number of responses and for each prompt length, all in one process per layout."""
    # The largest shapes warm up.
    lengths = [(prompt, [response] * max(RESPONSES)), (max(PROMPTS), [response] * 4)]
    lengths += [(prompt, [response] * k) for k in RESPONSES] + [(p, [response] * 4) for p in PROMPTS]
    rows = write_synthetic(output / "rows-growth.json", lengths, vocabulary)
    sizes = {"prompts": 1, "micro": 1, "micro_trl": 1, "warm_up": 2}
    return [
        {**common, **sizes, "setting": "growth", "turn": turn, "variant": variant, "rows": rows}
        for turn in range(turns)
        for variant in ("shared", "rows")
    ]


def draw_lengths(draw: random.Random) -> tuple[int, list[int]]:
    """A prompt of about 120 and four responses of about 290 tokens on average, as ragged as real ones."""

    def length(median: float, spread: float, longest: int) -> int:
        return min(longest, max(16, round(draw.lognormvariate(0, spread) * median)))

    return length(100, 0.6, 600), [length(245, 0.58, 1000) for _ in range(4)]


def write_synthetic(path: Path, lengths: list[tuple[int, list[int]]], vocabulary: int) -> str:
    """Random token ids of these lengths, with scores that all differ."""
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(10, vocabulary) for _ in range(count)]

    rows = [
        {"prompt_ids": ids(p), "response_ids": [ids(r) for r in rs], "scores": [float(k) for k in range(len(rs))]}
        for p, rs in lengths
    ]
    path.write_text(json.dumps(rows))
    return str(path)


def run_script(name: str, job: dict) -> dict:
    """The result of a script that prints one JSON line, or {"error": its last words} for a measurement that failed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", name, json.dumps(job)], env=environment, capture_output=True, text=True
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if name != "benchmarks.step":
        sys.exit(f"error: {name} failed:\n{done.stderr}")
    error = "out of memory" if "out of memory" in done.stderr.lower() else f"exit status {done.returncode}"
    print(done.stderr[-3000:], file=sys.stderr, flush=True)
    return {"error": error}


def summary(record: dict) -> str:
    if "error" in record:
        return f"failed, {record['error']}"
    seconds = sum(step["seconds"] for step in record["steps"])
    return f"{seconds / len(record['steps']):.3g} s per step, peak {record['peak'] / 2**30:.2f} GiB"


def shown(argument: str) -> str:
    """An argument without the folders of this machine."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


if __name__ == "__main__":
    sys.exit(main())
