"""Rows to token ids: one prompt, K responses, cut at the tokens that all K have in common.

Prompt and response are always tokenised together, because a tokenizer may merge the end of one with the beginning of
the other. The prompt ends where the first of the K sequences departs from the prompt tokenised on its own.
"""

import logging
import re
from itertools import groupby
from typing import Any

from datasets import Dataset, Json, List, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .canonical import as_json, unpadded
from .drops import (
    EVENTS,
    KEPT,
    DropReport,
    counted_features,
    is_first_process,
    refuse,
    source_digest,
    split_off_drops,
    without_format,
)
from .rows import TEMPLATE, UNFINISHED, Row, checked_row, is_per_token, score_fault, unfinished, without_responses

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
    [(out, reasons, cut)] = _tokenize([(0, row)], tokenizer, max_length, chat_template_kwargs or {})
    if cut is not None:
        logger.warning(CUT_WARNING, cut)
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
        _tokenize_batch,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=counted_features({**features, CUT: Value("string")}),
        num_proc=num_proc,
        fn_kwargs={
            "tokenizer": tokenizer,
            "max_length": max_length,
            "template_kwargs": chat_template_kwargs or {},
            "reading": {"invalid": invalid, "as_chat": as_chat},
            "source": dict(dataset.features),
            "columns": features,
            "code": source_digest(),
        },
        desc="Tokenising",
    )
    cut = next((text for text in mapped[CUT] if text is not None), None)
    if cut is not None and is_first_process():
        logger.warning(CUT_WARNING, cut)
    return split_off_drops(mapped.remove_columns(CUT))


def prepare_dataset(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, **options) -> Dataset:
    """`tokenize_dataset` with its count of what was dropped on the log."""
    dataset, report = tokenize_dataset(dataset, tokenizer, **options)
    report.log(logger, "Tokenising")
    return dataset


def common_prefix_length(a: list[int], b: list[int]) -> int:
    if b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _tokenize_batch(
    batch: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    template_kwargs: dict[str, Any],
    reading: dict[str, Any],
    source: dict[str, Any],
    columns: dict[str, Any],
    code: str,
) -> dict[str, list]:
    rows = unpadded((dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)), source)
    if "prompt_ids" in source:
        read: list[tuple[Row | None, list[str]]] = [(row, []) for row in rows]
    else:
        read = [checked_row(row, f"row {index}", **reading) for index, row in zip(indices, rows, strict=True)]
    usable = [(index, row) for index, (row, _) in zip(indices, read, strict=True) if row is not None]
    results = iter(_tokenize(usable, tokenizer, max_length, template_kwargs))
    out: dict[str, list] = {name: [] for name in (*columns, EVENTS, KEPT, CUT)}
    for index, (given, reasons) in zip(indices, read, strict=True):
        row, more, cut = (None, [], None) if given is None else next(results)
        faults = [reason for reason in more if not reason.startswith("note: ")]
        if faults and reading["invalid"] == "error":
            refuse(f"row {index}", faults[0])
        for name, kind in columns.items():
            out[name].append(as_json(row[name], kind) if row else None)
        for name, value in ((EVENTS, reasons + more), (KEPT, row is not None), (CUT, cut)):
            out[name].append(value)
    return out


def _tokenize(rows: list[tuple[int, Row]], tokenizer, max_length: int | None, template_kwargs: dict) -> list[Result]:
    """For each row, with its index: the tokenised row or None, the reasons, and the end cut off the prompt or None."""
    if rows and "response_ids" in rows[0][1]:
        return [(*_fit(row, max_length, f"row {index}"), None) for index, row in rows]
    control, results = _control_tokens(tokenizer), []
    for (index, row), (prompt_ids, full_ids) in zip(rows, _encode(rows, tokenizer, template_kwargs), strict=True):
        full_ids = [
            _without_end(row, prompt_ids, k, tokenizer) if cut else ids
            for k, (ids, cut) in enumerate(zip(full_ids, unfinished(row), strict=True))
        ]
        n = min(common_prefix_length(prompt_ids, ids) for ids in full_ids)
        tokenised = {**row, "prompt_ids": prompt_ids[:n], "response_ids": [ids[n:] for ids in full_ids]}
        out, reasons = _fit(tokenised, max_length, f"row {index}")
        cut = tokenizer.decode(prompt_ids[n:]) if n < len(prompt_ids) else None
        reasons += [] if cut is None else [f"note: {CUT_NOTE}"]
        messages = [m for text in [row["prompt"], *row["responses"]] if isinstance(text, list) for m in text]
        if control and any(control.search(message["content"] or "") for message in messages):
            reasons.append(f"note: {CONTROL_NOTE}")
        results.append((out, reasons, cut))
    return results


