"""What is refused before any stage is begun: options that would do nothing there, and what would fail hours later."""

import importlib
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from ..generation.scorer import DOTTED_PATH, check_scorer
from .config import DATA_KEYS, SGPOConfig
from .improver import sft_config

NO_EVALUATION = (
    "would evaluate nothing: the stages have no evaluation, and held-out answers (dataset_test_split) are sampled at "
    "the end. "
)
NO_HUB = "has no effect: upload output_dir when the run is done. Leave it out."
HUB = {"hub_model_id": None, "hub_private_repo": None, "hub_always_push": False,
       "hub_revision": None, "hub_strategy": "every_save"}  # fmt: skip


def refuse_options(args: SGPOConfig) -> None:
    """Raises ValueError for an option that the stages would ignore or break on; the message names it and the fix."""
    for name, (refused, reason) in _rules(args).items():
        if refused:
            raise ValueError(f"{name}={plain_value(getattr(args, name))!r} {reason}")
    for name in ("improver", "sft"):
        options = {key: value for key, value in (getattr(args, name) or {}).items() if key not in DATA_KEYS}
        try:
            sft_config(args, options, Path(args.output_dir), args.seed)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error


def plain_value(option):
    """The value of an option that may be an enum."""
    return getattr(option, "value", option)


def _rules(args: SGPOConfig) -> dict[str, tuple[bool, str]]:
    """Field -> (whether its value is refused, why and what to do)."""
    fix = NO_EVALUATION + "Set it to false."
    hub = {name: (plain_value(getattr(args, name)) != default, NO_HUB) for name, default in HUB.items()}
    return hub | {
        "eval_strategy": (
            plain_value(args.eval_strategy) != "no", NO_EVALUATION + 'Set it to "no", in quotes in a YAML file.'
        ),
        "do_eval": (args.do_eval, fix),
        "do_predict": (args.do_predict, fix),
        "eval_on_start": (args.eval_on_start, fix),
        "load_best_model_at_end": (args.load_best_model_at_end, fix),
        "metric_for_best_model": (args.metric_for_best_model is not None, NO_EVALUATION + "Leave it out."),
        "save_strategy": (plain_value(args.save_strategy) == "best", NO_EVALUATION + "Set it to steps, epoch or no."),
        "save_only_model": (
            args.save_only_model, "leaves out what a killed stage needs to go on to the same weights: set it to false."
        ),
        "resume_from_checkpoint": (
            str(args.resume_from_checkpoint).lower() not in ("none", "false", "", "true", "last"),
            "has no effect: a run goes on from what lies in output_dir. Leave it out, and give that run's output_dir.",
        ),
        "precompute_ref_logps": (
            args.precompute_ref_logps, "does not work with the stages of SGPO: set it to false."
        ),
    }  # fmt: skip


def refuse_vllm(args: SGPOConfig, *, full: bool) -> None:
    """Raises ValueError where `use_vllm` cannot work; `full` is a model without an adapter that is not quantised."""
    if args.use_vllm and (not full or args.world_size > 1):
        raise ValueError("use_vllm samples from full models in one process: leave out LoRA and quantisation, or it.")
    if args.use_vllm:
        try:
            importlib.import_module("vllm")
        except ImportError as error:
            raise ValueError("use_vllm needs vLLM: pip install vllm, or leave it out.") from error


def check_models(args: SGPOConfig) -> None:
    """Raises ValueError for a scorer or a reviser that cannot be found; no weights are read."""
    if args.reviser_model is not None:
        _check_model("reviser_model", args.reviser_model)
    if args.scorer is None:
        return
    try:
        check_scorer(args.scorer)
    except ValueError as error:
        raise ValueError(f"scorer: {error}") from error
    for part in args.scorer if isinstance(args.scorer, list) else [args.scorer]:
        name = part["spec"] if isinstance(part, dict) else part
        if isinstance(name, str) and (Path(name).is_dir() or not DOTTED_PATH.fullmatch(name)):
            _check_model("scorer", name)


def _check_model(option: str, name: str) -> None:
    try:
        AutoConfig.from_pretrained(name)
        AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{option}={name!r} cannot be read: name a folder with a model, or a hub id. {str(error).splitlines()[0]}"
        ) from error
