"""Small language models whose truth is known: word-level ones made in seconds, samples of equal length, and KL."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainers.generation.backends import left_padded

PAD, END = "<pad>", "</s>"


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A token per word; <pad> is 0 and </s>, which ends a text, is 1."""
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate([PAD, END, *words])}, unk_token=PAD))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, eos_token=END)


def word_model(tokenizer, *, layers: int, width: int, seed: int) -> LlamaForCausalLM:
    """A fresh Llama over the tokenizer's words."""
    with random_stream(seed):
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=4, max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=0,
            bos_token_id=None, eos_token_id=1, dtype=torch.float32,
        ))  # fmt: skip


def pretrain(model, texts: torch.Tensor, *, steps: int, batch: int, learning_rate: float, seed: int) -> float:
    """Trains on random rows of texts (N,L) of token ids, 0 being padding; returns the mean loss of the last steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    draws, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        rows = texts[torch.randint(len(texts), (batch,), generator=draws)]
        loss = model(rows, labels=rows.masked_fill(rows == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return float(np.mean(losses[-10:]))


@contextmanager
def random_stream(seed: int) -> Iterator[None]:
    """Draws inside depend on `seed` alone and leave the draws outside as they would have been."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def sample(policy, prompts: list[list[int]], count: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(P,count,tokens) token ids, and the logits (P,count,tokens,V) that they were drawn from.

    All samples have exactly so many tokens, so that no length can be learned or exploited.
    """
    context, mask = left_padded([prompt for prompt in prompts for _ in range(count)], 0)
    with random_stream(seed):
        drawn = policy.generate(context, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0, output_logits=True,
                                return_dict_in_generate=True)  # fmt: skip
    shape = (len(prompts), count, tokens)
    return drawn.sequences[:, -tokens:].reshape(shape), torch.stack(drawn.logits, 1).reshape(*shape, -1)


def scored_rows(questions: list[list[int]], samples: torch.Tensor, scores: np.ndarray) -> list[dict]:
    """Tokenised rows of all samples and scores."""
    return [
        {"prompt_ids": question, "response_ids": row.tolist(), "scores": values.tolist()}
        for question, row, values in zip(questions, samples, scores, strict=True)
    ]


@torch.no_grad()
def exact_kl(logits: torch.Tensor, reference, prompts: list[list[int]], samples: torch.Tensor) -> np.ndarray:
    """(P,count) KL(policy || reference) along each sample: the sum over positions of that of the next-token laws.

    `logits` and `samples` are those of `sample`.
    """
    context, mask = left_padded([prompt for prompt in prompts for _ in range(samples.size(1))], 0)
    responses = samples.flatten(0, 1)
    ids, mask = torch.cat([context, responses], 1), torch.cat([mask, torch.ones_like(responses)], 1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    theirs = reference(ids, attention_mask=mask, position_ids=places, logits_to_keep=samples.size(-1) + 1).logits[
        :, :-1
    ]
    ours, theirs = logits.log_softmax(-1), theirs.log_softmax(-1).view_as(logits)
    return (ours.exp() * (ours - theirs)).sum((-2, -1)).double().numpy()
