"""What the command line says beside a method's config: which rows, which model, and how both are read."""

import math
import re
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from trl import ModelConfig, get_peft_config, get_quantization_config

from polypo.recipes import accelerate_file, shipped

from .. import load_preferences
from ..config import check_options, option
from ..data.mixture import mix
from ..precision import FAST, settle_dtype

PER_DATA_SET = ("dataset_max_rows", "dataset_config", "dataset_train_split", "dataset_test_split", "data_format")


@dataclass
class DataArguments:
    """What to train with and on."""

    trainer: str = option("SWEPOTrainer", "Class of `trainers`, or a dotted import path.")
    # Of these, a list with one item becomes the item.
    dataset_name: list[str] | None = option(None, "Hub id, file or folder of preference rows; several are mixed.")
    dataset_weights: list[float] | None = option(
        None, "Which share of the training rows of each data set is taken: 0.5 half, 2 each row twice."
    )
    dataset_max_rows: list[int] | None = option(
        None,
        "Take at most so many training rows of each, at random. This and what follows: one for all, or each.",
    )
    dataset_config: list[str] | None = option(None, "Configuration of a data set with several.")
    dataset_train_split: list[str] = field(
        default_factory=lambda: ["train"], metadata={"help": "Split to train on, slices included."}
    )
    dataset_test_split: list[str] | None = option(None, "Split to evaluate on; left out: nothing is evaluated.")
    data_format: list[str] | None = option(
        None, "Format of the rows, auto, or an adapter's dotted path; left out: canonical rows and pairs."
    )
    streaming: bool = option(
        False, "Read the training rows one by one, without a copy of their source: of one data set, with max_steps."
    )
    max_train_rows: int | None = option(None, "Use only so many training rows.", at_least=1)
    dry_run: bool = option(False, "Describe the run and its memory without any weights.")
    accelerate_config: str | None = option(
        None,
        "Accelerate file, or a name in configs/accelerate such as zero3: polypo train starts with it, and a dry run "
        "estimates memory for it.",
    )
    probe: bool = option(
        False, "Make a few real steps on the longest and on typical batches: memory, time and advice."
    )

    def __post_init__(self):
        check_options(self)
        if self.accelerate_config is not None:
            self.accelerate_config = accelerate_file(self.accelerate_config)
        for name in ("dataset_name", *PER_DATA_SET):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) == 1:
                setattr(self, name, value[0])
        names = self.names
        if isinstance(self.dataset_weights, int | float):  # a YAML file may say so for one data set
            self.dataset_weights = [self.dataset_weights]
        for name in ("dataset_weights", *PER_DATA_SET):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != len(names):
                raise ValueError(f"{name} has {len(value)} items for {len(names)} data sets: give one for each.")
        if not any(self.each("dataset_train_split")):
            raise ValueError("dataset_train_split is empty: name a split to train on, of one data set at least.")
        if self.streaming and (len(names) > 1 or (self.dataset_weights, self.dataset_max_rows) != (None, None)):
            raise ValueError(
                "streaming reads one data set: name one in dataset_name, without dataset_weights and dataset_max_rows "
                "(max_train_rows works). From Python, datasets.interleave_datasets makes one stream of several."
            )
        if not all(0 < weight < math.inf for weight in self.dataset_weights or ()):
            raise ValueError(f"dataset_weights={self.dataset_weights}: give positive numbers.")
        for limit in self.each("dataset_max_rows"):
            if limit is not None and not (isinstance(limit, int) and limit > 0):
                raise ValueError(
                    f"dataset_max_rows={self.dataset_max_rows}: give positive whole numbers, or in a YAML file null."
                )

    @property
    def names(self) -> list[str]:
        """The data sets."""
        return self.dataset_name if isinstance(self.dataset_name, list) else [self.dataset_name or ""]

    def each(self, name: str) -> list:
        """The value of a field for each data set."""
        value = getattr(self, name)
        return value if isinstance(value, list) else [value] * len(self.names)

    def load(self, args, name: str, *, keep_dropped: bool = True) -> Dataset | IterableDataset | None:
        """The rows to train on ("train") or to evaluate on ("test"); None if no split was named for it.

        A stream keeps what is dropped, for a trainer to count, unless `keep_dropped` is false.
        """
        training = name == "train"
        splits = self.each("dataset_train_split" if training else "dataset_test_split")
        formats, configs = self.each("data_format"), self.each("dataset_config")
        weights = self.dataset_weights if training else None
        limit = self.max_train_rows if training else None
        chosen = [i for i, split in enumerate(splits) if split]
        limits = [self.each("dataset_max_rows")[i] if training else None for i in chosen]
        alone = len(chosen) == 1 and weights is None and limits == [None]
        with args.main_process_first(desc=f"reading {self.dataset_name}"):
            parts = [
                load_preferences(
                    shipped(self.names[i]),
                    split=splits[i],
                    data_format=formats[i],
                    as_chat=args.as_chat,
                    invalid_rows=args.invalid_rows,
                    num_proc=args.dataset_num_proc,
                    max_rows=limit if alone else None,
                    streaming=self.streaming and training,
                    keep_dropped=keep_dropped,
                    **({"name": configs[i]} if configs[i] else {}),
                )
                for i in chosen
            ]
            if alone or not parts:
                return parts[0] if parts else None
            names, shares = [self.names[i] for i in chosen], [weights[i] for i in chosen] if weights else None
            return mix(parts, names, shares, limits, seed=args.seed, max_rows=limit)


