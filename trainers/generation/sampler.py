"""Batched sampling of responses with Hugging Face `generate`, reproducible sample by sample.

Token t of a sample is `argmax(logits / temperature + gumbel)` over the tokens that top-k and top-p keep, which is an
exact draw from the softmax. The noise comes from one random stream per sample, seeded by (seed, round, prompt, sample
index) alone. So a sample does not depend on its batch, on the number of processes or on what was sampled before it,
and two policies that are close to each other give similar text for the same prompt, which makes before/after
comparisons sharper. Two limits: the streams of CPU and CUDA differ, and changing the batch changes the logits by
rounding, which can flip a token whose perturbed logit is tied to within that rounding (rare in float32, not in bf16).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from trl.models import unwrap_model_for_generation

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


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample. `temperature` 0 is greedy decoding; `top_p` 1 and `top_k` None or 0 switch the cuts off.

    `batch_size` counts sequences per forward pass and process (not prompts) and does not change the samples.
    """

    num_generations: int = 4
    max_new_tokens: int = 256
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int | None = None
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self):
        for name in ("num_generations", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative (0 is greedy decoding), got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1]; 1 switches it off. Got {self.top_p}.")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be positive, or None or 0 to switch it off. Got {self.top_k}.")


def sample_seed(seed: int, round: int, prompt: Prompt, index: int) -> int:
    """Seed of one sample's random stream: the same on every machine, in every process and Python version."""
    key = json.dumps([seed, round, prompt, index], sort_keys=True, ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


class GumbelSampler(LogitsProcessor):
    """Turns greedy `generate` into exact sampling with an own random stream per row.

    `__call__(input_ids (B, L), logits (B, V)) -> (B, V)`: zero at the sampled token of each row, minus infinity
    elsewhere. Use with `do_sample=False`, one instance per call of `generate`.
    """

    def __init__(
        self,
        seeds: list[int],
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        device: torch.device | str = "cpu",
    ):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.top_p = top_p
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(scores) != len(self.generators):
            raise ValueError(f"{len(scores)} rows of logits for {len(self.generators)} random streams.")
        scores = self.warpers(input_ids, scores)
        perturbed = scores + self._gumbel(scores)
        chosen = perturbed.argmax(-1, keepdim=True) if self.top_p >= 1 else self._nucleus_argmax(scores, perturbed)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    def _gumbel(self, scores: Tensor) -> Tensor:
        # float64: with 24 random bits the right tail is so coarse that rare tokens would tie.
        noise = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
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


def encode_prompt(tokenizer, prompt: Prompt) -> list[int]:
    """Token ids after which a response starts: chat template with generation prompt for messages.

    Messages that end with an assistant turn are continued. Special tokens of the template are never doubled.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
            ids.pop()  # some tokenizers close every text with EOS; nothing would follow it
    else:
        if tokenizer.chat_template is None:
            raise ValueError(
                "the prompt is a list of messages, but the tokenizer has no chat template. Use an instruct model, set "
                "`tokenizer.chat_template`, or give prompts as plain text."
            )
        resume = prompt[-1]["role"] == "assistant"
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=not resume, continue_final_message=resume, tokenize=True, return_dict=False
        )
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise ValueError("the prompt has no tokens and the tokenizer has no BOS token to start from: give some text.")
    return list(ids)


def encode_prompts(tokenizer, prompts: list[Prompt]) -> list[list[int]]:
    """`encode_prompt` for each; its errors name the position of the prompt."""
    encoded = []
    for i, prompt in enumerate(prompts):
        try:
            encoded.append(encode_prompt(tokenizer, prompt))
        except ValueError as error:
            raise ValueError(f"Prompt {i}: {error}") from error
    return encoded


def end_ids(model, tokenizer) -> list[int]:
    """All token ids that end a response: those of the generation config and the tokenizer's EOS."""
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    return ids


def sample_responses(
    model,
    tokenizer,
    prompts: list[Prompt],
    config: SamplingConfig,
    *,
    round: int = 0,
    accelerator=None,
    progress: bool = True,
    known: Mapping[Key, Sample] | None = None,
    on_batch: Callable[[dict[Key, Sample]], None] | None = None,
) -> list[list[Sample]]:
    """Samples `config.num_generations` responses for each prompt; returns them in the order of `prompts`.

    Args:
        model: causal language model or PeftModel, wrapped by DDP, DeepSpeed or FSDP or not. Training mode and
            gradient checkpointing are switched off during the call and put back afterwards.
        prompts: plain texts or lists of messages.
        round: counts the rounds of a loop; another round gives other samples.
        accelerator: with several processes each one samples its share and all return the full result. All must
            make the call with the same arguments.
        known: samples that exist already, by (prompt position, sample index); they are returned, not made again.
        on_batch: called in each process after each batch with that batch's new samples, for instance to save them.

    Raises:
        ValueError: a prompt without tokens, messages without a chat template, a prompt that does not fit in the
            context together with `max_new_tokens`.
    """
    known = dict(known or {})
    encoded = encode_prompts(tokenizer, prompts)
    keys = [(i, j) for i in range(len(prompts)) for j in range(config.num_generations)]
    todo = sorted((key for key in keys if key not in known), key=lambda key: (-len(encoded[key[0]]), key))
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    bar = tqdm(total=len(todo[rank::world]), desc="sampling", unit="seq", disable=not (progress and rank == 0))
    made: dict[Key, Sample] = {}
    with bar, _generation_mode(model, accelerator) as generator:
        _check_context(generator, encoded, config)
        for batch in _batches(todo, config.batch_size, rank, world):
            seeds = [sample_seed(config.seed, round, prompts[i], j) for i, j in batch.keys]
            samples = _generate(generator, tokenizer, [encoded[i] for i, _ in batch.keys], seeds, config)
            if batch.filler:
                continue
            new = dict(zip(batch.keys, samples, strict=True))
            made.update(new)
            bar.update(len(new))
            if on_batch is not None:
                on_batch(new)
    known.update(gather_object(list(made.items())) if world > 1 else made)
    return [[known[i, j] for j in range(config.num_generations)] for i in range(len(prompts))]


class _Batch(NamedTuple):
    keys: list[Key]
    filler: bool


def _batches(todo: list[Key], size: int, rank: int, world: int) -> Iterator[_Batch]:
    """This process's batches. Sharded models run in lock step, so every process gets the same number of them."""
    if not todo:
        return
    own, longest = todo[rank::world], len(todo[0::world])
    for start in range(0, longest, size):
        keys = own[start : start + size]
        yield _Batch(keys or todo[:1], filler=not keys)


def _generate(model, tokenizer, rows: list[list[int]], seeds: list[int], config: SamplingConfig) -> list[Sample]:
    device = model.get_input_embeddings().weight.device
    width, ends = max(map(len, rows)), end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    processors = LogitsProcessorList()
    if config.temperature > 0:
        cuts = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        processors.append(GumbelSampler(seeds, device=device, **cuts))
    output = model.generate(
        input_ids=ids,
        attention_mask=attention,
        logits_processor=processors,
        generation_config=_greedy_config(config.max_new_tokens, ends, pad),
    )
    return [_cut(row, ends, tokenizer) for row in output[:, width:].tolist()]


def _greedy_config(max_new_tokens: int, ends: list[int], pad: int) -> GenerationConfig:
    # What is left at None here would be filled from the model's own generation config. Neutral values keep a
    # repetition penalty or a minimum length that ships with a model from bending the sampled distribution.
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        min_length=0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        eos_token_id=ends or None,
        pad_token_id=pad,
    )


