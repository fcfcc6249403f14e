"""Fields of `transformers.TrainingArguments` that would do nothing here, or something wrong: refused by name."""

import torch
from packaging.version import Version
from transformers import TrainingArguments

COMPILES = Version("2.13")  # the oldest torch whose compiled models were seen to give the same losses; 2.11 does not


def refuse_unsupported(args: TrainingArguments) -> None:
    """Raises ValueError for a field that cannot work; `args` is a config of this package before `__post_init__`."""
    refuse(args, _rules(args))


def refuse(args: TrainingArguments, rules: dict[str, tuple[bool, str]]) -> None:
    """Raises ValueError for the first field that is refused; `rules` say for each whether it is, and why."""
    for name, (refused, reason) in rules.items():
        if refused:
            raise ValueError(f"{name}={plain_value(getattr(args, name))!r} {reason}")


def _rules(args) -> dict[str, tuple[bool, str]]:
    """Field -> (whether its value is refused, why and what to do)."""
    half = "would cast the policy and not the reference: set bf16 to true, which evaluates both in the same precision."
    metrics = args.include_for_metrics or []
    budget = args.max_tokens_per_batch is not None
    return {
        "remove_unused_columns": (
            bool(args.remove_unused_columns),
            "would remove the prompts and responses: it must be false.",
        ),
        "label_smoothing_factor": (
            bool(args.label_smoothing_factor),
            "has no effect on preferences: DPO has label_smoothing instead. Set it to 0.",
        ),
        "torch_compile": (
            bool(args.torch_compile) and Version(torch.__version__) < COMPILES,
            f"gives other losses with torch {torch.__version__}: set it to false, or install torch {COMPILES}.",
        ),
        "bf16_full_eval": (bool(args.bf16_full_eval), half),
        "fp16_full_eval": (bool(args.fp16_full_eval), half),
        "neftune_noise_alpha": (
            args.neftune_noise_alpha is not None,
            "would add noise to the policy and not to the reference: log-ratios would not start at 0. Leave it out.",
        ),
        "use_liger_kernel": (
            bool(args.use_liger_kernel),
            "would replace the forward pass that gives log-probabilities without logits: set it to false.",
        ),
        "train_sampling_strategy": (
            plain_value(args.train_sampling_strategy) not in (("random",) if budget else ("random", "sequential")),
            "does not know how long prompts and responses are: use random, with max_tokens_per_batch for batches of "
            "rows of like length."
            if not budget
            else "has no effect on batches by token budget: leave it at random.",
        ),
        "auto_find_batch_size": (
            bool(args.auto_find_batch_size) and budget,
            "has no effect on batches by token budget: lower max_tokens_per_batch instead.",
        ),
        "dataloader_drop_last": (
            bool(args.dataloader_drop_last) and budget,
            "has no effect on batches by token budget, which are dealt out evenly: set it to false.",
        ),
        "average_tokens_across_devices": (
            not args.average_tokens_across_devices,
            "has no effect: the loss is the mean over the prompts of all processes. Leave it at true.",
        ),
        "include_for_metrics": (
            "inputs" in metrics,
            "would look for input_ids, but a batch has prompts and responses: leave inputs out.",
        ),
        "include_num_input_tokens_seen": (
            plain_value(args.include_num_input_tokens_seen) not in ("no", False, None, "False"),
            "counts nothing, since a batch has prompts and responses: leave it at no.",
        ),
        "label_names": (bool(args.label_names), "has no effect: scores are the labels. Leave it out."),
        "parallelism_config": (
            args.parallelism_config is not None,
            "splits rows or layers in ways that were not tried: use DDP, ZeRO or FSDP2.",
        ),
    }


def plain_value(option):
    """The value of an option that may be an enum."""
    return getattr(option, "value", option)
