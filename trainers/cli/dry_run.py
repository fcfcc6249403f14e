"""What a run would do and need, told from config files, tokenizer and data alone: `train.py --dry_run`.

Nothing here needs weights or a GPU. The model is built on the meta device, where tensors have shapes and no storage.
"""

import math
from dataclasses import fields
from textwrap import indent
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from trl import get_peft_config

from .. import PreferenceConfig, PreferenceTrainer
from ..data import facts
from ..data.budget import Lengths, TokenBudgetSampler, packed_tokens, token_lengths
from ..data.drops import collected_reports
from ..data.load import load_split
from ..data.stream import TokenStream
from ..estimate import Estimate, Fed, Plan, Training, fed, read_plan
from ..forward import policy as policies
from ..forward.attention import FLEX
from ..forward.parts import slots
from ..forward.run import Runner
from ..generation.options import EnhanceOptions, read_options
from ..generation.scorer import asked_of_servers
from ..inputs import prepare_rows, prepare_training_rows
from .arguments import ModelArguments

KNOWN_ATTENTION = ("sdpa", "eager", FLEX)
SHOWN = 400  # characters of a text of the first row
# States per weight of the optimizers that do not keep two; the first name found in that of the optimizer counts.
STATES = {"ademamix": 3, "sgd": 0, "adafactor": 0, "lomo": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}


def describe(trainer_class: type[PreferenceTrainer], data, args: PreferenceConfig, model_args: ModelArguments) -> str:
    """The whole report; `data` are the launcher's `DataArguments`.

    Raises:
        ValueError: everything that would stop the run before its first step, as far as it can be seen from here.
    """
    plan = read_plan(data.accelerate_config)
    tokenizer, splits, reports, notes = read_splits(trainer_class, data, args, model_args, ("train", "test"))
    lengths = token_lengths(splits["train"])
    batches = plan_batches(lengths, args, plan.processes)
    model = build_model(model_args, args, plan)
    estimate = estimate_of(trainer_class, args, model_args, model, plan)
    layout, flex = _layout(policies.base_model(model), args)
    large, largest = (
        fed(part_of([lengths[i] for i in batches.at(q)], args.tokens_per_backward), layout, flex=flex)
        for q in (0.99, 1)
    )
    sections = {
        "model": _model(trainer_class, args, model_args, estimate),
        "rows": "\n".join(reports),
        "first row": first_row(splits["train"], tokenizer),
        "tokens per training row, percentiles": _lengths(lengths),
        "steps": _steps(args, plan, len(lengths), batches),
        "scorers on servers": _asked(args, lengths, splits["test"]),
        "memory per GPU, estimated": _memory(estimate, large, largest),
        "notes": "\n".join(notes + _notes(estimate)),
    }
    return "\n\n".join(f"{title}\n{indent(text, '  ')}" for title, text in sections.items() if text)


# Rows, model and batches.


def read_splits(trainer_class, data, args: PreferenceConfig, model_args: ModelArguments, names: tuple[str, ...]):
    """The tokenizer, the tokenised rows by split, what was dropped of them, and what a method says of its plan."""
    planned, notes = trainer_class.planned_rows(args, data)
    config, _ = find_config(model_args, args)
    tokenizer = policies.tokenizer_at(str(config.name_or_path), args.model_init_kwargs)
    policies.set_pad_token(tokenizer, args.pad_token)
    splits: dict[str, Any] = {}
    reports = []
    for name in names:
        with collected_reports() as passes:
            rows = load_split(data, args, name) if planned is None else planned if name == "train" else None
            if isinstance(rows, IterableDataset):
                stream = prepare_training_rows(rows, tokenizer, args, columns=trainer_class.columns)
                assert isinstance(stream, TokenStream)
                splits[name] = stream.first_rows(args.stream_buffer)
                passes.append(("Stream", stream.report))
                notes = [*notes, f"of the stream the first {len(splits[name]):,} rows are shown and stand for all."]
            else:
                splits[name] = prepare_rows(rows, tokenizer, args, columns=trainer_class.columns)
        reports += [f"{name}, {title}: {report}" for title, report in passes]
        if splits[name] is not None:
            trainer_class.check_rows(splits[name], args, training=name == "train")
    return tokenizer, splits, reports, notes


def find_config(model_args: ModelArguments, args: PreferenceConfig) -> tuple[PretrainedConfig, PeftConfig | None]:
    """Config of the model, or of the base under the adapter that it is, and that adapter."""
    keywords = {k: v for k, v in (args.model_init_kwargs or {}).items() if k not in ("dtype", "attn_implementation")}
    name = model_args.model_name_or_path
    adapter = policies.find_adapter(name, keywords.get("revision"))
    if adapter is not None:
        adapter.inference_mode = False  # as saved, it would be frozen
        name, keywords["revision"] = adapter.base_model_name_or_path or "", adapter.revision
    return AutoConfig.from_pretrained(name, **keywords), adapter


