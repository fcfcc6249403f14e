"""Memory of the recipes in configs/ultrafeedback, as `--dry_run` reckons it: the tables of docs/scale.md.

    python -m benchmarks.scale_table             # prints them
    python -m benchmarks.scale_table --write     # puts them into docs/scale.md

Needs neither weights nor data: the shapes of the two models stand here, and the lengths of the rows are drawn to have
about the means of a sample of UltraFeedback (prompts 180 tokens, responses 272).
"""

import json
import random
import sys
import tempfile
from functools import cache
from pathlib import Path

from trainers.cli import train
from trainers.cli.dry_run import build_model, estimate_of, plan_batches
from trainers.estimate import fed, read_plan

ROOT = Path(__file__).resolve().parents[1]
PAGE, BEGIN, END = ROOT / "docs/scale.md", "<!-- tables -->\n", "<!-- end -->"
COMMON = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "dtype": "bfloat16",
}  # fmt: skip
MODELS = {
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
    "emdpo": "EM-DPO, each M-step",
    "sgpo": "SGPO, its DPO stage",
}


def tables() -> str:
    """A markdown table per model: GiB at the peak of each method on each hardware."""
    columns = [(hardware, engine) for hardware, engines in HARDWARE.items() for engine in engines]
    parts = []
    for model in MODELS:
        lines = [f"| {model} | {' | '.join(map(', '.join, columns))} |", f"|---|{'---|' * len(columns)}"]
        for method, title in METHODS.items():
            sizes = [peak(model, hardware, method, engine) for hardware, engine in columns]
            cells = [f"{size / 2**30:.0f} GiB" for size in sizes]
            lines.append(f"| {title} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


@cache
def peak(name: str, hardware: str, method: str, engine: str) -> float:
    """Bytes per GPU for a batch at the 99th percentile."""
    trainer_class, _, args, model_args = parse(name, hardware, method)
    plan = read_plan(str(ROOT / f"configs/accelerate/{engine}.yaml"))
    estimate = estimate_of(trainer_class, args, model_args, build_model(model_args, args, plan), plan)
    lengths = draw(args.max_length, 2 if method == "sgpo" else 4)
    large = plan_batches(lengths, args, plan.processes).at(0.99)
    return sum(estimate.memory(fed([lengths[i] for i in large])).values())


def parse(name: str, hardware: str, method: str):
    """The command line of a recipe, on a folder that holds nothing but the model's config."""
    files = [str(ROOT / f"configs/ultrafeedback/{part}.yaml") for part in ("common", name, hardware, method)]
    return train.parse(["--config", *files, "--model_name_or_path", folder_of(name), "--dry_run", "true"])


@cache
def folder_of(name: str) -> str:
    folder = Path(tempfile.mkdtemp(prefix="scale-"))
    (folder / "config.json").write_text(json.dumps(MODELS[name]))
    return str(folder)


def draw(longest: int, responses: int) -> list[tuple[int, list[int]]]:
    """Log-normal lengths of 2,000 prompts with responses; a prompt and a response have at most `longest` tokens."""
    source, rows = random.Random(0), []
    for _ in range(2000):
        prompt = min(longest // 2, max(8, round(source.lognormvariate(4.75, 0.9))))
        drawn = [max(4, round(source.lognormvariate(5.35, 0.72))) for _ in range(4)][:responses]
        rows.append((prompt, [min(response, longest - prompt) for response in drawn]))
    return rows


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}{tables()}\n{END}{rest.partition(END)[2]}")
    else:
        print(tables())
