"""Samples K responses per prompt, scores them and writes canonical rows that `load_preferences` reads.

    python scripts/generate.py --model runs/models/smollm2-135m \
        --prompts data/demo/prompts.jsonl --output data/demo/preferences.jsonl.gz \
        --num_generations 6 --scorer trainers.generation.rewards.vader_sentiment

Run it with `accelerate launch` to use several GPUs. A run that was killed goes on where it stopped when the same
command is given again; the samples are the same as those of an uninterrupted run. Every column of a prompt row
(`split`, `topic`, ...) is copied to its output row.
"""

import gc
import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from ..data.rows import refuse_template_options
from ..data.tokenization import UNFINISHED
from ..forward.safe_files import SAFE, refuse_pickled_weights
from ..generation.collect import (
    check_settings,
    collect_samples,
    collect_scores,
    open_folder,
    summarize,
)
from ..generation.sampler import SamplingConfig
from ..generation.scorer import check_scorer, load_scorer
from ..runs.files import read_rows, write_json, write_rows
from ..runs.settings import digest, model_fingerprint

REPLACED_COLUMNS = ("prompt", "responses", "scores", "chosen", "rejected", UNFINISHED)


@dataclass
class GenerateArguments:
    """Options of scripts/generate.py."""

    model: str = field(metadata={"help": "Folder or hub id of the policy; a folder with a PEFT adapter works too."})
    prompts: str = field(metadata={"help": "A .jsonl or .jsonl.gz file, or the hub id of a data set, with `prompt`."})
    output: str = field(metadata={"help": "File to write: .jsonl or .jsonl.gz."})
    scorer: list[str] = field(
        metadata={"help": "Import path of a reward function, or folder or hub id of a reward model. Several give the "
                  "sum, with weights written as NAME=0.5.", "nargs": "+"}
    )  # fmt: skip
    num_generations: int = field(default=4, metadata={"help": "Responses per prompt."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest response in tokens."})
    temperature: float = field(default=0.8, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus mass; 1 switches it off."})
    top_k: int | None = field(default=None, metadata={"help": "Keep the k likeliest tokens; 0 switches it off."})
    batch_size: int = field(default=16, metadata={"help": "Sequences per forward pass and process."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    dtype: str = field(
        default="float32", metadata={"help": "Weights of the policy: float32, bfloat16, float16, auto."}
    )
    scorer_batch_size: int = field(default=8, metadata={"help": "Texts per forward pass of a reward model."})
    split: str = field(default="train", metadata={"help": "Split to take from a hub data set of prompts."})
    limit: int | None = field(default=None, metadata={"help": "Use the first so many prompts."})
    as_chat: bool = field(default=False, metadata={"help": "Make plain-text prompts user messages."})
    overwrite: bool = field(default=False, metadata={"help": "Delete an earlier output and its partial results."})


def load_prompts(args: GenerateArguments) -> list[dict]:
    """Rows with a checked `prompt`, in order."""
    path = Path(args.prompts)
    if path.is_file():
        rows = read_rows(path)
    elif path.suffix in (".jsonl", ".gz") or args.prompts.startswith((".", "/")):
        raise ValueError(f"--prompts: there is no file {path}.")
    else:
        rows = list(load_dataset(args.prompts, split=args.split))
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit} must be 1 or more.")
    rows = rows[: args.limit]
    if not rows:
        raise ValueError(f"--prompts: {args.prompts} has no rows.")
    for i, row in enumerate(rows):
        prompt = row.get("prompt")
        if not prompt or not isinstance(prompt, str | list):
            raise ValueError(f"--prompts: row {i} needs a `prompt`, text or messages; it has {sorted(row)}.")
        if args.as_chat and isinstance(prompt, str):
            row["prompt"] = [{"role": "user", "content": prompt}]
        refuse_template_options(row)
    return rows


def parse_scorers(specs: list[str]) -> list[dict]:
    """`NAME` or `NAME=weight` -> the dicts `load_scorer` takes."""
    parts = []
    for spec in specs:
        name, separator, weight = spec.rpartition("=")
        try:
            parts.append({"spec": name, "weight": float(weight)} if separator else {"spec": spec, "weight": 1.0})
        except ValueError:
            raise ValueError(f"--scorer {spec}: what follows = must be a weight such as 0.5.") from None
    return parts


def run_settings(args: GenerateArguments, rows: list[dict]) -> dict:
    """What the output depends on. Batch sizes and paths of files do not belong here."""
    names = ("num_generations", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "dtype")
    fingerprint = model_fingerprint(args.model)
    content = json.dumps(rows, sort_keys=True, ensure_ascii=True, default=str)
    return {
        "model": fingerprint or args.model,
        "prompts": hashlib.sha256(content.encode()).hexdigest(),
        "scorer": parse_scorers(args.scorer),
        **{name: getattr(args, name) for name in names},
    }


def is_finished(args: GenerateArguments, settings: dict) -> bool:
    """True when the output is there and was made with these settings.

    Raises:
        ValueError: the output was made with others, or its origin is unknown.
    """
    output, manifest = Path(args.output), manifest_path(args.output)
    if not output.exists() or parts_path(args.output).exists():
        return False
    if not manifest.exists():
        raise ValueError(
            f"{output} exists, but not {manifest.name} beside it: choose another --output or --overwrite."
        )
    check_settings(manifest, settings)
    return True


def manifest_path(output: str) -> Path:
    return Path(f"{output}.manifest.json")


def parts_path(output: str) -> Path:
    return Path(f"{output}.parts")


def generate(args: GenerateArguments, accelerator: Accelerator) -> dict:
    """Samples, scores, writes; returns the statistics."""
    sampling = SamplingConfig(**{f: getattr(args, f) for f in SamplingConfig.__dataclass_fields__})
    rows = load_prompts(args)
    check_scorer(parse_scorers(args.scorer))
    settings = run_settings(args, rows)
    if args.overwrite and accelerator.is_main_process:
        shutil.rmtree(parts_path(args.output), ignore_errors=True)
        for path in (Path(args.output), manifest_path(args.output)):
            path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    if is_finished(args, settings):
        accelerator.print(f"{args.output} is complete already.")
        return json.loads(manifest_path(args.output).read_text())["statistics"]
    folder = open_folder(parts_path(args.output), settings, accelerator)

    def load_policy():
        refuse_pickled_weights(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, **SAFE)
        return model.to(accelerator.device), tokenizer

    def load_scorers():
        gc.collect()  # the policy is gone: its memory is for the reward model
        options = {"batch_size": args.scorer_batch_size, "device": accelerator.device}
        return load_scorer(parse_scorers(args.scorer), **options)

    prompts = [row["prompt"] for row in rows]
    samples = collect_samples(folder, load_policy, prompts, sampling, accelerator=accelerator)
    responses = [[sample.text for sample in row] for row in samples]
    names = sorted({name for row in rows for name in row if name not in (*REPLACED_COLUMNS, "prompts", "completions")})
    columns = {name: [row.get(name) for row in rows] for name in names}
    scores = collect_scores(folder, load_scorers, prompts, responses, columns=columns, accelerator=accelerator)
    statistics = summarize(samples, scores)
    if accelerator.is_main_process:
        kept = [{k: v for k, v in row.items() if k not in REPLACED_COLUMNS} for row in rows]
        cut = [[sample.truncated for sample in row] for row in samples]
        answers = zip(prompts, responses, scores, cut, kept, strict=True)
        names = ("prompt", "responses", "scores", UNFINISHED)
        write_rows(args.output, (dict(zip(names, parts, strict=True)) | rest for *parts, rest in answers))
        manifest = {"settings": settings, "hash": digest(settings), "statistics": statistics}
        write_json(manifest_path(args.output), {**manifest, "made_with": provenance(args)})
        shutil.rmtree(folder)
    accelerator.wait_for_everyone()
    return statistics


def provenance(args: GenerateArguments) -> dict:
    """For the reader of a manifest; not compared."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"model": args.model, "prompts": args.prompts, "batch_size": args.batch_size, **packages}


def report(statistics: dict) -> str:
    lines = [f"  {name.replace('_', ' '):<38}{value:>12,}" for name, value in statistics.items()]
    return "\n".join(lines)


def main() -> None:
    sys.path.append(os.getcwd())  # a reward function in the user's own folder can be named
    (args,) = HfArgumentParser(GenerateArguments).parse_args_into_dataclasses()
    if Path(args.output).suffix not in (".jsonl", ".gz"):
        sys.exit(f"--output must end in .jsonl or .jsonl.gz, got {args.output}.")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    try:
        statistics = generate(args, accelerator)
    except ValueError as error:
        sys.exit(f"error: {error}")
    accelerator.print(f"{args.output}\n{report(statistics)}")


if __name__ == "__main__":
    main()
