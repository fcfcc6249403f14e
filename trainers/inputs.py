"""The data sets that a trainer is given, as tokenised rows."""

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .config import PreferenceConfig
from .data.prepare import prepare_dataset


def prepare_rows(
    dataset: Dataset | dict[str, Dataset] | None,
    tokenizer: PreTrainedTokenizerBase,
    args: PreferenceConfig,
    *,
    several: bool = False,
) -> Dataset | dict[str, Dataset] | None:
    """Canonical rows, TRL pairs or tokenised rows -> tokenised rows as `args` want them; of `several`, a dict by name.

    Raises:
        ValueError: it is no data set that can be held, or several where one is needed, or a row cannot be used.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        if not several:
            raise ValueError(
                f"A {type(dataset).__name__} of {', '.join(map(repr, dataset))} is no data set of rows: pass one of "
                "its splits, such as data['train']."
            )
        return {name: prepare_rows(part, tokenizer, args) for name, part in dataset.items()}
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "A stream cannot be trained on, as rows are counted, checked and numbered before the first step: load the "
            "data set without streaming, or write it to a file with scripts/prepare_data.py first."
        )
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"A data set of type {type(dataset).__name__} is not supported: give a datasets.Dataset, for example "
            "Dataset.from_list(rows) or load_preferences(path)."
        )
    with args.main_process_first(desc="preparing the data set"):
        return prepare_dataset(
            dataset,
            tokenizer,
            max_length=args.max_length,
            invalid=args.invalid_rows,
            as_chat=args.as_chat,
            num_proc=args.dataset_num_proc,
            chat_template_kwargs=args.chat_template_kwargs,
        )
