"""Options that every method shares, and how options are stated and checked. It imports nothing of this package."""

import dataclasses
import json
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_type_hints

import torch
from huggingface_hub.constants import HF_HOME
from packaging.version import Version
from transformers import TrainingArguments

BOUNDS = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le}
REDUCTIONS = ("sum", "mean")  # over tokens or responses
COMPILES = Version("2.13")  # the oldest torch whose compiled models were seen to give the same losses; 2.11 does not
if TYPE_CHECKING:
    JSON = dict[str, Any]
else:  # a parser takes the text of a command line for such an option, which reads it in its `__post_init__`
    JSON = str

# Fields of `transformers.TrainingArguments` that would silently give other numbers when they are set, and why.
REFUSED = {
    "label_smoothing_factor": "has no effect on preferences: DPO has label_smoothing instead. Set it to 0.",
    "bf16_full_eval": "would cast the policy and not the reference: set bf16 to true, which casts both.",
    "fp16_full_eval": "would cast the policy and not the reference: set bf16 to true, which casts both.",
    "neftune_noise_alpha": "would add noise to the policy and not to the reference: leave it out.",
    "parallelism_config": "splits rows or layers in ways that were not tried: use DDP, ZeRO or FSDP2.",
}
CUT_SAMPLES = (
    "truncate_prompts='left' would train answers behind a part of the prompts that {} samples them from: set it to "
    "'drop', or shorten the prompts of the data set."
)
# Liger's kernels in the place of the LM head, which gives log-probabilities without logits and without a loss.
LIGER_LOSSES = ("fused_linear_cross_entropy", "cross_entropy")


class Range:
    """Finite numbers within bounds, as the `choices` of an option: `value in range` is all that argparse asks."""

    def __init__(self, bounds: dict[str, float]):
        self.bounds = bounds

    def __contains__(self, value) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            return False
        return all(BOUNDS[name](value, bound) for name, bound in self.bounds.items())

    def __iter__(self) -> Iterator[str]:
        """One text, which a usage shows in the place of choices."""
        yield " and ".join(f"{name.replace('_', ' ')} {bound}" for name, bound in self.bounds.items())


def option(default, help: str, *, choices: Sequence[str] | None = None, **bounds: float) -> Any:
    """A dataclass field with its help, and either its `choices` or bounds: `above`, `at_least`, `below`, `at_most`.

    Both lie in the field's metadata as "choices", where `check_options` and every argument parser find them.
    """
    assert bounds.keys() <= BOUNDS.keys(), bounds
    allowed = Range(bounds) if bounds else choices and list(choices)
    return dataclasses.field(default=default, metadata={"help": help} | ({"choices": allowed} if allowed else {}))


