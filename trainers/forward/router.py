"""The load-balancing loss of a mixture of experts, which is no function of the logits.

A model adds it to a loss of its own where `output_router_logits` of its config is true, times `router_aux_loss_coef`.
Here it is taken inside the wrapped forward, over the tokens that are fed: without padding, a shared beginning once.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput


class RouterLoss(NamedTuple):
    """Mixtral's loss, which nearly all of transformers' mixtures have, and its coefficient."""

    top_k: int
    coefficient: float

    def __call__(self, router_logits: tuple[Tensor, ...], fed: Tensor | None) -> Tensor:
        """Router logits (tokens,experts) of each layer -> scalar; `fed` (rows,L) says which tokens are no padding."""
        experts = router_logits[0].size(-1)
        return load_balancing_loss_func(router_logits, experts, self.top_k, fed)  # type: ignore[arg-type,return-value]

    def check(self, own: ModelOutput) -> None:
        """Raises ValueError if this is not the loss in the model's own output for rows without a mask."""
        loss = own.get("aux_loss")
        if loss is None or not torch.allclose(self(own["router_logits"], None), loss, rtol=1e-4):
            raise ValueError(
                "This model has no load-balancing loss of its router, or another one than Mixtral's, which is not "
                "supported: set output_router_logits in the model's config to false to train without it."
            )


def router_loss(config: PretrainedConfig) -> RouterLoss | None:
    """The loss that a model's config asks for.

    Raises:
        ValueError: the config does not say how much it weighs.
    """
    text = config.get_text_config()
    if not getattr(text, "output_router_logits", False):
        return None
    missing = [name for name in ("num_experts_per_tok", "router_aux_loss_coef") if not hasattr(text, name)]
    if missing:
        raise ValueError(
            f"output_router_logits is true in the model's config, but {' and '.join(missing)} is missing there: set "
            "it, or set output_router_logits to false to train without the loss of the router."
        )
    return RouterLoss(text.num_experts_per_tok, text.router_aux_loss_coef) if text.router_aux_loss_coef else None
