"""Memory and time of the recipes in configs/ultrafeedback, as `--dry_run` reckons them: the tables of docs/scale.md.

    python scripts/scale_table.py                # prints them
    python scripts/scale_table.py --write        # puts them into docs/scale.md

Needs neither weights nor data: the shapes of the two models stand here, and the lengths of the rows are drawn to have
about the means of a sample of UltraFeedback (prompts 180 tokens, responses 272).
"""

import argparse
import json
import random
import tempfile
from functools import cache
from pathlib import Path

from trainers.cli import train
from trainers.cli.dry_run import bits, build_model, passes, run_facts
from trainers.data.budget import Lengths
from trainers.estimate import (
    Fed,
    fed,
    fed_in_all,
    forward,
    hours,
    memory,
    plan_batches,
    read_plan,
    shape_of,
    total,
    work,
)

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/scale.md"
COMMON = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "dtype": "bfloat16",
}  # fmt: skip
SHAPES = {
    "mistral-7b": {**COMMON, "model_type": "mistral", "vocab_size": 32000, "sliding_window": 4096},
    "llama-3-8b": {**COMMON, "model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192},
}
# Hardware, and the accelerate files it is for.
HARDWARE = {"full-8x80gb": ("zero2", "zero3", "fsdp2"), "lora-80gb": ("single",), "qlora-24gb": ("single",)}
# Methods that ask for the same are one row.
METHODS = {
    "swepo": "SWEPO, DPO, Plackett-Luce, InfoNCA, NCA",
    "lire": "LIRE, RRHF",
    "sparsepo": "SparsePO",
    "emdpo": "EM-DPO, 2 types, 3 rounds",
    "sgpo": "SGPO, its DPO stage on 19,000 pairs",
}
IMPOSSIBLE = {("emdpo", "fsdp2"), ("sgpo", "fsdp2"), ("sgpo", "zero3")}
ROWS, SAMPLE = 63_000, 2_000  # of UltraFeedback after 1 % was set aside; drawn
PAIRS = 19_000  # of SGPO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the tables in docs/scale.md")
    args = parser.parse_args()
    text = tables()
    if args.write:
        before, _, rest = PAGE.read_text().partition("<!-- tables -->\n")
        PAGE.write_text(f"{before}<!-- tables -->\n{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}")
    else:
        print(text)


def tables() -> str:
    """A markdown table per model: GiB at the peak and hours of each method on each hardware."""
    heads = [f"{hardware}, {engine}" for hardware, engines in HARDWARE.items() for engine in engines]
    parts = []
    for name in SHAPES:
        lines = [f"| {name} | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
        for method, title in METHODS.items():
            lines.append(f"| {title} | {' | '.join(cells(name, method))} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def cells(name: str, method: str) -> list[str]:
    """Peak and hours of a method on all hardware."""
    found = []
    for hardware, engines in HARDWARE.items():
        for engine in engines:
            found.append("not possible")
            if (method, engine) not in IMPOSSIBLE:
                size, time = estimate(name, hardware, method, engine)
                found[-1] = f"{size / 2**30:.0f} GiB, {time:.{time < 10:d}f} h"
    return found


@cache
def estimate(name: str, hardware: str, method: str, engine: str) -> tuple[float, float]:
    """Bytes per GPU for a batch at the 99th percentile, and hours, of one recipe."""
    trainer_class, data, args, model_args = parse(name, hardware, method)
    plan = read_plan(str(ROOT / f"configs/accelerate/{engine}.yaml"))
    shape = shape_on(name, hardware, engine)
    run, lengths = run_facts(trainer_class, args, shape, plan), draw(args.max_length)
    count = ROWS
    if method == "sgpo":
        count, lengths = PAIRS, [(prompt, responses[:2]) for prompt, responses in lengths]
    batches = plan_batches(lengths, args, plan.processes)
    peak = total(memory(shape, cheaper([lengths[i] for i in batches.large]), plan, run))
    rows, how = fed_in_all(lengths, args.layout), passes(args, trainer_class, batches.per_process)
    operations = how.training * work(shape, rows, run, reference=how.reference).total
    operations += how.scoring * forward(shape, rows)
    speed = {"tflops": data.gpu_tflops, "utilisation": data.utilisation, "processes": plan.processes}
    return peak, hours(operations * count / SAMPLE, **speed)


@cache
def shape_on(name: str, hardware: str, engine: str):
    """The shape of a model with what the hardware's recipe trains of it."""
    _, _, args, model_args = parse(name, hardware, "swepo")
    plan = read_plan(str(ROOT / f"configs/accelerate/{engine}.yaml"))
    return shape_of(build_model(model_args, args, plan), bits=bits(model_args))


def parse(name: str, hardware: str, method: str):
    """The command line of a recipe, on a folder that holds nothing but the model's config."""
    files = [str(ROOT / f"configs/ultrafeedback/{part}.yaml") for part in ("common", name, hardware, method)]
    return train.parse(["--config", *files, "--model_name_or_path", folder_of(name), "--dry_run", "true"])


@cache
def folder_of(name: str) -> str:
    folder = Path(tempfile.mkdtemp(prefix="scale-"))
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    return str(folder)


def cheaper(rows: list[Lengths]) -> Fed:
    """The micro-batch in the layout that feeds fewer tokens."""
    return min((fed(rows, shared=shared) for shared in (True, False)), key=lambda found: found.tokens)


@cache
def draw(longest: int) -> list[Lengths]:
    """Log-normal lengths of prompts with four responses; a prompt and a response have at most `longest` tokens."""
    source, rows = random.Random(0), []
    for _ in range(SAMPLE):
        prompt = min(longest // 2, max(8, round(source.lognormvariate(4.75, 0.9))))
        responses = [max(4, round(source.lognormvariate(5.35, 0.72))) for _ in range(4)]
        rows.append((prompt, [min(response, longest - prompt) for response in responses]))
    return rows


if __name__ == "__main__":
    main()
