"""Log-probabilities of all responses of some rows under a frozen policy, each response once, on all processes.

They lie in a parquet file keyed by the token ids, so that a killed pass goes on, a response that many annotators
judged is scored once, and neither the order of the rows nor the number of processes matters.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset

from ..forward.cache import score_rows
from ..likelihood import ordered_stages, ranking_logps
from ..runs.processes import free_memory

CHUNK = 4096  # rows whose likelihood is computed at a time


class PolicyScorer:
    """Scores rows with one policy after the other; at most one of them is in memory.

    Args:
        datasets: tokenised rows (`prompt_ids`, `response_ids`).
        accelerator: places and shards a policy like one that is trained.
        pad_token_id, layout: as in training.
        budget: tokens per batch and process.
    """

    def __init__(self, datasets: list[Dataset], accelerator: Accelerator, pad_token_id: int, layout: str, budget: int):
        self.datasets = datasets
        self.options = {
            "accelerator": accelerator, "pad_token_id": pad_token_id, "layout": layout, "budget": budget
        }  # fmt: skip

    def __call__(self, folder: Path, load: Callable[[], torch.nn.Module], title: str) -> list[list[list[float]]]:
        """For every data set and row the K sums over the response tokens, read from `folder` or made now.

        `load()` gives the policy and is called only if something is missing.
        """
        scores = score_rows(load, self.datasets, folder, title=title, **self.options)
        free_memory()
        return scores


def item_logps(
    logps: list[list[float]], reference: list[list[float]], scores: list[list[float]], *, beta: float, top: int | None
) -> np.ndarray:
    """(J,) log-likelihood of each row's ranking under one policy, in float64. Lists of K numbers per row."""
    out = [np.empty(0)]
    for start in range(0, len(scores), CHUNK):
        chunk = slice(start, start + CHUNK)
        rewards, values, mask = _rewards(logps[chunk], reference[chunk], scores[chunk], beta)
        out.append(ranking_logps(rewards, values, mask, top=top).numpy())
    return np.concatenate(out)


def usable(scores: list[list[float]], top: int | None) -> np.ndarray:
    """(J,) bool: the rows that say anything, with at least one stage."""
    values, mask = _pad(scores)
    return ordered_stages(values, mask, top).any(-1).numpy()


def _rewards(logps, reference, scores, beta: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values, mask = _pad(scores)
    return beta * (_pad(logps)[0] - _pad(reference)[0]), values, mask


def _pad(rows: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows), default=0)
    values = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)
    return values, torch.arange(width) < torch.tensor([len(row) for row in rows]).unsqueeze(-1)
