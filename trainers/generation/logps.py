"""Log-probabilities of given responses under a policy that every process holds whole, kept in a folder."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

from datasets import Dataset

from ..data.tokenization import tokenize_dataset
from ..forward.cache import score_rows
from ..runs.processes import Processes, free_memory
from .rewards import as_completion
from .sampler import Prompt


def collect_logps(
    folder: str | Path, load: Callable[[], tuple], tokenizer, prompts: list[Prompt], responses: list[list[str]],
    *, layout: str = "auto", processes: Processes | None = None,
) -> list[list[list[float]]]:  # fmt: skip
    """For every prompt and response the log-probability of each response token, the end token included.

    Args:
        folder: where they are kept; a killed pass goes on from there. A folder belongs to one policy.
        load: returns policy and tokenizer. It is not called when nothing is missing.
        prompts, responses: texts, or messages with the texts of the assistant's turn; 2 or more responses each.

    One prompt goes through the policy at a time, so that no number depends, by rounding, on where a pass was killed.

    Raises:
        ValueError: a prompt or a response without tokens.
    """
    processes = processes or Processes()
    rows = tokenize_texts(tokenizer, prompts, responses)
    logps = score_rows(
        lambda: load()[0], [rows], folder, accelerator=processes, pad_token_id=tokenizer.pad_token_id, layout=layout,
        per_token=True, budget=1,
    )  # fmt: skip
    free_memory()
    return cast("list[list[list[float]]]", logps[0])  # not sums, as it is per token


def tokenize_texts(tokenizer, prompts: list[Prompt], responses: list[list[str]]) -> Dataset:
    """Tokenised rows of prompts and the texts that answer each of them, 2 or more.

    Raises:
        ValueError: a prompt or a response without tokens.
    """
    rows = [
        {"prompt": p, "responses": [as_completion(p, text) for text in texts], "scores": [0.0] * len(texts)}
        for p, texts in zip(prompts, responses, strict=True)
    ]
    return tokenize_dataset(Dataset.from_list(rows), tokenizer, invalid="error")[0]
