"""The rows that every method of a comparison is trained and judged on: cut to one size, rescaled."""

import json
import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from ..config import option
from ..data.rows import UNFINISHED, unfinished
from ..generation.rewards import completion_text


def scale_scores(scores: list[float], how: str) -> list[float]:
    """Scores of one prompt on a common scale; their order and their ties stay as they are.

    - `rank`: ranks, evenly spread over [-1, 1]; equal scores share their mean rank. Sizes of differences are given up,
      which is what heavy-tailed scores need.
    - `zscore`: mean 0 and standard deviation 1 (of the population); 0 where all are equal.
    """
    if how == "none":
        return list(scores)
    values = rankdata(scores) if how == "rank" else np.asarray(scores, dtype=float)
    if values.max() == values.min():
        return [0.0] * len(scores)
    if how == "rank":
        return [float(v) for v in 2 * (values - 1) / (len(values) - 1) - 1]
    return [float(v) for v in (values - values.mean()) / values.std()]


@dataclass(kw_only=True)
class RowOptions:
    """Which responses of a row are compared, and on what scale their scores are."""

    responses_per_prompt: int | None = option(None, "Draw so many; all without it.", at_least=2)
    max_response_tokens: int | None = option(None, "Leave longer responses out.")
    max_prompt_tokens: int | None = option(None, "Leave rows with longer prompts out.")
    score_scale: str = option("none", "Rescale the scores inside each row.", choices=["none", "rank", "zscore"])
    draw_seed: int = option(0, "Seed of the drawn responses; the same for all runs.")


def cut_rows(rows: list[dict], count_tokens, options: RowOptions) -> tuple[list[dict], Counter]:
    """Rows of equal size, and the number of rows that were left out by reason.

    Responses of more than `max_response_tokens` are left out, then `responses_per_prompt` of the rest are drawn at
    random, by a seed that depends on the prompt alone. `count_tokens(text)` gives the length of a text.
    """
    longest, longest_prompt = options.max_response_tokens, options.max_prompt_tokens
    kept, seen = [], set()
    dropped: Counter[str] = Counter()
    for row in rows:
        key = json.dumps(row["prompt"], sort_keys=True)
        texts = [completion_text(response) for response in row["responses"]]
        fits = [k for k, text in enumerate(texts) if not longest or count_tokens(text) <= longest]
        size = options.responses_per_prompt or max(len(fits), 2)
        if key in seen:
            reason: str | None = "the prompt occurs twice"
        elif longest_prompt and count_tokens(completion_text(row["prompt"])) > longest_prompt:
            reason = f"a prompt of more than {longest_prompt} tokens"
        elif len(fits) < size:
            reason = f"fewer than {size} responses of at most {longest} tokens"
        else:
            drawn = sorted(random.Random(f"{options.draw_seed} {key}").sample(fits, size))
            scores = scale_scores([row["scores"][k] for k in drawn], options.score_scale)
            reason = "all scores tied" if max(scores) == min(scores) else None
        seen.add(key)
        if reason:
            dropped[reason] += 1
            continue
        own = ("prompt", "responses", "scores", UNFINISHED)
        rest = {n: value for n, value in row.items() if n not in own and not isinstance(value, list | dict)}
        kept.append({
            "prompt": row["prompt"],
            "responses": [row["responses"][k] for k in drawn],
            "scores": scores,
            UNFINISHED: [unfinished(row)[k] for k in drawn],
            **rest,
        })  # fmt: skip
    return kept, dropped
