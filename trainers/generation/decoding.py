"""Decoding in which finished rows leave the batch, waiting requests take their places, and prompts are read once.

Every sample keeps a random stream of its own, which `generate_batch` of transformers has no place for.
"""

import inspect
from collections import deque
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, DynamicLayer, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..forward.policy import base_model
from .sampler import GumbelSampler, SamplingConfig

SHARE = 8  # rows change when an eighth of them is finished: a change copies the cache
GROUP = 4  # samples of a prompt come into the batch together, but at most as many as a quarter of it
ARGUMENTS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


def can_decode(model: PreTrainedModel | PeftModel) -> bool:
    """Whether `Decoding` takes the model: `generate` calls it like most, and all its state is keys and values."""
    if isinstance(model, PeftModel):
        adapter = model.active_peft_config  # others than LoRA may put something before the prompt
        if not isinstance(adapter, LoraConfig) or adapter.alora_invocation_tokens is not None:
            return False
    base: Any = base_model(model)
    return (
        type(base).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        and inspect.signature(base.forward).parameters.keys() >= ARGUMENTS
        and all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in DynamicCache(config=base.config).layers)
    )


@dataclass
class Row:
    """A request at work."""

    at: int  # position of the request
    prompt_ids: list[int]
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)  # drawn; the last one has not been through the model
    done: bool = False

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.ids)


class Decoding:
    """Responses to requests, of which at most `config.batch_size` are at work.

    Every row of the batch ends in its last column, and the columns before a row's first token are masked.

    Args:
        model: one that `can_decode` takes, in evaluation mode.
        prompts: token ids of each request; equal ones that follow each other are read together.
        seeds: of the requests' random streams.
        ends: token ids that end a response.
    """

    def __init__(self, model, prompts: list[list[int]], seeds: list[int], config: SamplingConfig, ends: list[int]):
        self.model, self.prompts, self.seeds, self.config, self.ends = model, prompts, seeds, config, ends
        self.device = model.get_input_embeddings().weight.device
        self.sampler = None  # greedy
        if config.temperature > 0:
            self.sampler = GumbelSampler([], temperature=config.temperature, top_p=config.top_p, top_k=config.top_k)
        self.rows: list[Row] = []
        self.cache, self.width = DynamicCache(), 0  # and its columns
        self.waiting: deque[list[int]] = deque()
        most = max(1, config.batch_size // GROUP)
        for _, same in groupby(range(len(prompts)), key=prompts.__getitem__):
            group = list(same)
            self.waiting += [group[start : start + most] for start in range(0, len(group), most)]

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting) or not all(row.done for row in self.rows)

    @torch.no_grad()
    def advance(self) -> dict[int, list[int]]:
        """Works until more are finished: their token ids, up to the end token, by position of the request."""
        self._change_rows()
        while sum(row.done for row in self.rows) * SHARE < len(self.rows):
            self.width += 1
            last, lengths = [row.ids[-1:] for row in self.rows], [row.length for row in self.rows]
            self._draw(self.rows, self._forward(last, lengths, self.cache, self.width))
        return {row.at: row.ids for row in self.rows if row.done}

    def _change_rows(self) -> None:
        """Finished rows leave, and waiting ones come in."""
        stay = [i for i, row in enumerate(self.rows) if not row.done]
        rows, parts = [self.rows[i] for i in stay], [(self.cache, stay)] if stay else []
        if new := self._next(self.config.batch_size - len(stay)):
            rows += new
            parts.append(self._read_prompts(new))
        self.rows, self.width, self.cache = rows, max(row.length for row in rows) - 1, parts[0][0]
        for layers in zip(*(cache.layers for cache, _ in parts), strict=True):
            _join(layers, [indices for _, indices in parts], self.width)

    def _next(self, free: int) -> list[Row]:
        positions: list[int] = []
        while self.waiting and len(positions) + len(self.waiting[0]) <= free:
            positions += self.waiting.popleft()
        return [Row(i, self.prompts[i], torch.Generator(self.device).manual_seed(self.seeds[i])) for i in positions]

    def _read_prompts(self, rows: list[Row]) -> tuple[DynamicCache, list[int]]:
        """Draws the rows' first tokens. Returns the cache of their different prompts, and which of them is each's."""
        prompts = list(dict.fromkeys(tuple(row.prompt_ids) for row in rows))
        lengths, indices = [len(ids) for ids in prompts], [prompts.index(tuple(row.prompt_ids)) for row in rows]
        cache, width = DynamicCache(config=base_model(self.model).config), max(lengths)
        logits = self._forward([[0] * (width - len(ids)) + list(ids) for ids in prompts], lengths, cache, width)
        self._draw(rows, logits[indices])
        return cache, indices

    def _forward(self, new: list[list[int]], lengths: list[int], cache: DynamicCache, width: int) -> Tensor:
        """Logits (B,V) after the `new` ids (B,T), the last ones of rows of these lengths, in a cache that gets `width`
        columns."""
        columns = torch.arange(width, device=self.device) - width + torch.tensor(lengths, device=self.device)[:, None]
        # Without a mask attention is faster.
        mask = (columns >= 0).long() if min(lengths) < width else None
        output = self.model(
            input_ids=torch.tensor(new, device=self.device), attention_mask=mask, past_key_values=cache,
            position_ids=columns[:, -len(new[0]) :].clamp(min=0), use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        return output.logits[:, -1].to(self.device, torch.float32)

    def _draw(self, rows: list[Row], logits: Tensor) -> None:
        """One more token for each row that is not finished."""
        if self.sampler is None:
            drawn = logits.argmax(-1)
        else:
            drawn = self.sampler.choose(logits, [row.generator for row in rows])
        for row, token in zip(rows, drawn.tolist(), strict=True):
            if not row.done:
                row.ids.append(token)
                row.done = token in self.ends or len(row.ids) == self.config.max_new_tokens


def _join(layers: tuple, indices: list[list[int]], width: int) -> None:
    """Puts rows of each layer, of caches that end alike, into the first one, which then has `width` columns."""
    first, columns = layers[0], width
    if isinstance(first, DynamicSlidingWindowLayer):
        first.cumulative_length, columns = width, min(width, first.sliding_window - 1)

    def joined(states: list[Tensor]) -> Tensor:
        picked = [state[rows] for state, rows in zip(states, indices, strict=True)]
        return torch.cat([pad(state, (0, 0, columns - state.size(-2), 0)) for state in picked])

    first.keys = joined([layer.keys for layer in layers])
    first.values = joined([layer.values for layer in layers])
