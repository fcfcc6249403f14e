"""Prepares benchmarks.run: describes the machine, and draws the rows that every variant is measured on.

    python -m benchmarks.rows '<job as JSON>'

Prints one JSON line. Runs in a process of its own, because what is imported here stays in memory.
"""

import importlib.metadata
import json
import platform
import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import psutil
import torch
from transformers import AutoTokenizer

from trainers import load_preferences
from trainers.data import tokenize_row
from trainers.precision import FAST, instructions, settle_dtype

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")


def machine() -> dict:
    """Name, cores, memory and versions, without host name or paths."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cuda = torch.cuda.is_available()
    return {
        "cpu": names[0] if names else platform.machine(),
        "instructions": instructions(),
        "fast": settle_dtype(FAST, torch.device("cuda" if cuda else "cpu")),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpu_memory": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
    }


def write_rows(job: dict) -> None:
    """One file of rows per repeat, the same for every variant.

    A file holds the rows of one step twice: the first time warms up. Memory that a process touches for the first
    time costs as much as the step itself on some machines, so a warm-up must be as large as what is timed.
    """
    rows = drawn(job)
    for path in job["outputs"]:
        step = list(islice(rows, job["prompts"]))
        if len(step) < job["prompts"]:
            raise ValueError(f"{job['data']} has too few prompts with {job['k']} different scores.")
        Path(path).write_text(json.dumps(step * 2))


def drawn(job: dict) -> Iterator[dict]:
    """Prompts in random order, tokenised, with k random responses of k different scores; without those of fewer."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    dataset = load_preferences(job["data"], as_chat=tokenizer.chat_template is not None)
    draw = random.Random(job["seed"])
    for place in reversed(draw.sample(range(len(dataset)), len(dataset))):
        row, chosen = dataset[place], {}
        for i in draw.sample(range(len(row["scores"])), len(row["scores"])):
            chosen.setdefault(row["scores"][i], row["responses"][i])
        if len(chosen) >= job["k"]:
            scores, responses = zip(*list(chosen.items())[: job["k"]], strict=True)
            row = tokenize_row({"prompt": row["prompt"], "responses": responses, "scores": scores}, tokenizer)
            cut = [ids[: job["max_response"]] for ids in row["response_ids"]]
            yield {"prompt_ids": row["prompt_ids"], "response_ids": cut, "scores": row["scores"]}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(write_rows(job) if "outputs" in job else machine()), flush=True)
