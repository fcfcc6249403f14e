"""Scorers: callables `(prompts, completions, **columns) -> list[float]`, the signature of TRL's reward functions.

`prompts` and `completions` are aligned lists, one entry per response; a prompt given as messages comes with its
completion as a list of messages, as in TRL. `columns` are the other columns of the rows, repeated per response.
"""

import importlib
import logging
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..forward.policy import SAFE

logger = logging.getLogger(__name__)

Scorer = Callable[..., list[float]]
Spec = str | Callable | dict | list
DOTTED_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def load_scorer(spec: Spec, *, batch_size: int = 8, dtype=None, device: torch.device | str | None = None) -> Scorer:
    """Makes a checked scorer from its description.

    Args:
        spec: dotted import path of a callable; folder or hub id of a sequence-classification reward model with one
            output; a callable; `{"spec": ..., "weight": ...}`; or a list of these, which gives the weighted sum.
        batch_size: texts per forward pass of a reward model.
        dtype: of a reward model's weights; None is the dtype they were saved in.
        device: of a reward model; None is CUDA when there is one, else the CPU.

    Returns a callable that raises ValueError, naming the scorer, when the scores are not as many finite numbers as
    there are completions.

    Raises:
        ValueError: as `check_scorer`, and a reward model with several outputs.
    """
    options = {"batch_size": batch_size, "dtype": dtype, "device": device}
    parts = [
        (weight, name, function or RewardModelScorer(name, **options)) for weight, name, function in check_scorer(spec)
    ]

    def score(prompts, completions, **columns) -> list[float]:
        scored = [
            [weight * value for value in _checked(name, function(prompts=prompts, completions=completions, **columns),
                                                  len(completions))] for weight, name, function in parts
        ]  # fmt: skip
        return [math.fsum(values) for values in zip(*scored, strict=True)]

    return score


def check_scorer(spec: Spec) -> list[tuple[float, str, Callable | None]]:
    """Weight, name and function of each part; the function of a reward model is None. It loads none.

    Raises:
        ValueError: an empty list, a weight that is no finite number, a path that leads to no function.
    """
    if spec == []:
        raise ValueError("The list of scorers is empty: name at least one.")
    parts = spec if isinstance(spec, list) else [spec]
    return [_part(**part) if isinstance(part, dict) else _part(part) for part in parts]


def _part(spec: str | Callable, weight: float = 1.0) -> tuple[float, str, Callable | None]:
    if not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"Scorer {spec}: its weight must be a finite number, not {weight!r}.")
    if callable(spec):
        return weight, repr(spec), spec
    if Path(spec).is_dir() or not DOTTED_PATH.fullmatch(spec):
        return weight, spec, None
    module, _, attribute = spec.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), attribute)
        if not callable(function):
            raise AttributeError(f"it is a {type(function).__name__} and cannot be called")
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"Scorer {spec}: {error}. Give the import path of a function, a folder with a reward model (./name), or a "
            "hub id (owner/name)."
        ) from error
    return weight, spec, function


def _checked(name: str, scores, count: int) -> list[float]:
    values = [float(score) for score in scores]
    if wrong := [i for i, value in enumerate(values) if not math.isfinite(value)]:
        raise ValueError(f"Scorer {name} gave {values[wrong[0]]} for completion {wrong[0]}: scores must be finite.")
    if len(values) != count:
        raise ValueError(f"Scorer {name} gave {len(values)} scores for {count} completions.")
    return values


class RewardModelScorer:
    """Scores with a sequence-classification model of one output, on the text as its own chat template writes it.

    A tokenizer with a chat template gets user and assistant messages, also from plain text; one without gets prompt
    and completion as one text. Texts beyond the model's context lose their beginning, with one warning.
    """

    def __init__(self, name: str, *, batch_size: int = 8, dtype=None, device: torch.device | str | None = None):
        self.name, self.batch_size = name, batch_size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype or "auto", **SAFE)
        if model.config.num_labels != 1:
            raise ValueError(
                f"Reward model {name} has {model.config.num_labels} outputs, but a score is one number: use a model "
                "trained with num_labels=1."
            )
        self.model = model.to(self.device).eval()
        self.text_config = model.config.get_text_config()
        self.fixed_pad = self.text_config.pad_token_id
        self.limit = getattr(self.text_config, "max_position_embeddings", None)

    @torch.no_grad()
    def __call__(self, prompts, completions, **columns) -> list[float]:
        rows = [self._encode(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        scores = torch.empty(len(rows))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            scores[batch] = self._forward([rows[i] for i in batch])
        return scores.tolist()

    def _encode(self, prompt, completion) -> list[int]:
        if self.tokenizer.chat_template is None and isinstance(prompt, str):
            ids = self.tokenizer(prompt + completion)["input_ids"]
        else:
            chat = _as_messages(prompt, "user") + _as_messages(completion, "assistant")
            ids = self.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        if self.limit is not None and len(ids) > self.limit:
            _warn_of_a_cut(self.name, self.limit)
        return list(ids if self.limit is None else ids[-self.limit :])

    def _forward(self, rows: list[list[int]]) -> Tensor:
        """(B,) float32 scores of token rows."""
        # Such a model reads its score at the last id that is not the pad id. Where none is configured, training
        # read the very last token; an id that occurs in no row keeps it so.
        used = {token for row in rows for token in row}
        pad = self.fixed_pad if self.fixed_pad is not None else next(i for i in range(len(used) + 1) if i not in used)
        self.text_config.pad_token_id = pad
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.device)
        attention = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        return self.model(input_ids=ids, attention_mask=attention).logits[:, 0].float().cpu()


@cache
def _warn_of_a_cut(name: str, limit: int) -> None:
    logger.warning("%s: texts over %d tokens lose their beginning.", name, limit)


def _as_messages(text: str | list[dict], role: str) -> list[dict]:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)
