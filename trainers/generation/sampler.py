"""What is sampled and how: options, prompts as tokens, and a random stream for each sample.

Token t of a sample is `argmax(logits / temperature + gumbel)` over the tokens that top-k and top-p keep, which is an
exact draw from the softmax. The noise comes from one random stream per sample, seeded by (seed, round, prompt, sample
index) alone. So a sample does not depend on its batch, on the number of processes or on what was sampled before it,
and two policies that are close to each other give similar text for the same prompt, which makes before/after
comparisons sharper. Two limits: the streams of CPU and CUDA differ, and changing the batch changes the logits by
rounding, which can flip a token whose perturbed logit is tied to within that rounding (rare in float32, not in bf16).
"""

import dataclasses
import hashlib
import json
import shlex
import shutil
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from ..config import check_options, option
from ..data.encoding import chat_template, text_ids, without_none

TRANSFORMERS = "transformers"  # the engine in this process
Prompt = str | list[dict]
Key = tuple[int, int]  # (position of the prompt, index of the sample)


class Sample(NamedTuple):
    """One sampled response.

    `token_ids` are the sampled ids as the model produced them: the end-of-sequence id is the last one unless
    `truncated`. `text` is their decoded text without special tokens. `truncated` says that `max_new_tokens` was
    reached before an end-of-sequence token.
    """

    text: str
    token_ids: list[int]
    truncated: bool


def is_address(engine: str) -> bool:
    """Whether it is a server that is given, and not a command."""
    return engine.startswith(("http://", "https://"))


def check_engine(engine: str) -> None:
    """Raises ValueError for what is neither `transformers`, nor an address, nor a command that can be started."""
    if engine == TRANSFORMERS or is_address(engine):
        return
    try:
        words = shlex.split(engine)
    except ValueError as error:
        raise ValueError(f"engine={engine!r} is no command: {error}.") from error
    if not words or shutil.which(words[0]) is None:
        raise ValueError(
            f"engine={engine!r}: there is no program {words[0] if words else ''!r}. Give {TRANSFORMERS}, a command "
            "such as /env/bin/vllm serve, or an address that begins with http://."
        )


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample. `temperature` 0 is greedy decoding; `top_p` 1 and `top_k` None or 0 switch the cuts off.

    Raises:
        ValueError: an option outside its range.
    """

    num_generations: int = option(4, "Responses per prompt.", at_least=1)
    max_new_tokens: int = option(256, "Longest response in tokens.", at_least=1)
    temperature: float = option(0.8, "Sampling temperature; 0 is greedy.", at_least=0)
    top_p: float = option(0.95, "Nucleus mass; 1 switches it off.", above=0, at_most=1)
    top_k: int | None = option(None, "Keep the k likeliest tokens; 0 switches it off.", at_least=0)
    # These do not change what the samples are drawn from.
    engine: str = option(
        "transformers",
        "What samples: transformers, the address of a server of vLLM's kind, or the command that starts one, such as "
        '"vllm serve --dtype bfloat16" or "/env/bin/vllm serve --tensor-parallel-size 2".',
    )
    batch_size: int = option(
        16, "Sequences (not prompts) per forward pass, or requests at once, of a process.", at_least=1
    )

    def __post_init__(self):
        check_options(self)
        check_engine(self.engine)

    @property
    def sampled_by(self) -> str:
        """The kind of engine."""
        return TRANSFORMERS if self.engine == TRANSFORMERS else "a server"

    def config(self, seed: int, **changes) -> "SamplingConfig":
        """These options with a seed, and some of them changed."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(SamplingOptions)}
        return SamplingConfig(**options | {"seed": seed} | changes)


@dataclass(frozen=True)
class SamplingConfig(SamplingOptions):
    """How to sample, and the seed of the samples."""

    seed: int = option(0, "Seed of the samples.")


