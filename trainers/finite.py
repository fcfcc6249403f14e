"""A loss that is not finite stops the run before it reaches a weight. The Trainer would show it as 0 and train on."""

import logging

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def check_finite(
    loss: Tensor,
    losses: Tensor,
    batch: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    step: int,
    fatal: bool,
) -> None:
    """Look at the loss of a batch, and at those of its prompts (B,) if it is not finite.

    Args:
        step: the optimizer step that the batch is part of.
        fatal: false under float16, where the loss scaler skips such a step.

    Raises:
        FloatingPointError: the loss is not finite; the message names the step and the prompts.
    """
    if torch.isfinite(loss):
        return
    wrong = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    prompts = [tokenizer.decode(batch["prompt_ids"][b][batch["prompt_mask"][b]]) for b in wrong]
    told = ", ".join(repr(text[-80:]) for text in prompts[:3]) + (", ..." if len(prompts) > 3 else "")
    message = (
        f"The loss of step {step} is {float(loss)}: that of {len(wrong)} of {len(losses)} prompts is not finite, of "
        f"those that end with {told}."
    )
    if fatal:
        raise FloatingPointError(
            f"{message} The weights are still those of step {step - 1}: look at these rows (scores, lengths), lower "
            "learning_rate or set max_grad_norm, and go on from the last checkpoint."
        )
    logger.warning("%s The loss scaler skips such a step; if this stays so, use bf16.", message)
