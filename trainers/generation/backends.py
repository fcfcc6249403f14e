"""What answers requests: a backend with one method. The one for Hugging Face models is here, a server's in vllm.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from ..forward.policy import context_length
from .decoding import Decoding, can_decode
from .sampler import GumbelSampler, Sample, SamplingConfig

FLAGS = ("training", "gradient_checkpointing")  # of modules, off while sampling


class Request(NamedTuple):
    """The tokens of a prompt, and the seed of the random stream that its sample is drawn with."""

    prompt_ids: list[int]
    seed: int


class Backend(Protocol):
    """What `collect_samples` asks of an engine."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def context(self) -> int | None:
        """Most tokens of a prompt with its response, None where the engine knows itself."""

    def sample(self, requests: list[Request], config: SamplingConfig) -> Iterator[dict[int, Sample]]:
        """One sample per request, of at most `config.max_new_tokens`. `config.seed` is in the requests already.

        Samples come by the position of their request, in portions as they are done; `config.batch_size` requests are
        worked on at a time.
        """


def left_padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (N,L) on the right of a rectangle, and their mask, 0 where there is padding."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


@dataclass
class HuggingFace:
    """Samples reproducibly sample by sample: with `Decoding`, or with `generate` a model that it does not take.

    Args:
        model: causal language model or PeftModel, whole and on its device. Training mode and gradient checkpointing
            are switched off while it samples and put back afterwards.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase

    @property
    def context(self) -> int | None:
        return context_length(self.model.config)

    def sample(self, requests: list[Request], config: SamplingConfig) -> Iterator[dict[int, Sample]]:
        if not can_decode(self.model):
            for start in range(0, len(requests), config.batch_size):
                batch = requests[start : start + config.batch_size]
                yield dict(enumerate(self.generate(batch, config), start))
            return
        ends = end_ids(self.model.generation_config, self.tokenizer)
        decoding = Decoding(self.model, [r.prompt_ids for r in requests], [r.seed for r in requests], config, ends)
        while decoding.unfinished:
            with _without_training(self.model):  # not around the yield: the model is another's in the meantime
                finished = decoding.advance()
            yield {at: self._cut(ids, ends) for at, ids in finished.items()}

    def generate(self, requests: list[Request], config: SamplingConfig) -> list[Sample]:
        """The same samples from `generate` of transformers, all in one batch that runs until the last is finished."""
        rows, device = [request.prompt_ids for request in requests], self.model.get_input_embeddings().weight.device
        ends = end_ids(self.model.generation_config, self.tokenizer)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (ends or [0])[0]
        processors = LogitsProcessorList()
        if config.temperature > 0:
            seeds, heat, top_p = [request.seed for request in requests], config.temperature, config.top_p
            processors.append(GumbelSampler(seeds, temperature=heat, top_p=top_p, top_k=config.top_k, device=device))
        padded, attention = (tensor.to(device) for tensor in left_padded(rows, pad))
        settings = _greedy_config(config.max_new_tokens, ends, pad)
        with _without_training(self.model):
            output = self.model.generate(
                input_ids=padded, attention_mask=attention, logits_processor=processors, generation_config=settings
            )
        return [self._cut(row, ends) for row in output[:, padded.size(1) :].tolist()]

    def _cut(self, ids: list[int], ends: list[int]) -> Sample:
        stop = next((t + 1 for t, token in enumerate(ids) if token in ends), None)
        kept = ids[:stop]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        assert isinstance(text, str)  # of one list of ids
        return Sample(text, kept, truncated=stop is None)


@contextmanager
def _without_training(model: torch.nn.Module):
    flags = {
        module: {name: vars(module)[name] for name in FLAGS if name in vars(module)} for module in model.modules()
    }
    for module in flags:
        # The flags, not gradient_checkpointing_disable(): enabling again would forget the user's arguments.
        vars(module).update(dict.fromkeys(flags[module], False))
    try:
        yield
    finally:
        for module, values in flags.items():
            vars(module).update(values)


def end_ids(config: GenerationConfig, tokenizer) -> list[int]:
    """All token ids that end a response: those of the generation config and the tokenizer's EOS."""
    ids = config.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    return ids


def _greedy_config(max_new_tokens: int, ends: list[int], pad: int) -> GenerationConfig:
    # What is left at None here would be filled from the model's own generation config. Neutral values keep a
    # repetition penalty or a minimum length that ships with a model from bending the sampled distribution.
    return GenerationConfig(
        do_sample=False, num_beams=1, use_cache=True, max_new_tokens=max_new_tokens, min_length=0,
        repetition_penalty=1.0, no_repeat_ngram_size=0, temperature=1.0, top_p=1.0, top_k=50,
        eos_token_id=ends or None, pad_token_id=pad,
    )  # fmt: skip
