"""The canonical row and what makes it valid.

A canonical row is `{"prompt": str | messages, "responses": [K str | messages], "scores": [K floats]}` where a higher
score is better, with optional `annotator` (str or int), `weight` (float), `unfinished_responses` (K bools), and for
messages `tools` (list of JSON schemas) and `chat_template_kwargs` (dict). Every other column is passed through; a list
with K items is taken to belong to the responses and follows them when one is dropped.

There are two kinds of fault. A row that is built wrongly (a missing column, two lists of different length, a string
where a number belongs) raises `ValueError`: no setting can repair it. A row with unusable content (an empty response,
a missing score) is dropped and counted, or refused with `invalid="error"`.
"""

import json
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np
from datasets import List
from trl import extract_prompt

from .drops import Drop

Row = dict[str, Any]

TEXT = {"role", "content"}  # of a message
TEMPLATE = ("tools", "chat_template_kwargs")  # columns for the chat template
UNFINISHED = "unfinished_responses"  # column: which of the K responses stopped at a limit, and not at their end
TRAINED = "assistant_masks"  # column of tokenised rows: which response tokens are trained on, None for all
MIN_RESPONSES = 2
NO_WEIGHT = "weight is missing or not finite"
NOT_TEXT = {"image", "images", "video", "videos", "audio", "audios"}
ASKED = ("question", "instruction", "input", "query", "system", "history", "messages", "conversation", "conversations")
LARGEST_SCORE = float(np.finfo(np.float32).max)  # batches hold scores in float32


def checked_row(source: Row, where: str, *, as_chat: bool) -> tuple[Row | None, list[str]]:
    """The canonical row that can be used of a source's row, or None, and the reasons of `clean_row`.

    Raises:
        ValueError: the row is built wrongly; `where` begins the message.
    """
    try:
        row, reasons = clean_row(to_canonical(source))
    except Drop as drop:
        return None, [f"row: {drop}"]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return (chat_row(row) if row and as_chat else row), reasons


def to_canonical(row: Row) -> Row:
    """Bring a canonical row or a TRL `prompt/chosen/rejected` row into canonical form.

    Text and messages are not mixed in the result: if the prompt or any response is a list of messages, text prompts
    become a user message and text responses an assistant message.

    Raises:
        ValueError: if the row is built wrongly; the message names the field and the fix, not the row.
        Drop: if `chosen` and `rejected` hold an implicit prompt that cannot be told apart.
    """
    if "responses" not in row and "chosen" in row and "rejected" in row:
        row = pair_to_row(row)
    missing = [name for name in ("prompt", "responses", "scores") if name not in row]
    if missing:
        raise ValueError(
            f"missing column {missing[0]!r}; found columns {sorted(row)}. Give 'prompt', 'responses' and 'scores', "
            "or 'prompt', 'chosen' and 'rejected', or name the data_format."
        )
    responses = _as_list(row["responses"], "responses")
    scores = [None] * len(responses) if row["scores"] is None else _as_list(row["scores"], "scores")
    if len(responses) != len(scores):
        raise ValueError(
            f"'responses' has {len(responses)} items but 'scores' has {len(scores)}; give one score per response."
        )
    prompt = checked_text(row["prompt"], "prompt")
    responses = [checked_text(response, f"responses[{k}]") for k, response in enumerate(responses)]
    if len({isinstance(score, bool) for score in scores if score is not None}) > 1:
        raise ValueError(f"'scores' is {describe(scores)}; give numbers, or true and false, and not both.")
    scores = [_number(score, f"scores[{k}]") for k, score in enumerate(scores)]
    out = {**row, "prompt": prompt, "responses": responses, "scores": scores}
    if any(isinstance(text, list) for text in [prompt, *responses]):
        out = chat_row(out)
    if "weight" in row:
        out["weight"] = _number(row["weight"], "weight")
    annotator = row.get("annotator")
    if annotator is not None and (isinstance(annotator, bool) or not isinstance(annotator, str | Integral)):
        raise ValueError(f"'annotator' is {describe(annotator)}; give a str or an int.")
    if isinstance(annotator, str) and not annotator.strip():
        raise ValueError("'annotator' is blank; name who judged, or give null where nobody knows.")
    if row.get(UNFINISHED) is not None:
        unfinished(row)
    out |= {name: _template_option(row[name], name) for name in TEMPLATE if name in row}
    for name in sorted(NOT_TEXT & row.keys()):
        if row[name] is not None and row[name] != []:
            raise ValueError(f"{name!r} cannot be used: only text is trained on. Leave such rows out, or the column.")
    return out


def unfinished(row: Row) -> list[bool]:
    """Which of a row's K responses stopped at a limit.

    Raises:
        ValueError: the row has other marks than K booleans.
    """
    marks, count = row.get(UNFINISHED), len(row["responses"])
    if marks is None:
        return [False] * count
    if not isinstance(marks, list) or len(marks) != count or not all(isinstance(mark, bool) for mark in marks):
        raise ValueError(f"{UNFINISHED!r} is {marks!r}: give true or false for each of {count} responses.")
    return marks


