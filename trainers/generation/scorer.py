"""Scorers: callables `(prompts, completions, **columns) -> list[float]`, the signature of TRL's reward functions.

`prompts` and `completions` are aligned lists, one entry per response; a prompt given as messages comes with its
completion as a list of messages, as in TRL. `columns` are the other columns of the rows, repeated per response.
"""

import importlib
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..forward.safe_files import SAFE, refuse_pickled_weights

logger = logging.getLogger(__name__)

Scorer = Callable[..., list[float]]
DOTTED_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def load_scorer(
    spec: str | Callable | dict | list, *, batch_size: int = 8, dtype=None, device: torch.device | str | None = None
) -> Scorer:
    """Makes a checked scorer from its description.

    Args:
        spec: dotted import path of a callable; folder or hub id of a sequence-classification reward model with one
            output; a callable; `{"spec": ..., "weight": ...}`; or a list of these, which gives the weighted sum.
        batch_size: texts per forward pass of a reward model.
        dtype: of a reward model's weights; None is the dtype they were saved in.
        device: of a reward model; None is CUDA when there is one, else the CPU.

    Returns a callable that raises ValueError, naming scorer and position, when the scores are not as many finite
    numbers as there are completions.

    Raises:
        ValueError: a path that cannot be imported, that is no callable, or a spec of another form.
    """
    options = {"batch_size": batch_size, "dtype": dtype, "device": device}
    if isinstance(spec, list):
        if not spec:
            raise ValueError("The list of scorers is empty: name at least one.")
        return WeightedScorer([_weighted(part, options) for part in spec])
    if isinstance(spec, dict):
        return WeightedScorer([_weighted(spec, options)])
    if callable(spec):
        return CheckedScorer(getattr(spec, "__name__", type(spec).__name__), spec)
    if not isinstance(spec, str):
        raise ValueError(f"A scorer is a path, a callable, a dict or a list of these, got {spec!r}.")
    if not Path(spec).is_dir() and DOTTED_PATH.fullmatch(spec):
        return CheckedScorer(spec, _import_callable(spec))
    return CheckedScorer(spec, RewardModelScorer(spec, **options))


def check_scorer(spec: str | Callable | dict | list) -> None:
    """Raises ValueError for a spec that cannot be used, as far as that is known without loading a reward model."""
    for part in spec if isinstance(spec, list) else [spec]:
        name = part.get("spec") if isinstance(part, dict) else part
        if not isinstance(name, str) or DOTTED_PATH.fullmatch(name) and not Path(name).is_dir():
            load_scorer(part)


class CheckedScorer:
    """Calls a scorer and refuses a result that is not one finite number per completion."""

    def __init__(self, name: str, function: Callable):
        self.name, self.function = name, function

    def __call__(self, prompts, completions, **columns) -> list[float]:
        scores = self.function(prompts=prompts, completions=completions, **columns)
        scores = scores.tolist() if hasattr(scores, "tolist") else list(scores)
        if len(scores) != len(completions):
            raise ValueError(f"Scorer {self.name} gave {len(scores)} scores for {len(completions)} completions.")
        return [self._number(index, score) for index, score in enumerate(scores)]

    def _number(self, index: int, score) -> float:
        try:
            value = math.nan if isinstance(score, str) else float(score)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(
                f"Scorer {self.name} gave {score!r} for completion {index}: every score must be a finite number."
            )
        return value


class WeightedScorer:
    """Weighted sum of checked scorers."""

    def __init__(self, parts: list[tuple[float, Scorer]]):
        self.parts = parts

    def __call__(self, prompts, completions, **columns) -> list[float]:
        scored = [[weight * s for s in scorer(prompts, completions, **columns)] for weight, scorer in self.parts]
        return [math.fsum(values) for values in zip(*scored, strict=True)]


class RewardModelScorer:
    """Scores with a sequence-classification model of one output, on the text as its own chat template writes it.

    A tokenizer with a chat template gets user and assistant messages, also from plain text; one without gets prompt
    and completion as one text. Texts beyond the model's context lose their beginning, with one warning.
    """

    def __init__(self, name: str, *, batch_size: int = 8, dtype=None, device: torch.device | str | None = None):
        self.name, self.batch_size = name, batch_size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        refuse_pickled_weights(name)
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
        self.warned = False

    @torch.no_grad()
    def __call__(self, prompts, completions, **columns) -> list[float]:
        rows = [self._encode(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, score in zip(batch, self._forward([rows[i] for i in batch]).tolist(), strict=True):
                scores[i] = score
        return scores

    def _encode(self, prompt, completion) -> list[int]:
        if self.tokenizer.chat_template is not None:
            chat = _as_messages(prompt, "user") + _as_messages(completion, "assistant")
            ids = self.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        elif isinstance(prompt, str) and isinstance(completion, str):
            ids = self.tokenizer(prompt + completion)["input_ids"]
        else:
            raise ValueError(
                f"Reward model {self.name} has no chat template, but the prompts are messages: save a tokenizer "
                "with `chat_template` beside the model, or score plain text."
            )
        if self.limit is not None and len(ids) > self.limit:
            if not self.warned:
                logger.warning("%s: texts over %d tokens lose their beginning.", self.name, self.limit)
                self.warned = True
            ids = ids[-self.limit :]
        return list(ids)

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


def _as_messages(text: str | list[dict], role: str) -> list[dict]:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def _weighted(part, options: dict) -> tuple[float, Scorer]:
    if not isinstance(part, dict):
        return 1.0, load_scorer(part, **options)
    if "spec" not in part or set(part) - {"spec", "weight"}:
        raise ValueError(f"A weighted scorer is {{'spec': ..., 'weight': ...}}, got the keys {sorted(part)}.")
    weight = part.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"The weight of scorer {part['spec']} must be a finite number, got {weight!r}.")
    return float(weight), load_scorer(part["spec"], **options)


def _import_callable(path: str) -> Callable:
    module_name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but something it imports does not
        raise ValueError(
            f"Scorer {path}: there is no module {module_name}. Give the import path of a function, a folder with a "
            "reward model (./name), or a hub id (owner/name)."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"Scorer {path}: module {module_name} has no callable {attribute}.")
    return function