def check_choice(name: str, value, choices: Sequence[str]) -> None:
    """Raises ValueError for a word that a loss would take for another one."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}.")


def check_options(options) -> None:
    """Raises ValueError for the first field of a dataclass that is outside its choices or bounds.

    None is allowed where it is the default or the field's type says so.
    """
    types = get_type_hints(type(options))  # not `field.type`, from which argument parsers take None away
    for field in dataclasses.fields(options):
        value, allowed = getattr(options, field.name), field.metadata.get("choices")
        kinds = get_args(types[field.name]) or (types[field.name],)
        if allowed is None or (value is None and (field.default is None or type(None) in kinds)):
            continue
        if not isinstance(allowed, Range):
            check_choice(field.name, value, allowed)
            continue
        fraction = isinstance(value, float) and float not in kinds
        if fraction or value not in allowed:
            number = "whole" if fraction else "finite"
            raise ValueError(f"{field.name}={value!r} must be a {number} number, {', '.join(allowed)}.")


class Demands(NamedTuple):
    """What a method asks for beyond one forward pass of policy and reference per step; `--dry_run` reckons with it."""

    kl: bool = False  # a KL over the vocabulary, from the LM heads of policy and reference
    mask_heads: int = 0  # learned heads on the reference's hidden states of all layers
    trainings: float = 1  # each over num_train_epochs (or max_steps)
    scorings: int = 0  # forward passes over all rows, without gradients and outside of training steps


@dataclass
class Truncation:
    """How long a row may be, and what is cut where it is longer.

    A prompt is made to fit `max_prompt_length` first; its responses get the room that `max_length` then leaves.

    Raises:
        ValueError: a field outside its choices or bounds, or one that has no effect beside the others.
    """

    max_length: int | None = option(
        1024, "Longest prompt plus one response, in tokens; longer responses are cut. None for no limit.", at_least=2
    )
    max_prompt_length: int | None = option(
        None, "Longest prompt, in tokens. None: one that leaves room for a token of a response.", at_least=1
    )
    truncate_prompts: str = option(
        "drop",
        "Prompts longer than max_prompt_length: drop their rows, or cut their left end (behind BOS).",
        choices=["drop", "left"],
    )
    keep_system: bool = option(False, "Keep the system turn of a prompt whose left end is cut.")
    truncate_responses: str = option(
        "right",
        "Responses longer than the room that max_length leaves: cut their right end, or drop them.",
        choices=["right", "drop"],
    )

    def __post_init__(self):
        check_options(self)
        longest, left = self.max_prompt_length, self.truncate_prompts == "left"
        if longest is not None and self.max_length is not None and longest >= self.max_length:
            raise ValueError(
                f"max_prompt_length={longest} leaves no room for a response in max_length={self.max_length}: lower "
                "it, or raise max_length."
            )
        if left and longest is None:
            raise ValueError("truncate_prompts='left' needs max_prompt_length: set it to the tokens that stay.")
        if self.keep_system and not left:
            raise ValueError("keep_system has no effect on prompts that are not cut: set truncate_prompts='left'.")


@dataclass
class PreferenceConfig(Truncation, TrainingArguments):
    """`transformers.TrainingArguments` plus the data path, the layout of a batch and the reference.

    Raises:
        ValueError: a field outside its choices or bounds, or one that would silently give other numbers.
    """

    output_dir: str = option("trainer_output", "Folder of the run: its checkpoints, model, metrics and model card.")
    logging_steps: float = option(10, "Log every so many steps (a share of all if below 1).")
    logging_nan_inf_filter: bool = option(
        False, "Log other losses in place of one that is not finite. Such a loss ends the run."
    )
    remove_unused_columns: bool = option(False, "Must stay false: the collator decides which columns become tensors.")
    pad_token: str | None = option(None, "Token to pad with, for a tokenizer that has none. Any known token will do.")
    invalid_rows: str = option(
        "drop",
        "Rows or responses that cannot be trained on (empty response, missing score, prompt that is too long): "
        "drop and count them, or stop with an error.",
        choices=["drop", "error"],
    )
    as_chat: bool = option(False, "Wrap plain-text prompts and responses as user and assistant messages.")
    assistant_only_loss: bool = option(
        True, "Of responses of several messages train on the assistant's tokens only, not on a tool's or a user's."
    )
    chat_template_kwargs: JSON | None = option(
        None, "Further arguments of the chat template, such as {enable_thinking: false}."
    )
    stream_buffer: int = option(
        1024, "Rows of a stream (an IterableDataset) that are mixed with each other.", at_least=1
    )
    dataset_num_proc: int | None = option(None, "Processes for preprocessing.", at_least=1)
    pad_to_multiple_of: int | None = option(None, "Pad prompts and responses to a multiple.", at_least=1)
    disable_dropout: bool = option(True, "Switch dropout off in policy and reference, so that log-ratios start at 0.")
    layout: str = option(
        "auto",
        "How a batch travels through the model: what its sequences begin with once, as a tree (shared), one padded "
        "row per response (rows), or whichever is cheaper (auto).",
        choices=["auto", "shared", "rows"],
    )
    max_tokens_per_batch: int | None = option(
        None,
        "Group prompts so that a batch has at most so many tokens (every prompt counted once); replaces "
        "per_device_train_batch_size.",
        at_least=1,
    )
    tokens_per_backward: int | None = option(
        None,
        "Go backward through at most so many tokens of a batch at once (prompts counted once; one response of each "
        "prompt at the least): the same gradients in the memory of a part, for less than one more forward pass.",
        at_least=1,
    )
    sft_weight: float = option(
        0.0,
        "Add so many times the negative log-likelihood of the preferred responses, from the same forward pass: of a "
        "prompt's best one (the first on ties); with SWEPO the mean over its positives.",
        at_least=0,
    )
    sft_reduction: str = option("mean", "Mean or sum over a response's tokens in that term.", choices=REDUCTIONS)
    precompute_ref_logps: bool = option(
        False, "Score all rows with the reference once, before training, and cache it on disk."
    )
    ref_cache_dir: str | None = option(
        None, "Folder of the reference cache; by default beside the hub cache of Hugging Face."
    )
    ref_tokens_per_batch: int = option(
        16384, "Tokens per batch and process while the reference scores the rows.", at_least=1
    )
    sync_ref_model: bool = option(
        False,
        "Let the reference follow the policy (TR-DPO, arXiv 2404.09656): every so many steps it becomes a mixture of "
        "itself and the policy.",
    )
    ref_model_mixup_alpha: float = option(
        0.6, "Share of the policy in that mixture; 1 replaces the reference by the policy.", above=0, at_most=1
    )
    ref_model_sync_steps: int = option(512, "Steps between two such mixtures.", at_least=1)
    model_init_kwargs: JSON | None = option(None, "Keywords for from_pretrained when the model is given as a path.")
    early_stopping_patience: int | None = option(
        None,
        "End the training when metric_for_best_model has not become better in so many evaluations; needs "
        "load_best_model_at_end.",
        at_least=1,
    )
    self_enhance: dict[str, Any] | str | None = option(
        None,
        "Train in rounds on samples of the policy itself: {rounds, iterations, num_generations, scorer, ...} "
        "(trainers/generation/options.py), as JSON on the command line.",
    )

    def __post_init__(self):
        self.model_init_kwargs = _keywords("model_init_kwargs", self.model_init_kwargs)
        self.chat_template_kwargs = _keywords("chat_template_kwargs", self.chat_template_kwargs)
        Truncation.__post_init__(self)  # which checks all options
        if self.truncate_prompts == "left" and self.self_enhance is not None:
            raise ValueError(CUT_SAMPLES.format("self_enhance"))
        for name, reason in REFUSED.items():
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} {reason}")
        if self.use_liger_kernel:
            self.liger_kernel_config = _without_losses(self.liger_kernel_config or {})
        if self.gradient_accumulation_steps < 1:  # the Trainer would end without a step
            raise ValueError(f"gradient_accumulation_steps={self.gradient_accumulation_steps} must be at least 1.")
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError(
                "early_stopping_patience would keep the last weights and not the best: set load_best_model_at_end to "
                "true, with eval_strategy and save_strategy alike."
            )
        if self.max_tokens_per_batch is not None and self.train_sampling_strategy == "sequential":
            raise ValueError(
                "train_sampling_strategy='sequential' has no effect on batches by token budget, whose order is "
                "random: leave it out, or max_tokens_per_batch."
            )
        if self.torch_compile and Version(torch.__version__) < COMPILES:
            raise ValueError(
                f"torch_compile=True gives other losses with torch {torch.__version__}: set it to false, or install "
                f"torch {COMPILES}."
            )
        if self.sync_ref_model and self.precompute_ref_logps:
            raise ValueError(
                "sync_ref_model=True changes the reference, whose log-probabilities precompute_ref_logps keeps: set "
                "one of them to false."
            )
        if self.ref_cache_dir is None:
            self.ref_cache_dir = str(Path(HF_HOME) / "polypo" / "reference")
        TrainingArguments.__post_init__(self)

    @property
    def demands(self) -> Demands:
        """What `--dry_run` must reckon with."""
        return Demands()


def _keywords(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """Keywords from JSON, as the command line gives them."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{name}={value!r} is no JSON ({error}): give an object such as {{}}.") from error


def _without_losses(kernels: dict[str, bool]) -> dict[str, bool]:
    """The `liger_kernel_config` with the losses off, which are on by default."""
    for name in LIGER_LOSSES:
        if kernels.get(name):
            raise ValueError(
                f"liger_kernel_config: {name} would replace the forward that gives log-probabilities without logits: "
                "leave it out. The kernels for norms, rotary positions and MLPs can be had."
            )
    return kernels | dict.fromkeys(LIGER_LOSSES, False)
