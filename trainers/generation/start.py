"""Where a training of a loop starts, at the policy that an earlier one left, and where it ends."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from ..checkpoints import remove_incomplete_checkpoints
from ..forward import policy as policies
from ..forward.safe_files import refuse_pickled_weights
from .processes import Processes, free_memory


def load_start(model: str, start: Path | None, *, init_kwargs: dict, quantization_config=None, trainable=False):
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


def train_into(done: Path, train: Callable[[Path], None], processes: Processes) -> None:
    """Calls `train(folder)` unless `done` is there, which the folder becomes when its training is over.

    `train` leaves model and results in the folder and must resume from `last_checkpoint(folder)`.
    """
    if not done.exists():
        training = done.with_name("training")
        processes.main(lambda: remove_incomplete_checkpoints(training))
        train(training)
        free_memory()
        processes.main(lambda: training.rename(done))
    # After the rename, so that a kill amid the deletion leaves no half checkpoint to resume from.
    processes.main(lambda: [shutil.rmtree(checkpoint) for checkpoint in done.glob("checkpoint-*")])
