"""Rows to token ids: one prompt, K responses, cut at the tokens that all K have in common.

Prompt and response are always tokenised together, because a tokenizer may merge the end of one with the beginning of
the other. The prompt ends where the first of the K sequences departs from the prompt tokenised on its own.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from functools import cache, partial
from itertools import groupby
from os.path import commonprefix  # of any sequences
from typing import Any

from datasets import Dataset, Features, Json, List, Value
from jinja2 import TemplateError
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
from .json_rows import rows_in
from .rows import (
    TEMPLATE,
    UNFINISHED,
    Row,
    checked_row,
    unfinished,
    unpadded,
)
from .truncation import fit, head_of

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
}

Encoded = tuple[list[int], list[list[int]]]  # of a prompt, and of the prompt with each response
Result = tuple[Row | None, list[str], str | None]  # the tokenised row, the reasons, and the end cut off the prompt


def tokenize_row(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    **truncation,
) -> Row:
    """Tokenise one canonical row; see `tokenize_dataset`.

    Returns `prompt_ids` (list of P ints), `response_ids` (K lists of ints), `scores` (K floats) and the other columns.

    Raises:
        ValueError: if the row has no room or tokens for two responses.
    """
    control, limits = _control_tokens(tokenizer), Truncation(max_length, **truncation)
    options = chat_template_kwargs or {}
    [encoded] = [None] if "response_ids" in row else _encode([row], "row 0", tokenizer, options)
    out, reasons, cut = _tokenize(row, encoded, "row 0", tokenizer, options, limits, control)
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
    **truncation,
) -> tuple[Dataset, DropReport]:
    """Tokenise canonical rows or TRL pairs, and count what is dropped or truncated.

    Messages go through the chat template, which writes its own BOS and end-of-turn tokens; nothing is added to what it
    gives. It is given the row's `tools` and `chat_template_kwargs`, which win over those of all rows. Special tokens
    inside the text of a message become what they say, as at inference; such rows are counted.
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
        chat_template_kwargs: further arguments of the chat template.
        columns: columns to carry along beside the prompt's text, `weight` and `annotator`.
        truncation: the other fields of `Truncation` (config.py), such as `max_prompt_length`.

    Raises:
        ValueError: if messages are given and the tokenizer has no chat template, or one that writes no tools where a
            row has some, if text is given and it has no EOS token, if an unfinished response has several messages, or
            naming the row.
    """
    dataset = without_format(dataset)
    options = {"invalid": invalid, "as_chat": as_chat, "max_length": max_length, **truncation}
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
    return split_off_drops(mapped.remove_columns(CUT))


def how_to_tokenize(
    source: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, ...],
    chat_template_kwargs: dict[str, Any] | None,
    *,
    invalid: str,
    as_chat: bool,
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
    encoded = iter(_encode(texts, places[0], tokenizer, template_kwargs))
    counted = []
    for (row, reasons), where in zip(given, places, strict=True):
        result: Result = None, [], None
        if row is not None:
            ids = None if "response_ids" in row else next(encoded)
            result = _tokenize(row, ids, where, tokenizer, template_kwargs, **how)
        out, more, cut = result
        reasons = reasons + more
        faults = [reason for reason in reasons if not reason.startswith("note: ")]
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
    head = partial(
        head_of, prompt=_without_none(prompt) if isinstance(prompt, list) else prompt, where=where,
        tokenizer=tokenizer, options=_chat_options(row, template_kwargs), keep_system=limits.keep_system,
    )  # fmt: skip
    if encoded is None:
        return *fit(row, limits, where, head), None
    prompt_ids, full_ids = encoded
    n = len(commonprefix([prompt_ids, *full_ids]))
    tokenised = {**row, "prompt_ids": prompt_ids[:n], "response_ids": [ids[n:] for ids in full_ids]}
    out, reasons = fit(tokenised, limits, where, head)
    # Some decoders drop a space at the beginning, so both are decoded from there.
    cut = tokenizer.decode(prompt_ids)[len(tokenizer.decode(prompt_ids[:n])) :] if n < len(prompt_ids) else None
    reasons += [] if cut is None else [f"note: {CUT_NOTE}"]
    messages = [m for text in [row["prompt"], *row["responses"]] if isinstance(text, list) for m in text]
    if control and any(control.search(message["content"] or "") for message in messages):
        reasons.append(f"note: {CONTROL_NOTE}")
    return out, reasons, cut


def _control_tokens(tokenizer) -> re.Pattern | None:
    """Finds special tokens in a text: written by a user they end a turn or begin another."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def _encode(rows: list[Row], where: str, tokenizer, template_kwargs: dict[str, Any]) -> list[Encoded]:
    """Neighbours with the same options in one call; an error of several rows names the first one."""
    encoded = []
    for _, alike in groupby(rows, lambda row: repr([isinstance(row["prompt"], list), *map(row.get, TEMPLATE)])):
        same = list(alike)
        options = {name: same[0][name] for name in TEMPLATE if same[0].get(name)}
        if isinstance(same[0]["prompt"], list):
            encoded += _encode_chat(same, where, tokenizer, _chat_options(same[0], template_kwargs))
        elif options:
            raise ValueError(
                f"{where}: {next(iter(options))!r} is for the chat template, and the prompt is text: give messages, "
                "set as_chat, or remove the column."
            )
        else:
            encoded += _encode_text(same, tokenizer)
    return encoded


