"""Prepares benchmarks.run: describes the machine, and draws the rows that every variant is measured on.

    python -m benchmarks.rows '<job as JSON>'

Prints one JSON line. Runs in a process of its own, because what is imported here stays in memory.
"""

import importlib.metadata
import json
import platform
import random
import sys
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


def write_rows(job: dict) -> dict:
    """Draw K responses with K different scores for each prompt; one file per repeat, the same for every variant.

    A file holds the rows of one step twice: the first time warms up. Memory that a process touches for the first
    time costs as much as the step itself on some machines, so a warm-up must be as large as what is timed.
    """
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    dataset = load_preferences(job["data"], as_chat=tokenizer.chat_template is not None)
    draw = random.Random(job["seed"])
    order = draw.sample(range(len(dataset)), len(dataset))
    too_few = 0
    for path in job["outputs"]:
        rows = []
        while len(rows) < job["prompts"]:
            if not order:
                raise ValueError(f"{job['data']} has too few prompts with {job['k']} different scores.")
            row = draw_responses(dataset[order.pop()], job["k"], draw)
            too_few += row is None
            if row is not None:
                rows.append(cut(tokenize_row(row, tokenizer), response=job["max_response"]))
        Path(path).write_text(json.dumps(rows + rows))
    return {"passed_over": too_few}


def draw_responses(row: dict, k: int, draw: random.Random) -> dict | None:
    """k random responses of a canonical row with k different scores, None if there are fewer."""
    kept, scores = [], set()
    for i in draw.sample(range(len(row["scores"])), len(row["scores"])):
        if row["scores"][i] not in scores and len(kept) < k:
            kept.append(i)
            scores.add(row["scores"][i])
    if len(kept) < k:
        return None
    return {
        "prompt": row["prompt"],
        "responses": [row["responses"][i] for i in kept],
        "scores": [row["scores"][i] for i in kept],
    }


def cut(row: dict, *, response: int) -> dict:
    """The first `response` tokens of each response."""
    return {
        "prompt_ids": row["prompt_ids"],
        "response_ids": [ids[:response] for ids in row["response_ids"]],
        "scores": row["scores"],
    }


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(write_rows(job) if "outputs" in job else machine()), flush=True)
