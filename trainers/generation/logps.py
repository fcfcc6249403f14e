"""Log-probabilities of given responses under a policy that every process holds whole, kept in a folder."""

from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset

from ..data import PreferenceCollator
from ..data.tokenization import tokenize_dataset
from ..forward.cache import LogpsCache, response_keys
from ..forward.policy import base_model, disable_dropout
from ..forward.reference_pass import ReferenceTable
from ..forward.run import Runner
from ..runs.processes import Processes, free_memory

NAME = "logps"


def collect_logps(
    folder: str | Path, load: Callable[[], tuple], tokenizer, prompts: list, responses: list[list[str]],
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
    rows = [
        {"prompt": p, "responses": texts if isinstance(p, str) else [[_answer(text)] for text in texts],
         "scores": [0.0] * len(texts)} for p, texts in zip(prompts, responses, strict=True)
    ]  # fmt: skip
    tokens, _ = tokenize_dataset(Dataset.from_list(rows), tokenizer, invalid="error")
    cache = LogpsCache(folder, NAME)
    table = ReferenceTable(cache, per_token=True)
    table.register(tokens)
    if table.missing():
        _fill(table, load()[0], PreferenceCollator(tokenizer.pad_token_id), layout, processes)
        free_memory()
    keys = [response_keys(row["prompt_ids"], row["response_ids"]) for row in tokens]
    return [[list(cache.entries[key]) for key in row] for row in keys]


def _fill(table: ReferenceTable, policy, collator, layout: str, processes: Processes) -> None:
    disable_dropout(policy)
    policy.eval()
    runner = Runner([base_model(policy)], layout)

    def score(rows: list[dict]) -> torch.Tensor:
        batch = {name: tensor.to(processes.device) for name, tensor in collator(rows).items()}
        with torch.no_grad():
            runner.check(policy, batch, processes)
            return runner(policy, batch).logps

    table.fill(score, processes, budget=1, title="log-probabilities")


def _answer(text: str) -> dict:
    return {"role": "assistant", "content": text}