def build_model(model_args: ModelArguments, args: PreferenceConfig, plan: Plan) -> nn.Module:
    """The policy on the meta device, with its adapter; quantised weights stay in `dtype` here."""
    config, adapter = find_config(model_args, args)
    given = args.model_init_kwargs or {}
    keywords = {name: given[name] for name in ("trust_remote_code", "attn_implementation") if name in given}
    if keywords.get("attn_implementation") not in KNOWN_ATTENTION:
        keywords.pop("attn_implementation", None)
    asked = given.get("dtype") or "auto"
    dtype = (config.get_text_config().dtype or "float32") if asked == "auto" else asked
    if is_deepspeed_zero3_enabled():
        unset_hf_deepspeed_config()  # or transformers would shard a model that has no storage
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **keywords)
        if adapter := get_peft_config(model_args) or adapter:
            zero3 = plan.engine == "deepspeed" and plan.stage == 3 and not model_args.load_in_4bit
            model = policies.add_adapter(model, adapter, zero3=zero3)
    return model


def estimate_of(trainer_class, args: PreferenceConfig, model_args: ModelArguments, model, plan: Plan) -> Estimate:
    """The estimate of memory for these arguments."""
    window = args.accelerator_config.gradient_accumulation_kwargs or {}  # type: ignore[union-attr]
    optimizer, demands = str(getattr(args.optim, "value", args.optim)), args.demands
    full = not isinstance(model, PeftModel)
    run = Training(
        half=args.bf16 or args.fp16 or plan.half,
        recompute=args.gradient_checkpointing or plan.recompute,
        whole_gradients=plan.engine == "fsdp"
        and args.gradient_accumulation_steps > 1
        and not window.get("sync_each_batch", False),
        moments=next((count for name, count in STATES.items() if name in optimizer), 2),
        moment_width=1 if "8bit" in optimizer else None,
        frozen_copy=trainer_class.needs_reference and full and not args.precompute_ref_logps,
        kl=demands.kl,
        mask_heads=demands.mask_heads,
    )
    # bitsandbytes keeps a float32 scale per 64 weights in 4 bits; nested, the scales are 8-bit themselves.
    four = 4 + (8 / 64 + 32 / (64 * 256) if model_args.use_bnb_nested_quant else 32 / 64)
    return Estimate(model, plan, run, bits=four if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None)


class Batches(NamedTuple):
    """The micro-batches of a run: `size` units of rows each, where units lie from the one of fewest tokens on."""

    units: list[list[int]]
    size: int
    per_process: int  # micro-batches of an epoch
    per_epoch: int  # optimizer steps
    in_all: int

    def at(self, place: float) -> list[int]:
        """The rows of a micro-batch of the unit at this place, 0 to 1."""
        return self.units[max(0, math.ceil(place * len(self.units)) - 1)] * self.size


def plan_batches(lengths: list[Lengths], args: PreferenceConfig, processes: int) -> Batches:
    """Batches by token budget are units as the first epoch has them; with a fixed number of prompts each row is one.

    Steps are counted as the Trainer does.
    """
    sizes = [packed_tokens(row) for row in lengths]
    if args.max_tokens_per_batch is None:
        units, size = [[i] for i in np.argsort(sizes, kind="stable").tolist()], args.per_device_train_batch_size
    else:
        seed = args.seed if args.data_seed is None else args.data_seed
        units = TokenBudgetSampler(sizes, args.max_tokens_per_batch, seed=seed, processes=processes).batches(0)
        units, size = sorted(units, key=lambda batch: sum(sizes[i] for i in batch)), 1
    drop = args.dataloader_drop_last
    per_process = len(units) // size // processes if drop else math.ceil(math.ceil(len(units) / size) / processes)
    per_epoch = max(1, math.ceil(per_process / args.gradient_accumulation_steps))
    in_all = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    return Batches(units, size, per_process, per_epoch, in_all)


def part_of(rows: list[Lengths], budget: int | None) -> list[Lengths]:
    """The part of a micro-batch with the most tokens, of those that go backward at once."""
    if budget is None:
        return rows
    prompts, lengths = zip(*rows, strict=True)
    table = torch.nn.utils.rnn.pad_sequence([torch.tensor(own) for own in lengths], batch_first=True)
    parts = [[(p, own[part]) for p, own in rows if own[part]] for part in slots(table, torch.tensor(prompts), budget)]
    return max(parts, key=lambda part: sum(map(packed_tokens, part)))


def _layout(base: PreTrainedModel, args: PreferenceConfig) -> tuple[str, bool]:
    """The layout that the model allows, and whether attention is FlexAttention."""
    attention = (args.model_init_kwargs or {}).get("attn_implementation") or base.config._attn_implementation
    # One that is not installed here was not loaded above, and could not share prompts.
    return Runner([base], args.layout if attention in KNOWN_ATTENTION else "rows").layout, attention == FLEX


# Words.


