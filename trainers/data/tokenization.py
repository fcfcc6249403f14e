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
from .encoding import Encoded, encode
from .json_rows import rows_in
from .rows import TRAINED, UNFINISHED, Row, checked_row, is_per_token, unpadded, weight_fault
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
    options: dict[str, Any] = {"max_length": max_length, "assistant_only_loss": assistant_only_loss, **truncation}
    rows = RowTokenizer(tokenizer, row, chat_template_kwargs=chat_template_kwargs, **options)
    [(out, reasons, cut)] = rows.tokenized([row], ["row 0"])
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
    options |= {"max_length": max_length, "chat_template_kwargs": chat_template_kwargs, **truncation}
    rows = RowTokenizer(tokenizer, dataset.features, columns, **options)
    mapped = dataset.map(
        rows.counted_batch,
        with_indices=True,
        batched=True,
        batch_size=BATCH,
        remove_columns=dataset.column_names,
        features=Features({**rows.features, **COUNTED, CUT: Value("string")}),
        num_proc=num_proc,
        fn_kwargs={"code": source_digest()},
        desc="Tokenising",
    )
    warn_of_cut(mapped[CUT][:])
    unused = [CUT] if mapped.data.column(TRAINED).null_count < len(mapped) else [CUT, TRAINED]
    return split_off_drops(mapped.remove_columns(unused))


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


class RowTokenizer:
    """Tokenises rows with the columns of `source`; the other arguments are those of `tokenize_dataset`.

    `features` are the columns that are left, and their types.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: Mapping[str, Any],
        columns: tuple[str, ...] = (),
        *,
        invalid: str = "drop",
        as_chat: bool = False,
        assistant_only_loss: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        **truncation,
    ):
        self.tokenizer, self.source, self.limits = tokenizer, dict(source), Truncation(**truncation)
        self.invalid, self.as_chat, self.assistant_only_loss = invalid, as_chat, assistant_only_loss
        self.template_kwargs = chat_template_kwargs or {}
        kept = {name: source[name] for name in ("weight", "annotator", *columns) if name in source}
        # The prompt's text stays for callbacks that sample answers to it.
        text = {"prompt": Json()} if "prompt" in source or "prompt_ids" not in source else {}
        self.features: dict[str, Any] = kept | text | IDS
        # Special tokens in a text: written by a user they end a turn or begin another.
        tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.control = re.compile("|".join(map(re.escape, tokens))) if tokens else None

    def counted_batch(self, batch: Mapping[str, list], indices: list[int], code: str = "") -> dict[str, list]:
        """Columns of tokenised rows, one for each row of `batch`; those of `COUNTED` and `CUT` say what became of it.

        `code` is there for the cache of `datasets`.
        """
        rows, places = list(rows_in(batch)), [f"row {index}" for index in indices]
        try:
            counted = self._counted(rows, places)
        except Exception:  # of any of them: one by one, the first with a fault names itself
            counted = [self._counted([row], [where])[0] for row, where in zip(rows, places, strict=True)]
        return {name: [row[name] for row in counted] for name in counted[0]}

    def _counted(self, rows: list[Row], places: list[str]) -> list[Row]:
        rows, tokenised = [unpadded(row, self.source) for row in rows], "prompt_ids" in self.source
        given: list[tuple[Row | None, list[str]]] = [
            (row, []) if tokenised else checked_row(row, where, as_chat=self.as_chat)
            for row, where in zip(rows, places, strict=True)
        ]
        usable = [row for row, _ in given if row is not None]
        left = [where for (row, _), where in zip(given, places, strict=True) if row is not None]
        results = iter(self.tokenized(usable, left))
        counted = []
        for (row, reasons), where in zip(given, places, strict=True):
            out, more, cut = (None, [], None) if row is None else next(results)
            reasons = reasons + more
            faults = [reason for reason in reasons if not reason.startswith("note")]
            if faults and self.invalid == "error":
                refuse(where, faults[0])
            packed = {name: as_json(out[name], kind) if out else None for name, kind in self.features.items()}
            counted.append(packed | {EVENTS: reasons, KEPT: out is not None, CUT: cut})
        return counted

    def tokenized(self, rows: list[Row], places: list[str]) -> list[Result]:
        """Canonical rows, or tokenised ones that are made to fit; an error of several names the first."""
        texts = [row for row in rows if "response_ids" not in row]
        encoded = iter(
            encode(texts, next(iter(places), ""), self.tokenizer, self.template_kwargs, self.assistant_only_loss)
        )
        return [
            self._of_ids(row, where) if "response_ids" in row else self._of_text(row, next(encoded), where)
            for row, where in zip(rows, places, strict=True)
        ]

    def _of_ids(self, row: Row, where: str) -> Result:
        row = {TRAINED: None} | row
        if (marks := row[TRAINED]) and not (
            is_per_token(marks, [len(ids) for ids in row["response_ids"]])
            and all(mark in (0, 1) for own in marks for mark in own)
        ):
            raise ValueError(f"{where}: {TRAINED!r} must hold true or false for each token of each response.")
        if fault := weight_fault(row.get("weight", 1.0)):
            return None, [f"row: {fault}"], None
        return *self._fit(row, where, None), None

    def _of_text(self, row: Row, encoded: Encoded, where: str) -> Result:
        if row.get(TRAINED):
            raise ValueError(
                f"{where}: {TRAINED!r} says which token ids are trained on, and the row has none: give 'prompt_ids' "
                "and 'response_ids' beside it, or remove the column."
            )
        prompt_ids, full_ids, masks = encoded
        n = len(commonprefix([prompt_ids, *full_ids]))
        tokenised = {**row, "prompt_ids": prompt_ids[:n], "response_ids": [ids[n:] for ids in full_ids]}
        tokenised[TRAINED] = masks and [mask[n:] for mask in masks]
        out, reasons = self._fit(tokenised, where, prompt_ids)
        cut: str | None = None
        if n < len(prompt_ids) and (masks is None or any(mask[n] for mask in masks if len(mask) > n)):
            # Some decoders drop a space at the beginning, so both are decoded from there.
            whole, kept = (str(self.tokenizer.decode(ids)) for ids in (prompt_ids, prompt_ids[:n]))
            cut = whole[len(kept) :]
            reasons.append(f"note: {CUT_NOTE}")
        messages = [m for text in [row["prompt"], *row["responses"]] if isinstance(text, list) for m in text]
        if self.control and any(self.control.search(message["content"] or "") for message in messages):
            reasons.append(f"note: {CONTROL_NOTE}")
        return out, reasons, cut

    def _fit(self, row: Row, where: str, whole: list[int] | None) -> tuple[Row | None, list[str]]:
        """`whole` are the token ids of the prompt where they were made here."""
        ends = partial(
            fixed_ends, row=row, where=where, whole=whole, tokenizer=self.tokenizer,
            template_kwargs=self.template_kwargs, keep_system=self.limits.keep_system,
        )  # fmt: skip
        return fit(row, self.limits, where, ends)
