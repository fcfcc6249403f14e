"""The frozen policy that log-ratios are taken against, and how it is reached during training."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from accelerate import Accelerator
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models import prepare_deepspeed, prepare_fsdp

from .identity import owners, reference_parameters
from .policy import SAFE

REFERENCE_ADAPTER = "reference"
INERT = (True, "gaussian", "orthogonal", "eva")  # initialisations under which a fresh adapter changes no output


@dataclass
class Reference:
    """Where the frozen policy is.

    `own` says that it is a model of its own; that model is None once all its numbers are cached. Otherwise it is the
    policy with `adapter` active, or with no adapter where `adapter` is None. `given` says that the user chose it, so
    that it may be another policy than the one that training starts from.
    """

    own: bool
    model: nn.Module | None = None
    adapter: str | None = None
    given: bool = False
    release: Callable[[], object] = lambda: None  # ends the engine of an own model

    @property
    def in_memory(self) -> bool:
        return self.model is not None or not self.own

    @contextmanager
    def active(self, policy: nn.Module, unwrapped: PeftModel) -> Iterator[nn.Module]:
        """Give the module to call for the reference; `policy` is the wrapped policy, `unwrapped` what is in it."""
        if self.own:
            if self.model is None:
                raise ValueError(
                    "These rows have no cached reference log-probabilities, and the reference is not in memory any "
                    "more. Give the data set as train_dataset or eval_dataset at the start, or set "
                    "precompute_ref_logps to false."
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
            self.release = self.model.destroy  # type: ignore[assignment,union-attr]
        elif getattr(accelerator.state, "fsdp_plugin", None) is not None:
            self.model = prepare_fsdp(self.model, accelerator)  # type: ignore[assignment]
        else:
            self.model = accelerator.prepare_model(self.model, evaluation_mode=True)


@contextmanager
def _same_learning(model: nn.Module) -> Iterator[None]:
    """The same weights are trainable at the end: PEFT decides anew when it adds an adapter or switches one on."""
    learning = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            before, learns = learning.get(name, (parameter, False))
            # FSDP2 may leave gathered weights in the place of their shards, which come back with flags of their own.
            for either in (before, parameter):
                if either.requires_grad != learns:
                    either.requires_grad_(learns)


def changes_nothing_yet(peft_config: PeftConfig) -> bool:
    """Whether a fresh adapter is a no-op on a base that is as it was: not so PiSSA, OLoRA, LoftQ, random weights."""
    kinds = [getattr(peft_config, name) for name in _initialisations(peft_config)]
    return bool(kinds) and all(kind in INERT for kind in kinds)


def _initialisations(peft_config: PeftConfig) -> list[str]:
    return [name for name in vars(peft_config) if name.startswith("init_") and name.endswith("weights")]


def reference_adapter(policy: nn.Module, *, inert_adapter: bool) -> str | None:
    """The adapter that makes the reference out of a policy as it is before its first step, None for none.

    That is the user's own where one is called "reference" and is not the one in training.
    """
    if not isinstance(policy, PeftModel) or inert_adapter:
        return None
    given = policy.peft_config.get(REFERENCE_ADAPTER)
    return policy.active_adapter if given is None or _is_copy(given) else REFERENCE_ADAPTER


def make_reference(
    policy: PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | PeftModel | None,
    *,
    adapter: str | None,
    copy_policy: bool = True,
    init_kwargs: dict | None = None,
) -> Reference:
    """The reference for a policy as it stands before its first step; the policy's outputs do not change.

    An adapter that changes nothing yet is switched off. Any other adapter is part of the policy: the reference is a
    frozen copy of it, or the user's own adapter. A full model is copied, unless `copy_policy` is false because all its
    numbers are cached.

    Args:
        adapter: from `reference_adapter`.
        init_kwargs: with which the policy was loaded.

    Raises:
        ValueError: `ref_model` is the policy itself, the reference would have weights that are trained, or a ZeRO-3
            policy cannot be read again from its path.
    """
    if ref_model is policy:
        raise ValueError("ref_model is the policy itself and would be trained: omit ref_model to get a frozen copy.")
    if ref_model is not None:
        _refuse_shared(policy, dict(ref_model.named_parameters()), "Load ref_model anew, from its path")
        return Reference(own=True, model=ref_model, given=True)
    if not isinstance(policy, PeftModel):
        return Reference(own=True, model=_frozen_copy(policy, init_kwargs or {}) if copy_policy else None)
    _refuse_shared(
        policy,
        reference_parameters(policy, adapter=None),
        "Train weights of the adapter alone (in a LoraConfig bias='none', the base frozen), or pass the model that "
        "training starts from as ref_model, loaded anew",
    )
    if adapter is None:
        return Reference(own=False)
    if adapter != policy.active_adapter:
        return Reference(own=False, adapter=_frozen(policy, adapter), given=True)
    return Reference(own=False, adapter=_frozen(policy, _copy_adapter(policy, adapter)))


def _refuse_shared(policy: nn.Module, used: dict[str, nn.Parameter], fix: str) -> None:
    ids = {id(parameter) for parameter in used.values()}
    shared = [
        name for name, parameter in policy.named_parameters() if parameter.requires_grad and id(parameter) in ids
    ]
    if shared:
        raise ValueError(
            f"The reference would move with the policy: {len(shared)} trainable weights belong to both, such as "
            f"{shared[0]}. {fix}."
        )


def _copy_adapter(policy: PeftModel, trained: str) -> str:
    """A second adapter with the weights of `trained`; returns its name, which no other adapter has.

    The copy is not initialised as `trained` was, because PiSSA and its like change the base each time.
    """
    for name, config in list(policy.peft_config.items()):
        if _is_copy(config):  # of an earlier trainer
            policy.delete_adapter(name)
    copied = REFERENCE_ADAPTER
    while copied in policy.peft_config:
        copied += "_"
    config = copy.deepcopy(policy.peft_config[trained])
    vars(config).update(dict.fromkeys(_initialisations(config), False), inference_mode=True, reference_copy=True)
    if getattr(config, "layer_replication", None):
        vars(config).update(layer_replication=None)  # of the base, and done
    if getattr(config, "bias", "none") != "none":  # none is trained here (`_refuse_shared`), and PEFT takes one only
        vars(config).update(bias="none")
    with _same_learning(policy):
        policy.add_adapter(copied, config, autocast_adapter_dtype=False)
        for module in policy.modules():  # PEFT keeps weights and settings of adapters in dicts, by adapter
            for entries in vars(module).values():
                if isinstance(entries, dict) and entries is not policy.peft_config and {trained, copied} <= {*entries}:
                    entries[copied] = copy.deepcopy(entries[trained])
    return copied


def _is_copy(config: PeftConfig) -> bool:
    return getattr(config, "reference_copy", False)


def _frozen(policy: PeftModel, adapter: str) -> str:
    belongs = owners(policy)
    for name, parameter in policy.named_parameters():
        if belongs.get(name) == adapter:
            parameter.requires_grad_(False)
    for name, module in policy.named_modules():
        if isinstance(module, nn.Dropout) and name.endswith(f".{adapter}"):
            module.p = 0.0
    return adapter


def _frozen_copy(policy: PreTrainedModel, init_kwargs: dict) -> PreTrainedModel:
    if not is_deepspeed_zero3_enabled():
        return copy.deepcopy(policy)
    # Under ZeRO-3 this process holds only its own share of each weight, so there is nothing whole to copy.
    path = policy.config.name_or_path
    if not path:
        raise ValueError(
            "Under ZeRO-3 the reference is read from the policy's path, but this model has none: pass the model as a "
            "path or hub id, or pass ref_model."
        )
    return AutoModelForCausalLM.from_pretrained(path, **{**SAFE, **init_kwargs, "dtype": policy.dtype})
