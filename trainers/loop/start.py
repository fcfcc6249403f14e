"""Where a round of a loop starts: at the policy that an earlier round left, or at a checkpoint amid its training."""

import json
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from ..forward import policy as policies
from ..forward.safe_files import refuse_pickled_weights


def load_start(model: str, start: Path | None, *, init_kwargs: dict, quantization_config=None, trainable=False):
    """The policy where a round starts: `model`, or the full model or the adapter on `model` that lies in `start`."""
    keywords = {"init_kwargs": init_kwargs, "quantization_config": quantization_config}
    if start is None or not (start / "adapter_config.json").exists():
        return policies.load_policy(str(start or model), **keywords)
    base = policies.load_policy(model, **keywords)
    refuse_pickled_weights(start)
    return PeftModel.from_pretrained(base, str(start), is_trainable=trainable)


def load_for_sampling(model: str, start: Path | None, args, *, dtype: str | None, quantization_config=None) -> tuple:
    """Policy on the device and tokenizer. In float32 an adapter is merged, which is faster; elsewhere it would round.

    Raises:
        ValueError: the tokenizer has no pad token and none was named.
    """
    init_kwargs = {**(args.model_init_kwargs or {})}
    init_kwargs |= {} if dtype is None else {"dtype": dtype}
    policy = load_start(model, start, init_kwargs=init_kwargs, quantization_config=quantization_config)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=init_kwargs.get("trust_remote_code", False))
    policies.set_pad_token(tokenizer, args.pad_token)
    if quantization_config is not None:
        return policy, tokenizer
    if isinstance(policy, PeftModel) and policies.base_model(policy).dtype == torch.float32:
        policy = policy.merge_and_unload()
    return policy.to(args.device), tokenizer


def last_checkpoint(folder: Path) -> str | None:
    """The newest of the trainer's checkpoints in `folder` that was saved to its end."""
    found = [path for path in Path(folder).glob("checkpoint-*") if _is_complete(path)]
    return str(max(found, key=_step)) if found else None


def remove_incomplete_checkpoints(folder: Path) -> None:
    """The trainer counts these folders when it limits their number, and would delete a good one in their favour."""
    for path in Path(folder).glob("checkpoint-*"):
        if not _is_complete(path):
            shutil.rmtree(path)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_complete(checkpoint: Path) -> bool:
    """The trainer writes its state last."""
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