def _cut(ids: list[int], ends: list[int], tokenizer) -> Sample:
    stop = next((t + 1 for t, token in enumerate(ids) if token in ends), None)
    kept = ids[:stop]
    return Sample(tokenizer.decode(kept, skip_special_tokens=True), kept, truncated=stop is None)


def _check_context(model, encoded: list[list[int]], config: SamplingConfig) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for i, ids in enumerate(encoded):
        if limit is not None and len(ids) + config.max_new_tokens > limit:
            raise ValueError(
                f"Prompt {i} has {len(ids)} tokens; with max_new_tokens={config.max_new_tokens} that exceeds the "
                f"model's context of {limit}. Shorten the prompt or lower max_new_tokens."
            )


@contextmanager
def _generation_mode(model, accelerator):
    unwrapped = accelerator.unwrap_model(model) if accelerator else model
    training = {module: module.training for module in unwrapped.modules()}
    checkpointing = {
        module: module.gradient_checkpointing
        for module in unwrapped.modules()
        if isinstance(getattr(module, "gradient_checkpointing", None), bool)
    }
    distributed = accelerator is not None and accelerator.distributed_type != DistributedType.NO
    gathered = unwrap_model_for_generation(model, accelerator) if distributed else nullcontext(unwrapped)
    for module in checkpointing:
        # The flag, not gradient_checkpointing_disable(): enabling again would forget the user's arguments.
        module.gradient_checkpointing = False
    unwrapped.eval()
    try:
        with gathered as generator:
            yield generator
    finally:
        for module, value in training.items():
            module.training = value
        for module, value in checkpointing.items():
            module.gradient_checkpointing = value
