"""One forward pass: lay a batch out, run the model, give per-token log-probabilities back."""

import inspect
import logging
import math
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import FLEX, SHARED_SDPA, flex_mask
from .head import Reading, add_logps_head, read_logps, widen
from .layout import ModelInputs, count_tokens, lay_out, read_lengths, rows_layout, to_responses
from .policy import has_dropout
from .router import RouterLoss, router_loss

logger = logging.getLogger(__name__)

# Mean difference in log-probability per token that rounding explains; a wrong mask or position is far above it.
AGREEMENT = {torch.float64: 1e-8, torch.float32: 2e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
LAID_OUT = ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "mask")  # what a layout reads of a batch
CHECK_PROMPT, CHECK_RESPONSE = 128, 64  # tokens of the group that the first batch is checked on


class Forward(NamedTuple):
    """What one model says about one batch.

    `logps` is (B,K,R), float32 or wider: the log-probability of each token of `response_mask`, 0 elsewhere. Cached
    reference values are (B,K,1), the sums over the tokens, unless the method asks for tokens; `logps.sum(-1)` is right
    for both.
    `values` is what else the method's reading gave, for the N tokens of `response_mask`, in its order.
    `aux_loss` is the loss of the router, a scalar, where the model is a mixture of experts that is trained with it.
    """

    logps: Tensor
    values: Mapping[str, Tensor] = MappingProxyType({})
    aux_loss: Tensor | None = None


class LayoutError(RuntimeError):
    """The layout of a batch and the model's own logits disagree."""


class Runner:
    """Runs prepared models on batches, in the layout that the user asked for or that is cheaper.

    Args:
        models: the policy and, if it is a model of its own, the reference; all of them are prepared here.
        layout: "rows", "shared" or "auto".

    Raises:
        ValueError: "shared" is asked for and a model cannot do it.
    """

    def __init__(self, models: list[PreTrainedModel], layout: str):
        reasons = [prepare_forward(model, share=layout != "rows") for model in models]
        reason = next(filter(None, reasons), None)
        if reason and layout == "shared":
            raise ValueError(
                f"layout='shared' is not possible with this model: {reason}. Use layout 'auto' or 'rows'."
            )
        if reason:
            logger.warning("Prompts are not shared between responses: %s. Training goes on with padded rows.", reason)
        self.layout = "rows" if reason else layout
        self._window = min((w for w in map(sliding_window, models) if w is not None), default=None)
        self.router = router_loss(models[0].config)
        self._flex = models[0].config._attn_implementation == FLEX
        self._checked = False
        self._last: tuple[list, ModelInputs] | None = None

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], reading: Reading = read_logps) -> Forward:
        return run(model, batch, self.inputs(batch), flex=self._flex, reading=reading)

    def inputs(self, batch: dict[str, Tensor]) -> ModelInputs:
        """The batch in its layout; of the last batch those that were made before, for policy and reference alike."""
        if (inputs := self._laid_out(batch)) is None:
            inputs = lay_out(batch, self.layout, self._window)
            self._last = self._given(batch), inputs
        return inputs

    def tokens(self, batch: dict[str, Tensor]) -> int:
        """Tokens that the batch has in its layout; nothing is laid out for it, as it may have gone in parts."""
        inputs = self._laid_out(batch)
        return count_tokens(batch, self.layout, self._window) if inputs is None else inputs.input_ids.numel()

    def _laid_out(self, batch: dict[str, Tensor]) -> ModelInputs | None:
        if self._last is None:
            return None
        given, inputs = self._last
        return inputs if all(map(operator.is_, self._given(batch), given)) else None

    def _given(self, batch: dict[str, Tensor]) -> list:
        return [self.layout, *(batch[name] for name in LAID_OUT)]

    @torch.no_grad()
    def check(self, model: nn.Module, batch: dict[str, Tensor], accelerator: Accelerator) -> None:
        """Compare with the model's own logits on a small group, once a run: a silent mistake costs a whole run.

        Raises:
            LayoutError: they differ, and there is no other layout to go on with.
            FloatingPointError: they are not finite.
            ValueError: the loss of the router is not the model's own.
        """
        if self._checked:
            return
        self._checked = True
        model = getattr(model, "_orig_mod", model)  # torch.compile would compile for these calls alone
        with accelerator.autocast(), without_dropout(model):
            limit = agreement(model)
            layout = "rows" if self.layout == "rows" else "shared"
            difference = check_first_batch(model, batch, layout, flex=self._flex, router=self.router)
        difference = float(accelerator.gather(torch.tensor([difference], device=accelerator.device)).max())
        if difference <= limit:
            return
        if self.layout != "auto" and not math.isfinite(difference):
            raise FloatingPointError(
                "The log-probabilities of the first batch are not finite: the weights hold NaN or infinity, or the "
                "precision is too low for them. Look at the model's weights; in place of float16 take bfloat16."
            )
        wrong = (
            f"log-probabilities differ from the model's own logits by {difference:.2g} per token (limit {limit:.2g})"
        )
        if self.layout != "auto":
            raise LayoutError(f"The {wrong}: this model computes its logits in a way that is not supported.")
        logger.warning("The shared layout's %s. Training goes on with padded rows.", wrong)
        self.layout, self._checked = "rows", False
        self.check(model, batch, accelerator)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Every module as in evaluation, and then as it was, wrappers included."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def prepare_forward(model: PreTrainedModel, *, share: bool) -> str | None:
    """Add the log-probability head and, if `share`, the attention for shared prompts.

    Returns why prompts cannot be shared with this model, or None when they can.
    """
    reason = _why_not_shared(model) if share else None
    if share and reason is None and model.config._attn_implementation != FLEX:
        model.set_attn_implementation(SHARED_SDPA)
    add_logps_head(model)
    return reason


