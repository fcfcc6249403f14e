"""Rows to token ids: one prompt, K responses, cut at the tokens that all K have in common.

Prompt and response are always tokenised together, because a tokenizer may merge the end of one with the beginning of
the other. The prompt ends where the first of the K sequences departs from the prompt tokenised on its own.
"""

import logging
import re
from functools import cache
from os.path import commonprefix  # of any sequences
from typing import Any

from datasets import Dataset, Features, Json, List, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

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
from .rows import (
    TEMPLATE,
    UNFINISHED,
    Row,
    checked_row,
    is_per_token,
    score_fault,
    unfinished,
    unpadded,
    without_responses,
)

logger = logging.getLogger(__name__)

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
}

Encoded = tuple[list[int], list[list[int]]]  # of a prompt, and of the prompt with each response
Result = tuple[Row | None, list[str], str | None]  # the tokenised row, the reasons, and the end cut off the prompt


def tokenize_row(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Row:
    """Tokenise one canonical row; see `tokenize_dataset`.

    Returns `prompt_ids` (list of P ints), `response_ids` (K lists of ints), `scores` (K floats) and the other columns.

    Raises:
        ValueError: if the row has no room or tokens for two responses.
    """
    control = _control_tokens(tokenizer)
    out, reasons, cut = _tokenize(row, "row 0", tokenizer, max_length, chat_template_kwargs or {}, control)
    if cut is not None:
        _warn_of_cut(cut)
    if out is None:
        raise ValueError("; ".join(reasons))
    return {name: value for name, value in out.items() if name not in ("responses", UNFINISHED)}


def tokenize_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    invalid: str = "drop",
    as_chat: bool = False,
    num_proc: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    columns: tuple[str, ...] = (),
) -> tuple[Dataset, DropReport]:
    """Tokenise canonical rows or TRL pairs, and count what is dropped or truncated.

    Messages go through the chat template, which writes its own BOS and end-of-turn tokens; nothing is added to what it
    gives. It is given the row's `tools` and `chat_template_kwargs`, which win over those of all rows. Special tokens
    inside the text of a message become what they say, as at inference; such rows are counted.
    Text is tokenised as it is, and EOS is added unless the response ends with it. Responses which the column
    `unfinished_responses` (K bools) marks get neither EOS nor the end of a turn. Each response is truncated to
    `max_length` minus the length of its prompt. Rows that hold `prompt_ids`, `response_ids` and `scores` are taken as
    tokenised and only truncated, together with their per-token columns (K lists as long as the responses).

    Args:
        max_length: largest number of tokens of prompt plus response. None: no limit.
        invalid: `"drop"` leaves out and counts what cannot be used (see `canonicalize`), responses without tokens, and
            prompts that fill `max_length`; `"error"` refuses the first one. Truncation is counted, never refused.
        as_chat: wrap text prompts and responses in user and assistant messages.
        chat_template_kwargs: further arguments of the chat template.
        columns: columns to carry along beside the prompt's text, `weight` and `annotator`.

    Raises:
        ValueError: if messages are given and the tokenizer has no chat template, or one that writes no tools where a
            row has some, if text is given and it has no EOS token, if an unfinished response has several messages, or
            naming the row.
    """
    dataset = without_format(dataset)
    features = {name: dataset.features[name] for name in ("weight", "annotator", *columns) if name in dataset.features}
    # The prompt's text stays for callbacks that sample answers to it.
    text = {"prompt": Json()} if "prompt" in dataset.features or "prompt_ids" not in dataset.features else {}
    features |= text | IDS
    mapped = dataset.map(
        _counted_row,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features({**features, **COUNTED, CUT: Value("string")}),
        num_proc=num_proc,
        fn_kwargs={
            "invalid": invalid,
            "as_chat": as_chat,
            "source": dict(dataset.features),
            "columns": features,
            "code": source_digest(),
            "tokenizer": tokenizer,
            "max_length": max_length,
            "template_kwargs": chat_template_kwargs or {},
            "control": _control_tokens(tokenizer),
        },
        desc="Tokenising",
    )
    cut = next((text for text in mapped[CUT] if text is not None), None)
    if cut is not None and is_first_process():
        _warn_of_cut(cut)
    return split_off_drops(mapped.remove_columns(CUT))


