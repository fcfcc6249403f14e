"""What a run starts from, by content: which reference, and which base under an adapter.

A path says nothing about weights, since a folder can be moved or written anew, and hashing all of a large model takes
long at every start. So a few thousand numbers of every weight are hashed, which training or merging changes alike.
"""

from collections.abc import Iterable

import torch
import xxhash
from peft import PeftModel
from torch import nn

from .cache import reference_parameters, whole
from .policy import base_model

SAMPLED = 4096  # numbers of each weight


def start_of_run(
    policy: nn.Module, ref_model: nn.Module | None, *, fresh_adapter: bool, needs_reference: bool
) -> dict[str, str]:
    """Dtype of the policy and digests of what stays as it is while the policy is trained, by name.

    Every process must call this before an engine wraps the models: ZeRO-3 gathers the weights one by one. Under FSDP
    only the first process is sure to hold weights, so its answer counts.

    Args:
        ref_model: the reference if it was given; otherwise it is the policy as it is now, without a fresh adapter.
    """
    adapted = isinstance(policy, PeftModel)
    found = {"dtype": str(base_model(policy).dtype).removeprefix("torch.")}
    if adapted:
        found["base weights"] = weights_digest(policy, adapter=None)
    if needs_reference and ref_model is None and fresh_adapter:
        found["reference weights"] = found["base weights"]
    elif needs_reference:
        source = policy if ref_model is None else ref_model
        adapter = source.active_adapter if isinstance(source, PeftModel) else None
        found["reference weights"] = weights_digest(source, adapter=adapter)
    return found


def weights_digest(model: nn.Module, *, adapter: str | None) -> str:
    """Hash of samples of all weights under the names of the bare model; of adapters, `adapter` alone counts."""
    return _digest(reference_parameters(model, adapter=adapter, has_adapters=isinstance(model, PeftModel)).items())


def _digest(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    digest = xxhash.xxh3_128()
    for name, parameter in sorted(parameters, key=lambda item: item[0]):
        with whole(parameter):
            data = parameter.detach().flatten()
            digest.update(f"{name} {tuple(parameter.shape)} {data.dtype}".encode())
            if not data.is_meta:
                step = data.numel() // SAMPLED | 1  # odd, so that it runs through the columns of a matrix as well
                digest.update(data[::step].contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
