"""Canonical rows to token ids: one prompt, K responses, cut at the tokens that all K have in common.

Prompt and response are always tokenised together, because a tokenizer may merge the end of one with the beginning of
the other. The prompt ends where the first of the K sequences departs from the prompt tokenised on its own.
"""

import logging
import re
from itertools import groupby
from typing import Any

from datasets import Dataset, List, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .drops import (
    EVENTS,
    KEPT,
    DropReport,
    batch_to_rows,
    check_invalid,
    is_first_process,
    refuse,
    source_digest,
    split_off_drops,
    unsigned,
    with_event_columns,
    without_format,
)
from .rows import LARGEST_SCORE, MIN_RESPONSES, Row, is_per_token, take_responses
from .structured import TEMPLATE, packed, padded_columns, without_padding

logger = logging.getLogger(__name__)

UNFINISHED = "unfinished_responses"  # column: which of the K responses stopped at a limit, and not at their end
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
    [(out, reasons, cut)] = _tokenize_rows([row], tokenizer, max_length, chat_template_kwargs or {})
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
    num_proc: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> tuple[Dataset, DropReport]:
    """Tokenise canonical rows, and count what is dropped or truncated.

    Messages go through the chat template, which writes its own BOS and end-of-turn tokens; nothing is added to what it
    gives. It is given the row's `tools` and `chat_template_kwargs`, which win over those of all rows. Special tokens
    inside the text of a message become what they say, as at inference; such rows are counted.
    Text is tokenised as it is, and EOS is added unless the response ends with it. Responses which the column
    `unfinished_responses` (K bools) marks get neither EOS nor the end of a turn. Each response is truncated to
    `max_length` minus the length of its prompt. Rows that hold `prompt_ids`, `response_ids` and `scores` are taken as
    tokenised and only truncated, together with their per-token columns (K lists as long as the responses). Scalar
    columns, lists of numbers and the prompt's text are carried over, other columns are not.

    Args:
        max_length: largest number of tokens of prompt plus response. None: no limit.
        invalid: `"drop"` leaves out and counts responses without tokens, prompts that fill `max_length`, and rows with
            fewer than two responses; `"error"` refuses the first one. Truncation is counted, never refused.
        chat_template_kwargs: further arguments of the chat template.

    Raises:
        ValueError: if messages are given and the tokenizer has no chat template, or one that writes no tools where a
            row has some, if text is given and it has no EOS token, if an unfinished response has several messages, or
            naming the row.
    """
    check_invalid(invalid)
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length is {max_length}; a prompt and a response need at least 2 tokens.")
    _check_columns(dataset)
    dataset = without_format(dataset)
    features = _token_features(dataset)
    mapped = dataset.map(
        _tokenize_batch,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=with_event_columns({**features, CUT: Value("string")}),
        num_proc=num_proc,
        fn_kwargs={
            "tokenizer": tokenizer,
            "max_length": max_length,
            "invalid": invalid,
            "template_kwargs": chat_template_kwargs or {},
            "columns": features,
            "padded": padded_columns(dataset.features),
            "code": source_digest(),
        },
        desc="Tokenising",
    )
    cut = next((text for text in mapped[CUT] if text is not None), None)
    if cut is not None and is_first_process():
        logger.warning(CUT_WARNING, cut)
    return split_off_drops(mapped.remove_columns(CUT))


def common_prefix_length(a: list[int], b: list[int]) -> int:
    if b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def unfinished(row: Row, where: str = "a row") -> list[bool]:
    """Which of a row's K responses stopped at a limit.

    Raises:
        ValueError: the row has other marks than K booleans.
    """
    marks, count = row.get(UNFINISHED), len(row["responses"])
    if marks is None:
        return [False] * count
    if not isinstance(marks, list) or len(marks) != count or not all(isinstance(mark, bool) for mark in marks):
        raise ValueError(f"{where}: {UNFINISHED!r} is {marks!r}: give true or false for each of {count} responses.")
    return marks


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


def _check_columns(dataset: Dataset) -> None:
    names = set(dataset.column_names)
    if not ({"prompt", "responses", "scores"} <= names or {"prompt_ids", "response_ids", "scores"} <= names):
        raise ValueError(
            f"columns {sorted(names)} are not canonical rows (prompt, responses, scores); read the data with "
            "load_preferences or canonicalize first, or give prompt_ids, response_ids and scores."
        )


