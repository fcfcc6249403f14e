"""What a run would do and need, told from config files, tokenizer and data alone: `train.py --dry_run`.

Nothing here needs weights or a GPU. The model is built on the meta device, where tensors have shapes and no storage.
"""

import math
from collections import Counter
from dataclasses import fields

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.utils.peft_utils import find_adapter_config_file
from trl import ModelConfig, get_peft_config

from .. import PreferenceConfig, PreferenceTrainer
from ..data.budget import Lengths, TokenBudgetSampler, packed_tokens, token_lengths
from ..data.drops import collected_reports
from ..estimate import Estimate, Fed, Plan, Run, fed, read_plan
from ..forward import policy as policies
from ..forward.attention import FLEX
from ..forward.run import Runner
from ..inputs import prepare_rows

KNOWN_ATTENTION = ("sdpa", "eager", FLEX)
PERCENTILES = (50, 90, 95, 99, 100)
SHOWN = 400  # characters of a text of the first row
# States per weight of the optimizers that do not keep two; the first name found in that of the optimizer counts.
STATES = {"ademamix": 3, "sgd": 0, "adafactor": 0, "lomo": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}


def describe(trainer_class: type[PreferenceTrainer], data, args: PreferenceConfig, model_args: ModelConfig) -> str:
    """The whole report; `data` are the launcher's `DataArguments`.

    Raises:
        ValueError: everything that would stop the run before its first step, as far as it can be seen from here.
    """
    plan = read_plan(data.accelerate_config)
    engine = "zero3" if plan.engine == "deepspeed" and plan.stage == 3 else plan.engine
    if engine in trainer_class.unsupported_engines:
        raise ValueError(f"{trainer_class.method} does not run under {plan.name}: see docs/distributed.md.")
    planned, notes = trainer_class.planned_rows(args, data)
    tokenizer = load_tokenizer(model_args, args)
    splits, reports = {}, []
    for name in ("train", "test"):
        with collected_reports() as passes:
            rows = data.load(args, name) if planned is None else planned if name == "train" else None
            splits[name] = prepare_rows(rows, tokenizer, args, columns=trainer_class.columns)
        reports += [f"{name}, {title}: {report}" for title, report in passes]
        if splits[name] is not None:
            trainer_class.check_rows(splits[name], args, training=name == "train")
    lengths = token_lengths(splits["train"])
    per_process, large, largest = plan_batches(lengths, args, plan.processes)
    model = build_model(model_args, args, plan)
    estimate = estimate_of(trainer_class, args, model_args, model, plan)
    layout, flex = _layout(model, model_args, args)
    batches = [cheaper([lengths[i] for i in rows], layout, flex=flex) for rows in (large, largest)]
    sections = {
        "model": _model(trainer_class, args, model_args, estimate),
        "rows": "\n".join(reports),
        "first row": first_row(splits["train"], tokenizer),
        "tokens per training row, percentiles": _lengths(lengths),
        "steps": _steps(args, plan, len(lengths), per_process),
        "memory per GPU, estimated": _memory(estimate, *batches, f"{len(large)} prompt(s)"),
        "notes": "\n".join(notes + _notes(args, estimate, layout)),
    }
    return "\n\n".join(f"{title}\n{_indent(text)}" for title, text in sections.items() if text)


# Model and batches.


def find_config(model_args: ModelConfig, args: PreferenceConfig) -> tuple[PretrainedConfig, PeftConfig | None]:
    """Config of the model, or of the base under the adapter that it is, and that adapter.

    Raises:
        ValueError: it cannot be read; the message names what is needed.
    """
    options = {"trust_remote_code": False, "revision": model_args.model_revision, **(args.model_init_kwargs or {})}
    adapter, name = None, model_args.model_name_or_path
    for key in ("dtype", "attn_implementation"):
        options.pop(key, None)
    try:
        if find_adapter_config_file(name, revision=options["revision"] or "main") is not None:
            adapter = PeftConfig.from_pretrained(name, revision=options["revision"])
            adapter.inference_mode = False  # as saved, it would be frozen
            name, options["revision"] = adapter.base_model_name_or_path, adapter.revision
        return AutoConfig.from_pretrained(name, **options), adapter
    except OSError as error:
        raise ValueError(
            f"model_name_or_path={name!r}: its config cannot be read ({error}). A dry run needs config and tokenizer "
            "of the model: give a local folder with these files, or fetch them to the cache with a network."
        ) from error