def sample_seed(seed: int, round: int, prompt: Prompt, index: int, occurrence: int = 0) -> int:
    """Seed of one sample's random stream: the same on every machine, in every process and Python version.

    `occurrence` counts equal prompts, whose samples would be equal too.
    """
    again = [occurrence] if occurrence else []
    key = json.dumps([seed, round, prompt, index, *again], sort_keys=True, ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


class GumbelSampler(LogitsProcessor):
    """Turns greedy `generate` into exact sampling with an own random stream per row.

    `__call__(input_ids (B, L), logits (B, V)) -> (B, V)`: zero at the sampled token of each row, minus infinity
    elsewhere. Use with `do_sample=False`, one instance per call of `generate`.
    """

    def __init__(
        self, seeds: list[int], *, temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = None,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.top_p = top_p
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Tensor:
        chosen = self.choose(scores, self.generators)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    def choose(self, logits: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Token ids (B,) drawn from logits (B,V), each with its own stream."""
        warped = self.warpers(None, logits)  # type: ignore[arg-type]  # they do not look at the ids
        perturbed = warped + self._gumbel(warped, generators)
        chosen = perturbed.argmax(-1, keepdim=True) if self.top_p >= 1 else self._nucleus_argmax(warped, perturbed)
        return chosen[:, 0]

    def _gumbel(self, scores: Tensor, generators: list[torch.Generator]) -> Tensor:
        # float64: with 24 random bits the right tail is so coarse that rare tokens would tie.
        noise = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
        for row, generator in zip(noise, generators, strict=True):
            row.uniform_(generator=generator)
        return noise.log_().neg_().log_().neg_().to(scores.dtype)

    def _nucleus_argmax(self, scores: Tensor, perturbed: Tensor) -> Tensor:
        """(B, 1) arg-max of `perturbed` over the nucleus: tokens with less than `top_p` mass on likelier tokens.

        Sorting the vocabulary at each step would cost as much as a small model. A winner outside the nucleus is
        struck out instead, with everything that is no likelier, until the winner lies inside.
        """
        probs = scores.softmax(-1)
        while True:
            chosen = perturbed.argmax(-1, keepdim=True)
            level = probs.gather(1, chosen)
            above = torch.where(probs > level, probs, 0.0).sum(-1, keepdim=True)
            outside = above >= self.top_p
            if not outside.any():
                return chosen
            perturbed.masked_fill_(outside & (probs <= level), -torch.inf)


def plain_prompt(prompt: Prompt) -> Prompt:
    """A prompt whose messages have the keys that were given."""
    return prompt if isinstance(prompt, str) else without_none(prompt)


def encode_prompt(tokenizer, prompt: Prompt) -> list[int]:
    """Token ids after which a response starts: chat template with generation prompt for messages.

    Messages that end with an assistant turn are continued. Special tokens of the template are never doubled. Keys of
    messages whose value is None are left out: a table gives every message all keys that any message has.

    Raises:
        ValueError: there are no tokens, or the chat template refuses the messages.
    """
    [ids] = text_ids(tokenizer, [prompt]) if isinstance(prompt, str) else [_chat_ids(tokenizer, prompt)]
    return _begun(tokenizer, ids)


def encode_prompts(tokenizer, prompts: list[Prompt]) -> list[list[int]]:
    """`encode_prompt` for each, texts in one call. Raises ValueError naming the one that cannot be encoded."""
    texts = iter(text_ids(tokenizer, [prompt for prompt in prompts if isinstance(prompt, str)]))
    encoded = []
    for i, prompt in enumerate(prompts):
        try:
            ids = next(texts) if isinstance(prompt, str) else _chat_ids(tokenizer, prompt)
            encoded.append(_begun(tokenizer, ids))
        except ValueError as error:
            raise ValueError(f"Prompt {i}: {error}") from error
    return encoded


def _chat_ids(tokenizer, messages: list[dict]) -> list[int]:
    resume = messages[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not resume, "continue_final_message": resume}
    try:
        return chat_template(tokenizer, options)(without_none(messages), tokenize=True, return_dict=False)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}.") from error


def _begun(tokenizer, ids: list[int]) -> list[int]:
    """With a token to start from."""
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise ValueError("the prompt has no tokens and the tokenizer has no BOS token to start from: give some text.")
    return list(ids)