def _model(trainer_class, args, model_args: ModelArguments, estimate: Estimate) -> str:
    inherited = {f.name for f in fields(PreferenceConfig)}
    own = [f.name for f in fields(trainer_class.config_class) if f.name not in inherited]
    shared = ("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "max_length", "layout")
    values = {name: getattr(args, name) for name in (*own, *shared)}
    adapter = f", LoRA of rank {model_args.lora_r}" if model_args.use_peft else ""
    return "\n".join([
        f"{model_args.model_name_or_path}: {estimate.parameters:,} parameters, {estimate.layers} layers, hidden size "
        f"{estimate.hidden}, vocabulary {estimate.vocabulary:,}",
        f"trained: {estimate.trained:,} ({estimate.trained / estimate.parameters:.2%}){adapter}",
        f"method: {trainer_class.method} ({trainer_class.__name__})",
        *(f"  {name}: {getattr(value, 'value', value)}" for name, value in values.items()),
    ])  # fmt: skip


def first_row(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first row as the model reads it, special tokens included."""
    texts = facts.as_read(rows[0], tokenizer)
    return "\n".join(f"{name}: {text[:SHOWN]!r}{' ...' if len(text) > SHOWN else ''}" for name, text in texts)


def _lengths(lengths: list[Lengths]) -> str:
    lines = [f"{'':27}" + "".join(f"{f'{q} %':>9}" for q in facts.PERCENTILES[:-1]) + "  longest"]
    for name, values in facts.parts_of(lengths).items():
        lines.append(f"{name:27}" + "".join(f"{value:>9,}" for value in facts.percentiles(values)))
    counts = facts.responses_per_row(responses for _, responses in lengths)
    return "\n".join([*lines, "responses per prompt: " + ", ".join(f"{k}: {n:,}" for k, n in counts.items())])


def _steps(args: PreferenceConfig, plan: Plan, rows: int, batches: Batches) -> str:
    window, trainings = args.gradient_accumulation_steps, args.demands.trainings
    size, prompts = f"{batches.size} prompts", f"{batches.size * plan.processes * window}"
    if args.max_tokens_per_batch is not None:
        size = f"at most {args.max_tokens_per_batch:,} tokens"
        prompts = f"about {rows / batches.per_process * window:.0f}"
    return (
        f"{size} x {plan.processes} process(es) x {window} accumulated = {prompts} prompts per step\n"
        f"{batches.per_epoch:,} steps per epoch, {batches.in_all:,} in all"
        + (f", in each of {trainings:g} trainings" if trainings != 1 else "")
    )


def _asked(args: PreferenceConfig, rows: list[Lengths], held_out: Dataset | None) -> str:
    """What all rounds ask of servers, where nothing is known and no text is there twice."""
    if args.self_enhance is None:
        return ""
    options = read_options("self_enhance", args.self_enhance, EnhanceOptions)
    drawn = [
        (rows, options.rounds * options.num_generations),
        (token_lengths(held_out) if held_out is not None else [], (options.rounds + 1) * options.held_out_generations),
    ]
    texts = [prompt + options.max_new_tokens for own, times in drawn for prompt, _ in own for _ in range(times)]
    if options.own_responses:
        texts += [prompt + response for prompt, responses in rows for response in responses]
    return "\n".join(asked_of_servers(options.scorer, len(texts), sum(texts), options.scorer_batch_size))


def _memory(estimate: Estimate, large: Fed, largest: Fed) -> str:
    sizes, run, plan = estimate.memory(large), estimate.run, estimate.plan
    parts = {**sizes, "sum": sum(sizes.values()), "with the largest batch": sum(estimate.memory(largest).values())}
    unit, divisor = ("GiB", 2**30) if parts["sum"] >= 2**30 else ("MiB", 2**20)
    return "\n".join([
        f"{plan.name}, {plan.processes} GPU(s), {'16-bit' if run.half else 'full'} precision"
        + (", layers recomputed" if run.recompute else ""),
        f"a micro-batch of the 99th percentile: {large.tokens:,} tokens; the largest: {largest.tokens:,}",
        *(f"{name:23}{size / divisor:9.2f} {unit}" for name, size in parts.items()),
        "Not in it: about 1 GiB of CUDA context, and what the allocator cannot use. --probe measures memory and time.",
    ])  # fmt: skip


def _notes(estimate: Estimate) -> list[str]:
    notes = []
    if estimate.full and not estimate.plan.engine and estimate.trained_bytes < 4 * estimate.trained:
        notes.append(
            "The trained weights are kept in half precision, where small steps are rounded away: use dtype: float32 "
            "with bf16: true, LoRA, or an accelerate file for ZeRO or FSDP, which keep float32 weights."
        )
    if estimate.run.whole_gradients:
        notes.append(
            "FSDP adds up whole gradients while it accumulates. Set accelerator_config: "
            "{gradient_accumulation_kwargs: {sync_each_batch: true}} to keep them sharded."
        )
    return notes
