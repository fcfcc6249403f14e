"""Rows to token ids: one prompt, K responses, cut at the tokens that all K have in common.

Prompt and response are always tokenised together, because a tokenizer may merge the end of one with the beginning of
the other. The prompt ends where the first of the K sequences departs from the prompt tokenised on its own.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from functools import cache, partial
from os.path import commonprefix  # of any sequences
from typing import Any

from datasets import Dataset, Features, Json, List, Value
from transformers import PreTrainedTokenizerBase

from ..config import Truncation
from .canonical import as_json
from .drops import (
    COUNTED,
    EVENTS,
    KEPT,
    DropReport,
    is_first_process,
    refuse,
    source_digest,
    split_off_drops,
    without_format,
)
from .encoding import Encoded, chat_options, chat_template, encode, without_none
from .json_rows import rows_in
from .rows import (
    TRAINED,
    UNFINISHED,
    Row,
    checked_row,
    is_per_token,
    unpadded,
)
from .truncation import fit, fixed_ends

logger = logging.getLogger(__name__)

BATCH = 128  # rows whose texts go through the tokenizer together, on all its threads
CUT = "_cut_text"
CUT_NOTE = "prompts whose end is counted to the responses, because it is no token prefix"
CUT_WARNING = (
    "The tokenised prompt is not the beginning of the tokenised prompt + response, so this end of the prompt is "
    "counted to the responses: %r. Either tokens merge across the boundary, or the chat template writes the prompt "
    "differently when an answer follows. At inference the model sees other tokens there. End the prompt on a token "
    "boundary, or use a chat template that writes the prompt the same way in both cases. Shown once; the report "
    "counts the rows."
)
CONTROL_NOTE = "rows with special tokens in the text of a message, which the chat template lets through as such"
IDS = {
    "prompt_ids": List(Value("int32")),
    "response_ids": List(List(Value("int32"))),
    "scores": List(Value("float64")),
    TRAINED: List(List(Value("bool"))),
}

Result = tuple[Row | None, list[str], str | None]  # the tokenised row, the reasons, and the end cut off the prompt


def tokenize_row(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    assistant_only_loss: bool = True,
    chat_template_kwargs: dict[str, Any] | None = None,
    **truncation,
) -> Row:
    """Tokenise one canonical row; see `tokenize_dataset`.

    Returns `prompt_ids` (list of P ints), `response_ids` (K lists of ints), `scores` (K floats) and the other columns,
    `assistant_masks` (K lists of bools) where not all tokens are trained on.

    Raises:
        ValueError: if the row has no room or tokens for two responses.
    """
    control, limits = _control_tokens(tokenizer), Truncation(max_length, **truncation)
    options = chat_template_kwargs or {}
    [encoded] = [None] if "response_ids" in row else encode([row], "row 0", tokenizer, options, assistant_only_loss)
    out, reasons, cut = _tokenize(row, encoded, "row 0", tokenizer, options, limits, control)
    if cut is not None:
        _warn_of_cut(cut)
    if out is None:
        raise ValueError("; ".join(reasons))
    left_out = ("responses", UNFINISHED, *([] if out[TRAINED] else [TRAINED]))
    return {name: value for name, value in out.items() if name not in left_out}


def tokenize_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    invalid: str = "drop",
    as_chat: bool = False,
    num_proc: int | None = None,
    assistant_only_loss: bool = True,
    chat_template_kwargs: dict[str, Any] | None = None,
    columns: tuple[str, ...] = (),
    **truncation,
) -> tuple[Dataset, DropReport]:
    """Tokenise canonical rows or TRL pairs, and count what is dropped or truncated.

    Messages go through the chat template, which writes its own BOS and end-of-turn tokens; nothing is added to what it
    gives. It is given the row's `tools` and `chat_template_kwargs`, which win over those of all rows. Special tokens
    inside the text of a message become what they say, as at inference; such rows are counted. Of responses of several
    messages the assistant's are trained on: `assistant_masks` marks their tokens (K lists of bools, None for all).
    Text is tokenised as it is, and EOS is added unless the response ends with it. Responses which the column
    `unfinished_responses` (K bools) marks get neither EOS nor the end of a turn. Each response is truncated to
    `max_length` minus the length of its prompt, unless `truncation` says otherwise. Rows that hold `prompt_ids`,
    `response_ids` and `scores` are taken as tokenised and only truncated, together with their per-token columns (K
    lists as long as the responses).

    Args:
        max_length: largest number of tokens of prompt plus response. None: no limit.
        invalid: `"drop"` leaves out and counts what cannot be used (see `canonicalize`), responses without tokens, and
            prompts that fill `max_length`; `"error"` refuses the first one. Truncation is counted, never refused.
        as_chat: wrap text prompts and responses in user and assistant messages.
        assistant_only_loss: whether only the assistant's tokens are trained on.
        chat_template_kwargs: further arguments of the chat template.
        columns: columns to carry along beside the prompt's text, `weight` and `annotator`.
        truncation: the other fields of `Truncation` (config.py), such as `max_prompt_length`.

    Raises:
        ValueError: if messages are given and the tokenizer has no chat template, or one that writes no tools where a
            row has some or does not tell which tokens are the assistant's, if text is given and it has no EOS token,
            if an unfinished response has several messages, or naming the row.
    """
    dataset = without_format(dataset)
    options: dict[str, Any] = {"invalid": invalid, "as_chat": as_chat, "assistant_only_loss": assistant_only_loss}
    options |= {"max_length": max_length, **truncation}
    how = how_to_tokenize(dataset.features, tokenizer, columns, chat_template_kwargs, **options)
    mapped = dataset.map(
        counted_batch,
        with_indices=True,
        batched=True,
        batch_size=BATCH,
        remove_columns=dataset.column_names,
        features=Features({**how["columns"], **COUNTED, CUT: Value("string")}),
        num_proc=num_proc,
        fn_kwargs=how,
        desc="Tokenising",
    )
    warn_of_cut(mapped[CUT][:])
    unused = [CUT] if mapped.data.column(TRAINED).null_count < len(mapped) else [CUT, TRAINED]
    return split_off_drops(mapped.remove_columns(unused))


def how_to_tokenize(
    source: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, ...],
    chat_template_kwargs: dict[str, Any] | None,
    *,
    invalid: str,
    as_chat: bool,
    assistant_only_loss: bool = True,
    **truncation,
) -> dict[str, Any]:
    """Keywords of `counted_batch` for rows with the columns of `source`; "columns" are the features that it gives."""
    features = {name: source[name] for name in ("weight", "annotator", *columns) if name in source}
    # The prompt's text stays for callbacks that sample answers to it.
    text = {"prompt": Json()} if "prompt" in source or "prompt_ids" not in source else {}
    return {
        "invalid": invalid,
        "as_chat": as_chat,
        "limits": Truncation(**truncation),
        "source": dict(source),
        "columns": features | text | IDS,
        "code": source_digest(),
        "tokenizer": tokenizer,
        "assistant_only_loss": assistant_only_loss,
        "template_kwargs": chat_template_kwargs or {},
        "control": _control_tokens(tokenizer),
    }


def warn_of_cut(ends: Iterable[str | None]) -> None:
    """Show the first end of a prompt that was cut off, in the first process."""
    cut = next((end for end in ends if end is not None), None)
    if cut is not None and is_first_process():
        _warn_of_cut(cut)


@cache
def _warn_of_cut(end: str) -> None:
    """Once for each end of a prompt: a run in rounds tokenises many times."""
    logger.warning(CUT_WARNING, end)


def prepare_dataset(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, **options) -> Dataset:
    """`tokenize_dataset` with its count of what was dropped on the log."""
    dataset, report = tokenize_dataset(dataset, tokenizer, **options)
    report.log(logger, "Tokenising")
    return dataset


def counted_batch(batch: Mapping[str, list], indices: list[int], **how) -> dict[str, list]:
    """Columns of tokenised rows, one for each row of `batch`; those of `COUNTED` and `CUT` say what became of it."""
    rows = list(rows_in(batch))
    try:
        counted = _counted_rows(rows, indices, **how)
    except Exception:  # of any of them: one by one, the first with a fault names itself
        counted = [_counted_rows([row], [index], **how)[0] for row, index in zip(rows, indices, strict=True)]
    return {name: [row[name] for row in counted] for name in counted[0]}


def _counted_rows(
    rows: list[Row],
    indices: list[int],
    invalid: str,
    as_chat: bool,
    source: dict[str, Any],
    columns: dict[str, Any],
    code: str,
    tokenizer,
    assistant_only_loss: bool,
    template_kwargs: dict[str, Any],
    **how,
) -> list[Row]:
    places = [f"row {index}" for index in indices]
    rows = [unpadded(row, source) for row in rows]
    has_tokens = "prompt_ids" in source
    given: list[tuple[Row | None, list[str]]] = [
        (row, []) if has_tokens else checked_row(row, where, as_chat=as_chat)
        for row, where in zip(rows, places, strict=True)
    ]
    texts = [row for row, _ in given if row is not None and "response_ids" not in row]
    encoded = iter(encode(texts, places[0], tokenizer, template_kwargs, assistant_only_loss))
    counted = []
    for (row, reasons), where in zip(given, places, strict=True):
        result: Result = None, [], None
        if row is not None:
            ids = None if "response_ids" in row else next(encoded)
            result = _tokenize(row, ids, where, tokenizer, template_kwargs, **how)
        out, more, cut = result
        reasons = reasons + more
        faults = [reason for reason in reasons if not reason.startswith("note")]
        if faults and invalid == "error":
            refuse(where, faults[0])
        packed = {name: as_json(out[name], kind) if out else None for name, kind in columns.items()}
        counted.append(packed | {EVENTS: reasons, KEPT: out is not None, CUT: cut})
    return counted


def _tokenize(
    row: Row, encoded: Encoded | None, where: str, tokenizer, template_kwargs: dict[str, Any], limits: Truncation,
    control: re.Pattern | None,
) -> Result:  # fmt: skip
    """The tokenised row or None, the reasons, and the end cut off the prompt or None; `encoded` unless it has ids."""
    prompt = None if encoded is None else row["prompt"]
    ends = partial(
        fixed_ends, prompt=without_none(prompt) if isinstance(prompt, list) else prompt, where=where,
        whole=encoded and encoded[0], tokenizer=tokenizer,
        apply=chat_template(tokenizer, chat_options(row, template_kwargs)), keep_system=limits.keep_system,
    )  # fmt: skip
    if encoded is None:
        row = {TRAINED: None} | row
        if (marks := row[TRAINED]) and not (
            is_per_token(marks, [len(ids) for ids in row["response_ids"]])
            and all(mark in (0, 1) for own in marks for mark in own)
        ):
            raise ValueError(f"{where}: {TRAINED!r} must hold true or false for each token of each response.")
        return *fit(row, limits, where, ends), None
    if row.get(TRAINED):
        raise ValueError(
            f"{where}: {TRAINED!r} says which token ids are trained on, and the row has none: give 'prompt_ids' and "
            "'response_ids' beside it, or remove the column."
        )
    prompt_ids, full_ids, masks = encoded
    n = len(commonprefix([prompt_ids, *full_ids]))
    tokenised = {**row, "prompt_ids": prompt_ids[:n], "response_ids": [ids[n:] for ids in full_ids]}
    tokenised[TRAINED] = masks and [mask[n:] for mask in masks]
    out, reasons = fit(tokenised, limits, where, ends)
    cut = None
    if n < len(prompt_ids) and (masks is None or any(mask[n] for mask in masks if len(mask) > n)):
        # Some decoders drop a space at the beginning, so both are decoded from there.
        cut = tokenizer.decode(prompt_ids)[len(tokenizer.decode(prompt_ids[:n])) :]
    reasons += [] if cut is None else [f"note: {CUT_NOTE}"]
    messages = [m for text in [row["prompt"], *row["responses"]] if isinstance(text, list) for m in text]
    if control and any(control.search(message["content"] or "") for message in messages):
        reasons.append(f"note: {CONTROL_NOTE}")
    return out, reasons, cut


def _control_tokens(tokenizer) -> re.Pattern | None:
    """Finds special tokens in a text: written by a user they end a turn or begin another."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None
