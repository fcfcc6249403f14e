"""Tells what a data set is before anything is trained on it, as a page and as JSON: polypo inspect DATA --model M

    polypo inspect data/demo/preferences.jsonl.gz --model HuggingFaceTB/SmolLM2-135M-Instruct --as_chat true
    polypo inspect a.csv lab/b --dataset_max_rows 1000 5000 --data_format numbered auto
    polypo inspect lab/large --streaming true --max_rows 5000
    polypo inspect --config dpo/demo.yaml

Options of `polypo train` that say which rows are read, and how, apply as well: data_format, dataset_train_split,
dataset_test_split, dataset_weights, as_chat, max_length, ... A recipe shows what its run would train on. Without a
model there are no tokens, and lengths are in characters. No weights are read.
"""

import copy
import json
import re
from dataclasses import dataclass, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import GenerationConfig, PreTrainedTokenizerBase

from polypo import recipes

from ..config import PreferenceConfig, Truncation, check_options, option
from ..data import facts
from ..data.budget import Lengths, token_lengths
from ..data.drops import collected_reports
from ..data.facts import Texts
from ..data.json_rows import rows_of
from ..data.rows import UNFINISHED
from ..forward import policy as policies
from ..generation.backends import end_ids
from ..inputs import prepare_rows
from ..runs.files import write_json
from . import config_files
from .arguments import DataArguments, ModelArguments
from .dry_run import find_config
from .inspect_page import CLEAN, warnings_of, write_page
from .train import find_trainer

SHOWN = 3  # rows


@dataclass
class InspectArguments:
    """Options of `polypo inspect`; all of `polypo train` apply as well."""

    model: str | None = option(None, "Folder or hub id of the model whose tokenizer counts.")
    max_rows: int | None = option(None, "Look at so many training rows only.", at_least=1)
    output: str | None = option(None, "Page to write, and .json beside it; left out: runs/inspect/NAME.html.")

    def __post_init__(self):
        check_options(self)


@dataclass
class Split:
    """The rows of a split: canonical, with what their texts show, and with a model tokenised.

    `whole` are the tokenised rows without a limit of length, `read` those that a run would train on.
    """

    rows: Dataset
    texts: Texts
    reports: list[tuple[str, Any]]
    whole: Dataset | None = None
    read: Dataset | None = None
    error: str | None = None  # why there are no `read` rows

    @property
    def lengths(self) -> list[Lengths]:
        """Of each row, in tokens or, without a model, in characters."""
        return self.texts.lengths if self.whole is None else token_lengths(self.whole)

    @property
    def scores(self) -> list[list[float]]:
        """Of the rows of `lengths`."""
        return (self.rows if self.whole is None else self.whole)["scores"][:]


def main(argv: list[str]) -> None:
    names = list(takewhile(lambda part: not part.startswith("-"), argv))
    flags, recipe = recipes.split_recipe([*(["--dataset_name", *names] if names else []), *argv[len(names) :]])
    trainer_class = find_trainer(recipes.chosen("trainer", flags, recipe, DataArguments.trainer))
    # Without use_cpu, a machine without a GPU refuses the bf16 of a recipe.
    own, data, args, model = config_files.parse(
        [InspectArguments, DataArguments, trainer_class.config_class, ModelArguments],
        [*flags, "--use_cpu", "true"],
        recipe,
    )
    recipes.refuse_missing(dataset_name=data.dataset_name)
    model.model_name_or_path = own.model or model.model_name_or_path
    args.model_init_kwargs = {"revision": model.model_revision, **(args.model_init_kwargs or {})}
    data.max_train_rows = own.max_rows or data.max_train_rows
    if data.streaming and data.max_train_rows is None:
        raise ValueError("max_rows is missing: a stream has no end that is known, so say how many rows to look at.")
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", "+".join(data.names)).strip("-.")
    output = Path(own.output or f"runs/inspect/{name}.html")
    if output.suffix != ".html":
        raise ValueError(f"--output {output}: give a name that ends in .html.")
    print("\n".join(inspect(data, args, model, output, columns=trainer_class.columns)))


def inspect(
    data: DataArguments, args: PreferenceConfig, model: ModelArguments, output: Path, *, columns=()
) -> list[str]:
    """Writes the page and its JSON; returns what the terminal says.

    Raises:
        ValueError: what would stop a run that reads this data, too, but for rows that are all too long.
    """
    tokenizer, ends = tokenizer_of(model, args) if model.model_name_or_path else (None, [])
    read = {name: read_split(data, args, name, tokenizer, columns) for name in ("train", "test")}
    splits = {name: split for name, split in read.items() if split is not None}
    found = {name: facts_of(split, args, tokenizer, ends) for name, split in splits.items()}
    if "test" in splits:
        seen = splits["test"].texts.shared_with(splits["train"].texts)
        found["test"]["duplicates"]["rows_with_a_prompt_of_train"] = seen
    report: dict[str, Any] = {
        "data": {"dataset_name": data.dataset_name, "data_format": data.data_format},
        "model": model.model_name_or_path or None,
        "max_length": args.max_length,
        "max_prompt_length": args.max_prompt_length,
        "splits": found,
    }
    report["warnings"] = warnings_of(report)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output.with_suffix(".json"), report)
    write_page(output, report, {name: (split.lengths, split.scores) for name, split in splits.items()})
    told = [f"{name}, {title}: {passed}" for name, split in splits.items() for title, passed in split.reports]
    told += report["warnings"] or [CLEAN]
    return [*told, f"{output} is ready, and the numbers in {output.with_suffix('.json')}."]