def run(
    model: nn.Module,
    batch: dict[str, Tensor],
    inputs: ModelInputs,
    *,
    flex: bool = False,
    reading: Reading = read_logps,
) -> Forward:
    """Feed a batch, as it was laid out, to a prepared model (wrapped by DDP, DeepSpeed, FSDP or PEFT, or bare)."""
    values = dict(model(**_keywords(inputs, flex), reading=reading))
    logps = values.pop("logps")
    aux_loss = values.pop("aux_loss", None)
    return Forward(to_responses(widen(logps), batch["response_mask"]), values, aux_loss)


def _keywords(inputs: ModelInputs, flex: bool) -> dict:
    names = ("input_ids", "positions", "targets", "distinct", "fed")
    keywords: dict[str, object] = {name: getattr(inputs, name) for name in names}
    if inputs.branches is None:
        return keywords
    keywords["position_ids"] = inputs.position_ids
    if flex:
        return keywords | {"attention_mask": flex_mask(inputs.branches.ends)}
    # A mask with four dimensions is passed on as it is; without one the model would build (T,T) from the position
    # ids. The attention function reads `branches` instead.
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs.input_ids.device)
    return keywords | {"branches": inputs.branches, "attention_mask": no_mask}


def sliding_window(model: PreTrainedModel) -> int | None:
    """The longest distance that every layer can look back, None if unlimited."""
    config = model.config.get_text_config()
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)


def _why_not_shared(model: PreTrainedModel) -> str | None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    forward = inspect.signature(type(model.base_model).forward).parameters
    if kinds:
        return f"its layers are of kind {', '.join(sorted(kinds))}"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "its position biases follow the place in the row"
    if "position_ids" not in forward or not any(p.kind is p.VAR_KEYWORD for p in forward.values()):
        return "its forward takes no position ids or no attention keywords"
    if config._attn_implementation not in ("sdpa", SHARED_SDPA, FLEX):
        return f"attn_implementation is {config._attn_implementation!r}, neither 'sdpa' nor {FLEX!r}"
    if has_dropout(model):
        return "dropout is on"
    return None


def check_first_batch(
    model: nn.Module,
    batch: dict[str, Tensor],
    layout: str,
    *,
    flex: bool = False,
    router: RouterLoss | None = None,
) -> float:
    """Mean difference per token between `run` and the model's own logits, on a part of the first prompt's group."""
    group = _small_group(batch)
    inputs = rows_layout(group)
    with torch.no_grad():
        own = model(input_ids=inputs.input_ids, **({} if router is None else {"output_router_logits": True}))
        if router is not None:
            router.check(own)
        logits = widen(own.logits.flatten(0, 1).index_select(0, inputs.positions))
        expected = logits.log_softmax(-1).gather(-1, inputs.targets.unsqueeze(-1)).squeeze(-1)
        found = run(model, group, lay_out(group, layout), flex=flex).logps[group["response_mask"]]
    return float((found - expected).abs().mean())


def agreement(model: nn.Module) -> float:
    """Largest mean difference per token that `check_first_batch` may find for a model of this dtype."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        dtypes.add(torch.bfloat16)
    return max(AGREEMENT.get(dtype, AGREEMENT[torch.bfloat16]) for dtype in dtypes)


def _small_group(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The end of the first prompt with the starts of its responses, so that the check costs little."""
    length = int(batch["prompt_mask"][0].sum())
    kept = slice(max(0, length - CHECK_PROMPT), length)
    # All tokens that are read: the first of them need not hold one that is trained on.
    lengths = read_lengths(batch["response_mask"][:1])
    steps = torch.arange(CHECK_RESPONSE, device=batch["mask"].device)
    return {
        "prompt_ids": batch["prompt_ids"][:1, kept],
        "prompt_mask": batch["prompt_mask"][:1, kept],
        "response_ids": batch["response_ids"][:1, :, :CHECK_RESPONSE],
        "response_mask": (steps < lengths.unsqueeze(-1))[..., : batch["response_ids"].size(-1)],
        "mask": batch["mask"][:1],
    }
