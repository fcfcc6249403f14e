"""What a trained policy says when it is asked: samples, their reward and length, and how far it is from the base."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from datasets import Dataset

from ..forward.cache import score_rows
from ..generation import sample_responses
from ..generation.rewards import as_completion
from ..generation.sampler import SamplingConfig, encode_prompt
from ..generation.scorer import load_scorer
from ..generation.start import Weights, load_start
from ..runs.processes import Processes

TOKENS_PER_FORWARD = 2048


@dataclass(frozen=True)
class SampleOptions(SamplingConfig):
    """The keys of `samples`. At temperature 1 and top_p 1 the samples are the policy's own distribution.

    Args:
        prompts: held-out prompts to sample on; 0 for no samples.
        dtype: of the weights while sampling; None is the dtype they are trained in.
        scorer: what `load_scorer` takes; None for no reward.
    """

    prompts: int = 32
    num_generations: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    dtype: str | None = None
    scorer: str | dict | list | None = None


def sample_and_measure(
    name: str,
    start: Path | None,
    tokenizer,
    prompts: list,
    options: SampleOptions,
    *,
    device,
    init_kwargs: dict | None,
    before: Path | None = None,
) -> dict:
    """Samples of the policy in `start`, or of model `name` itself: reward, length, and log-ratio to that in `before`.

    The mean of the log-ratios, summed over the tokens of each sample, estimates KL(policy || before) of whole
    responses without bias when the samples are the policy's own (temperature 1, top_p 1).
    """
    prompts = prompts[: options.prompts]
    if not prompts:
        return {}
    init_kwargs = init_kwargs if options.dtype is None else (init_kwargs or {}) | {"dtype": options.dtype}
    weights = Weights(name, start, tokenizer, init_kwargs=init_kwargs)
    samples = sample_responses(weights.whole(device=device), tokenizer, prompts, options)
    rows = Dataset.from_list([
        {"prompt_ids": encode_prompt(tokenizer, prompt), "response_ids": [sample.token_ids for sample in row]}
        for prompt, row in zip(prompts, samples, strict=True)
    ])  # fmt: skip
    ratios = np.zeros((len(rows), options.num_generations))
    if start != before:
        policy, base = (
            score(name, at, rows, tokenizer, device=device, init_kwargs=init_kwargs) for at in (start, before)
        )
        ratios = np.subtract(policy, base)
    flat = [sample for row in samples for sample in row]
    measured = {
        "tokens": [len(sample.token_ids) for sample in flat],
        "truncated": [sample.truncated for sample in flat],
        "logratios": ratios.ravel().tolist(),
        "texts": [sample.text for sample in flat],
        "token_ids": [sample.token_ids for sample in flat],
    }
    if options.scorer is not None:
        owners = [prompt for prompt, row in zip(prompts, samples, strict=True) for _ in row]
        completions = [as_completion(prompt, sample.text) for prompt, sample in zip(owners, flat, strict=True)]
        measured["rewards"] = load_scorer(options.scorer, device=device)(prompts=owners, completions=completions)
    return measured


def score(name: str, start: Path | None, rows: Dataset, tokenizer, *, device, init_kwargs: dict | None) -> list:
    """For each tokenised row the log-probabilities of its responses under the policy in `start`, or under `name`."""
    processes = Processes()
    processes.device = torch.device(device)
    with TemporaryDirectory() as folder:
        load = partial(load_start, name, start, init_kwargs=init_kwargs)
        return score_rows(
            load, [rows], folder, accelerator=processes, pad_token_id=tokenizer.pad_token_id,
            budget=TOKENS_PER_FORWARD,
        )[0]  # fmt: skip
