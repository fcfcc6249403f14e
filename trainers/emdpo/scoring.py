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

from ..data import PreferenceCollator
from ..forward.cache import LogpsCache, response_keys
from ..forward.policy import base_model, disable_dropout
from ..forward.reference import Reference
from ..forward.reference_pass import ReferenceTable
from ..forward.run import Runner
from ..likelihood import ordered_stages, ranking_logps
from ..runs.processes import Processes, free_memory

NAME = "logps"  # of the file, which lies in the folder of its policy
CHUNK = 4096  # rows whose likelihood is computed at a time


class PolicyScorer:
    """Scores rows with one policy after the other; at most one of them is in memory.

    Args:
        datasets: tokenised rows (`prompt_ids`, `response_ids`).
        accelerator: places and shards a policy like one that is trained.
        collator, layout: as in training.
        budget: tokens per batch and process.
    """

    def __init__(
        self, datasets: list[Dataset], accelerator: Accelerator, collator: PreferenceCollator, layout: str, budget: int
    ):
        self.datasets, self.accelerator, self.collator = datasets, accelerator, collator
        self.layout, self.budget = layout, budget
        self._keys = [
            [response_keys(row["prompt_ids"], row["response_ids"]) for row in rows.select_columns(
                ["prompt_ids", "response_ids"])] for rows in datasets
        ]  # fmt: skip

    def __call__(self, folder: Path, load: Callable[[], torch.nn.Module], title: str) -> list[list[list[float]]]:
        """For every data set and row the K sums over the response tokens, read from `folder` or made now.

        `load()` gives the policy and is called only if something is missing.
        """
        cache = LogpsCache(folder, NAME)
        table = ReferenceTable(cache, per_token=False)
        for rows in self.datasets:
            table.register(rows)
        if table.missing():
            self._fill(table, load(), title)
            free_memory()
        # Also where a kill came after the last part: all entries are there, and what it left is of no use.
        Processes().main(lambda: _tidy(cache))
        return [[[cache.entries[key] for key in keys] for keys in rows] for rows in self._keys]

    def _fill(self, table: ReferenceTable, model: torch.nn.Module, title: str) -> None:
        disable_dropout(model)
        runner = Runner([base_model(model)], self.layout)
        policy = self._place(model)

        def score(rows: list[dict]) -> torch.Tensor:
            batch = {k: v.to(self.accelerator.device) for k, v in self.collator(rows).items()}
            with torch.no_grad(), self.accelerator.autocast():
                runner.check(policy, batch, self.accelerator)
                return runner(policy, batch).logps

        table.fill(score, self.accelerator, budget=self.budget, title=title)
        if policy is not model:
            policy.destroy()  # an engine keeps its hooks and buffers otherwise

    def _place(self, model: torch.nn.Module) -> torch.nn.Module:
        """The frozen policy on the device, or its shares in an engine."""
        if self.accelerator.state.deepspeed_plugin is None:
            return model.to(self.accelerator.device).requires_grad_(False).eval()
        frozen = Reference(own=True, model=model)
        frozen.prepare(self.accelerator)
        return frozen.model


def _tidy(cache: LogpsCache) -> None:
    cache.finish()
    for half_written in cache.path.parent.glob(f"{cache.path.name}.*.tmp"):
        half_written.unlink()


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
