"""What token masks and the KL need from one forward of the reference and one of the policy."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..forward.divergence import FrozenHead, logps_and_kl
from ..forward.head import Pass
from .activations import find_sites, recorded
from .learned import ATTRIBUTE

ACTIVATIONS = "activations/"  # prefix of the token means of a type


@dataclass(frozen=True)
class ReadReference:
    """Log-probabilities and last hidden states (N,H); with `layers` the states of all blocks (L,N,H), the last one
    after the final norm; with `activations` their token means (A,N) by type."""

    frozen: FrozenHead
    layers: bool = False
    activations: bool = False

    def __call__(self, this: Pass) -> dict[str, Tensor]:
        recording: AbstractContextManager[dict[str, list[Tensor]]] = (
            recorded(find_sites(this.model), this.select) if self.activations else nullcontext({})
        )
        with recording as means:
            output = this.body(output_hidden_states=self.layers)
        hidden = this.select(output.last_hidden_state)
        values = {"logps": this.logps(hidden), "hidden": hidden}
        if self.layers:
            values["layers"] = torch.stack([this.select(states) for states in output.hidden_states[1:]])
        if self.activations:
            means["logits"] = [self.frozen.mean_logits(hidden)]
        return values | {ACTIVATIONS + kind: torch.stack(found) for kind, found in means.items()}


@dataclass(frozen=True)
class ReadPolicy:
    """Log-probabilities; "kls" (N,) if there is a frozen head; learned masks (N,), under the names of their heads."""

    reference: Mapping[str, Tensor]
    frozen: FrozenHead | None

    def __call__(self, this: Pass) -> dict[str, Tensor]:
        hidden = this.select(this.body().last_hidden_state)
        values = {}
        if self.frozen is None:
            values["logps"] = this.logps(hidden)
        else:
            values["logps"], values["kls"] = logps_and_kl(this, hidden, self.frozen, self.reference["hidden"])
        if "layers" in self.reference:
            values |= getattr(this.model, ATTRIBUTE)(self.reference["layers"])
        return values


def activation_means(values: Mapping[str, Tensor], token_mask: Tensor) -> dict[str, Tensor]:
    """What `ReadReference` recorded: {type: (A,N)} -> {type: (A,B,K,R)}, 0 outside `token_mask`."""
    by_kind = {n.removeprefix(ACTIVATIONS): v for n, v in values.items() if n.startswith(ACTIVATIONS)}
    return {
        kind: means.new_zeros(len(means), *token_mask.shape).masked_scatter(token_mask, means)
        for kind, means in by_kind.items()
    }