def _chat_options(row: Row, template_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the chat template is given beside the messages; what the row says wins."""
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return template_kwargs | tools | (row.get("chat_template_kwargs") or {})


def _encode_text(rows: list[Row], tokenizer) -> list[Encoded]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token to end a text response with; set tokenizer.eos_token.")
    texts = [row["prompt"] + end for row in rows for end in ["", *map(_whole, row["responses"], unfinished(row))]]
    ids = iter(tokenizer(texts, verbose=False, return_attention_mask=False)["input_ids"])
    encoded = []
    for row in rows:
        prompt_ids, *full_ids = (_single_bos(next(ids), tokenizer.bos_token_id) for _ in ["", *row["responses"]])
        if prompt_ids[-1:] == [eos] and not row["prompt"].endswith(tokenizer.eos_token):
            prompt_ids = prompt_ids[:-1]  # some tokenizers end every text with EOS
        full_ids = [some[:-1] if some[-1] == eos else some for some in full_ids]
        ends = ([] if cut else [eos] for cut in unfinished(row))
        encoded.append((prompt_ids, [some + end for some, end in zip(full_ids, ends, strict=True)]))
    return encoded


def _whole(response: str, is_unfinished: bool) -> str:
    """Without what a limit leaves of a character of several tokens."""
    return response.rstrip("\ufffd") if is_unfinished else response


def _encode_chat(rows: list[Row], where: str, tokenizer, options: dict[str, Any]) -> list[Encoded]:
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
    prompts = [_without_none(row["prompt"]) for row in rows]
    chats = [
        prompt + _without_none(response)
        for prompt, row in zip(prompts, rows, strict=True)
        for response in row["responses"]
    ]
    apply = tokenizer.apply_chat_template
    try:
        prompt_ids = apply(prompts, add_generation_prompt=True, return_dict=True, **options)["input_ids"]
        ids = iter(apply(chats, return_dict=True, **options)["input_ids"])
    except TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses these messages: {error}.") from error
    full_ids = [[next(ids) for _ in row["responses"]] for row in rows]
    _without_ends(rows, prompt_ids, full_ids, tokenizer)
    return list(zip(prompt_ids, full_ids, strict=True))


def _without_ends(rows: list[Row], prompt_ids: list[list[int]], full_ids: list[list[list[int]]], tokenizer) -> None:
    """Unfinished responses lose what ends a response, so that no stop is learned where none was."""
    places = [(i, k) for i, row in enumerate(rows) for k, cut in enumerate(unfinished(row)) if cut]
    responses = [rows[i]["responses"][k] for i, k in places]
    if any(len(response) > 1 for response in responses):
        raise ValueError(f"{UNFINISHED} marks a response of several messages: mark those of one message only.")
    # What a template writes after a message cannot be told from the message, so these go without the template.
    texts = [_whole(response[0]["content"], True) for response in responses]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    for (i, k), some in zip(places, ids, strict=True):
        full_ids[i][k] = [*prompt_ids[i], *some]


def _without_none(messages: list[dict]) -> list[dict]:
    """A table gives every message all keys that any message has; templates ask whether a key is defined."""
    return [{key: value for key, value in m.items() if value is not None or key == "content"} for m in messages]


def _single_bos(ids: list[int], bos: int | None) -> list[int]:
    """A text that was written with a template may begin with BOS, and the tokenizer adds another."""
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids
