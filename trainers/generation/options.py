"""Options with keys of their own, and those of self-enhancement."""

import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from polypo.recipes import nearest

from ..config import option
from ..precision import FAST
from .sampler import SamplingOptions

Options = TypeVar("Options")
Spec = str | Callable | dict | list  # of a scorer
DTYPES = ["auto", FAST, "bfloat16", "float16", "float32"]


def read_mapping(option: str, value: dict[str, Any] | str, known: list[str] | None = None) -> dict[str, Any]:
    """An option with keys of its own, from the dict of a YAML file or the JSON of a flag.

    Raises:
        ValueError: text that is not a JSON object, or a key that is not in `known`; None knows all keys.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{option} is not JSON ({error}): write '{{\"key\": 3, ...}}'.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{option} must be a mapping of options, got {value!r}.")
    for name in value:
        if known is not None and name not in known:
            near = nearest(name, known, f"known are {', '.join(known)}.")
            raise ValueError(f"{option}: unknown key {name!r}: {near}")
    return dict(value)


def read_options(option: str, value: dict[str, Any] | str, kind: type[Options]) -> Options:
    """The dataclass `kind` from the mapping of an option. Raises ValueError for a key or value that is wrong."""
    known = fields(kind)  # type: ignore[arg-type]
    value = read_mapping(option, value, [field.name for field in known])
    needed = [field.name for field in known if field.default is MISSING and field.default_factory is MISSING]
    if missing := [name for name in needed if name not in value]:
        raise ValueError(f"{option} needs the key {missing[0]!r}.")
    try:
        return kind(**value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class EnhanceOptions(SamplingOptions):
    """The keys of `self_enhance`, those of `SamplingOptions` among them."""

    scorer: Spec = option(
        MISSING,
        "What `load_scorer` takes: path of a reward function, reward model, server, weighted list of these.",
    )
    rounds: int = option(
        1, "How often to sample and train (Evolve). May be raised later: finished rounds are kept.", at_least=1
    )
    iterations: int = option(
        1, "How often a round goes through its training (Iterate): multiplies its epochs or max_steps.", at_least=1
    )
    own_responses: bool = option(True, "The data set's own responses are in every round's pool, scored like the rest.")
    keep_old: bool = option(False, "Keep the samples of earlier rounds in the pool as well.")
    held_out_generations: int = option(
        0, "Responses per held-out prompt before the first round and after each, always from the same random streams.",
        at_least=0,
    )  # fmt: skip
    dtype: str | None = option(None, "Weights while sampling; by default those of the training.", choices=DTYPES)
    scorer_batch_size: int = option(8, "Texts per forward pass of a reward model.", at_least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.num_generations < 2 and not self.own_responses:
            raise ValueError("num_generations must be at least 2 without own_responses.")
