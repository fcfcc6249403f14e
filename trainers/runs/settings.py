"""What the result of a run depends on, as flat settings by name, and the comparison that refuses to mix other ones."""

import dataclasses
import hashlib
import logging
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset
from peft import PeftConfig
from transformers import TrainingArguments

from ..data.json_rows import plain

logger = logging.getLogger(__name__)

# The training arguments that a weight depends on, beside all fields of a method's own config.
COMPARED = (
    "seed", "data_seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim",
    "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha",
    "train_sampling_strategy", "dataloader_drop_last",
)  # fmt: skip
LENGTH = ("num_train_epochs", "max_steps", "early_stopping_patience")
# Fields of our configs that change no weight but for rounding, or that callers name in words of their own.
FREE = (
    "layout", "pad_token", "pad_to_multiple_of", "dataset_num_proc", "precompute_ref_logps", "ref_cache_dir",
    "ref_tokens_per_batch", "tokens_per_backward", "model_init_kwargs", "self_enhance",
    "stream_buffer",
)  # fmt: skip
# Fields of an adapter's config that change no weight.
FREE_OF_ADAPTER = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config",
)  # fmt: skip
WEIGHTS = (".safetensors",)
HASH = re.compile(r"[0-9a-f]{32,}")


def run_settings(
    args: TrainingArguments | None = None, *, length: bool = True, free: tuple[str, ...] = (),
    adapter: PeftConfig | None = None, **more,
) -> dict:  # fmt: skip
    """What a result depends on, by name, as JSON gives it back. Every kind of run asks this function.

    Args:
        args: of a training; the fields of its own class and those in `COMPARED` count. None where nothing is trained.
        length: whether the names in `LENGTH` belong to it. They do not where a run may be prolonged.
        free: further fields of `args` that do not count.
        adapter: configuration of the adapter that is trained, None for none.
        more: what else decides: `model_fingerprint` of the start, `rows_digest` or `digest` of the data, options.
    """
    settings = {}
    if args is not None:
        own = {f.name for f in dataclasses.fields(args)} - {f.name for f in dataclasses.fields(TrainingArguments)}
        values = args.to_dict()
        left_out = {*FREE, *free} if length else {*FREE, *free, *LENGTH}
        names = (own | {*COMPARED} | values.keys() & {*LENGTH}) - left_out
        settings = {name: values.get(name) for name in sorted(names)}
        batch = 1 if values.get("max_tokens_per_batch") else args.per_device_train_batch_size
        settings["batch size x accumulation x processes"] = batch * args.gradient_accumulation_steps * args.world_size
        settings |= {"mixed_precision": args.mixed_precision, "peft_config": adapter and adapter.peft_type}
    if adapter is not None:
        settings |= {f"peft_config.{name}": value for name, value in adapter_settings(adapter).items()}
    return plain(settings | more)


def adapter_settings(adapter: PeftConfig) -> dict:
    """What of an adapter's configuration a weight depends on."""
    return {name: value for name, value in adapter.to_dict().items() if name not in FREE_OF_ADAPTER}


def policy_settings(model: str, quantization_config=None, init_kwargs: dict | None = None) -> dict:
    """For `more` of `run_settings`: the model that a run starts from, by its files, and how they are read."""
    quantization = quantization_config and quantization_config.to_dict()
    how = {"quantization_config": quantization, "model_init_kwargs": init_kwargs}
    return plain({"model files": model_fingerprint(model) or model, **how})


def refuse_other_settings(source: str | Path, before: dict, now: dict, *, ways_out: str) -> None:
    """Compare the settings that something was made with and those of this run.

    What an older version did not write down is taken as it is, and the log says so.

    Args:
        source: what was made with the settings `before`.
        ways_out: beside setting them back.

    Raises:
        ValueError: settings differ; the message names them.
    """
    if unknown := sorted(now.keys() - before.keys()):
        logger.warning("%s does not say with what %s it was written: taken as they are.", source, ", ".join(unknown))
    changed = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    if changed:
        told = "; ".join(_told(name, before[name], now[name]) for name in changed)
        raise ValueError(f"{source} was written with other settings: {told}. Set them back, or {ways_out}.")


def _told(name: str, before, now) -> str:
    if any(isinstance(value, str) and HASH.fullmatch(value) for value in (before, now)):
        return f"{name} are others"
    return f"{name} was {before!r} and is {now!r}"


# Hashes.


def rows_digest(rows: Dataset) -> str:
    """Hash of the numbers of all tokenised rows in their order: token ids, scores, weights; and of JSON columns."""
    hashed = xxhash.xxh3_128()
    for part in rows.with_format("arrow").iter(1000):
        for name in sorted(rows.column_names):
            _update(hashed, name, part[name].combine_chunks())
    return hashed.hexdigest()


def _update(hashed, name: str, values: pa.Array) -> None:
    hashed.update(name.encode())
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        hashed.update(pc.list_value_length(values).to_numpy(zero_copy_only=False).tobytes())
        values = pc.list_flatten(values)
    if any(of(values.type) for of in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)):
        hashed.update(values.to_numpy(zero_copy_only=False).astype("float64").tobytes())
    elif isinstance(values.type, pa.BaseExtensionType):
        hashed.update("\n".join(map(str, values.storage.to_pylist())).encode())


def model_fingerprint(name: str) -> str | None:
    """Hash of a local folder's file sizes, small files and samples of the weights; None for a hub id."""
    folder = Path(name)
    if not folder.is_dir():
        return None
    hashed, block = hashlib.sha256(), 1 << 16
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".bin", *WEIGHTS)):
        size = path.stat().st_size
        hashed.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for part in range(32):  # the whole file when it is small, 2 MiB spread over it when not
                file.seek(part * max(block, (size - block) // 31))
                hashed.update(file.read(block))
    return hashed.hexdigest()
