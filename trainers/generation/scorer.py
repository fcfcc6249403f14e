"""Scorers: callables `(prompts, completions, **columns) -> list[float]`, the signature of TRL's reward functions.

`prompts` and `completions` are aligned lists, one entry per response; a prompt given as messages comes with its
completion as a list of messages, as in TRL. `columns` are the other columns of the rows, repeated per response.
"""

import importlib
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from .judge import Judge
from .options import Spec, read_mapping, read_options
from .reward_model import RewardModelScorer
from .reward_server import RewardServer
from .served import Counts, ServedScorer

Scorer = Callable[..., list[float]]
Part = tuple[float, str, Scorer | None]  # weight, name and what scores; None for a reward model
KINDS: dict[str, type] = {"judge": Judge, "reward_server": RewardServer}  # by the key that holds the address
DOTTED_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def load_scorer(
    spec: Spec, *, batch_size: int = 8, dtype=None, device: torch.device | str | None = None,
    counts: Counts | None = None,
) -> Scorer:  # fmt: skip
    """Makes a checked scorer from its description.

    Args:
        spec: dotted import path of a callable; folder or hub id of a sequence-classification reward model with one
            output; a callable; `{"spec": ..., "weight": ...}`; the keys of `Judge` or `RewardServer` for a server,
            with a weight among them or without, as a mapping or as JSON; or a list of these, which gives the weighted
            sum.
        batch_size: texts per forward pass, or per request, of a reward model.
        dtype: of a reward model's weights; None is the dtype they were saved in.
        device: of a reward model; None is CUDA when there is one, else the CPU.
        counts: what servers were asked is added here.

    Returns a callable that raises ValueError, naming the scorer, when the scores are not as many finite numbers as
    there are completions.

    Raises:
        ValueError: as `check_scorer`, and a reward model with several outputs.
    """
    asked: Counts = {} if counts is None else counts

    def load(name: str, scorer: Callable | None) -> Callable:
        if scorer is None:
            return RewardModelScorer(name, batch_size=batch_size, dtype=dtype, device=device)
        return scorer.connect(batch_size, asked) if isinstance(scorer, ServedScorer) else scorer

    parts = [(weight, name, load(name, scorer)) for weight, name, scorer in check_scorer(spec)]

    def score(prompts, completions, **columns) -> list[float]:
        scored = [
            [weight * value for value in _checked(name, function(prompts=prompts, completions=completions, **columns),
                                                  len(completions))] for weight, name, function in parts
        ]  # fmt: skip
        return [math.fsum(values) for values in zip(*scored, strict=True)]

    return score


def check_scorer(spec: Spec, columns: Collection[str] | None = None) -> list[Part]:
    """The parts of a scorer, of which it loads and asks none.

    Args:
        columns: of the rows; None where they are not known.

    Raises:
        ValueError: an empty list, a weight that is no finite number, a path that leads to no function, a wrong option
            of a server, a judge's template that names a column that is not there.
    """
    if spec == []:
        raise ValueError("The list of scorers is empty: name at least one.")
    parts = [_part(as_mapping(part)) for part in (spec if isinstance(spec, list) else [spec])]
    for _, name, scorer in parts:
        if columns is not None and isinstance(scorer, ServedScorer) and not scorer.columns <= {*columns}:
            missing = min(scorer.columns - {*columns})
            raise ValueError(f"Scorer {name}: its template names {missing!r}, but rows have {sorted(columns)}.")
    return parts


def asked_of_servers(spec: Spec, responses: int, tokens: int, batch_size: int) -> list[str]:
    """The forecast of each part that is on a server."""
    served = [scorer for _, _, scorer in check_scorer(spec) if isinstance(scorer, ServedScorer)]
    return [scorer.forecast(responses, tokens, batch_size) for scorer in served]


def compared_scorer(spec: Spec | None) -> Spec | None:
    """What of a scorer the scores depend on, for the settings of a run: of a server not its address or its prices.

    A function is known by its name, since its text says where in memory it lies.
    """
    if isinstance(spec, list):
        return [compared_scorer(part) for part in spec]
    if callable(spec):
        return f"{spec.__module__}.{getattr(spec, '__qualname__', type(spec).__qualname__)}"
    if not asks_server(spec):
        return spec | {"spec": compared_scorer(spec.get("spec"))} if isinstance(spec, dict) else spec
    weight, own = _split(as_mapping(spec))
    return _served(own).compared | {"weight": weight}


def asks_server(spec: Spec | None) -> bool:
    """Whether a scorer, or a part of it, is on a server; `spec` may be what `compared_scorer` made of it."""
    parts = spec if isinstance(spec, list) else [spec]
    return any(not as_mapping(part).keys().isdisjoint(KINDS) for part in parts)


def as_mapping(part: Any) -> dict:
    """A part of a description: a mapping, one in JSON, or what `spec` names."""
    if isinstance(part, str) and part.lstrip().startswith("{"):
        return read_mapping("scorer", part)
    return part if isinstance(part, dict) else {"spec": part}


def _split(part: dict) -> tuple[float, dict]:
    """The weight, and what is weighted."""
    return part.get("weight", 1.0), {name: value for name, value in part.items() if name != "weight"}


def _served(own: dict) -> ServedScorer:
    return read_options("scorer", own, next(kind for key, kind in KINDS.items() if key in own))


def _part(part: dict) -> Part:
    weight, own = _split(part)
    name: Any
    scorer: Scorer | None
    if asks_server(own):
        scorer = served = _served(own)
        name = f"{served.model} at {served.url}"
    else:
        spec = read_mapping("scorer", own, ["spec", "weight", *KINDS]).get("spec")
        name, scorer = (repr(spec), spec) if callable(spec) else (spec, _function(spec))
    if not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"Scorer {name}: its weight must be a finite number, not {weight!r}.")
    return weight, name, scorer


def _function(path: Any) -> Callable | None:
    """None for a reward model."""
    if not isinstance(path, str):
        raise ValueError(f"scorer: {path!r} is no path and no hub id; the keys of a server stand beside `weight`.")
    if Path(path).is_dir() or not DOTTED_PATH.fullmatch(path):
        return None
    module, _, attribute = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), attribute)
        if not callable(function):
            raise AttributeError(f"it is a {type(function).__name__} and cannot be called")
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"Scorer {path}: {error}. Give the import path of a function, a folder with a reward model (./name), or a "
            "hub id (owner/name)."
        ) from error
    return function


def _checked(name: str, scores, count: int) -> list[float]:
    values = [float(score) for score in scores]
    if wrong := [i for i, value in enumerate(values) if not math.isfinite(value)]:
        raise ValueError(f"Scorer {name} gave {values[wrong[0]]} for completion {wrong[0]}: scores must be finite.")
    if len(values) != count:
        raise ValueError(f"Scorer {name} gave {len(values)} scores for {count} completions.")
    return values
