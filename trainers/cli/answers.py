"""Sampled answers of two policies to the same prompts, compared in ways that a mean reward hides."""

import re
from collections.abc import Callable

import numpy as np

from ..statistics import bootstrap_interval

Answer = dict  # one sampled response: text, score, tokens, truncated

MEASURES: dict[str, Callable[[Answer], float]] = {
    "reward": lambda a: a["score"],
    "length in tokens": lambda a: a["tokens"],
    "share cut off at the limit": lambda a: a["truncated"],
    "share of repeated word triples": lambda a: repetition(a["text"]),
    "exclamation marks": lambda a: a["text"].count("!"),
}


def per_prompt(answers: list[list[Answer]], measure: Callable[[Answer], float]) -> np.ndarray:
    """Mean of a measure over the answers to each prompt, (N,)."""
    return np.array([np.mean([measure(a) for a in row]) for row in answers])


def compare_answers(before: list[list[Answer]], after: list[list[Answer]]) -> dict[str, dict]:
    """Means over prompts before and after, and the paired gain, each with its interval."""
    compared = {}
    for name, measure in MEASURES.items():
        first, second = (per_prompt(rows, measure) for rows in (before, after))
        arrays = {"before": first, "after": second, "gain": second - first}
        compared[name] = {key: bootstrap_interval(values) for key, values in arrays.items()}
    return compared


def at_equal_length(first: list[str], second: list[str]) -> tuple[list[str], list[str]]:
    """Both texts of each pair, cut to the words of the shorter one."""
    words = [(a.split(), b.split()) for a, b in zip(first, second, strict=True)]
    sizes = [min(map(len, pair)) for pair in words]
    before, after = ([" ".join(p[side][:n]) for p, n in zip(words, sizes, strict=True)] for side in (0, 1))
    return before, after


def matched_gain(before: list[list[Answer]], after: list[list[Answer]], scorer: Callable) -> dict:
    """Gain in reward with both answers of a pair cut to the words of the shorter one: what length cannot explain."""
    gains = []
    for rows in zip(before, after, strict=True):
        sides = at_equal_length(*([answer["text"] for answer in row] for row in rows))
        first, second = (np.mean(scorer(prompts=[""] * len(texts), completions=texts)) for texts in sides)
        gains.append(second - first)
    return bootstrap_interval(np.array(gains))


def repetition(text: str, n: int = 3) -> float:
    """Share of the n-grams of words that occurred earlier in the text; 0 for a text of fewer than n words."""
    words = re.findall(r"\w+", text.lower())
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