def load_tokenizer(model_args: ModelConfig, args: PreferenceConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model, with its pad token."""
    path = find_config(model_args, args)[0].name_or_path
    options = args.model_init_kwargs or {}
    options = {"revision": options.get("revision") or "main", "trust_remote_code": options.get("trust_remote_code")}
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    policies.set_pad_token(tokenizer, args.pad_token)
    return tokenizer


def build_model(model_args: ModelConfig, args: PreferenceConfig, plan: Plan) -> PreTrainedModel | PeftModel:
    """The policy on the meta device, with its adapter; quantised weights stay in `dtype` here."""
    config, adapter = find_config(model_args, args)
    options = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    options |= args.model_init_kwargs or {}
    dtype, attention = options["dtype"], options["attn_implementation"] or model_args.attn_implementation
    if dtype in (None, "auto"):
        dtype = config.get_text_config().dtype or "float32"
    if is_deepspeed_zero3_enabled():
        unset_hf_deepspeed_config()  # or transformers would shard a model that has no storage
    keywords = {"attn_implementation": attention} if attention in KNOWN_ATTENTION else {}
    keywords["trust_remote_code"] = options.get("trust_remote_code", False)
    with torch.device("meta"):
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **keywords)
        if adapter := get_peft_config(model_args) or adapter:
            zero3 = plan.engine == "deepspeed" and plan.stage == 3 and not model_args.load_in_4bit
            model = policies.add_adapter(model, adapter, zero3=zero3)
    return model


def estimate_of(trainer_class, args: PreferenceConfig, model_args: ModelConfig, model, plan: Plan) -> Estimate:
    """The estimate of memory for these arguments."""
    window = args.accelerator_config.gradient_accumulation_kwargs or {}
    optimizer, demands = str(getattr(args.optim, "value", args.optim)), args.demands
    full = not isinstance(model, PeftModel)
    run = Run(
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


def plan_batches(lengths: list[Lengths], args: PreferenceConfig, processes: int) -> tuple[int, list[int], list[int]]:
    """Micro-batches of one process in an epoch, and the rows of a large one (99th percentile) and of the largest.

    With a fixed number of prompts, a large batch is made of the row at that percentile; batches by token budget are
    taken as they come, since the budget already keeps long rows apart.
    """
    sizes = [packed_tokens(row) for row in lengths]
    if args.max_tokens_per_batch is not None:
        batches = budget_batches(sizes, args, processes)
        return len(batches) // processes, batches[_rank(len(batches))], batches[-1]
    size, rows = args.per_device_train_batch_size, len(sizes)
    drop = args.dataloader_drop_last
    per_process = rows // size // processes if drop else math.ceil(math.ceil(rows / size) / processes)
    ordered = sorted(range(rows), key=sizes.__getitem__)
    return per_process, [ordered[_rank(rows)]] * size, [ordered[-1]] * size


def budget_batches(sizes: list[int], args: PreferenceConfig, processes: int) -> list[list[int]]:
    """The batches by token budget of the first epoch, from the smallest to the largest."""
    seed = args.seed if args.data_seed is None else args.data_seed
    batches = TokenBudgetSampler(sizes, args.max_tokens_per_batch, seed=seed, processes=processes).batches(0)
    return sorted(batches, key=lambda batch: sum(sizes[i] for i in batch))


def _rank(count: int) -> int:
    """Where the 99th percentile stands among `count` sorted values."""
    return math.ceil(0.99 * count) - 1


def count_steps(args: PreferenceConfig, batches_per_process: int) -> tuple[int, int]:
    """Optimizer steps per epoch and in all, as the Trainer counts them."""
    per_epoch = max(1, math.ceil(batches_per_process / args.gradient_accumulation_steps))
    return per_epoch, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def cheaper(rows: list[Lengths], layout: str = "auto", *, flex: bool = False) -> Fed:
    """The micro-batch in its layout; under "auto" in the one that feeds fewer tokens."""
    layouts = {"rows": (False,), "shared": (True,), "auto": (True, False)}[layout]
    return min((fed(rows, shared=shared, flex=flex) for shared in layouts), key=lambda batch: batch.tokens)


def _layout(model, model_args: ModelConfig, args: PreferenceConfig) -> tuple[str, bool]:
    """The layout that the model allows, and whether attention is FlexAttention."""
    base = policies.base_model(model)
    attention = (args.model_init_kwargs or {}).get("attn_implementation") or model_args.attn_implementation
    attention = attention or base.config._attn_implementation
    # One that is not installed here was not loaded above, and could not share prompts.
    return Runner([base], args.layout if attention in KNOWN_ATTENTION else "rows").layout, attention == FLEX


# Words.


def _model(trainer_class, args, model_args: ModelConfig, estimate: Estimate) -> str:
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
    row = rows[0]
    texts = [("prompt", row["prompt_ids"])]
    texts += [(f"scored {score:g}", ids) for score, ids in zip(row["scores"], row["response_ids"], strict=True)]
    texts = [(name, tokenizer.decode(ids)) for name, ids in texts]
    return "\n".join(f"{name}: {text[:SHOWN]!r}{' ...' if len(text) > SHOWN else ''}" for name, text in texts)


def _lengths(lengths: list[Lengths]) -> str:
    columns = {
        "prompt": [p for p, _ in lengths],
        "response": [r for _, responses in lengths for r in responses],
        "prompt + response": [p + r for p, responses in lengths for r in responses],
        "prompt once + all responses": [packed_tokens(row) for row in lengths],
    }
    lines = [f"{'':27}" + "".join(f"{f'{q} %':>9}" for q in PERCENTILES[:-1]) + "  longest"]
    for name, values in columns.items():
        # A value that occurs, not one between two.
        cells = np.percentile(values, PERCENTILES, method="inverted_cdf")
        lines.append(f"{name:27}" + "".join(f"{int(value):>9,}" for value in cells))
    counts = sorted(Counter(len(responses) for _, responses in lengths).items())
    return "\n".join([*lines, "responses per prompt: " + ", ".join(f"{k}: {n:,}" for k, n in counts)])


def _steps(args: PreferenceConfig, plan: Plan, rows: int, batches: int) -> str:
    per_epoch, in_all = count_steps(args, batches)
    window = plan.processes * args.gradient_accumulation_steps
    size, prompts = f"{args.per_device_train_batch_size} prompts", f"{args.per_device_train_batch_size * window}"
    if args.max_tokens_per_batch is not None:
        size = f"at most {args.max_tokens_per_batch:,} tokens"
        prompts = f"about {rows / batches * args.gradient_accumulation_steps:.0f}"
    trainings = args.demands.trainings
    return (
        f"{size} x {plan.processes} process(es) x {args.gradient_accumulation_steps} accumulated = {prompts} prompts "
        f"per step\n{per_epoch:,} steps per epoch, {in_all:,} in all"
        + (f", in each of {trainings:g} trainings" if trainings != 1 else "")
    )


def _memory(estimate: Estimate, large: Fed, largest: Fed, batch: str) -> str:
    sizes, run, plan = estimate.memory(large), estimate.run, estimate.plan
    unit, divisor = ("GiB", 2**30) if sum(sizes.values()) >= 2**30 else ("MiB", 2**20)
    recomputed = ", layers recomputed" if run.recompute else ""
    parts = {**sizes, "sum": sum(sizes.values()), "with the largest batch": sum(estimate.memory(largest).values())}
    return "\n".join([
        f"{plan.name}, {plan.processes} GPU(s), {'16-bit' if run.half else 'full'} precision{recomputed}",
        f"batch of the 99th percentile: {batch}, {large.tokens:,} tokens; the largest: {largest.tokens:,}",
        *(f"{name:23}{size / divisor:9.2f} {unit}" for name, size in parts.items()),
        "Not in it: about 1 GiB of CUDA context, and what the allocator cannot use. How long it takes, and what it "
        "really needs: --probe on the machine itself.",
    ])  # fmt: skip


def _notes(args: PreferenceConfig, estimate: Estimate, layout: str) -> list[str]:
    notes, run = [], estimate.run
    if estimate.full and not estimate.plan.engine and estimate.trained_bytes < 4 * estimate.trained:
        notes.append(
            "The trained weights are kept in half precision, where small steps are rounded away: use dtype: float32 "
            "with bf16: true, LoRA, or an accelerate file for ZeRO or FSDP, which keep float32 weights."
        )
    if run.whole_gradients:
        notes.append(
            "FSDP adds up whole gradients while it accumulates. Set accelerator_config: "
            "{gradient_accumulation_kwargs: {sync_each_batch: true}} to keep them sharded."
        )
    if args.precompute_ref_logps and estimate.full:
        notes.append("The reference is in memory only before training, while it scores rows that are not cached yet.")
    if layout == "rows" and args.layout == "auto":
        notes.append("This attn_implementation cannot share prompts: the layout is rows.")
    return notes


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
