"""The learned mask: a small head on the reference's hidden states, with exact zeros.

    x_i = LayerNorm(h_i)             one LayerNorm for all layers i = 1..L
    g_i = ReLU(w_i . x_i + b_i)
    m   = ReLU(sum_i a_i g_i)

The heads live inside the policy while it trains, so that every engine sees their parameters and their calls; they are
saved beside the policy in a file of their own, and the saved policy has no trace of them.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from ..forward.identity import write_whole
from ..runs.processes import refuse_partial_weights

ATTRIBUTE = "mask_heads"  # name of the heads inside the policy
FILE = "mask_heads.safetensors"
DECAYED = ("weight", "mixer")  # neither biases nor the LayerNorm


class MaskHead(nn.Module):
    """Hidden states (L,N,H) of a reference -> one mask value per token (N,), 0 or more, in float32 or wider.

    Args:
        std: of the normal distribution that layer weights and mixer are drawn from; biases start at 0.
        start: "released", or "dense" with the mixer at 1/L and layer biases at 0.5, where no head starts dead.
    """

    def __init__(self, layers: int, width: int, *, eps: float, std: float = 0.02, start: str = "released"):
        super().__init__()
        self.eps = eps
        # Of the LayerNorm; not a module of its own, because ZeRO-3 gathers what belongs to the one that is called.
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.weight = nn.Parameter(torch.randn(layers, width) * std)
        self.bias = nn.Parameter(torch.full((layers,), 0.5 if start == "dense" else 0.0))
        self.mixer = nn.Parameter(torch.full((layers,), 1 / layers) if start == "dense" else torch.randn(layers) * std)

    def forward(self, states: Tensor) -> Tensor:
        wide = torch.promote_types(states.dtype, torch.float32)
        scale, shift, weight, bias, mixer = (
            p.to(wide) for p in (self.scale, self.shift, self.weight, self.bias, self.mixer)
        )
        total = states.new_zeros(states.size(1), dtype=wide)
        for i, layer in enumerate(states):
            # w.(scale x + shift) as x.(scale w) + w.shift: of (L,N,H) numbers only x is kept for the backward pass.
            x = layer_norm(layer.to(wide), (len(scale),), eps=self.eps)
            total = total + mixer[i] * torch.relu(x @ (scale * weight[i]) + weight[i] @ shift + bias[i])
        return torch.relu(total)


class MaskHeads(nn.Module):
    """One head by name: "common", or "reward" and "kl". States (L,N,H) -> {name: (N,)}.

    Args:
        names: of the heads.
        seed: of the heads' start, which then depends on nothing else.
    """

    def __init__(self, names: list[str], layers: int, width: int, *, seed: int = 0, **options):
        super().__init__()
        self.shape = {"names": names, "layers": layers, "width": width, "eps": options["eps"]}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleDict({name: MaskHead(layers, width, **options) for name in names})

    def forward(self, states: Tensor) -> dict[str, Tensor]:
        with torch.autocast(states.device.type, enabled=False):
            return {name: head(states) for name, head in self.heads.items()}

    def save(self, folder: str | Path, state: Mapping[str, Tensor]) -> None:
        """Write a state of the heads to `folder`."""
        state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        save_file(state, Path(folder) / FILE, metadata={"settings": json.dumps(self.shape)})

    @classmethod
    def load(cls, folder: str | Path) -> "MaskHeads":
        """The heads that were saved in `folder`."""
        with safe_open(Path(folder) / FILE, "pt") as file:
            shape = json.loads(file.metadata()["settings"])
        heads = cls(**{name: shape[name] for name in ("names", "layers", "width", "eps")})
        heads.restore(folder)
        return heads

    def restore(self, folder: str | Path) -> None:
        """Take over the values saved in `folder`, also where a sharded engine keeps only a part of each parameter.

        Raises:
            ValueError: they belong to other heads.
        """
        state, own = load_file(Path(folder) / FILE), dict(self.named_parameters())
        if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in state.items()}:
            raise ValueError(
                f"The mask heads in {folder} ({', '.join(sorted(state))}) are not those of this run "
                f"({', '.join(sorted(own))}): set mask, independent, mask_reward and mask_kl as in the saved run."
            )
        for name, parameter in own.items():
            write_whole(parameter, state[name])


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A policy's state without its mask heads, and that of the heads under their own names."""
    marker = f"{ATTRIBUTE}."
    heads = {name.partition(marker)[2]: value for name, value in state.items() if marker in name}
    return {name: value for name, value in state.items() if marker not in name}, heads


def check_engine(accelerator: Accelerator, optimizer: torch.optim.Optimizer | None) -> None:
    """Raises ValueError where mask heads would not be optimised or saved as asked; `optimizer` is the user's own."""
    if optimizer is not None:
        raise ValueError("optimizers has no parameters of the mask head: leave it out, or set mask to ones.")
    refuse_partial_weights(accelerator, "a learned mask")
    deepspeed = accelerator.state.deepspeed_plugin
    if deepspeed is not None and "optimizer" in deepspeed.hf_ds_config.config:
        raise ValueError(
            "The DeepSpeed config names an optimizer, which would give the mask head the policy's learning rate and "
            "weight decay: remove `optimizer` from it, and set optim in the recipe."
        )


def regroup(optimizer: torch.optim.Optimizer, model: nn.Module, *, learning_rate: float, weight_decay: float) -> None:
    """Move the heads' parameters, found by name in `model`, into two groups of their own, with and without decay."""
    heads = {name: p for name, p in model.named_parameters() if f"{ATTRIBUTE}." in name}
    moved = {id(parameter) for parameter in heads.values()}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in moved]
    for decay in (weight_decay, 0.0):
        own = [p for name, p in heads.items() if (name.rpartition(".")[2] in DECAYED) == (decay is weight_decay)]
        optimizer.add_param_group({"params": own, "lr": learning_rate, "weight_decay": decay})
