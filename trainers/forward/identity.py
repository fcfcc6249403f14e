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


def start_of_run(policy: nn.Module, reference: nn.Module | None, adapter: str | None) -> dict[str, str]:
    """Dtype of the policy and digests of what stays as it is while the policy is trained, by name.

    Every process must call this before an engine wraps the models: ZeRO-3 gathers the weights one by one. Under FSDP
    only the first process is sure to hold weights, so its answer counts.

    Args:
        reference: the reference as it is now, under `adapter`; None where none is needed.
    """
    found = {"dtype": str(base_model(policy).dtype).removeprefix("torch.")}
    if isinstance(policy, PeftModel):
        found["base weights"] = weights_digest(policy, adapter=None)
    if reference is policy and adapter is None and "base weights" in found:
        found["reference weights"] = found["base weights"]  # ZeRO-3 gathers every weight for a digest
    elif reference is not None:
        found["reference weights"] = weights_digest(reference, adapter=adapter)
    return found


def weights_digest(model: nn.Module, *, adapter: str | None) -> str:
    """Hash of samples of all weights under the names of the bare model; of adapters, `adapter` alone counts."""
    return _digest(reference_parameters(model, adapter=adapter).items())


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
