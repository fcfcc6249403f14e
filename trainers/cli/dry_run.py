"""What a run would do and need, told from config files, tokenizer and data alone: `train.py --dry_run`.

Nothing here needs weights or a GPU. The model is built on the meta device, where tensors have shapes and no storage.
"""

import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.utils.peft_utils import find_adapter_config_file
from trl import ModelConfig, get_peft_config

from .. import PreferenceCollator, PreferenceConfig, PreferenceTrainer
from ..data.budget import Lengths, packed_tokens, token_lengths
from ..data.drops import collected_reports
from ..estimate import (
    Fed,
    ModelShape,
    Plan,
    Run,
    count_steps,
    fed,
    fed_in_all,
    forward,
    hours,
    memory,
    plan_batches,
    plan_from_environment,
    read_plan,
    shape_of,
    total,
    work,
)
from ..forward import policy as policies
from ..forward.attention import FLEX
from ..forward.run import Runner
from ..inputs import prepare_rows

KNOWN_ATTENTION = ("sdpa", "eager", FLEX)
PERCENTILES = (50, 90, 95, 99, 100)
# bitsandbytes keeps a float32 scale per 64 weights in 4 bits; nested, the scales are 8-bit themselves.
BITS_4, BITS_4_NESTED, BITS_8 = 4 + 32 / 64, 4 + 8 / 64 + 32 / (64 * 256), 8
# States per weight of the optimizers that do not keep two; the first name found in that of the optimizer counts.
STATES = {"ademamix": 3, "sgd": 0, "adafactor": 0, "lomo": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}


def describe(
    trainer_class: type[PreferenceTrainer], data, args: PreferenceConfig, model_args: ModelConfig, load: Callable
) -> str:
    """The whole report; `load("train")` and `load("test")` give canonical rows, or None if there is no such split.

    Raises:
        ValueError: everything that would stop the run before its first step, as far as it can be seen from here.
    """
    plan = read_plan(data.accelerate_config) if data.accelerate_config else plan_from_environment(os.environ)
    _refuse_engine(trainer_class, plan)
    planned, remarks = None, []
    if hasattr(trainer_class, "planned_rows"):  # a method that makes its rows itself
        planned, remarks = trainer_class.planned_rows(args, data)
    model = build_model(model_args, args, plan)
    tokenizer = policies.load_tokenizer(model, args.model_init_kwargs)
    policies.set_pad_token(tokenizer, args.pad_token)
    splits, reports = {}, []
    for name in ("train", "test"):
        with collected_reports() as found:
            raw = load(name) if planned is None else planned if name == "train" else None
            splits[name] = prepare_rows(raw, tokenizer, args)
        if splits[name] is not None:
            trainer_class.check_rows(splits[name], args, training=name == "train")
        for i, (title, report) in enumerate(found):
            if i == 0 or report.reasons or report.responses_dropped or report.notes:
                reports.append(f"{name}, {title}: {report}")
    lengths = token_lengths(splits["train"])
    batches = plan_batches(lengths, args, plan.processes)
    shape = shape_of(model, bits=bits(model_args))
    run = run_facts(trainer_class, args, shape, plan)
    attention = _attention(model_args, args) or policies.base_model(model).config._attn_implementation
    # One that is not installed here was not loaded above, and could not share prompts.
    runner = Runner([policies.base_model(model)], args.layout if attention in KNOWN_ATTENTION else "rows")
    shared = [runner.shared(_collate(splits["train"], rows)) for rows in (batches.large, batches.largest)]
    large, largest = (
        fed([lengths[i] for i in rows], shared=is_shared, flex=attention == FLEX)
        for rows, is_shared in zip((batches.large, batches.largest), shared, strict=True)
    )
    how = passes(args, trainer_class, batches.per_process)
    in_all = fed_in_all(lengths, runner.layout)
    batch = f"{len(batches.large)} prompt(s) in layout {'shared' if shared[0] else 'rows'}"
    notes = remarks + _notes(args, shape, plan, run, attention)
    sections = [
        _model_section(trainer_class, args, model_args, shape),
        "\n".join(["rows", *map(_indent, reports)]),
        _lengths_section(lengths),
        _steps_section(args, plan, len(lengths), batches.per_process),
        _memory_section(shape, plan, run, large, largest, batch),
        _time_section(shape, plan, run, in_all, how, data),
        "\n".join(["notes", *map(_indent, notes)]) if notes else "",
    ]
    return "\n\n".join(filter(None, sections))


