"""Rows per second, from a file to canonical rows and from these to tokens, beside what does the same without checks.

    python -m benchmarks.data runs/models/smollm2-135m 64000

A row is a prompt of 100 random words and four responses of 150.
"""

import json
import random
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import datasets
from transformers import AutoTokenizer

from trainers.data import load_preferences, tokenize_dataset


def measure(model: str, count: int, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha())
    draw, path = random.Random(0), str(folder / "rows.jsonl")
    with open(path, "w") as file:
        for _ in range(count):
            prompt, *texts = (" " + " ".join(draw.choices(words, k=k)) for k in (100, 150, 150, 150, 150))
            file.write(json.dumps({"prompt": prompt, "responses": texts, "scores": [1, 2, 3, 4]}) + "\n")
    rows = load_preferences(path)
    texts = [row["prompt"] + text for row in rows for text in ["", *row["responses"]]]
    parts = [texts[i : i + 5000] for i in range(0, len(texts), 5000)]
    datasets.config.HF_DATASETS_CACHE = folder / "fresh"
    for name, call in {
        "reader of datasets": lambda: datasets.load_dataset("json", data_files=path),
        "load_preferences": lambda: load_preferences(path),
        "tokenizer alone": lambda: deque(map(tokenizer, parts), maxlen=0),
        "tokenize_dataset": lambda: tokenize_dataset(rows, tokenizer),
    }.items():
        start = time.perf_counter()
        call()
        print(f"{name:20}{count / (time.perf_counter() - start):8.0f} rows/s", flush=True)


if __name__ == "__main__":
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)  # not from the cache of an earlier run
        measure(sys.argv[1], int(sys.argv[2]), Path(folder))
