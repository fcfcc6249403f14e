"""Tokens per second of sampling, in turns: batches of `generate`, this process's own decoding, and any engine.

    python -m benchmarks.sampling runs/models/smollm2-135m [ENGINE ...]

Four prompts of the demo with eight samples each, of at most 128 tokens, 16 at a time, at temperature 0.7 in float32;
and how many tokens these samples have in the shared layout, with and without the beginnings that some have in common.
An ENGINE is what the option `engine` takes, as "vllm serve --dtype float32" or the address of a server.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.forward.tree import grow
from trainers.generation import HuggingFace, Request, Sample, SamplingConfig
from trainers.generation.engine import opened
from trainers.generation.sampler import TRANSFORMERS, encode_prompts, sample_seed
from trainers.generation.start import Weights

PROMPTS, COUNT, TURNS = Path(__file__).resolve().parents[1] / "data/demo/prompts.jsonl", 4, 3
CONFIG = SamplingConfig(num_generations=8, max_new_tokens=128, temperature=0.7, batch_size=16)


def requests(tokenizer) -> list[Request]:
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[:COUNT]]
    pairs = sorted(zip(encode_prompts(tokenizer, prompts), prompts, strict=True), key=lambda pair: -len(pair[0]))
    indices = range(CONFIG.num_generations)
    return [Request(ids, sample_seed(CONFIG.seed, 0, prompt, j)) for ids, prompt in pairs for j in indices]


def shared_tokens(wanted: list[Request], made: dict[int, Sample]) -> str:
    """The tokens that a pass over the samples feeds."""
    trunk = tree = 0
    for prompt, places in groupby(range(len(wanted)), lambda at: wanted[at].prompt_ids):
        sequences = [np.array(prompt + made[at].token_ids[:-1]) for at in places]
        trunk += sum(map(len, sequences)) - (len(sequences) - 1) * len(prompt)
        tree += grow(sequences).tokens
    return f"{trunk:,} tokens with each prompt once, {tree:,} with every shared beginning once"


def in_batches(backend: HuggingFace, wanted: list[Request]) -> list[dict[int, Sample]]:
    size = CONFIG.batch_size
    return [dict(enumerate(backend.generate(wanted[i : i + size], CONFIG), i)) for i in range(0, len(wanted), size)]


def measure(path: str, engines: list[str], folder: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    weights, wanted = Weights(path, None, tokenizer, "float32"), requests(tokenizer)
    with ExitStack() as stack:
        ways: dict[str, Callable] = {"generate": lambda: in_batches(HuggingFace(model, tokenizer), wanted)}
        for engine in [TRANSFORMERS, *engines]:
            backend = stack.enter_context(opened(engine, weights, folder))
            ways[engine] = lambda backend=backend: backend.sample(wanted, CONFIG)
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        first: dict[int, Sample] = {}
        for _ in range(TURNS):
            for name, way in ways.items():
                start, made = time.perf_counter(), dict[int, Sample]()
                for portion in way():
                    made |= portion
                tokens = sum(len(sample.token_ids) for sample in made.values())
                speeds[name].append(tokens / (time.perf_counter() - start))
                first = first or made
                alike = sum(made[at].token_ids == first[at].token_ids for at in made)
                print(
                    f"{name:20} {speeds[name][-1]:8.1f} tokens/s, {alike} of {len(made)} samples as the first",
                    flush=True,
                )
    print(shared_tokens(wanted, first))
    for name, own in speeds.items():
        ratios = [new / old for new, old in zip(own, speeds["generate"], strict=True)]
        shown = [f"{statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in (own, ratios)]
        print(f"{name:20} {shown[0]} tokens/s, {shown[1]} times generate's")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        measure(sys.argv[1], sys.argv[2:], Path(folder))
