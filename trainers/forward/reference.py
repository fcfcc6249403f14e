"""The frozen policy that log-ratios are taken against, and how it is reached during training."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from accelerate import Accelerator
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models import prepare_deepspeed, prepare_fsdp

from .safe_files import SAFE

REFERENCE_ADAPTER = "reference"


@dataclass
class Reference:
    """Where the frozen policy is.

    `own` says that it is a model of its own; that model is None once all its numbers are cached. Otherwise it is the
    policy with `adapter` active, or with no adapter where `adapter` is None.
    """

    own: bool
    model: nn.Module | None = None
    adapter: str | None = None

    @property
    def in_memory(self) -> bool:
        return self.model is not None or not self.own

    @contextmanager
    def active(self, policy: nn.Module, unwrapped: nn.Module) -> Iterator[nn.Module]:
        """Give the module to call for the reference; `policy` is the wrapped policy, `unwrapped` its inner model."""
        if self.own:
            if self.model is None:
                raise ValueError(
                    "These rows have no cached reference log-probabilities, and the reference is not in memory any "
                    "more. Give the data set as eval_dataset at the start, or set precompute_ref_logps to false."
                )
            yield self.model
        elif self.adapter is None:
            with _same_learning(unwrapped), unwrapped.disable_adapter():
                yield policy
        else:
            trained = unwrapped.active_adapter
            with _same_learning(unwrapped):
                unwrapped.set_adapter(self.adapter, inference_mode=True)
                try:
                    yield policy
                finally:
                    unwrapped.set_adapter(trained)

    def prepare(self, accelerator: Accelerator) -> None:
        """Place and shard an own reference model like the policy. Call once, before the first forward."""
        if self.model is None:
            return
        self.model.requires_grad_(False).eval()
        if accelerator.state.deepspeed_plugin is not None:
            self.model = prepare_deepspeed(self.model, accelerator)
        elif getattr(accelerator.state, "fsdp_plugin", None) is not None:
            self.model = prepare_fsdp(self.model, accelerator)
        else:
            self.model = accelerator.prepare_model(self.model, evaluation_mode=True)


@contextmanager
def _same_learning(model: nn.Module) -> Iterator[None]:
    """The same weights are trainable at the end: PEFT makes those of an adapter trainable that it switches on."""
    learning = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            before, learns = learning[name]
            # FSDP2 may leave gathered weights in the place of their shards, which come back with flags of their own.
            for either in (before, parameter):
                if either.requires_grad != learns:
                    either.requires_grad_(learns)


def make_reference(
    policy: PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | None,
    *,
    fresh_adapter: bool,
    copy_policy: bool = True,
) -> Reference:
    """The reference for a policy as it stands before its first step.

    A fresh adapter changes nothing yet, so switching it off gives the reference. A pretrained adapter is part of the
    policy: the reference is a frozen copy of it under the name "reference". A full model is copied, unless
    `copy_policy` is false because all its numbers are cached.

    Raises:
        ValueError: `ref_model` is the policy itself, or a ZeRO-3 policy cannot be read again from its path.
    """
    if ref_model is policy:
        raise ValueError("ref_model is the policy itself and would be trained: omit ref_model to get a frozen copy.")
    if ref_model is not None:
        return Reference(own=True, model=ref_model)
    if not isinstance(policy, PeftModel):
        return Reference(own=True, model=_frozen_copy(policy) if copy_policy else None)
    if fresh_adapter:
        return Reference(own=False)
    trained = policy.active_adapter
    if REFERENCE_ADAPTER not in policy.peft_config:
        policy.add_adapter(REFERENCE_ADAPTER, policy.peft_config[trained])
    weights = get_peft_model_state_dict(policy, adapter_name=trained)
    set_peft_model_state_dict(policy, weights, adapter_name=REFERENCE_ADAPTER)
    policy.set_requires_grad(REFERENCE_ADAPTER, False)
    for name, module in policy.named_modules():  # the new adapter has the dropout of its configuration
        if isinstance(module, nn.Dropout) and name.endswith(f".{REFERENCE_ADAPTER}"):
            module.p = 0.0
    return Reference(own=False, adapter=REFERENCE_ADAPTER)


def _frozen_copy(policy: PreTrainedModel) -> PreTrainedModel:
    if not is_deepspeed_zero3_enabled():
        return copy.deepcopy(policy)
    # Under ZeRO-3 this process holds only its own share of each weight, so there is nothing whole to copy.
    path = policy.config.name_or_path
    if not path:
        raise ValueError(
            "Under ZeRO-3 the reference is read from the policy's path, but this model has none: pass the model as a "
            "path or hub id, or pass ref_model."
        )
    return AutoModelForCausalLM.from_pretrained(path, dtype=policy.dtype, **SAFE)
