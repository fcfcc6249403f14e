"""A command line and its YAML files become dataclasses, and what cannot become a field is named."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from trl import TrlParser

from polypo.recipes import nearest, set_environment, split_recipe, take

from ..config import Range

# Keys and flags of older releases, and what to do now.
DROPPED = {
    "gpu_tflops": "hours are no longer reckoned from an assumed speed: --probe measures them.",
    "utilisation": "hours are no longer reckoned from an assumed speed: --probe measures them.",
    "limits": "the limits of SGPO are constants of trainers/sgpo/monitor.py, and all figures are in its manifests.",
    "stage": "the stages of SGPO run one after the other, and a run that was stopped goes on where it was.",
    "use_vllm": "write the engine into sampling: {engine: vllm serve} (docs/engines.md).",
    "separate_improver": "with SGPO one model is policy and improver, as the paper's abstract says.",
    "reference_in_input": "SGPO's improver must work where there is no reference, as on the prompts of the pairs.",
}
# Names of TRL's DPO scripts that are other ones here, or none (docs/trl.md).
NO_VARIANT = "this variant of DPO is not here: a method of your own is one file (README)."
IN_PYTHON = "the reference is the model that training starts from; in Python, ref_model names another."
OF_TRL = {
    "precompute_ref_log_probs": "it is precompute_ref_logps here.",
    "precompute_ref_batch_size": "it is ref_tokens_per_batch here, in tokens.",
    "dataset_streaming": "it is streaming here.",
    "loss_type": "the loss is the trainer's: DPOTrainer is sigmoid, and robust with label_smoothing (docs/trl.md).",
    "loss_weights": "sft_weight adds the likelihood of the preferred responses; other mixtures are not here.",
    "rpo_alpha": "it is sft_weight here.",
    "truncation_mode": "keep_start is the default; keep_end is truncate_prompts: left, with max_prompt_length.",
    "max_completion_length": "max_length bounds a prompt plus one response, max_prompt_length the prompt.",
    "padding_free": "layout: auto, the default, feeds no padding where the model allows it: leave it out.",
    "activation_offloading": "gradient_checkpointing and tokens_per_backward save memory here.",
    "trust_remote_code": "it is model_init_kwargs: {trust_remote_code: true} here.",
    "router_aux_loss_coef": "the coefficient is that of the model's config.",
    **dict.fromkeys(("ref_model", "ref_adapter_name", "model_adapter_name", "ref_model_init_kwargs"), IN_PYTHON),
    **dict.fromkeys(
        ("ld_alpha", "use_weighting", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau"), NO_VARIANT
    ),
}
KINDS = {"invalid int value:": "needs a whole number, not", "invalid float value:": "needs a number, not"}


class Parser(TrlParser):
    """TRL's parser; what it cannot read is a ValueError, without 300 lines of usage before it."""

    def __init__(self, classes: list[type]):
        super().__init__(classes, add_help=False, allow_abbrev=False)  # type: ignore[arg-type]
        for action in self._actions:
            if isinstance(action.choices, Range):
                action.choices = None  # `check_options` says what is out of bounds
            if getattr(action.type, "__name__", None) == "string_to_bool":
                action.type = partial(truth, action.type)  # type: ignore[arg-type]

    def unknown(self, flags: list[str]) -> list[str]:
        """Flags that are no option."""
        names = [flag.split("=")[0] for flag in flags if flag.startswith("--")]
        return [name for name in names if name not in self._option_string_actions]

    def error(self, message: str):
        for kind, told in KINDS.items():
            message = message.replace(kind, told)
        raise ValueError(message)


def truth(of: Callable[[str], bool], text: str) -> bool:
    """A boolean by `of`, which does not know YAML's words on and off."""
    return of({"on": "true", "off": "false"}.get(text.lower(), text))


def read(argv: list[str], *classes: type) -> tuple:
    """One instance of each dataclass from a command line, of which `--config` names YAML files; see `parse`."""
    return parse([*classes], *split_recipe(argv))


def first(cls: type, argv: list[str], recipe: dict | None = None) -> tuple[Any, list[str]]:
    """An instance of a dataclass from its flags in a command line that has others too, and these."""
    own, rest = take(argv, *(field.name for field in dataclasses.fields(cls)))
    given = {name: value for name, value in vars(own).items() if value is not None}
    return parse([cls], [], (recipe or {}) | given)[0], rest


def parse(classes: list[type], flags: list[str], recipe: dict) -> tuple:
    """One instance of each dataclass; a flag goes before a key of the recipe.

    The recipe's key `env` holds environment variables, as for TRL. A text of it is read as a flag's is, so that
    `max_steps: true` or `seed: 1.5` is an error, and `1e-5` a number.

    Raises:
        ValueError: a key or a flag is unknown, the message names the nearest known one; or a value is of another kind.
    """
    recipe, parser = dict(recipe), Parser(classes)
    set_environment(recipe)
    recipe.pop("env", None)
    left = parser.set_defaults_with_config(**recipe)
    known = [field.name for cls in classes for field in dataclasses.fields(cls) if field.init]

    def refuse(names: list[str]) -> None:
        for name in (part.removeprefix("--") for part in names):
            if name in DROPPED:
                raise ValueError(f"{name} is no option any more: {DROPPED[name]}")
            told = OF_TRL.get(name) or nearest(name, known, "see --help.")
            raise ValueError(f"the option {name!r} is not known: {told}")

    refuse([*left, *parser.unknown(flags)])  # one that is misspelt before those that are missing
    *parsed, more = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True, look_for_args_file=False)
    refuse(more)
    return tuple(parsed)