def tokenizer_of(model: ModelArguments, args: PreferenceConfig) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The tokenizer of a model, or of the base of an adapter, and the token ids that end a response of it."""
    config, _ = find_config(model, args)
    name = str(config.name_or_path)
    tokenizer = policies.tokenizer_at(name, args.model_init_kwargs)
    try:
        generation = GenerationConfig.from_pretrained(name, revision=model.model_revision or "main")
    except OSError:  # it has none
        generation = GenerationConfig.from_model_config(config)
    return tokenizer, end_ids(generation, tokenizer)


def read_split(
    data: DataArguments, args: PreferenceConfig, name: str, tokenizer: PreTrainedTokenizerBase | None, columns=()
) -> Split | None:
    """The rows of a split, read as a run reads them, and what was left out on the way; None where none was named."""
    with collected_reports() as reports:
        rows = data.load(args, name, keep_dropped=False)
        if rows is None:
            return None
        if isinstance(rows, IterableDataset):
            rows = Dataset.from_list(list(rows), features=rows.features)
        split = Split(rows, Texts.of(rows_of(rows)), reports)
        if tokenizer is None:
            return split
        with collected_reports():  # those of the second pass are the run's
            split.whole = prepare_rows(rows, tokenizer, without_limits(args))
        try:
            split.read = prepare_rows(rows, tokenizer, args, columns=columns)
        except ValueError as error:  # such as no row that fits into max_length, which the lengths explain
            split.error = f"a run would stop: {error}"
    return split


def without_limits(args: PreferenceConfig) -> PreferenceConfig:
    """The same config for rows of any length, all of whose tokens count."""
    whole = copy.copy(args)
    vars(whole).update({option.name: option.default for option in fields(Truncation)} | {"max_length": None})
    whole.assistant_only_loss = False
    return whole


def facts_of(
    split: Split, args: PreferenceConfig, tokenizer: PreTrainedTokenizerBase | None, ends: list[int]
) -> dict[str, Any]:
    """All that is said of a split, as JSON takes it."""
    lengths, scores, rows = split.lengths, split.scores, split.rows
    responses = [own for _, own in lengths]
    found = {
        "passes": [{"title": title} | vars(report) for title, report in split.reports],
        "rows": len(rows),
        "responses": sum(map(len, responses)),
        "columns": {name: repr(kind) for name, kind in rows.features.items()},
        "responses_per_row": facts.responses_per_row(responses),
        "scores": facts.score_facts(rows["scores"][:]),
        "length_and_score": facts.length_facts(responses, scores),
        "lengths_in": "characters" if split.whole is None else "tokens",
        "lengths": {part: dict(zip(facts.PERCENTILES, facts.percentiles(values), strict=True))
                    for part, values in facts.parts_of(lengths).items()},
        "duplicates": split.texts.duplicates(),
        "rows_with_an_empty_turn": split.texts.empty_turns,
        "scripts_of_prompts": dict(split.texts.scripts.most_common()),
        "responses_in_another_script": split.texts.other_script,
    }  # fmt: skip
    if "annotator" in rows.column_names:
        found["annotators"] = facts.annotator_facts(rows["annotator"][:])
    if split.whole is None or tokenizer is None:
        return found | {"first_rows": [in_words(row) for row in rows.select(range(min(SHOWN, len(rows))))]}
    unfinished = sum(sum(marks or ()) for marks in rows[UNFINISHED][:]) if UNFINISHED in rows.column_names else 0
    tokens = facts.token_facts(split.whole, tokenizer, ends)
    tokens["responses_without_end"] = max(0, tokens["responses_without_end"] - unfinished)
    found["tokens"] = tokens | {
        "responses_too_long": facts.too_long(lengths, args),
        "ends": tokenizer.convert_ids_to_tokens(ends),
    }
    shown = split.whole if split.read is None else split.read
    found |= {"error": split.error, "trained_on": 0 if split.read is None else len(split.read)}
    return found | {
        "first_rows": [facts.as_read(row, tokenizer) for row in shown.select(range(min(SHOWN, len(shown))))]
    }


def in_words(row: dict) -> list[tuple[str, str]]:
    """A canonical row as (name, text) of its prompt and its responses."""
    texts = [("prompt", row["prompt"])]
    texts += [(f"scored {score:g}", text) for score, text in zip(row["scores"], row["responses"], strict=True)]
    return [
        (name, text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, indent=1))
        for name, text in texts
    ]
