"""A small story model that goes on from openings, and the sentiment of what it says: the world of two experiments."""

import itertools
import os
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.generation.rewards import vader_sentiment

from .frame import Point
from .worlds import exact_kl, sample

# The folder of a TinyStories model of 260,032 parameters, which is not part of this package: docs/results/swepo.md.
MODEL = Path(os.environ.get("POLYPO_STORIES", "../shared/models/stories260K"))
TOKENS = 40  # of every response
OPENINGS = (
    "Once upon a time, there was a {kind} named {name}. One day, {name}",
    "{name} was a {kind} who lived near the woods. In the morning, {name}",
    "One day, a {kind} named {name} went outside. It was raining and {name}",
    "There was a {kind} called {name}. {name} had a best friend, but",
    "{name} the {kind} found a big box. Inside the box,",
    "It was late and {name} the {kind} could not sleep. Then",
)
KINDS = ("little girl", "little boy", "small dog", "brown bear", "shy cat", "old man")
NAMES = {"train": ("Lily", "Tom", "Sue", "Max", "Mia", "Ben"), "test": ("Anna", "Tim", "Lucy", "Jack")}


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def story_model():
    """The reference, and the start of every policy.

    Raises:
        FileNotFoundError: `MODEL` is no folder of a model.
    """
    if not (MODEL / "config.json").exists():
        raise FileNotFoundError(
            f"There is no story model in {MODEL}: set POLYPO_STORIES to a folder of stories260K with config.json, "
            "weights and tokenizer; docs/results/swepo.md says how to make it."
        )
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def prompts(split: str, count: int, seed: int, openings: tuple[str, ...] = OPENINGS) -> list[list[int]]:
    """Token ids of `count` different prompts, drawn by the seed; the splits share no name."""
    texts = [opening.format(kind=kind, name=name)
             for opening, kind, name in itertools.product(openings, KINDS, NAMES[split])]  # fmt: skip
    return [tokenizer()(text)["input_ids"] for text in random.Random(seed).sample(texts, count)]


def sentiment(samples: torch.Tensor) -> np.ndarray:
    """(P,K) VADER's compound score of each sample (P,K,R)."""
    texts = tokenizer().batch_decode(samples.flatten(0, 1), skip_special_tokens=True)
    return np.reshape(vader_sentiment([None] * len(texts), texts), samples.shape[:2])


def measuring(reference, seed: int, *, openings: int = 32, samples: int = 8):
    """`rating` of the sentiment of samples on held-out openings, which are those of the seed."""
    return rating(reference, prompts("test", openings, seed), seed, sentiment, samples, TOKENS)


def rating(reference, questions: list[list[int]], seed: int, score: Callable, samples: int, tokens: int):
    """policy -> mean score of its samples on `questions`, and their exact KL from the reference.

    The random stream is that of the seed, the same for every policy.
    """

    def measure(policy) -> Point:
        drawn, logits = sample(policy, questions, samples, tokens, seed + 10_000)
        kl = exact_kl(logits, reference, questions, drawn)
        return {"reward": float(score(drawn).mean()), "kl": float(kl.mean())}

    return measure