def _without_end(row: Row, prompt_ids: list[int], k: int, tokenizer) -> list[int]:
    """The ids of prompt and response k without what ends a response, so that no stop is learned where none was."""
    response = row["responses"][k]
    if isinstance(response, list) and len(response) > 1:
        raise ValueError(f"{UNFINISHED} marks a response of several messages: mark those of one message only.")
    text = response if isinstance(response, str) else response[0]["content"]
    text = text.rstrip("\ufffd")  # what a limit leaves of a character of several tokens
    if isinstance(response, str):
        return _encode_text([{"prompt": row["prompt"], "responses": [text]}], tokenizer)[0][1][0][:-1]
    # What a template writes after a message cannot be told from the message, so this one goes without the template.
    return [*prompt_ids, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def _control_tokens(tokenizer) -> re.Pattern | None:
    """Finds special tokens in a text: written by a user they end a turn or begin another."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def _encode(rows: list[tuple[int, Row]], tokenizer, template_kwargs: dict) -> list[Encoded]:
    encoded = []
    for options, group in groupby(rows, lambda pair: _template_options(pair[0], pair[1], template_kwargs)):
        pairs = list(group)
        encoded += (
            _encode_text([row for _, row in pairs], tokenizer)
            if options is None
            else _encode_chat(pairs, tokenizer, options)
        )
    return encoded


def _template_options(index: int, row: Row, template_kwargs: dict) -> dict[str, Any] | None:
    """Options of the chat template for a row of messages; None for texts, which need none."""
    given = {name: row[name] for name in TEMPLATE if row.get(name)}
    if isinstance(row["prompt"], list):
        own = {"tools": given["tools"]} if "tools" in given else {}
        return template_kwargs | own | given.get("chat_template_kwargs", {})
    if given:
        raise ValueError(
            f"row {index}: {next(iter(given))!r} is for the chat template, and the prompt is text: give messages, set "
            "as_chat, or remove the column."
        )
    return None


def _encode_text(rows: list[Row], tokenizer) -> list[Encoded]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token to end a text response with; set tokenizer.eos_token.")
    texts = [text for row in rows for text in [row["prompt"], *(row["prompt"] + r for r in row["responses"])]]
    ids = iter(_single_bos(i, tokenizer.bos_token_id) for i in tokenizer(texts, verbose=False)["input_ids"])
    encoded = []
    for row in rows:
        prompt_ids = next(ids)
        if prompt_ids[-1:] == [eos] and not row["prompt"].endswith(tokenizer.eos_token):
            prompt_ids = prompt_ids[:-1]  # some tokenizers end every text with EOS
        full_ids = [next(ids) for _ in row["responses"]]
        encoded.append((prompt_ids, [i if i[-1] == eos else [*i, eos] for i in full_ids]))
    return encoded


def _encode_chat(rows: list[tuple[int, Row]], tokenizer, options: dict[str, Any]) -> list[Encoded]:
    """Rows with the same options of the chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            "the prompts are messages but the tokenizer has no chat template; use the tokenizer of an instruct model, "
            "set tokenizer.chat_template, or give prompts and responses as text."
        )
    tools, template = options.get("tools"), options.get("chat_template")
    if tools and "tools" not in tokenizer.get_chat_template(template, tools):
        raise ValueError(
            f"row {rows[0][0]}: it has 'tools', which the chat template does not write: use the tokenizer of a model "
            "that calls tools, or remove the column."
        )
    prompts = [_without_none(row["prompt"]) for _, row in rows]
    chats = [p + _without_none(r) for p, (_, row) in zip(prompts, rows, strict=True) for r in row["responses"]]
    apply = tokenizer.apply_chat_template
    try:
        prompt_ids = apply(prompts, add_generation_prompt=True, return_dict=True, **options)["input_ids"]
        full_ids = iter(apply(chats, return_dict=True, **options)["input_ids"])
    except TemplateError as error:
        if len(rows) == 1:
            raise ValueError(f"row {rows[0][0]}: the chat template refuses these messages: {error}.") from error
        return [_encode_chat([row], tokenizer, options)[0] for row in rows]  # one by one, to find the row
    return [(ids, [next(full_ids) for _ in row["responses"]]) for ids, (_, row) in zip(prompt_ids, rows, strict=True)]


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
    notes = []
    if room is not None and any(len(ids) > room for ids in response_ids):
        cut = sum(len(ids) > room and not fault for ids, fault in zip(response_ids, faults, strict=True))
        notes = ["note: responses truncated to fit max_length"] * cut
        row = _truncate(row, room)
    kept, reasons = without_responses(row, faults)
    return kept, reasons + notes


def _truncate(row: Row, room: int) -> Row:
    lengths = [len(ids) for ids in row["response_ids"]]
    text = ("prompt", "responses")
    return {
        name: [item[:room] for item in value] if name not in text and is_per_token(value, lengths) else value
        for name, value in row.items()
    }