# Model, data and batches.


def build_model(model_args: ModelConfig, args: PreferenceConfig, plan: Plan):
    """The policy on the meta device, with its adapter; quantised weights stay in `dtype` here."""
    options = {"trust_remote_code": False, "revision": model_args.model_revision, **(args.model_init_kwargs or {})}
    dtype = options.pop("dtype", model_args.dtype)
    options.pop("attn_implementation", None)
    adapter, name = None, model_args.model_name_or_path
    try:
        if find_adapter_config_file(name, revision=options["revision"] or "main") is not None:
            adapter = PeftConfig.from_pretrained(name, revision=options["revision"])
            adapter.inference_mode = False  # as saved, it would be frozen
            name, options["revision"] = adapter.base_model_name_or_path, adapter.revision
        config = AutoConfig.from_pretrained(name, **options)
    except OSError as error:
        raise ValueError(
            f"model_name_or_path={name!r}: its config cannot be read ({error}). A dry run needs config and tokenizer "
            "of the model: give a local folder with these files, or fetch them to the cache with a network."
        ) from error
    if dtype in (None, "auto"):
        dtype = config.get_text_config().dtype or "float32"
    if is_deepspeed_zero3_enabled():
        unset_hf_deepspeed_config()  # or transformers would shard a model that has no storage
    attention = _attention(model_args, args)
    keywords = {"attn_implementation": attention} if attention in KNOWN_ATTENTION else {}
    keywords["trust_remote_code"] = options["trust_remote_code"]
    with torch.device("meta"):
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **keywords)
        peft_config = get_peft_config(model_args)
        if peft_config is not None:
            zero3 = plan.engine == "deepspeed" and plan.stage == 3 and bits(model_args) is None
            model = policies.add_adapter(model, peft_config, zero3=zero3)
        elif adapter is not None:
            model = policies.add_adapter(model, adapter, zero3=False)
    if args.disable_dropout:
        policies.disable_dropout(model)
    return model


def _refuse_engine(trainer_class: type[PreferenceTrainer], plan: Plan) -> None:
    engine = "zero3" if plan.engine == "deepspeed" and plan.stage == 3 else plan.engine
    if engine in trainer_class.unsupported_engines:
        raise ValueError(f"{trainer_class.method} does not run under {plan.name}: see docs/distributed.md.")


def _collate(rows: Dataset, batch: list[int]) -> dict[str, torch.Tensor]:
    keys = ("prompt_ids", "response_ids", "scores")
    return PreferenceCollator(pad_token_id=0)([{key: rows[i][key] for key in keys} for i in batch])


# Facts for the arithmetic.


