"""The mask heads inside a policy that is being trained: where they sit and how they are optimised."""

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from .learned import ATTRIBUTE, MaskHeads

NORM_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")


def check_engine(accelerator: Accelerator, optimizer: torch.optim.Optimizer | None) -> None:
    """Raises ValueError where mask heads would not be optimised or saved as asked; `optimizer` is the user's own."""
    if optimizer is not None:
        raise ValueError("optimizers has no parameters of the mask head: leave it out, or set mask to ones.")
    deepspeed, fsdp = accelerator.state.deepspeed_plugin, getattr(accelerator.state, "fsdp_plugin", None)
    if deepspeed is not None and "optimizer" in deepspeed.deepspeed_config:
        raise ValueError(
            "The DeepSpeed config names an optimizer, which would give the mask head the policy's learning rate and "
            "weight decay: remove `optimizer` from it, and set optim in the recipe."
        )
    if fsdp is not None and "FULL" not in str(fsdp.state_dict_type):
        raise ValueError("Learned masks need fsdp_state_dict_type: FULL_STATE_DICT, or they would not be saved.")


def add_heads(policy: PreTrainedModel, reference: PreTrainedModel, names: list[str], *, sharded: bool, **options):
    """Put fresh heads for the hidden states of `reference` into `policy`, before an engine wraps it.

    Args:
        sharded: whether the engine keeps one dtype for a group of parameters; otherwise heads are float32 or wider.
        options: `std`, `start` and `seed` of the heads.

    Returns:
        The `MaskHeads`.
    """
    config = reference.config.get_text_config()
    eps = next((getattr(config, name) for name in NORM_EPSILONS if getattr(config, name, None)), 1e-5)
    heads = MaskHeads(names, config.num_hidden_layers, config.hidden_size, eps=eps, **options)
    heads.to(policy.device, policy.dtype if sharded else torch.promote_types(policy.dtype, torch.float32))
    policy.add_module(ATTRIBUTE, heads)
    return heads


def regroup(optimizer: torch.optim.Optimizer, model, heads: MaskHeads, *, learning_rate: float, weight_decay: float):
    """Move the heads' parameters, found by name in `model`, into two groups of their own, with and without decay."""
    decayed = heads.decayed()
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if f"{ATTRIBUTE}." in name:
            groups[name.partition(f"{ATTRIBUTE}.")[2] in decayed].append(parameter)
    moved = {id(parameter) for group in groups.values() for parameter in group}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in moved]
    for decays, parameters in groups.items():
        optimizer.add_param_group(
            {"params": parameters, "lr": learning_rate, "weight_decay": weight_decay if decays else 0.0}
        )
