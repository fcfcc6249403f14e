"""Checks and measures on one GPU what CPUs cannot show, in at most 8 minutes and without a download.

    python -m benchmarks.gpu                        # says first which packages are missing and how to bring them
    python -m benchmarks.gpu --device cpu --quick   # tries every section that needs no GPU, on a small model

Prints a table and writes runs/gpu/gpu.json, section by section. Each runs in a process of its own
(benchmarks.gpu_parts), so that a crash or a full memory ends that section alone.
"""

import argparse
import datetime
import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TRAINERS = ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "dill", "multiprocess", "xxhash",
            "pyarrow", "pandas", "scipy", "psutil", "jinja2", "matplotlib", "tqdm")  # fmt: skip
# Wheels for Linux on x86-64 in MiB, November 2026; those that are not named have less than 1.
SIZES = {"pyarrow": 52.5, "bitsandbytes": 41.1, "scipy": 33.7, "pandas": 11.8, "matplotlib": 9.4}
PLATFORMS = "".join(f" --platform manylinux{v}_x86_64" for v in ("_2_28", "_2_27", "_2_24", "_2_17", "2014"))
COMPARED = ("prompts/s", "peak, GiB")
COMMAND = [sys.executable, "-m", "benchmarks.gpu_parts"]
LONGEST = 150  # seconds of one section


class Section(NamedTuple):
    """One process: a function of benchmarks.gpu_parts, its options, and what it needs to run."""

    function: str
    options: dict = {}
    needs: tuple[str, ...] = TRAINERS
    only_cuda: str = ""  # why it cannot run on a CPU
    base: str = ""  # the section that it is compared with


FOUR, SIXTEEN = {"k": 4, "prompts": 4}, {"k": 16, "prompts": 1}
LIGER = {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": False}}
# The most important first: what the minutes do not suffice for is left out.
SECTIONS = {
    "matrix product": Section("product"),
    "layouts": Section("layouts"),
    "7B LoRA, K = 4": Section("lora", FOUR),
    "7B LoRA, K = 16": Section("lora", SIXTEEN),
    "7B LoRA, K = 16, in parts": Section("lora", {**SIXTEEN, "responses_per_part": 4}, base="7B LoRA, K = 16"),
    "7B LoRA, TRL, all pairs": Section("lora", {**FOUR, "variant": "trl_all_pairs"}, base="7B LoRA, K = 4"),
    "FlexAttention": Section("flex", only_cuda="FlexAttention has no backward on CPUs"),
    "all trainers": Section("methods", {"tuning": "full"}, (*TRAINERS, "pytest")),
    "checkpointing": Section("methods", {"tuning": "checkpointing", "methods": ["SWEPO", "SparsePO"]},
                             (*TRAINERS, "pytest")),
    "7B LoRA, K = 4, checkpointing": Section("lora", {**FOUR, "checkpointing": True}, base="7B LoRA, K = 4"),
    "7B LoRA, TRL, best against each": Section("lora", {**FOUR, "variant": "trl_best_rest"}, base="7B LoRA, K = 4"),
    "QLoRA, two layers": Section("lora", {"k": 4, "prompts": 1, "bits": 4}, (*TRAINERS, "bitsandbytes")),
    "7B LoRA, K = 4, Liger": Section("lora", {**FOUR, "arguments": LIGER}, (*TRAINERS, "liger-kernel", "triton"),
                                     "Liger's kernels need a GPU", "7B LoRA, K = 4"),
    "tests marked gpu": Section("tests", {}, (*TRAINERS, "pytest", "liger-kernel", "triton"), "they need a GPU"),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    versions = {name: version(name) for name in dict.fromkeys(sum((s.needs for s in SECTIONS.values()), ()))}
    print(packages_text(versions), flush=True)
    if args.device == "cuda" and versions["torch"] and not sees_cuda():
        sys.exit("error: torch sees no CUDA device. To try the script itself: --device cpu --quick.")
    begin = time.monotonic()
    results = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)]),
        "versions": {"python": sys.version.split()[0], **versions},
        "sections": {},
    }
    for name in [name for name in SECTIONS if args.only in name]:
        left = 60 * args.minutes - (time.monotonic() - begin)
        results["sections"][name] = result = run(name, args, versions, left)
        compare(result, SECTIONS[name].base, results["sections"])
        results["minutes"] = (time.monotonic() - begin) / 60
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1))
        print(f"{name}: {result['status']}{', ' + result['reason'] if result.get('reason') else ''}", flush=True)
    print(f"\n{table(results['sections'])}\n{args.output.name} is written, {results['minutes']:.1f} minutes.")
    return int(any(result["status"] in ("failed", "wrong") for result in results["sections"].values()))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--quick", action="store_true", help="small models and few cases: shows that the script runs, and no more")
    add("--minutes", type=float, default=8, help="sections that would begin later are left out, the last one is cut")
    add("--only", default="", help="sections whose name contains this")
    add("--output", type=Path, default=ROOT / "runs/gpu/gpu.json")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu needs --quick: a model of the 7B shape would fill the memory")
    return args


