"""Options that every method shares."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.constants import HF_HOME
from transformers import TrainingArguments

from .arguments import refuse_unsupported

POSITIVE = (
    "max_tokens_per_batch", "ref_tokens_per_batch", "dataset_num_proc", "pad_to_multiple_of",
    "gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
)  # fmt: skip
LAYOUTS = ("auto", "shared", "rows")


class Demands(NamedTuple):
    """What a method asks for beyond one forward pass of policy and reference per step; `--dry_run` reckons with it."""

    kl: bool = False  # a KL over the vocabulary, from the LM heads of policy and reference
    mask_heads: int = 0  # learned heads on the reference's hidden states of all layers
    trainings: float = 1  # each over num_train_epochs (or max_steps)
    scorings: int = 0  # forward passes over all rows, without gradients and outside of training steps


@dataclass
class PreferenceConfig(TrainingArguments):
    """`transformers.TrainingArguments` plus the data path, the layout of a batch and the reference.

    Raises:
        ValueError: a field outside its range; the message names the field and the fix.
    """

    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps (a share of all if below 1)."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Log other losses in place of one that is not finite. Such a loss ends the run."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the collator decides which columns become tensors."}
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Token to pad with, for a tokenizer that has none. Any known token will do."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest prompt plus one response, in tokens; longer responses are cut."}
    )
    invalid_rows: str = field(
        default="drop",
        metadata={
            "help": "Rows or responses that cannot be trained on (empty response, missing score, prompt longer "
            "than max_length): drop and count them, or stop with an error.",
            "choices": ["drop", "error"],
        },
    )
    as_chat: bool = field(
        default=False, metadata={"help": "Wrap plain-text prompts and responses as user and assistant messages."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of the chat template, such as {enable_thinking: false}."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes for preprocessing."})
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Pad prompts and responses to a multiple."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "Switch dropout off in policy and reference, so that log-ratios start at 0."}
    )
    layout: str = field(
        default="auto",
        metadata={
            "help": "How a batch travels through the model: every prompt once with its responses as branches "
            "(shared), one padded row per response (rows), or whichever is cheaper (auto).",
            "choices": list(LAYOUTS),
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Group prompts so that a batch has at most so many tokens (every prompt counted once); replaces "
            "per_device_train_batch_size."
        },
    )
    precompute_ref_logps: bool = field(
        default=False,
        metadata={"help": "Score all rows with the reference once, before training, and cache it on disk."},
    )
    ref_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the reference cache; by default beside the hub cache of Hugging Face."},
    )
    ref_tokens_per_batch: int = field(
        default=16384, metadata={"help": "Tokens per batch and process while the reference scores the rows."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keywords for from_pretrained when the model is given as a path."}
    )

    def __post_init__(self):
        for name in ("model_init_kwargs", "chat_template_kwargs"):
            setattr(self, name, _keywords(name, getattr(self, name)))
        refuse_unsupported(self)
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} is unknown: choose one of {', '.join(LAYOUTS)}.")
        if self.invalid_rows not in ("drop", "error"):
            raise ValueError(f"invalid_rows={self.invalid_rows!r} is unknown: choose drop or error.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for a prompt and a response: use 2 or more."
            )
        for name in POSITIVE:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if self.ref_cache_dir is None:
            self.ref_cache_dir = str(Path(HF_HOME) / "polypo" / "reference")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate} must be a finite number that is not negative.")
        if self.output_dir is not None:
            _check_folder("output_dir", self.output_dir)
        super().__post_init__()

    @property
    def demands(self) -> Demands:
        """What `--dry_run` must reckon with."""
        return Demands()


def _keywords(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """Keywords from JSON, as the command line gives them."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{name}={value!r} is no JSON ({error}): give an object such as {{}}.") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}: give an object such as {{}}.")
    return value


def _check_folder(name: str, value: str) -> None:
    """Raises ValueError for what is no folder and cannot become one."""
    try:
        if "\0" in value:
            raise ValueError("a null character")
        path = Path(value).expanduser()
        blocked = next((p for p in (path, *path.parents) if p.is_symlink() and not p.exists() or p.is_file()), None)
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links
        raise ValueError(f"{name}={value!r} can be no folder ({error}): name another.") from error
    if not value:
        raise ValueError(f"{name} is empty: name a folder.")
    if blocked is not None:
        kind = "a file" if blocked.is_file() else "a link that leads nowhere"
        raise ValueError(f"{name}={value!r}: {blocked} is {kind}: name a folder.")