@dataclass
class ModelArguments(ModelConfig):
    """TRL's options of the model, with a dtype that goes by the machine."""

    model_name_or_path: str = option("", "Folder or hub id of a model or of an adapter.")
    # None where it is not set: false turns off the LoRA of a recipe.
    use_peft: bool = option(None, "Train an adapter (LoRA), and not all weights.")
    dtype: str | None = option(
        "float32",
        "Of the weights: auto is that of the files, fast is bfloat16 where this machine computes it fast, and float32 "
        "elsewhere.",
        choices=["auto", "fast", "bfloat16", "float16", "float32"],
    )

    def __post_init__(self):
        super().__post_init__()  # makes one name of a list, which PEFT takes for a regular expression of whole paths
        names: Any = self.lora_target_modules
        if isinstance(names, str) and re.fullmatch(r"[\w.]+", names):
            self.lora_target_modules = [names]
        of_lora = [f for f in fields(ModelConfig) if re.search("lora|dora", f.name)]
        if self.use_peft is None and (idle := [f.name for f in of_lora if getattr(self, f.name) != f.default]):
            raise ValueError(f"{idle[0]} has no effect without use_peft: set that to true, or leave this out.")
        self.use_peft = bool(self.use_peft)

    @property
    def of_trainer(self) -> dict:
        """The keywords of a trainer that these options come to."""
        return {"quantization_config": get_quantization_config(self), "peft_config": get_peft_config(self)}


def set_model_options(args, model: ModelArguments, *, planned_for: str | None = None) -> None:
    """The model's options of the command line become keywords of `from_pretrained`, and its dtype a real one.

    `planned_for` is the accelerate file of a dry run, whose GPUs take the place of this machine.
    """
    asked = model.dtype
    if asked == FAST and planned_for:
        model.dtype, why = "bfloat16", f"the GPUs of {planned_for} are taken to compute in it"
    else:  # one answer for all processes: their measurements may differ
        model.dtype, why = broadcast_object_list([settle_dtype(asked, args.device)])[0]
    if model.dtype != asked and args.process_index == 0:
        _say_once(f"dtype: {model.dtype}, because {why}.")
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        **(args.model_init_kwargs or {}),
    }


@cache
def _say_once(line: str) -> None:
    """Several runs of one process have it in common."""
    print(line, flush=True)
