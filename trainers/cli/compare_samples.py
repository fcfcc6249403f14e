"""What a trained policy says when it is asked: samples, their reward and length, and how far it is from the base."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from .. import PreferenceCollator
from ..forward import policy as policies
from ..forward.run import Runner
from ..generation import sample_responses
from ..generation.rewards import as_completion
from ..generation.sampler import SamplingConfig, encode_prompt
from ..generation.scorer import load_scorer
from ..generation.start import load_start

ROWS_PER_FORWARD = 4


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
) -> dict:
    """Samples of the policy in `start`, or of model `name` itself: reward, length, and log-ratio to that model.

    The mean of the log-ratios, summed over the tokens of each sample, estimates KL(policy || base) of whole responses
    without bias when the samples are the policy's own (temperature 1, top_p 1).
    """
    prompts = prompts[: options.prompts]
    if not prompts:
        return {}
    init_kwargs = init_kwargs if options.dtype is None else (init_kwargs or {}) | {"dtype": options.dtype}
    model = load_start(name, start, init_kwargs=init_kwargs).to(device).eval()
    merge = isinstance(model, PeftModel) and policies.base_model(model).dtype == torch.float32
    if merge:  # faster, and undone for the log-ratios
        model.merge_adapter()
    samples = sample_responses(model, tokenizer, prompts, options)
    if merge:
        model.unmerge_adapter()
    rows = [
        {"prompt_ids": encode_prompt(tokenizer, prompt), "response_ids": [sample.token_ids for sample in row],
         "scores": [0.0] * len(row)}
        for prompt, row in zip(prompts, samples, strict=True)
    ]  # fmt: skip
    ratios = [[0.0] * len(row) for row in samples]
    if start is not None:
        base = None if isinstance(model, PeftModel) else load_start(name, None, init_kwargs=init_kwargs).to(device)
        pairs = zip(*policy_and_base(model, base, rows, tokenizer.pad_token_id), strict=True)
        ratios = [[p - b for p, b in zip(*pair, strict=True)] for pair in pairs]
    del model
    flat = [sample for row in samples for sample in row]
    measured = {
        "tokens": [len(sample.token_ids) for sample in flat],
        "truncated": [sample.truncated for sample in flat],
        "logratios": sum(ratios, []),
        "texts": [sample.text for sample in flat],
        "token_ids": [sample.token_ids for sample in flat],
    }
    if options.scorer is not None:
        owners = [prompt for prompt, row in zip(prompts, samples, strict=True) for _ in row]
        completions = [as_completion(prompt, sample.text) for prompt, sample in zip(owners, flat, strict=True)]
        measured["rewards"] = load_scorer(options.scorer, device=device)(prompts=owners, completions=completions)
    return measured


def policy_and_base(model, base, rows: list[dict], pad_token_id: int) -> tuple[list[list[float]], list[list[float]]]:
    """Log-probabilities of the responses under a policy and under `base`; None is the policy with its adapter off."""
    runner = Runner([policies.base_model(model), *([] if base is None else [base.eval()])], "auto")
    policy = sum_logps(runner, model, rows, pad_token_id)
    if base is not None:
        return policy, sum_logps(runner, base, rows, pad_token_id)
    with model.disable_adapter():
        return policy, sum_logps(runner, model, rows, pad_token_id)


@torch.no_grad()
def sum_logps(
    runner: Runner, model, rows: list[dict], pad_token_id: int, batch_size: int = ROWS_PER_FORWARD
) -> list[list[float]]:
    """Log-probability of each response of tokenised rows, summed over its tokens."""
    collate, device = PreferenceCollator(pad_token_id), next(model.parameters()).device
    sums = []
    for start in range(0, len(rows), batch_size):
        part = [{n: row[n] for n in ("prompt_ids", "response_ids", "scores")} for row in rows[start:][:batch_size]]
        batch = {name: tensor.to(device) for name, tensor in collate(part).items()}
        logps = runner(model, batch).logps.sum(-1).tolist()
        sums += [values[: len(row["response_ids"])] for values, row in zip(logps, part, strict=True)]
    return sums
