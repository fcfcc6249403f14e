"""Where a round of a loop starts: at the policy that an earlier round left."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from ..forward import policy as policies


def load_start(model: str, start: Path | None, *, init_kwargs: dict, quantization_config=None, trainable=False):
    """The policy where a round starts: `model`, or the full model or the adapter on `model` that lies in `start`."""
    keywords = {"init_kwargs": init_kwargs, "quantization_config": quantization_config}
    if start is None or not (start / "adapter_config.json").exists():
        return policies.load_policy(str(start or model), **keywords)
    base = policies.load_policy(model, **keywords)
    return PeftModel.from_pretrained(base, str(start), is_trainable=trainable)


def load_for_sampling(model: str, start: Path | None, args, *, dtype: str | None, quantization_config=None) -> tuple:
    """Policy on the device and tokenizer. In float32 an adapter is merged, which is faster; elsewhere it would round.

    Raises:
        ValueError: the tokenizer has no pad token and none was named.
    """
    init_kwargs = {**(args.model_init_kwargs or {})}
    init_kwargs |= {} if dtype is None else {"dtype": dtype}
    policy = load_start(model, start, init_kwargs=init_kwargs, quantization_config=quantization_config)
    tokenizer = AutoTokenizer.from_pretrained(model)
    policies.set_pad_token(tokenizer, args.pad_token)
    if quantization_config is not None:
        return policy, tokenizer
    if isinstance(policy, PeftModel) and policies.base_model(policy).dtype == torch.float32:
        policy = policy.merge_and_unload()
    return policy.to(args.device), tokenizer
