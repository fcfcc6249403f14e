"""Which weights a reference has, and hashes of them: what names its cache, and what a run starts from."""

import json
from collections.abc import Iterator

import torch
import xxhash
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .policy import base_model

# A path says nothing about weights, since a folder can be moved or written anew, and hashing all of a large model
# takes long at every start. So a run knows its start by this many numbers of every weight, spread evenly.
SAMPLED = 4096

# Fields of a model config that do not change a log-probability.
IRRELEVANT = (
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id", "pad_token_id",
    "output_attentions", "output_hidden_states", "return_dict", "transformers_version", "use_cache", "problem_type",
)  # fmt: skip


def start_of_run(policy: nn.Module, reference: nn.Module | None, adapter: str | None) -> dict[str, str]:
    """Dtype of the policy and digests of what stays as it is while the policy is trained, by name.

    Every process must call this before an engine wraps the models: ZeRO-3 gathers the weights one by one. Under FSDP
    only the first process is sure to hold weights, so its answer counts.

    Args:
        reference: the reference as it is now, under `adapter`; None where none is needed.
    """
    start = {"dtype": str(base_model(policy).dtype).removeprefix("torch.")}
    if isinstance(policy, PeftModel):
        start["base weights"] = weights_digest(policy, adapter=None, sampled=SAMPLED)
    if reference is policy and adapter is None and "base weights" in start:
        start["reference weights"] = start["base weights"]  # ZeRO-3 gathers every weight for a digest
    elif reference is not None:
        start["reference weights"] = weights_digest(reference, adapter=adapter, sampled=SAMPLED)
    return start


def reference_fingerprint(source: nn.Module, args, *, adapter: str | None, per_token: bool) -> str:
    """Hash of everything that changes the numbers of a reference, which is `source` as it is now under `adapter`.

    Args:
        args: the trainer's, for the precision.
        per_token: whether every token is stored, or sums.
    """
    base = base_model(source)
    config = {k: v for k, v in base.config.to_dict().items() if k not in IRRELEVANT and not k.startswith("_attn")}
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else "off"
    options = [config, f"{base.dtype}, autocast {autocast}", per_token]
    options += [] if adapter is None else [adapter_numbers(source, adapter)]
    digest = xxhash.xxh3_128(weights_digest(source, adapter=adapter).encode())
    digest.update(json.dumps(options, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def weights_digest(model: nn.Module, *, adapter: str | None, sampled: int | None = None) -> str:
    """Hash of all `reference_parameters` of a model, or of so many numbers of each.

    ZeRO-3 shares are gathered one by one.
    """
    digest = xxhash.xxh3_128()
    for name, parameter in sorted(reference_parameters(model, adapter=adapter).items()):
        with whole(parameter):
            data = parameter.detach().flatten()
            digest.update(f"{name} {tuple(parameter.shape)} {data.dtype}".encode())
            if not data.is_meta:
                # An odd step runs through the columns of a matrix as well.
                step = 1 if sampled is None else data.numel() // sampled | 1
                digest.update(data[::step].contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def whole(parameter: Tensor, *, changed: bool = False):
    """The parameter as a whole, also under ZeRO-3, which keeps what the first process writes to it if `changed`."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if changed else None)
    return torch.no_grad()


def read_whole(parameter: Tensor, device: torch.device) -> Tensor:
    """Its values on a device, also where an engine keeps only a share of them in this process; all processes call."""
    data = parameter.detach()
    if isinstance(data, DTensor):
        return data.full_tensor().to(device)
    with whole(parameter):
        return parameter.detach().to(device, copy=hasattr(parameter, "ds_id"))  # of a share, gathered here alone


@torch.no_grad()
def write_whole(parameter: Tensor, value: Tensor) -> None:
    """Gives it these values, of which an engine may keep only a share in this process; all processes call."""
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    with whole(parameter, changed=True):
        parameter.copy_(value)


def reference_parameters(model: nn.Module, *, adapter: str | None) -> dict[str, nn.Parameter]:
    """Weights of a reference under the names of the bare model; `adapter` is the one that counts, None for none.

    A base model under an adapter and the same model without one get the same names, so that they share a cache.
    """
    if not isinstance(model, PeftModel):
        return dict(model.named_parameters())
    belongs = owners(model)
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if belongs.get(name) in (None, adapter)
    }


def owners(model: PeftModel) -> dict[str, str]:
    """Which adapter a weight belongs to, by the weight's name; those of the base are not in it."""
    return {name: adapter for name, adapter, _, _ in _of_adapters(model)}


def adapter_weights(model: PeftModel, adapter: str) -> dict[str, nn.Parameter]:
    """The weights of one adapter, by names in which that of the adapter is left out."""
    return {name: parameter for _, owner, name, parameter in _of_adapters(model) if owner == adapter}


def adapter_numbers(model: nn.Module, adapter: str | None) -> dict[str, float]:
    """What the layers hold of an adapter beside its weights, such as their scaling, by the layer's name."""
    return {
        f"{path}.{name}": entries[adapter]
        for path, module in model.named_modules()
        for name, entries in vars(module).items()
        if isinstance(entries, dict) and isinstance(entries.get(adapter), int | float)
    }


def _of_adapters(model: PeftModel) -> Iterator[tuple[str, str, str, nn.Parameter]]:
    """The name of each weight of an adapter, the adapter, the name without it, and the weight.

    PEFT keeps the weights of all kinds of adapters in dicts of modules or parameters, by the adapter's name.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleDict | nn.ParameterDict):
            for name, parameter in module.named_parameters(remove_duplicate=False):
                adapter, _, rest = name.partition(".")
                if adapter in model.peft_config:
                    yield f"{path}.{name}", adapter, f"{path}.{rest}", parameter
