"""Prompts with reference answers, read from conversations, pairs or canonical rows."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from datasets import Dataset

from polypo.recipes import shipped

from ..data.canonical import canonicalize
from ..data.drops import DropReport, refuse
from ..data.json_rows import columns_of
from ..data.load import load_preferences, read_dataset, refuse_unknown_splits
from ..data.rows import refuse_template_options, unfinished
from ..data.stream import refuse_stream
from ..generation.sampler import Prompt, plain_prompt
from .config import SGPOConfig
from .text import turns

logger = logging.getLogger(__name__)

BEST, MESSAGES, SCORED = "best", "messages", {"responses", "scores"}


class Rows(NamedTuple):
    """Rows of `prompt` and `reference` to train the improver on, to make pairs of, to measure on, and for SFT."""

    improver: list[dict]
    preferences: list[dict]
    held_out: list[dict]
    conversations: list[dict] | None


def read_data(args: SGPOConfig, data) -> Rows:
    """All rows of a run; no prompt is in two of held-out rows, the improver's rows and those of the pairs.

    `data` are splits by name, see `SGPOTrainer.run`, or data arguments.

    Raises:
        ValueError: a split is missing, not known, or has no row of its own.
    """
    refuse_unknown_splits(data, "train", "preferences", "test", "sft")
    held_out = _read(args, data, "test", needs_reference=False) or []
    improver = _without(_read(args, data, "train") or [], held_out, "improver prompts are held out")
    preferences = _read(args, data, "preferences", needs_reference=False) or []
    preferences = _without(preferences, held_out, "preference prompts are held out")
    preferences = _without(preferences, improver, "preference prompts are the improver's")
    conversations = _read(args, data, "sft", repeats=True)
    if conversations is not None:
        conversations = _without(conversations, held_out, "conversations are held out")
    if not improver or not preferences:
        raise ValueError("no prompt is left for the improver or for the pairs: all are in the other splits.")
    return Rows(improver, preferences, held_out, conversations)


def _read(args: SGPOConfig, data, split: str, **options) -> list[dict] | None:
    with args.main_process_first(desc=f"reading {split}"):
        if (dataset := _load(args, data, split)) is not None:
            return read_rows(dataset, args, title=split, **options)
    if split in ("train", "preferences") or (split == "sft" and args.sft is not None):
        raise ValueError(f"the rows of {split} are missing: name their data set and split, or hand them over.")
    return None


def _load(args: SGPOConfig, data, split: str) -> Dataset | None:
    """The split as it was handed over or lies on the hub or on the disk, as far as its limit goes."""
    sft, other = args.sft or {}, args.preference_dataset
    limits = {"preferences": args.max_preference_rows, "sft": sft.get("max_rows")}
    if isinstance(data, Mapping):
        refuse_stream(dataset := data.get(split), "SGPO")
    else:
        alone = (data.dataset_weights, data.dataset_max_rows, data.streaming) == (None, None, False)
        if len(data.names) > 1 or not alone:
            raise ValueError(
                "SGPO reads one data set, whole: name one in dataset_name, without dataset_weights, dataset_max_rows "
                "and streaming."
            )
        limits["train"], own, plain_rows = data.max_train_rows, (data.data_format, data.dataset_config), (None, None)
        name, part, data_format, config = {
            "train": (data.dataset_name, data.dataset_train_split, *own),
            "test": (data.dataset_name, data.dataset_test_split, *own),
            "preferences": (other or data.dataset_name, args.preference_split or (other and "train"),
                            *(plain_rows if other else own)),
            "sft": (sft.get("dataset_name"), sft.get("dataset_split", "train"), *plain_rows),
        }[split]  # fmt: skip
        if not (name and part):
            return None
        name, options = shipped(name), {"name": config} if config else {}
        if data_format is not None:
            limit = limits.get(split)
            return load_preferences(name, part, data_format, max_rows=limit, invalid_rows=args.invalid_rows, **options)
        dataset = read_dataset(name, part, **options)
    if dataset is not None and (limit := limits.get(split)) is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    if dataset is not None and args.sft_target_source == BEST and SCORED <= set(columns_of(dataset)):
        dataset, report = canonicalize(dataset, invalid=args.invalid_rows)  # of whose responses the best is taken
        report.log(logger, "responses")
    return dataset


def read_rows(dataset: Dataset, args: SGPOConfig, *, title: str = "", needs_reference=True, repeats=False) -> list:
    """Rows of `prompt` and `reference` (None where there is none and none is needed); drops are counted and logged.

    Args:
        args: `sft_target_source` is the column of the reference, or `best` for the response with the best score. A
            conversation is split: its last turn is the reference, the turns before it are the prompt. A column
            `messages` is taken without being named.
        repeats: keep several rows of one prompt. Else the first one stays: a repeated prompt is no fault.

    Raises:
        ValueError: no column can be read as that, no row is left, or `invalid_rows` is `error` and a row has a fault.
    """
    column = _reference_column(columns_of(dataset), args.sft_target_source, needs_reference)
    report, rows, seen = DropReport(rows_in=len(dataset)), [], set()
    for index, row in enumerate(dataset):
        refuse_template_options(row)
        prompt, reference = _split(row, column)
        reason = _fault(prompt, reference if needs_reference else "-")
        if reason is not None and args.invalid_rows == "error":
            refuse(f"row {index} of {title}", reason)
        if reason is None and not repeats and key(prompt) in seen:
            reason = "the same prompt again"
        if reason is not None:
            report.reasons[reason] += 1
            continue
        seen.add(key(prompt))
        if args.as_chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        rows.append({"prompt": plain_prompt(prompt), "reference": reference})
    report.rows_out = len(rows)
    report.log(logger, title)
    if not rows:
        raise ValueError(f"{title}: no usable row is left.\n{report}")
    return rows


def key(prompt: Prompt) -> str:
    """The same for prompts that differ in white space and case only."""
    return "\0".join(" ".join(message["content"].lower().split()) for message in turns(prompt))


def count_drops(reasons: list[str | None]) -> dict:
    """How many rows stay, and how many go for which reason."""
    dropped = Counter(reason for reason in reasons if reason is not None)
    return {"kept": reasons.count(None), "dropped": dict(sorted(dropped.items()))}


def _without(rows: list[dict], others: list[dict], why: str) -> list[dict]:
    """The rows whose prompt is in none of `others`; how many go is logged."""
    taken = {key(row["prompt"]) for row in others}
    kept = [row for row in rows if key(row["prompt"]) not in taken]
    if len(kept) < len(rows):
        logger.warning("%d of %d rows are left out, since these %s.", len(rows) - len(kept), len(rows), why)
    return kept


def _reference_column(columns: list[str], source: str, needed: bool) -> str | None:
    if source == BEST and SCORED <= set(columns):
        return BEST
    for column in (source, MESSAGES):
        if column in columns:
            return column
    if needed or "prompt" not in columns:
        raise ValueError(
            f"the data has the columns {sorted(columns)}: set sft_target_source to the one with the reference answer "
            f"(now {source!r}), or to {BEST!r} for rows of responses and scores, with their data_format."
        )
    return None


def _split(row: dict, column: str | None) -> tuple[Prompt, str | None]:
    prompt = row.get("prompt") or ""
    if column is None:
        return prompt, None
    value = row.get(column)  # a row of a JSON file may lack it
    if column == BEST:
        whole = [k for k, cut in enumerate(unfinished(row)) if not cut]
        value = row["responses"][max(whole, key=row["scores"].__getitem__)] if whole else None
    if not isinstance(value, list):
        return prompt, value
    if not value or not isinstance(value[-1], dict) or value[-1].get("role") != "assistant":
        return prompt, None
    # A conversation that begins with its prompt; a list of the answer alone follows the prompt of the row.
    return (value[:-1] if len(value) > 1 else prompt), value[-1].get("content")


def _fault(prompt: Prompt, reference: str | None) -> str | None:
    if not prompt or not isinstance(prompt, str | list) or not all(m["content"].strip() for m in turns(prompt)):
        return "no prompt"
    return None if isinstance(reference, str) and reference.strip() else "no reference answer at the end"
