"""Draws the rows that benchmarks.run measures on, without torch: who starts processes must stay small."""

import json
import random
from pathlib import Path
from typing import NamedTuple


class Setting(NamedTuple):
    """A prompt with K responses, and which variants are measured on it.

    The prompt has 0.8 to 1.2 times `prompt` tokens, a response a quarter of `longest` up to it. With `draft` every
    second response begins with that share of the one before it, as an improved answer does with its draft.
    """

    k: int
    prompt: int
    variants: tuple[str, ...]
    longest: int = 256
    pairs: int = 1  # of a prompt that TRL is fed in a timed step; its other pairs cost the same
    draft: float = 0.0

    def lengths(self, seed: int) -> tuple[int, list[int]]:
        """Tokens of the prompt and of each response."""
        source = random.Random(seed)
        prompt = source.randint(round(0.8 * self.prompt), round(1.2 * self.prompt))
        return prompt, [source.randint(self.longest // 4, self.longest) for _ in range(self.k)]


def write_synthetic(path: Path, lengths: list[tuple[int, list[int]]], vocabulary: int, draft: float = 0.0) -> str:
    """Random token ids of these lengths, with scores that all differ."""
    source, rows = random.Random(0), []
    for p, sizes in lengths:
        prompt, *responses = ([source.randrange(10, vocabulary) for _ in range(n)] for n in (p, *sizes))
        for before, after in zip(responses[::2], responses[1::2], strict=False):
            after[: int(draft * len(after))] = before[: int(draft * len(before))]
        rows.append({"prompt_ids": prompt, "response_ids": responses, "scores": [float(k) for k in range(len(sizes))]})
    path.write_text(json.dumps(rows))
    return str(path)
