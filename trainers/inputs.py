"""The data sets that a trainer is given, as tokenised rows, and which rows of a batch count."""

import warnings
from dataclasses import fields
from typing import Any

import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import PreferenceConfig, Truncation
from .data.budget import token_lengths
from .data.stream import TokenStream, refuse_stream, token_stream
from .data.tokenization import prepare_dataset
from .forward.policy import context_length, table_sizes

Batch = dict[str, Tensor]
REPEATED = "repeated"  # (B,) bool in a batch: rows that are there to fill it up


def prepare_rows(
    dataset: Dataset | dict[str, Dataset] | None,
    tokenizer: PreTrainedTokenizerBase,
    args: PreferenceConfig,
    *,
    columns: tuple[str, ...] = (),
    several: bool = False,
    name: str = "the data set",
) -> Dataset | dict[str, Dataset] | None:
    """Canonical rows, TRL pairs or tokenised rows -> tokenised rows as `args` want them; of `several`, a dict by name.

    Args:
        columns: further columns to carry along, which a method reads.
        name: of the argument that the data set came in, for the error.

    Raises:
        ValueError: it is no `datasets.Dataset`, or has no rows, or a row cannot be used.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict) and several:
        return {
            key: prepare_rows(part, tokenizer, args, columns=columns, name=f"{name}[{key!r}]")
            for key, part in dataset.items()
        }
    refuse_stream(dataset, "Anything but training")
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"A {type(dataset).__name__} is no data set of rows: give a datasets.Dataset, such as one split of "
            "several (data['train']), or Dataset.from_list(rows); to train on also a datasets.IterableDataset."
        )
    if not len(dataset):
        raise ValueError(f"{name} has no rows.")
    with args.main_process_first(desc="preparing the data set"):
        return prepare_dataset(dataset, tokenizer, num_proc=args.dataset_num_proc, columns=columns, **_options(args))


def prepare_training_rows(
    dataset: Dataset | IterableDataset | None,
    tokenizer: PreTrainedTokenizerBase,
    args: PreferenceConfig,
    *,
    columns: tuple[str, ...] = (),
) -> Dataset | TokenStream | None:
    """As `prepare_rows`; a stream becomes one of tokenised rows."""
    if isinstance(dataset, IterableDataset):
        return token_stream(dataset, tokenizer, args, columns, **_options(args))
    return prepare_rows(dataset, tokenizer, args, columns=columns, name="train_dataset")


def _options(args: PreferenceConfig) -> dict[str, Any]:
    """How rows are tokenised."""
    return {
        **{field.name: getattr(args, field.name) for field in fields(Truncation)},
        "invalid": args.invalid_rows,
        "as_chat": args.as_chat,
        "assistant_only_loss": args.assistant_only_loss,
        "chat_template_kwargs": args.chat_template_kwargs,
    }


def parts(*datasets: Dataset | TokenStream | dict[str, Dataset] | None) -> list[Dataset]:
    """Each data set once, those of a dict one by one; of a stream its first rows."""
    several = [d.values() if isinstance(d, dict) else [d] for d in datasets if d is not None]
    return [rows.head if isinstance(rows, TokenStream) else rows for one in several for rows in one]


def mark_repeated(batch: Batch, accelerator: Accelerator, loader: DataLoader) -> None:
    """Rows that accelerate repeats so that the last batches of an epoch are even count nowhere.

    Args:
        batch: this process' last one of an epoch.
        loader: what it came from, whose sampler may draw more or fewer rows than there are.
    """
    batches = loader.batch_sampler
    batches = batches.batch_sampler if isinstance(batches, BatchSamplerShard) else batches
    # Other samplers of batches are even (by token budget), and a stream has no last batch.
    if not isinstance(batches, BatchSampler) or isinstance(loader.dataset, TorchIterableDataset):
        return
    if accelerator.num_processes == 1 or batches.drop_last:
        return
    # Not accelerate's own remainder, which is wrong in an epoch whose first batches were skipped to go on, and counts
    # the rows of the data set.
    rows_at_once = batches.batch_size * (1 if accelerator.split_batches else accelerator.num_processes)
    remainder = len(batches.sampler) % rows_at_once  # type: ignore[arg-type]
    if not remainder:
        return
    size = len(batch["scores"])
    position = accelerator.process_index * size + torch.arange(size, device=batch["scores"].device)
    batch[REPEATED] = position >= remainder
    weight = batch.get("weight", torch.ones_like(position))
    batch["weight"] = weight.float().masked_fill(batch[REPEATED], 0)


def check_ranges(datasets: list[Dataset], models: list[PreTrainedModel]) -> None:
    """Compare the token ids and the lengths of tokenised rows with the tables of the models that they will be fed to.

    Rows that are longer than a model without a table was made for are told in a warning.

    Raises:
        ValueError: a row holds a token or a position that a model has no entry for, which training might only meet
            after hours.
    """
    if not datasets:
        return
    lows, highs, lengths = zip(*map(_extremes, datasets), strict=True)
    lowest, highest, longest = min(lows), max(highs), max(lengths)
    for model in models:
        tokens, positions = table_sizes(model)
        if lowest < 0 or highest >= tokens:
            raise ValueError(
                f"The rows hold token ids from {lowest} to {highest}, but {type(model).__name__} knows 0 to "
                f"{tokens - 1}: take the tokenizer of the model, or call "
                "model.resize_token_embeddings(len(tokenizer)) first."
            )
        # the last token of a response is never fed
        if positions is not None and longest - 1 > positions:
            raise ValueError(
                f"The longest row has {longest} tokens, but {type(model).__name__} has a table of {positions} "
                f"positions: set max_length to {positions}."
            )
        context = context_length(model.config)
        if context is not None and longest - 1 > context:
            warnings.warn(
                f"Some rows are longer than the {context} tokens that {type(model).__name__} was made for "
                f"(max_position_embeddings), beyond which its numbers mean little: set max_length to {context}.",
                stacklevel=2,
            )


def _extremes(dataset: Dataset) -> tuple[int, int, int]:
    """Lowest and highest token id of tokenised rows, and the tokens of the longest prompt with one response."""
    ids = [0]
    for table in dataset.select_columns(["prompt_ids", "response_ids"]).with_format("arrow").iter(1000):
        for tokens in (pc.list_flatten(table["prompt_ids"]), pc.list_flatten(pc.list_flatten(table["response_ids"]))):
            ids += pc.min_max(tokens).as_py().values()
    return min(ids), max(ids), max(prompt + max(responses) for prompt, responses in token_lengths(dataset))
