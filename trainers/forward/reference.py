"""The frozen policy that log-ratios are taken against, and how it is reached during training."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models import prepare_deepspeed, prepare_fsdp

from .identity import adapter_numbers, adapter_weights, read_whole, reference_parameters, whole, write_whole
from .policy import base_model, load_policy

# In a checkpoint, where the reference moves. Not beside the policy's file, which some load by its suffix.
REFERENCE = "ref_model/model.safetensors"
REFERENCE_ADAPTER = "reference"
INERT = (True, "gaussian", "orthogonal", "eva")  # initialisations under which a fresh adapter changes no output
UNLIKE = (
    "sync_ref_model mixes the weights that the policy trains into those of the reference, but {}: leave out "
    "ref_model, so that the reference is a copy of the policy, or set sync_ref_model to false."
)


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

    def told(self, given: str | PreTrainedModel | PeftModel | None) -> str:
        """In words, for run.json; `given` is what the user gave for `ref_model`."""
        if not self.own:
            if self.adapter is None:
                return "the model with its adapter off"
            return f"the adapter {self.adapter!r}" if self.given else "a frozen copy of the adapter as it was"
        if given is None:
            return "a frozen copy of the policy as it was"
        if isinstance(given, str):
            return given
        path = base_model(given).config.name_or_path or "a model without a path"
        return f"{path} with the adapter {given.active_adapter!r}" if isinstance(given, PeftModel) else path

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

    # What changes where it follows the policy. All processes must call each of these.

    def mix(self, policy: nn.Module, alpha: float) -> None:
        """Each weight becomes alpha times the policy's plus 1 - alpha times itself, in float32 or wider."""
        for kept, trained in self._weights(policy).values():
            wide = torch.promote_types(trained.dtype, torch.float32)
            with torch.no_grad(), whole(trained), whole(kept, changed=True):
                kept.copy_(kept.to(wide).lerp(trained.to(kept.device, wide), alpha))

    def save(self, policy: nn.Module, checkpoint: Path, *, write: bool) -> None:
        """Keep the weights that `mix` changes in a checkpoint, which this process does if `write`."""
        weights: dict[str, Tensor] = {}
        for name, (kept, _) in self._weights(policy).items():
            value = read_whole(kept, torch.device("cpu"))
            weights |= {name: value.contiguous()} if write else {}
        if write:
            (checkpoint / REFERENCE).parent.mkdir(exist_ok=True)
            save_file(weights, checkpoint / REFERENCE)

    def load(self, policy: nn.Module, checkpoint: Path) -> None:
        """Take over what `save` kept."""
        with safe_open(checkpoint / REFERENCE, "pt") as file:
            for name, (kept, _) in self._weights(policy).items():
                write_whole(kept, file.get_tensor(name))

    def check_weights(self, policy: nn.Module) -> None:
        """Raises ValueError where the weights that the policy trains are not those of the reference, or count more."""
        adapters = [policy.active_adapter, self.adapter] if isinstance(policy, PeftModel) and not self.own else []
        own, other = (adapter_numbers(policy, adapter) for adapter in adapters) if adapters else ({}, {})
        for name, number in own.items():
            if other.get(name, number) != number:
                told = f"the adapter has {name.rpartition('.')[2]} {other[name]} there, not {number}"
                raise ValueError(UNLIKE.format(told))
        for name, (kept, trained) in self._weights(policy).items():
            with whole(kept), whole(trained):
                if kept.shape != trained.shape:
                    raise ValueError(UNLIKE.format(f"{name} is {tuple(kept.shape)} there, not {tuple(trained.shape)}"))

    def _weights(self, policy: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """The weights that `mix` changes, by name: that of the reference and that of the policy."""
        if self.own:
            model = extract_model_from_parallel(self.model, keep_torch_compile=False)
            kept = dict(model.named_parameters(remove_duplicate=False))
            weights = dict(policy.named_parameters())
            trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
            reached = {id(kept[name]) for name in weights.keys() & kept.keys()}  # also where weights are tied
            more = [name for name, weight in kept.items() if id(weight) not in reached]
        else:
            assert isinstance(policy, PeftModel) and self.adapter is not None
            kept, trained = (adapter_weights(policy, name) for name in (self.adapter, policy.active_adapter))
            more = [*(kept.keys() - trained.keys())]
        if unlike := sorted(trained.keys() - kept.keys()) or sorted(more):
            raise ValueError(UNLIKE.format(f"{len(unlike)} are not in both, such as {unlike[0]}"))
        return {name: (kept[name], weight) for name, weight in trained.items()}


class SyncReference(TrainerCallback):
    """Mixes the policy into its reference every `ref_model_sync_steps` steps, as TRL's `SyncRefModelCallback` does.

    Also for adapters, and under ZeRO-3 one weight at a time, where TRL's gathers both models at once.
    """

    def __init__(self, reference: Reference):
        self.reference = reference

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % args.ref_model_sync_steps == 0:
            policy = extract_model_from_parallel(model, keep_torch_compile=False)
            self.reference.mix(policy, args.ref_model_mixup_alpha)


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


def named_reference(policy: nn.Module, name: str, init_kwargs: dict | None) -> str | PreTrainedModel | PeftModel:
    """What a text for `ref_model` stands for: an adapter of the policy, by its name, or a model, which is loaded.

    Raises:
        ValueError: it is the adapter in training, or neither.
    """
    adapters = policy.peft_config if isinstance(policy, PeftModel) else {}
    if name not in adapters:
        try:
            return load_policy(name, init_kwargs=init_kwargs)
        except OSError as error:
            known = f"no adapter of the model ({', '.join(adapters)}), and " if adapters else ""
            raise ValueError(f"ref_model={name!r} is {known}no model that can be loaded: {error}") from error
    if name == policy.active_adapter:
        raise ValueError(f"ref_model={name!r} is the adapter in training: omit ref_model to get a frozen copy of it.")
    return name


def start_of_reference(
    policy: nn.Module,
    ref_model: str | PreTrainedModel | PeftModel | None,
    *,
    fresh: PeftConfig | None,
    follows: bool = False,
) -> tuple[nn.Module, str | None]:
    """The model that is the reference before the first step, and the adapter that is on in it, None for none.

    Without `ref_model` that is the policy: with the user's own adapter where one is called "reference" and is not the
    one in training, without its adapter where that changes nothing yet, or as it is.

    Args:
        ref_model: a model, or the name of an adapter of the policy, from `named_reference`.
        fresh: configuration of the policy's adapter if it is a fresh one.
        follows: whether the reference will follow the policy, for which it needs an adapter of its own.
    """
    if isinstance(ref_model, str):
        return policy, ref_model
    if ref_model is not None:
        return ref_model, ref_model.active_adapter if isinstance(ref_model, PeftModel) else None
    if not isinstance(policy, PeftModel) or fresh is not None and changes_nothing_yet(fresh) and not follows:
        return policy, None
    given = policy.peft_config.get(REFERENCE_ADAPTER)
    return policy, policy.active_adapter if given is None or _is_copy(given) else REFERENCE_ADAPTER


def make_reference(
    policy: PreTrainedModel | PeftModel,
    ref_model: str | PreTrainedModel | PeftModel | None,
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
        adapter: from `start_of_reference`.
        init_kwargs: with which the policy was loaded.

    Raises:
        ValueError: `ref_model` is the policy itself, the reference would have weights that are trained, or a ZeRO-3
            policy cannot be read again from its path.
    """
    if ref_model is policy:
        raise ValueError("ref_model is the policy itself and would be trained: omit ref_model to get a frozen copy.")
    if ref_model is not None and not isinstance(ref_model, str):
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
    for parameter in adapter_weights(policy, adapter).values():
        parameter.requires_grad_(False)
    for name, module in policy.named_modules():
        if isinstance(module, nn.Dropout) and name.endswith(f".{adapter}"):
            module.p = 0.0
    return adapter


def _frozen_copy(policy: PreTrainedModel, init_kwargs: dict) -> nn.Module:
    if not is_deepspeed_zero3_enabled():
        return copy.deepcopy(policy)
    # Under ZeRO-3 this process holds only its own share of each weight, so there is nothing whole to copy.
    path = policy.config.name_or_path
    if not path:
        raise ValueError(
            "Under ZeRO-3 the reference is read from the policy's path, but this model has none: pass the model as a "
            "path or hub id, or pass ref_model."
        )
    return load_policy(path, init_kwargs=init_kwargs | {"dtype": policy.dtype})
