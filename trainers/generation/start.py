"""Where a training of a loop starts: at the policy that an earlier one left."""

from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PreTrainedModel

from ..forward import policy as policies
from ..precision import settle_dtype
from .engine import Weights


def load_start(
    model: str, start: Path | None, *, init_kwargs: dict | None, quantization_config=None, trainable=False
) -> PreTrainedModel | PeftModel:
    """The policy where a round starts: `model`, or the full model or the adapter on `model` that lies in `start`.

    Raises:
        ValueError: `model` is an adapter itself.
    """
    if (Path(model) / "adapter_config.json").is_file():
        raise ValueError(
            f"model_name_or_path={model!r} is an adapter, and a run in several trainings starts from a whole model: "
            "merge it into its base (merge_and_unload), and give the folder of that."
        )
    keywords = {"init_kwargs": init_kwargs, "quantization_config": quantization_config}
    if start is None or not (start / "adapter_config.json").exists():
        return policies.load_policy(str(start or model), **keywords)
    base = policies.load_policy(model, **keywords)
    return PeftModel.from_pretrained(base, str(start), is_trainable=trainable)


def load_for_sampling(
    model: str, start: Path | None, init_kwargs: dict | None, quantization_config, dtype: str | None,
    device: torch.device,
) -> PreTrainedModel | PeftModel:  # fmt: skip
    """The whole policy on the device. In float32 an adapter is merged, which is faster; elsewhere it would round."""
    own = {**(init_kwargs or {})} | ({} if dtype is None else {"dtype": dtype})
    policy = load_start(model, start, init_kwargs=own, quantization_config=quantization_config)
    if quantization_config is not None:
        return policy
    if isinstance(policy, PeftModel) and policies.base_model(policy).dtype == torch.float32:
        policy = policy.merge_and_unload()
    policy.to(device)  # type: ignore[arg-type]
    return policy


def weights_of(model: str, start: Path | None, args, *, dtype: str | None = None, quantization_config=None) -> Weights:
    """What a stage samples from, read as the training reads it.

    Raises:
        ValueError: the tokenizer has no pad token and none was named.
    """
    init_kwargs = {**(args.model_init_kwargs or {})}
    tokenizer = policies.tokenizer_at(model, init_kwargs)
    policies.set_pad_token(tokenizer, args.pad_token)
    dtype = dtype and dtype_for_all(dtype, args.device)
    load = partial(load_for_sampling, model, start, init_kwargs, quantization_config)
    return Weights(model, start, load, tokenizer, dtype or init_kwargs.get("dtype"))


def dtype_for_all(dtype: str, device: torch.device) -> str:
    """What `fast` is on this machine, or the dtype itself: one for all processes, whose measurements may differ."""
    return broadcast_object_list([settle_dtype(dtype, device)[0]])[0]