def _token_features(dataset: Dataset) -> dict[str, Any]:
    def is_scalar(feature) -> bool:
        return isinstance(feature, Value)

    def is_numbers(feature) -> bool:
        while isinstance(feature, List):
            feature = feature.feature
        return isinstance(feature, Value) and feature.dtype not in ("string", "large_string")

    # The prompt's text stays for callbacks that sample answers to it.
    carried = {
        name: feature
        for name, feature in dataset.features.items()
        if name == "prompt" or name not in ("responses", UNFINISHED) and (is_scalar(feature) or is_numbers(feature))
    }
    return {
        **carried,
        "prompt_ids": List(Value("int32")),
        "response_ids": List(List(Value("int32"))),
        "scores": List(Value("float64")),
    }


def _tokenize_batch(
    batch: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    invalid: str,
    template_kwargs: dict[str, Any],
    columns: dict[str, Any],
    padded: dict[str, Any],
    code: str,
) -> dict[str, list]:
    rows = [without_padding(row, padded) for row in batch_to_rows(batch)]
    out = {name: [] for name in [*columns, EVENTS, KEPT, CUT]}
    results = _tokenize_rows(rows, tokenizer, max_length, template_kwargs, first_index=indices[0])
    for index, (row, reasons, cut) in zip(indices, results, strict=True):
        faults = [reason for reason in reasons if not reason.startswith("note: ")]
        if faults and invalid == "error":
            refuse(f"row {index}", faults[0])
        values = packed({name: row[name] if row else None for name in columns}, columns)
        for name in columns:
            out[name].append(values[name])
        out[EVENTS].append(reasons)
        out[KEPT].append(row is not None)
        out[CUT].append(cut)
    return out | {name: unsigned(out[name], out[KEPT], kind) for name, kind in columns.items()}


def _tokenize_rows(
    rows: list[Row], tokenizer, max_length: int | None, template_kwargs: dict, first_index: int = 0
) -> list[tuple[Row | None, list[str], str | None]]:
    """For each row: the tokenised row or None, the reasons, and the end of the prompt that was cut off or None."""
    if "response_ids" in rows[0]:
        for i, row in enumerate(rows):
            _check_token_row(row, first_index + i)
        return [(*_fit(row, max_length), None) for row in rows]
    control = None
    if isinstance(rows[0]["prompt"], str):
        _refuse_options_of_text(rows, first_index)
        encoded = _encode_text(rows, tokenizer)
    else:
        control = _control_tokens(tokenizer)
        encoded = _encode_chat(rows, tokenizer, template_kwargs, first_index)
    results = []
    for index, (row, (prompt_ids, full_ids)) in enumerate(zip(rows, encoded, strict=True), first_index):
        full_ids = [
            _without_end(row, prompt_ids, k, tokenizer) if cut else ids
            for k, (ids, cut) in enumerate(zip(full_ids, unfinished(row, f"row {index}"), strict=True))
        ]
        n = min(common_prefix_length(prompt_ids, ids) for ids in full_ids)
        tokenised = {**row, "prompt_ids": prompt_ids[:n], "response_ids": [ids[n:] for ids in full_ids]}
        out, reasons = _fit(tokenised, max_length)
        cut = tokenizer.decode(prompt_ids[n:]) if n < len(prompt_ids) else None
        notes = [] if cut is None else [f"note: {CUT_NOTE}"]
        if control and any(
            control.search(m["content"] or "") for text in [row["prompt"], *row["responses"]] for m in text
        ):
            notes.append(f"note: {CONTROL_NOTE}")
        results.append((out, [*reasons, *notes], cut))
    return results