def pair_to_row(row: Row) -> Row:
    """Turn a TRL pair into a row with K=2 and scores 1 and 0; an implicit prompt is split off by TRL's own rule."""
    chosen, rejected = (checked_text(row[name], name) for name in ("chosen", "rejected"))
    prompt = row.get("prompt")
    chat_with_prompt = isinstance(chosen, list) and bool(chosen) and chosen[0]["role"] != "assistant"
    if prompt is None or (isinstance(prompt, str) and chat_with_prompt):
        asked = [name for name in ASKED if row.get(name)]
        if asked and not chat_with_prompt:
            raise ValueError(
                f"missing column 'prompt' beside 'chosen' and 'rejected', but there is {asked[0]!r}: rename it with "
                f"dataset.rename_column({asked[0]!r}, 'prompt'), or make a prompt of it in a data_format of your own."
            )
        prompt, chosen, rejected = _implicit_prompt(chosen, rejected)
    rest = {name: value for name, value in row.items() if name not in ("prompt", "chosen", "rejected")}
    return {"prompt": prompt, "responses": [chosen, rejected], "scores": [1.0, 0.0], **rest}


def chat_row(row: Row) -> Row:
    """A row with a text prompt and text responses as one user turn and K assistant turns."""
    prompt = row["prompt"]
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    responses = [[{"role": "assistant", "content": r}] if isinstance(r, str) else r for r in row["responses"]]
    return {**row, "prompt": prompt, "responses": responses}


def clean_row(row: Row) -> tuple[Row | None, list[str]]:
    """Remove unusable responses from a canonical row.

    Returns the row, or None if it has to go, and the reasons: `"response: ..."` for each response that was removed and
    `"row: ..."` if the row is dropped.
    """
    if _is_blank(row["prompt"]):
        return None, ["row: prompt is empty"]
    if fault := weight_fault(row.get("weight", 1.0)):
        return None, [f"row: {fault}"]
    if len(row["responses"]) < MIN_RESPONSES:
        return None, [f"row: fewer than {MIN_RESPONSES} responses given"]
    faults = [_fault(*pair) for pair in zip(row["responses"], row["scores"], strict=True)]
    return without_responses(row, faults)


def without_responses(row: Row, faults: list[str | None]) -> tuple[Row | None, list[str]]:
    """The row without the responses that have a fault, or None if too few are left; and the reasons.

    Every list with one item per response goes along.
    """
    reasons = [f"response: {fault}" for fault in faults if fault]
    if len(faults) - len(reasons) < MIN_RESPONSES:
        return None, [*reasons, f"row: fewer than {MIN_RESPONSES} usable responses left"]
    if not reasons:
        return row, []

    def left(name: str, value: Any) -> Any:
        whole = name in ("prompt", "prompt_ids", *TEMPLATE) or not isinstance(value, list) or len(value) != len(faults)
        return value if whole else [item for item, fault in zip(value, faults, strict=True) if not fault]

    return {name: left(name, value) for name, value in row.items()}, reasons


def score_fault(score: float | None) -> str | None:
    """Why a score cannot be used."""
    if score is None or math.isnan(score):
        return "missing score"
    if abs(score) <= LARGEST_SCORE:
        return None
    return "infinite score" if math.isinf(score) else "score too large for float32"


def weight_fault(weight: float | None) -> str | None:
    """Why a weight cannot be used."""
    if weight is None or not math.isfinite(weight):
        return NO_WEIGHT
    return "weight is negative" if weight < 0 else None


def _fault(response: str | list[dict] | None, score: float | None) -> str | None:
    if _is_blank(response):
        return "empty text"
    if isinstance(response, list) and response[0]["role"] in ("user", "system"):
        return f"starts with a {response[0]['role']} turn, which belongs to the prompt"
    return score_fault(score)


def checked_text(value, name: str):
    """Text or a list of messages, as it is; ValueError otherwise."""
    if value is None or isinstance(value, str):
        _refuse_half_characters(value or "", name)
        return value
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise ValueError(f"{name!r} is {describe(value)}; give text or a list of messages.")
    for message in messages:
        if not isinstance(message, dict) or not message.keys() >= TEXT:
            raise ValueError(f"{name!r} holds {describe(message)}; a message needs 'role' and 'content'.")
        if not isinstance(message["role"], str) or not isinstance(message["content"], str | None):
            raise ValueError(f"{name!r} holds a message whose 'role' or 'content' is not text; give text in both.")
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
            raise ValueError(
                f"{name!r} holds a message whose 'tool_calls' is {describe(calls)}; give a list of {{'function': "
                "{'name': text, 'arguments': a dict or JSON text}}."
            )
        _refuse_half_characters(message["role"] + (message["content"] or ""), name)
    return messages


def _refuse_half_characters(text: str, name: str) -> None:
    """Raises ValueError for half a surrogate pair, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name!r} holds half a surrogate pair ({error}); write the whole character, or leave it out."
        ) from error


def _is_call(call: Any) -> bool:
    """A call of a tool as templates write them; some write what stands in `function` without it too."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    return isinstance(function.get("arguments"), dict | str)