@cache
def _warn_of_cut(end: str) -> None:
    """Once for each end of a prompt: a run in rounds tokenises many times."""
    logger.warning(CUT_WARNING, end)


def prepare_dataset(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, **options) -> Dataset:
    """`tokenize_dataset` with its count of what was dropped on the log."""
    dataset, report = tokenize_dataset(dataset, tokenizer, **options)
    report.log(logger, "Tokenising")
    return dataset


def _counted_row(
    row: Row,
    index: int,
    invalid: str,
    as_chat: bool,
    source: dict[str, Any],
    columns: dict[str, Any],
    code: str,
    **how,
) -> Row:
    where, row = f"row {index}", unpadded(dict(row), source)
    given, reasons = (row, []) if "prompt_ids" in source else checked_row(row, where, as_chat=as_chat)
    out, more, cut = (None, [], None) if given is None else _tokenize(given, where, **how)
    reasons = reasons + more
    faults = [reason for reason in reasons if not reason.startswith("note: ")]
    if faults and invalid == "error":
        refuse(where, faults[0])
    packed = {name: as_json(out[name], kind) if out else None for name, kind in columns.items()}
    return packed | {EVENTS: reasons, KEPT: out is not None, CUT: cut}


def _tokenize(
    row: Row, where: str, tokenizer, max_length: int | None, template_kwargs: dict, control: re.Pattern | None
) -> Result:
    """The tokenised row or None, the reasons, and the end cut off the prompt or None."""
    if "response_ids" in row:
        return *_fit(row, max_length, where), None
    prompt_ids, full_ids = _encode(row, where, tokenizer, template_kwargs)
    full_ids = [
        _without_end(row, prompt_ids, k, tokenizer) if cut else ids
        for k, (ids, cut) in enumerate(zip(full_ids, unfinished(row), strict=True))
    ]
    n = len(commonprefix([prompt_ids, *full_ids]))
    tokenised = {**row, "prompt_ids": prompt_ids[:n], "response_ids": [ids[n:] for ids in full_ids]}
    out, reasons = _fit(tokenised, max_length, where)
    # Some decoders drop a space at the beginning, so both are decoded from there.
    cut = tokenizer.decode(prompt_ids)[len(tokenizer.decode(prompt_ids[:n])) :] if n < len(prompt_ids) else None
    reasons += [] if cut is None else [f"note: {CUT_NOTE}"]
    messages = [m for text in [row["prompt"], *row["responses"]] if isinstance(text, list) for m in text]
    if control and any(control.search(message["content"] or "") for message in messages):
        reasons.append(f"note: {CONTROL_NOTE}")
    return out, reasons, cut