def version(name: str) -> str | None:
    """Of an installed package, else None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages_text(versions: dict[str, str | None]) -> str:
    """Which packages there are, and how to bring those that are missing."""
    lines = ["packages: " + ", ".join(f"{name} {number}" for name, number in versions.items() if number)]
    missing = [name for name, number in versions.items() if number is None]
    wheels = [name for name in missing if name not in ("torch", "triton")]  # too large, and there with CUDA's torch
    if missing:
        lines.append(f"missing: {', '.join(missing)}")
    if wheels:
        size, python = sum(SIZES.get(name, 0.6) for name in wheels), ".".join(sys.version.split(".")[:2])
        lines += [
            f"To bring wheels of about {size:.0f} MiB along (too much? go without the largest, and what needs it), "
            "call this where there is a network:",
            f"  python3 -m pip download --no-deps --only-binary=:all: --python-version {python}{PLATFORMS} -d wheels "
            + " ".join(wheels),
            "and here: python3 -m pip install --no-index --no-deps wheels/*.whl",
        ]
    return "\n".join(lines)


def sees_cuda() -> bool:
    import torch  # only where it is installed

    return torch.cuda.is_available()


def run(name: str, args: argparse.Namespace, versions: dict[str, str | None], seconds: float) -> dict:
    """The result of a section: its status, and figures with their limits or the reason why there are none."""
    section = SECTIONS[name]
    if args.device == "cpu" and section.only_cuda:
        return {"status": "skipped", "reason": section.only_cuda}
    if missing := [package for package in section.needs if not versions[package]]:
        return {"status": "skipped", "reason": f"{', '.join(missing)} not installed"}
    if seconds <= 0:
        return {"status": "left out", "reason": "no time left"}
    job = {"function": section.function, "device": args.device, "quick": args.quick, **section.options}
    return run_job(job, min(seconds, LONGEST))


def run_job(job: dict, seconds: float) -> dict:
    """Runs a function of benchmarks.gpu_parts in a process of its own."""
    begin = time.monotonic()
    try:
        done = subprocess.run([*COMMAND, json.dumps(job)], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"status": "left out", "reason": f"not done after {seconds:.0f} s"}
    took = {"seconds": time.monotonic() - begin}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"status": "failed", "reason": lines[-1][:300], "log": done.stderr[-5000:], **took}
    figures, limits = json.loads(done.stdout.splitlines()[-1])
    wrong = [name for name, limit in limits.items() if not figures[name] <= limit]
    reason = {"reason": f"beyond its limit: {', '.join(wrong)}"} if wrong else {}
    return {"status": "wrong" if wrong else "ok", **reason, "figures": figures, "limits": limits, **took}


def compare(result: dict, base: str, sections: dict[str, dict]) -> None:
    """Adds how a section stands to the one that it is compared with, where both have figures."""
    other = sections.get(base, {})
    for figure in COMPARED if "figures" in result and "figures" in other else ():
        result["figures"][f"{figure} over that of {base}"] = result["figures"][figure] / other["figures"][figure]


def table(sections: dict[str, dict]) -> str:
    """One line per figure in Markdown."""
    lines = [("section", "result", "figure", "value", "limit"), ("---",) * 5]
    for name, result in sections.items():
        for figure, value in result.get("figures", {"": result.get("reason", "")}).items():
            limit = result.get("limits", {}).get(figure, "")
            lines.append((name, result["status"], figure, *(f"{v:,.4g}" if isinstance(v, float | int) else v
                                                           for v in (value, limit))))  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
