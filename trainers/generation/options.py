"""Options with keys of their own, and those of self-enhancement."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch

from .sampler import SamplingConfig


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
            raise ValueError(f"{option}: unknown key {name!r}. Known keys: {', '.join(known)}.")
    return dict(value)


@dataclass(frozen=True)
class EnhanceOptions:
    """The keys of `self_enhance`.

    Args:
        scorer: what `load_scorer` takes: dotted path of a reward function, reward model, weighted list of these.
        rounds: how often to sample and train (Evolve). May be raised later: finished rounds are kept.
        iterations: how often a round goes through its training (Iterate): multiplies num_train_epochs or max_steps.
        num_generations, max_new_tokens, temperature, top_p, top_k: samples per prompt and how they are drawn.
        batch_size: sequences per forward pass and process while sampling.
        own_responses: put the data set's own responses into every round's pool, scored by the same scorer.
        keep_old: keep the samples of earlier rounds in the pool as well.
        held_out_generations: responses per held-out prompt (`dataset_test_split`) before the first round and after
            each, always from the same random streams; 0 for none.
        dtype: of the weights while sampling; None is the dtype they are trained in.
        scorer_batch_size: texts per forward pass of a reward model.

    Raises:
        ValueError: a key outside its range; the message names it.
    """

    scorer: str | dict | list = ""
    rounds: int = 1
    iterations: int = 1
    num_generations: int = 4
    max_new_tokens: int = 256
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int | None = None
    batch_size: int = 16
    own_responses: bool = True
    keep_old: bool = False
    held_out_generations: int = 0
    dtype: str | None = None
    scorer_batch_size: int = 8

    def __post_init__(self):
        if not self.scorer:
            raise ValueError("self_enhance: scorer is missing: name a reward function or a reward model.")
        for name, lowest in (("rounds", 1), ("iterations", 1), ("held_out_generations", 0), ("scorer_batch_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(f"self_enhance: {name}={value!r} must be a whole number of at least {lowest}.")
        for name in ("own_responses", "keep_old"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"self_enhance: {name}={getattr(self, name)!r} must be true or false.")
        if self.num_generations < 2 and not self.own_responses:
            raise ValueError("self_enhance: num_generations must be at least 2 without own_responses.")
        if self.dtype is not None and not isinstance(getattr(torch, str(self.dtype), None), torch.dtype):
            raise ValueError(f"self_enhance: dtype={self.dtype!r} is unknown: use float32, bfloat16 or float16.")
        try:
            self.sampling(0)
        except (ValueError, TypeError) as error:
            raise ValueError(f"self_enhance: {error}") from error

    @classmethod
    def parse(cls, value: dict[str, Any] | str) -> "EnhanceOptions":
        """From the dict of a YAML file or the JSON of a flag.

        Raises:
            ValueError: text that is not a JSON object, or a key that does not exist.
        """
        return cls(**read_mapping("self_enhance", value, [f.name for f in dataclasses.fields(cls)]))

    def sampling(self, seed: int, num_generations: int | None = None) -> SamplingConfig:
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "batch_size")
        options = {name: getattr(self, name) for name in names}
        return SamplingConfig(num_generations=num_generations or self.num_generations, seed=seed, **options)
