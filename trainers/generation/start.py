"""What a stage starts from: the model of a run, or what an earlier stage left, to train on or to sample from."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.json_rows import digest
from ..forward import policy as policies
from ..precision import settle_dtype
from ..runs.processes import Processes, whole_weights
from ..runs.settings import model_fingerprint


def load_start(
    model: str, start: Path | None, *, init_kwargs: dict | None, quantization_config=None, trainable=False
) -> PreTrainedModel | PeftModel:
    """The policy where a round starts: `model`, or the full model or the adapter on `model` that lies in `start`.

    Raises:
        ValueError: `model` is an adapter itself.
    """
    if policies.is_adapter(model, (init_kwargs or {}).get("revision")):
        raise ValueError(
            f"model_name_or_path={model!r} is an adapter, and a run in several trainings starts from a whole model: "
            "merge it into its base (merge_and_unload), and give the folder of that."
        )
    keywords = {"init_kwargs": init_kwargs, "quantization_config": quantization_config}
    if start is None or not policies.is_adapter(str(start)):
        return policies.load_policy(str(start or model), **keywords)
    base = policies.load_policy(model, **keywords)
    return PeftModel.from_pretrained(base, str(start), is_trainable=trainable)


@dataclass(frozen=True)
class Weights:
    """What is sampled from.

    Args:
        model: path or hub id.
        start: full weights in the place of the model's, or an adapter on it; None is the model.
        tokenizer: with a pad token.
        dtype: to sample in, None for that of the weights.
        init_kwargs: what else the model is loaded with.
    """

    model: str
    start: Path | None
    tokenizer: PreTrainedTokenizerBase
    dtype: str | None = None
    init_kwargs: dict | None = None
    quantization_config: object = None

    def whole(self, dtype: str | None = None, device: torch.device | None = None):
        """The policy in this process, whole whatever engine trains; by default to sample from on its device.

        In float32 an adapter is merged, which is faster; elsewhere it would round.
        """
        keywords = {**(self.init_kwargs or {})}
        if dtype or self.dtype:
            keywords["dtype"] = dtype or self.dtype
        quantized = self.quantization_config
        with whole_weights():
            policy = load_start(self.model, self.start, init_kwargs=keywords, quantization_config=quantized)
            if quantized is not None:
                return policy
            if isinstance(policy, PeftModel) and policies.base_model(policy).dtype == torch.float32:
                policy = policy.merge_and_unload()
            return policy.to(device or Processes().device).eval()  # type: ignore[arg-type]

    @property
    def adapter(self) -> bool:
        return self.start is not None and policies.is_adapter(str(self.start))

    @property
    def folder(self) -> str:
        """Of the full weights, under an adapter those of its base."""
        return self.model if self.start is None or self.adapter else str(self.start)

    @property
    def name(self) -> str:
        """A name that other weights do not have."""
        files = [model_fingerprint(str(path)) or str(path) for path in (self.folder, self.start or "")]
        return f"policy-{digest(files)[:12]}"


def weights_of(model: str, start: Path | None, args, *, dtype: str | None = None, quantization_config=None) -> Weights:
    """What a stage samples from, read as the training reads it.

    Raises:
        ValueError: the tokenizer has no pad token and none was named.
    """
    init_kwargs = {**(args.model_init_kwargs or {})}
    tokenizer = policies.tokenizer_at(model, init_kwargs)
    policies.set_pad_token(tokenizer, args.pad_token)
    dtype = dtype_for_all(dtype, args.device) if dtype else init_kwargs.get("dtype")
    return Weights(model, start, tokenizer, dtype, init_kwargs, quantization_config)


def dtype_for_all(dtype: str, device: torch.device) -> str:
    """What `fast` is on this machine, or the dtype itself: one for all processes, whose measurements may differ."""
    return broadcast_object_list([settle_dtype(dtype, device)[0]])[0]
