"""Prompts with reference answers, read from conversations, pairs or canonical rows."""

import logging
from collections import Counter

from datasets import Dataset

from ..data.drops import DropReport, refuse
from ..data.load import load_preferences, read_dataset
from ..data.rows import refuse_template_options
from ..data.tokenization import unfinished
from ..generation.sampler import Prompt
from ..rounds import plain
from .text import turns

logger = logging.getLogger(__name__)

BEST = "best"
MESSAGES = "messages"


def read_rows(
    name: str, split: str | None, *, source: str, data_format: str | None = None, config: str | None = None,
    as_chat: bool = False,
    limit: int | None = None, needs_reference: bool = True, repeats: bool = False, invalid: str = "drop",
) -> list[dict]:  # fmt: skip
    """Rows of `prompt` and `reference` (None where there is none and none is needed); drops are counted and logged.

    Args:
        source: column of the reference, or `best` for the response with the best score. A conversation is split: its
            last turn is the reference, the turns before it are the prompt. A column `messages` is taken without
            being named.
        data_format: of `load_preferences`; its rows have responses and scores, so `source` is `best`.
        config: configuration of a data set that has several.
        as_chat: make text prompts user messages.
        repeats: keep several rows of one prompt. Else the first one stays, whatever `invalid` says: a repeated prompt
            is no fault.
        invalid: `drop` leaves out and counts rows without a prompt or an answer, `error` refuses the first one.

    Raises:
        ValueError: no column can be read as that, no row is left, or `invalid` is `error` and a row has a fault; the
            message names the row.
    """
    if data_format is not None and source != BEST:
        raise ValueError(f"sft_target_source={source!r} does not go with data_format: set it to {BEST!r}.")
    strict = {"prompt", "responses", "scores", MESSAGES, source}
    options = {"name": config} if config else {}
    dataset = None if data_format is not None else read_dataset(name, split or "train", options, strict)
    if dataset is None or (source == BEST and {"responses", "scores"} <= set(dataset.column_names)):
        dataset = load_preferences(name, split, data_format, max_rows=limit, invalid_rows=invalid, **options)
    elif limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    report, rows, seen = DropReport(rows_in=len(dataset)), [], set()
    column = _reference_column(dataset, source, needs_reference, name)
    for index, row in enumerate(dataset):
        refuse_template_options(row)
        prompt, reference = _split(row, column)
        reason = _fault(prompt, reference if needs_reference else "-")
        if reason is not None and invalid == "error":
            refuse(f"row {index} of {name}, {split or 'train'}", reason)
        if reason is None and not repeats and key(prompt) in seen:
            reason = "the same prompt again"
        if reason is not None:
            report.reasons[reason] += 1
            continue
        seen.add(key(prompt))
        if as_chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        rows.append({"prompt": plain(prompt), "reference": reference})
    report.rows_out = len(rows)
    report.log(logger, name)
    if not rows:
        raise ValueError(f"{name}, {split}: no usable row is left.\n{report}")
    return rows


def without(rows: list[dict], others: list[dict], what: str, why: str) -> list[dict]:
    """The rows whose prompt is in none of `others`; how many of `what` go, and why, is logged."""
    taken = {key(row["prompt"]) for row in others}
    kept = [row for row in rows if key(row["prompt"]) not in taken]
    if len(kept) < len(rows):
        logger.warning("%d of %d %s are left out, since %s.", len(rows) - len(kept), len(rows), what, why)
    return kept


def key(prompt: Prompt) -> str:
    """The same for prompts that differ in white space and case only."""
    return "\0".join(" ".join(message["content"].lower().split()) for message in turns(prompt))


def count_drops(reasons: list[str | None]) -> dict[str, int]:
    """How many rows stay, and how many go for which reason."""
    dropped = Counter(reason for reason in reasons if reason is not None)
    return {"kept": reasons.count(None), "dropped": dict(sorted(dropped.items()))}


def _reference_column(dataset: Dataset, source: str, needed: bool, name: str) -> str | None:
    columns = dataset.column_names
    if source == BEST and {"responses", "scores"} <= set(columns):
        return BEST
    for column in (source, MESSAGES):
        if column in columns:
            return column
    if source == BEST and needed:
        raise ValueError(
            f"{name} has the columns {sorted(columns)}, but sft_target_source={BEST!r} takes the response with the "
            "best score: give rows of responses and scores, name their data_format, or set sft_target_source to the "
            "column with the reference answer."
        )
    if needed or "prompt" not in columns:
        raise ValueError(
            f"{name} has the columns {sorted(columns)}: set sft_target_source to the one with the reference answer "
            f"(now {source!r}), or to {BEST!r} for rows of responses and scores."
        )
    return None


def _split(row: dict, column: str | None) -> tuple[Prompt | None, str | None]:
    prompt = row.get("prompt")
    if column is None:
        return prompt, None
    if column == BEST:
        whole = [k for k, cut in enumerate(unfinished(row)) if not cut]
        value = row["responses"][max(whole, key=row["scores"].__getitem__)] if whole else None
    else:
        value = row[column]
    if not isinstance(value, list):
        return prompt, value
    if not value or not isinstance(value[-1], dict) or value[-1].get("role") != "assistant":
        return prompt, None
    # A conversation that begins with its prompt; a list of the answer alone follows the prompt of the row.
    return (value[:-1] if len(value) > 1 else prompt), value[-1].get("content")


def _fault(prompt: Prompt | None, reference: str | None) -> str | None:
    if not prompt or not isinstance(prompt, str | list) or not all(m["content"].strip() for m in turns(prompt)):
        return "no prompt"
    if isinstance(reference, bool | int | float):
        return f"the reference answer is a number ({type(reference).__name__}), and not text"
    if not isinstance(reference, str) or not reference.strip():
        return "no reference answer at the end"
    return None