def _without_end(row: Row, prompt_ids: list[int], k: int, tokenizer) -> list[int]:
    """The ids of prompt and response k without what ends a response, so that no stop is learned where none was."""
    response = row["responses"][k]
    if isinstance(response, list) and len(response) > 1:
        raise ValueError(f"{UNFINISHED} marks a response of several messages: mark those of one message only.")
    text = response if isinstance(response, str) else response[0]["content"]
    text = text.rstrip("\ufffd")  # what a limit leaves of a character of several tokens
    if isinstance(response, str):
        return _encode_text(row["prompt"], [text], tokenizer)[1][0][:-1]
    # What a template writes after a message cannot be told from the message, so this one goes without the template.
    return [*prompt_ids, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def _control_tokens(tokenizer) -> re.Pattern | None:
    """Finds special tokens in a text: written by a user they end a turn or begin another."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def _encode(row: Row, where: str, tokenizer, template_kwargs: dict[str, Any]) -> Encoded:
    options = {name: row[name] for name in TEMPLATE if row.get(name)}
    if isinstance(row["prompt"], list):
        own = options.pop("chat_template_kwargs", {})
        return _encode_chat(row, where, tokenizer, template_kwargs | options | own)
    if options:
        raise ValueError(
            f"{where}: {next(iter(options))!r} is for the chat template, and the prompt is text: give messages, set "
            "as_chat, or remove the column."
        )
    return _encode_text(row["prompt"], row["responses"], tokenizer)


def _encode_text(prompt: str, responses: list[str], tokenizer) -> Encoded:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token to end a text response with; set tokenizer.eos_token.")
    texts = [prompt, *(prompt + response for response in responses)]
    prompt_ids, *full_ids = (
        _single_bos(ids, tokenizer.bos_token_id) for ids in tokenizer(texts, verbose=False)["input_ids"]
    )
    if prompt_ids[-1:] == [eos] and not prompt.endswith(tokenizer.eos_token):
        prompt_ids = prompt_ids[:-1]  # some tokenizers end every text with EOS
    return prompt_ids, [ids if ids[-1] == eos else [*ids, eos] for ids in full_ids]


def _encode_chat(row: Row, where: str, tokenizer, options: dict[str, Any]) -> Encoded:
    if not tokenizer.chat_template:
        raise ValueError(
            "the prompts are messages but the tokenizer has no chat template; use the tokenizer of an instruct model, "
            "set tokenizer.chat_template, or give prompts and responses as text."
        )
    tools, template = options.get("tools"), options.get("chat_template")
    if tools and "tools" not in tokenizer.get_chat_template(template, tools):
        raise ValueError(
            f"{where}: it has 'tools', which the chat template does not write: use the tokenizer of a model "
            "that calls tools, or remove the column."
        )
    prompt = _without_none(row["prompt"])
    chats = [prompt + _without_none(response) for response in row["responses"]]
    apply = tokenizer.apply_chat_template
    try:
        prompt_ids = apply(prompt, add_generation_prompt=True, return_dict=True, **options)["input_ids"]
        return prompt_ids, apply(chats, return_dict=True, **options)["input_ids"]
    except TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses these messages: {error}.") from error


def _without_none(messages: list[dict]) -> list[dict]:
    """A table gives every message all keys that any message has; templates ask whether a key is defined."""
    return [{key: value for key, value in m.items() if value is not None or key == "content"} for m in messages]


def _single_bos(ids: list[int], bos: int | None) -> list[int]:
    """A text that was written with a template may begin with BOS, and the tokenizer adds another."""
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def _fit(row: Row, max_length: int | None, where: str) -> tuple[Row | None, list[str]]:
    """Fit a tokenised row into `max_length` tokens per response."""
    prompt_ids, response_ids, scores = (row[name] or [] for name in IDS)
    if len(response_ids) != len(scores):
        raise ValueError(
            f"{where}: 'response_ids' has {len(response_ids)} items but 'scores' has {len(scores)}; give one score "
            "per response."
        )
    if not prompt_ids:
        return None, ["row: prompt has no tokens, so the first response token would have no context"]
    room = None if max_length is None else max_length - len(prompt_ids)
    if room is not None and room < 1:
        return None, ["row: prompt fills max_length and leaves no room for a response"]
    faults = [score_fault(score) if ids else "no tokens" for ids, score in zip(response_ids, scores, strict=True)]
    lengths, notes = [len(ids) for ids in response_ids], []
    if room is not None and any(length > room for length in lengths):
        cut = sum(length > room and not fault for length, fault in zip(lengths, faults, strict=True))
        notes = ["note: responses truncated to fit max_length"] * cut
        per_token = [n for n, v in row.items() if n not in ("prompt", "responses") and is_per_token(v, lengths)]
        row = row | {name: [item[:room] for item in row[name]] for name in per_token}
    kept, reasons = without_responses(row, faults)
    return kept, reasons + notes