def run_facts(trainer_class: type[PreferenceTrainer], args: PreferenceConfig, shape: ModelShape, plan: Plan) -> Run:
    """What the arithmetic needs of the training arguments."""
    options = args.gradient_checkpointing_kwargs or {}
    every = options.get("every_n_layers", 1)
    synced = (args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch", False)
    optimizer = getattr(args.optim, "value", str(args.optim))
    return Run(
        half=args.bf16 or args.fp16 or plan.mixed_precision in ("bf16", "fp16"),
        checkpointed=math.ceil(shape.layers / every) if args.gradient_checkpointing or plan.recompute else 0,
        offload_checkpoints=bool(options.get("offload", False)),
        whole_gradients=plan.engine == "fsdp" and args.gradient_accumulation_steps > 1 and not synced,
        moments=next((states for name, states in STATES.items() if name in optimizer), 2),
        moment_bytes=1 if "8bit" in optimizer else None,
        frozen_copy=trainer_class.needs_reference and shape.full and not args.precompute_ref_logps,
        kl=args.demands.kl,
        mask_heads=args.demands.mask_heads,
    )


class Passes(NamedTuple):
    """How often all rows go through a model."""

    training: float
    reference: bool  # in each training step
    scoring: int  # without gradients and outside of training steps


def passes(args: PreferenceConfig, trainer_class: type[PreferenceTrainer], batches: int) -> Passes:
    per_epoch, in_all = count_steps(args, batches)
    demands, cached = args.demands, trainer_class.needs_reference and args.precompute_ref_logps
    online = trainer_class.needs_reference and not cached
    return Passes(demands.trainings * in_all / per_epoch, online, demands.scorings + cached)


def bits(model_args: ModelConfig) -> float | None:
    if model_args.load_in_4bit:
        return BITS_4_NESTED if model_args.use_bnb_nested_quant else BITS_4
    return BITS_8 if model_args.load_in_8bit else None


def _attention(model_args: ModelConfig, args: PreferenceConfig) -> str | None:
    return (args.model_init_kwargs or {}).get("attn_implementation", model_args.attn_implementation)


# Words.


def _model_section(trainer_class, args, model_args: ModelConfig, shape: ModelShape) -> str:
    inherited = {f.name for f in fields(PreferenceConfig)}
    own = [f.name for f in fields(trainer_class.config_class) if f.name not in inherited]
    shared = ("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "max_length", "layout")
    settings = {name: getattr(args, name) for name in (*own, *shared)}
    return "\n".join(
        [
            "model",
            f"  {model_args.model_name_or_path}: {shape.parameters:,} parameters, {shape.layers} layers, hidden size "
            f"{shape.hidden}, vocabulary {shape.vocabulary:,}",
            f"  trained: {shape.trainable:,} ({shape.trainable / shape.parameters:.2%})"
            + (f", LoRA of rank {model_args.lora_r}" if model_args.use_peft else ""),
            "",
            f"method\n  {trainer_class.method} ({trainer_class.__name__})",
            *(f"  {name}: {getattr(value, 'value', value)}" for name, value in settings.items()),
        ]
    )


def _lengths_section(lengths: list[Lengths]) -> str:
    columns = {
        "prompt": [p for p, _ in lengths],
        "response": [r for _, responses in lengths for r in responses],
        "prompt + response": [p + r for p, responses in lengths for r in responses],
        "prompt once + all responses": [packed_tokens(row) for row in lengths],
    }
    table = [["", *(f"{q} %" for q in PERCENTILES[:-1]), "longest"]]
    for name, values in columns.items():
        # A value that occurs, not one between two.
        table.append([name, *(f"{v:,}" for v in np.percentile(values, PERCENTILES, method="inverted_cdf"))])
    counts = Counter(len(responses) for _, responses in lengths)
    shares = ", ".join(f"{k}: {n:,} ({n / len(lengths):.1%})" for k, n in sorted(counts.items()))
    return f"tokens per training row, percentiles\n{_table(table)}\n\nresponses per prompt\n  {shares}"


def _steps_section(args: PreferenceConfig, plan: Plan, rows: int, batches: int) -> str:
    per_epoch, in_all = count_steps(args, batches)
    window = plan.processes * args.gradient_accumulation_steps
    if args.max_tokens_per_batch is None:
        size = f"{args.per_device_train_batch_size} prompts"
        prompts = f"{args.per_device_train_batch_size * window}"
    else:
        size = f"at most {args.max_tokens_per_batch:,} tokens"
        prompts = f"about {rows / batches * args.gradient_accumulation_steps:.0f}"
    return (
        f"steps\n  {size} x {plan.processes} process(es) x {args.gradient_accumulation_steps} accumulated = {prompts} "
        f"prompts per step\n  {per_epoch:,} steps per epoch, {in_all:,} in all"
    )


def _memory_section(shape: ModelShape, plan: Plan, run: Run, large: Fed, largest: Fed, batch: str) -> str:
    items = memory(shape, large, plan, run)
    unit, divisor = ("GiB", 2**30) if total(items) >= 2**30 else ("MiB", 2**20)
    table = [["", unit, ""]]
    for item in items:
        size = f"{item.size / divisor:.2f}"
        table.append([item.name, size if item.counted else f"({size})", item.how])
    sum_ = f"{total(items) / divisor:.2f}"
    table.append(["sum", sum_, "without what is in brackets: it is never there at the peak"])
    return "\n".join(
        [
            "memory per GPU, estimated",
            f"  {plan.name}, {plan.processes} GPU(s), {'16-bit' if run.half else 'full'} precision, "
            f"{run.checkpointed} of {shape.layers} layers recomputed",
            f"  batch of the 99th percentile: {batch}, {large.tokens:,} tokens",
            "",
            _table(table),
            f"  With the largest batch ({largest.tokens:,} tokens): "
            f"{total(memory(shape, largest, plan, run)) / divisor:.2f} {unit}.",
            "  Not in it: about 1 GiB of CUDA context, and what the allocator cannot use.",
        ]
    )


def _time_section(shape: ModelShape, plan: Plan, run: Run, rows: Fed, passes: Passes, data) -> str:
    """Operations of one pass over the rows, and the time of all passes at the assumed speed."""
    epoch = work(shape, rows, run, reference=passes.reference)
    parts = {name: value for name, value in epoch._asdict().items() if value}
    scoring = passes.scoring * forward(shape, rows)
    speed = {"tflops": data.gpu_tflops, "utilisation": data.utilisation, "processes": plan.processes}
    trained, scored = hours(passes.training * epoch.total, **speed), hours(scoring, **speed)
    shown = ", ".join(f"{name} {value / 1e15:,.1f}" for name, value in parts.items())
    lines = [
        "time, estimated",
        f"  one pass over the rows: {epoch.total / 1e15:,.1f} PFLOP ({shown})",
        f"  assumed: {plan.processes} GPU(s) x {data.gpu_tflops:g} TFLOP/s x {data.utilisation:.0%} utilisation",
        f"  training: {passes.training:.3g} pass(es), {trained:.2f} hours",
    ]
    if passes.scoring:
        lines.append(f"  scoring before or between: {passes.scoring} forward pass(es), {scored:.2f} hours")
        lines.append(f"  sum: {trained + scored:.2f} hours")
    return "\n".join(
        [*lines, "  Not in it: loading, evaluation, saving, sampling. Padding between prompts is left out."]
    )


def _notes(args: PreferenceConfig, shape: ModelShape, plan: Plan, run: Run, attention: str) -> list[str]:
    notes = []
    if shape.full and not plan.engine and shape.trainable_bytes < 4 * shape.trainable:
        notes.append(
            "The trained weights are kept in half precision, where small steps are rounded away: use dtype: float32 "
            "with bf16: true, LoRA, or an accelerate file for ZeRO or FSDP, which keep float32 weights."
        )
    if run.whole_gradients:
        notes.append(
            "FSDP adds up whole gradients while it accumulates. Set accelerator_config: "
            "{gradient_accumulation_kwargs: {sync_each_batch: true}} to keep them sharded."
        )
    if args.precompute_ref_logps and shape.full:
        notes.append(
            "The reference is in memory before training only, while it scores the rows that are not cached yet."
        )
    if attention not in KNOWN_ATTENTION:
        notes.append(f"attn_implementation={attention!r} cannot share prompts: the layout is rows.")
    if attention == "eager":
        notes.append("attn_implementation='eager' keeps attention scores, which are not in the estimate.")
    if not shape.gated:
        notes.append("The feed-forward layers are not gated ones as in a Llama: activations may be twice as large.")
    return notes


def _table(rows: list[list[str]]) -> str:
    """First and last text columns to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text_last = len(rows[0]) == 3
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        if text_last:
            cells[-1] = row[-1]
        lines.append(_indent("  ".join(cells).rstrip()))
    return "\n".join(lines)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