def prompt_to_answer(row: Row, where: str):
    """The prompt of a row of which nothing else need be there; ValueError without one, or where answers cannot follow
    its options of the chat template."""
    if not isinstance(row, dict) or not row.get("prompt"):
        raise ValueError(f"{where} needs a `prompt`, text or messages; it has {sorted(row)}.")
    refuse_template_options(row)
    return row["prompt"]


def refuse_template_options(row: Row) -> None:
    """Raises ValueError for a row with options of the chat template, where answers are sampled without them."""
    if given := [name for name in TEMPLATE if row.get(name)]:
        raise ValueError(f"{given[0]!r} cannot be used where answers are sampled: remove the column.")


def refuse_template_kwargs(given: dict | None) -> None:
    """The same for such options of all rows."""
    if given:
        raise ValueError("chat_template_kwargs have no effect on sampling: set them in the tokenizer's chat template.")


def unpadded(row: Row, features: dict[str, Any]) -> Row:
    """A row of a table with these columns, without the nulls that it filled in (`without_padding`)."""
    nested = {name: kind for name, kind in features.items() if isinstance(kind, List | dict)}
    return row | {name: without_padding(row[name], kind, name in TEMPLATE) for name, kind in nested.items()}


def without_padding(value: Any, feature: Any, inside: bool = False) -> Any:
    """A value of a table without the nulls that the table filled into its records, which a template would write out.

    A table gives all records of a column the same keys. Its own nulls cannot be told from those that were filled in,
    so all of them are removed: below the keys of messages, and in the columns of `TEMPLATE` (`inside`). JSON columns
    keep theirs.
    """
    if isinstance(feature, List) and isinstance(value, list):
        return [without_padding(item, feature.feature, inside) for item in value]
    if not (isinstance(feature, dict) and isinstance(value, dict)):
        return value
    message = feature.keys() >= TEXT
    return {
        name: without_padding(item, feature[name], inside or message and name not in TEXT)
        for name, item in value.items()
        if item is not None or not inside
    }


def is_per_token(value: Any, lengths: list[int]) -> bool:
    """Whether a column of a row holds one item for each token of its K responses."""
    return (
        isinstance(value, list)
        and len(value) == len(lengths)
        and all(isinstance(item, list) and len(item) == n for item, n in zip(value, lengths, strict=True))
    )


def trained_tokens(row: Row) -> list[list[bool]]:
    """Which tokens of each response of a tokenised row are trained on."""
    return row.get(TRAINED) or [[True] * len(ids) for ids in row["response_ids"]]


def describe(value) -> str:
    text = repr(value)
    return f"the {type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _as_list(value, name: str) -> list:
    if value is None:
        return []
    if isinstance(value, Iterable) and not isinstance(value, str | dict):
        return list(value)
    raise ValueError(f"{name!r} is {describe(value)}; give a list with one item per response.")


def _number(value, name: str) -> float | None:
    if value is None or type(value) is float:
        return value
    if not isinstance(value, Real):
        raise ValueError(f"{name!r} is {describe(value)}; give a number.")
    try:
        return float(value)
    except OverflowError:  # an integer beyond every float
        return -math.inf if value < 0 else math.inf


def _template_option(value, name: str) -> list[dict] | dict | None:
    """`tools` or `chat_template_kwargs`, as such or as JSON text."""
    try:
        option = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        option = value
    if name == "tools" and isinstance(option, list) and all(isinstance(tool, dict) for tool in option):
        return option
    if option is None or name != "tools" and isinstance(option, dict):
        return option
    kind = "a list of JSON schemas" if name == "tools" else "a dict"
    raise ValueError(f"{name!r} is {describe(value)}; give {kind}.")


def _implicit_prompt(chosen, rejected) -> tuple[Any, Any, Any]:
    if type(chosen) is not type(rejected):
        raise ValueError("'chosen' is text and 'rejected' messages, or the reverse; give a 'prompt', or both alike.")
    if not chosen or not rejected or chosen[0] != rejected[0]:
        raise Drop("chosen and rejected share no prompt")
    if isinstance(chosen, str) and (chosen.startswith(rejected) or rejected.startswith(chosen)):
        raise Drop("chosen begins like the whole of rejected (or the reverse), so the prompt cannot be told apart")
    split = extract_prompt({"chosen": chosen, "rejected": rejected})
    end = len(split["prompt"])
    if isinstance(chosen, str) and any(t[end - 1 : end].isalnum() and t[end].isalnum() for t in (chosen, rejected)):
        raise ValueError(
            f"there is no 'prompt', and what 'chosen' and 'rejected' share ends inside a word: "
            f"{split['prompt'][-20:]!r}. Give the prompt in a column 'prompt', or name the data_format."
        )
    return split["prompt"], split["chosen"], split["rejected"]


def _is_blank(text) -> bool:
    if isinstance(text, list):
        return all(_is_blank(message["content"]) and not message.get("tool_calls") for message in text)
    return text is None or not text.strip()