def _control_tokens(tokenizer) -> re.Pattern | None:
    """Finds special tokens in a text: written by a user they end a turn or begin another."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def _encode_text(rows: list[Row], tokenizer) -> list[tuple[list[int], list[list[int]]]]:
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


def _encode_chat(rows: list[Row], tokenizer, template_kwargs: dict, first_index: int):
    if not tokenizer.chat_template:
        raise ValueError(
            "the prompts are messages but the tokenizer has no chat template; use the tokenizer of an instruct model, "
            "set tokenizer.chat_template, or give prompts and responses as text."
        )
    encoded = []
    for options, group in groupby(rows, lambda row: _template_options(row, template_kwargs)):
        encoded += _encode_alike(list(group), tokenizer, options, first_index + len(encoded))
    return encoded


def _template_options(row: Row, template_kwargs: dict) -> dict[str, Any]:
    own = {"tools": row["tools"]} if row.get("tools") else {}
    return template_kwargs | own | (row.get("chat_template_kwargs") or {})


def _encode_alike(rows: list[Row], tokenizer, options: dict[str, Any], first_index: int):
    """Rows with the same options of the chat template."""
    tools, template = options.get("tools"), options.get("chat_template")
    if tools and "tools" not in tokenizer.get_chat_template(template, tools):
        raise ValueError(
            f"row {first_index}: it has 'tools', which the chat template does not write: use the tokenizer of a model "
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
        full_ids = iter(apply(chats, return_dict=True, **options)["input_ids"])
    except TemplateError as error:
        if len(rows) == 1:
            raise ValueError(f"row {first_index}: the chat template refuses these messages: {error}.") from error
        # one by one, to find the row
        return [_encode_alike([row], tokenizer, options, first_index + i)[0] for i, row in enumerate(rows)]
    return [(ids, [next(full_ids) for _ in row["responses"]]) for ids, row in zip(prompt_ids, rows, strict=True)]


def _refuse_options_of_text(rows: list[Row], first_index: int) -> None:
    for index, row in enumerate(rows, first_index):
        if found := [name for name in TEMPLATE if row.get(name)]:
            raise ValueError(
                f"row {index}: {found[0]!r} is for the chat template, and the prompt is text: give messages, set "
                "as_chat, or remove the column."
            )


def _without_none(messages: list[dict]) -> list[dict]:
    """Arrow gives every message all keys that any message has; templates ask whether a key is defined."""
    return [
        {key: value for key, value in message.items() if value is not None or key == "content"} for message in messages
    ]


def _single_bos(ids: list[int], bos: int | None) -> list[int]:
    """A text that was written with a template may begin with BOS, and the tokenizer adds another."""
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def _check_token_row(row: Row, index: int) -> None:
    k = len(row["scores"] or ())
    if len(row["response_ids"] or ()) != k:
        raise ValueError(
            f"row {index}: 'response_ids' has {len(row['response_ids'] or ())} items but 'scores' has {k}; give one "
            "score per response."
        )


def _fit(row: Row, max_length: int | None) -> tuple[Row | None, list[str]]:
    """Fit a tokenised row into `max_length` tokens per response."""
    prompt_ids, response_ids = row["prompt_ids"] or [], row["response_ids"] or []
    if not prompt_ids:
        return None, ["row: prompt has no tokens, so the first response token would have no context"]
    room = None if max_length is None else max_length - len(prompt_ids)
    if room is not None and room < 1:
        return None, ["row: prompt fills max_length and leaves no room for a response"]
    reasons = []
    keep = [k for k, ids in enumerate(response_ids) if ids and _is_score(row["scores"][k])]
    for k, ids in enumerate(response_ids):
        if not ids:
            reasons.append("response: no tokens")
        elif k not in keep:
            reasons.append("response: missing or infinite score")
        elif room is not None and len(ids) > room:
            reasons.append("note: responses truncated to fit max_length")
    if len(keep) < MIN_RESPONSES:
        return None, [*reasons, f"row: fewer than {MIN_RESPONSES} usable responses left"]
    if room is not None and any(len(ids) > room for ids in response_ids):
        row = _truncate(row, room)
    return (take_responses(row, keep) if len(keep) < len(response_ids) else row), reasons


def _is_score(score: float | None) -> bool:
    return score is not None and abs(score) <= LARGEST_SCORE


def _truncate(row: Row, room: int) -> Row:
    lengths = [len(ids) for ids in row["response_ids"]]
    text = ("prompt", "responses")
    return {
        name: [item[:room] for item in value] if name not in text and is_per_token(value, lengths) else value
        for name, value in row.items()
    }
