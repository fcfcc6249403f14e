"""Raw rows to tokenised rows, with one printed account of what was dropped."""

import logging
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .canonical import canonicalize
from .tokenization import tokenize_dataset

logger = logging.getLogger(__name__)


def prepare_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    invalid: str = "drop",
    as_chat: bool = False,
    num_proc: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Dataset:
    """Canonical rows, TRL pairs or tokenised rows -> tokenised rows that can be trained on.

    Raises:
        ValueError: a row that cannot be read, or that would be dropped while `invalid` is "error"; or no row is left.
    """
    if "prompt_ids" not in dataset.column_names:
        dataset, report = canonicalize(dataset, invalid=invalid, num_proc=num_proc, as_chat=as_chat)
        report.log(logger, "Reading rows")
    dataset, report = tokenize_dataset(
        dataset,
        tokenizer,
        max_length=max_length,
        invalid=invalid,
        num_proc=num_proc,
        chat_template_kwargs=chat_template_kwargs,
    )
    report.log(logger, "Tokenising")
    return dataset
