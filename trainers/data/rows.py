"""The canonical row and what makes it valid.

A canonical row is `{"prompt": str | messages, "responses": [K str | messages], "scores": [K floats]}` where a higher
score is better, with optional `annotator` (str or int), `weight` (float), and for messages `tools` (list of JSON
schemas) and `chat_template_kwargs` (dict). Every other column is passed through; a list column with K items is taken
to belong to the responses and follows them when one is dropped.

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
from trl import extract_prompt

from .drops import Drop
from .structured import TEMPLATE

Row = dict[str, Any]

MIN_RESPONSES = 2
NO_WEIGHT = "weight is missing or not finite"
NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")
ASKED = (
    "question", "instruction", "input", "query", "system", "history", "messages", "conversation", "conversations"
)  # fmt: skip
LARGEST_SCORE = float(np.finfo(np.float32).max)  # batches hold scores in float32


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
    responses = as_list(row["responses"], "responses")
    scores = [None] * len(responses) if row["scores"] is None else as_list(row["scores"], "scores")
    if len(responses) != len(scores):
        raise ValueError(
            f"'responses' has {len(responses)} items but 'scores' has {len(scores)}; give one score per response."
        )
    prompt = checked_text(row["prompt"], "prompt")
    responses = [checked_text(response, f"responses[{k}]") for k, response in enumerate(responses)]
    if len({isinstance(score, bool) for score in scores if score is not None}) > 1:
        raise ValueError(f"'scores' is {describe(scores)}; give numbers, or true and false, and not both.")
    scores = [checked_number(score, f"scores[{k}]") for k, score in enumerate(scores)]
    if any(isinstance(text, list) for text in [prompt, *responses]):
        prompt, responses = _as_messages(prompt, responses)
    out = {**row, "prompt": prompt, "responses": responses, "scores": scores}
    if "weight" in row:
        out["weight"] = checked_number(row["weight"], "weight")
    if row.get("annotator") is not None:
        checked_annotator(row["annotator"])
    out |= {name: _checked_template_option(row[name], name) for name in TEMPLATE if name in row}
    for name in NOT_TEXT:
        if row.get(name) is not None and row[name] != []:
            raise ValueError(f"{name!r} cannot be used: only text is trained on. Leave such rows out, or the column.")
    return out


def checked_annotator(value) -> str | int:
    """The name of who judged: text that is not blank, or an integer; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, str | Integral):
        raise ValueError(f"'annotator' is {describe(value)}; give a str or an int.")
    if isinstance(value, str) and not value.strip():
        raise ValueError("'annotator' is blank; name who judged, or give null where nobody knows.")
    return value


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


def is_per_token(value: Any, lengths: list[int]) -> bool:
    """Whether a column of a row holds one item for each token of its K responses."""
    return (
        isinstance(value, list)
        and len(value) == len(lengths)
        and all(isinstance(item, list) and len(item) == n for item, n in zip(value, lengths, strict=True))
    )


def chat_row(row: Row) -> Row:
    """A canonical row with a text prompt and text responses as one user turn and K assistant turns."""
    prompt, responses = _as_messages(row["prompt"], row["responses"])
    return {**row, "prompt": prompt, "responses": responses}


def clean_row(row: Row) -> tuple[Row | None, list[str]]:
    """Remove unusable responses from a canonical row.

    Returns the row, or None if it has to go, and the reasons: `"response: ..."` for each response that was removed and
    `"row: ..."` if the row is dropped.
    """
    if _is_blank(row["prompt"]):
        return None, ["row: prompt is empty"]
    if "weight" in row:
        weight = row["weight"]
        if weight is None or not math.isfinite(weight):
            return None, [f"row: {NO_WEIGHT}"]
        if weight < 0:
            return None, ["row: weight is negative"]
    if len(row["responses"]) < MIN_RESPONSES:
        return None, [f"row: fewer than {MIN_RESPONSES} responses given"]
    faults = response_faults(row)
    reasons = [f"response: {fault}" for fault in faults.values()]
    keep = [k for k in range(len(row["responses"])) if k not in faults]
    if len(keep) < MIN_RESPONSES:
        return None, [*reasons, f"row: fewer than {MIN_RESPONSES} usable responses left"]
    return (take_responses(row, keep) if reasons else row), reasons


def take_responses(row: Row, keep: list[int]) -> Row:
    """Keep the responses with these indices, together with every list column that has one item per response."""
    k = len(row["scores"])
    whole = ("prompt", "prompt_ids", *TEMPLATE)
    return {
        name: [value[i] for i in keep] if isinstance(value, list) and len(value) == k and name not in whole else value
        for name, value in row.items()
    }


def response_faults(row: Row) -> dict[int, str]:
    """What makes responses unusable, by their index."""
    faults = {}
    for k, (response, score) in enumerate(zip(row["responses"], row["scores"], strict=True)):
        if _is_blank(response):
            faults[k] = "empty text"
        elif isinstance(response, list) and response[0]["role"] in ("user", "system"):
            faults[k] = f"starts with a {response[0]['role']} turn, which belongs to the prompt"
        elif score is None or math.isnan(score):
            faults[k] = "missing score"
        elif math.isinf(score):
            faults[k] = "infinite score"
        elif abs(score) > LARGEST_SCORE:
            faults[k] = "score too large for float32"
    return faults


def as_list(value, name: str) -> list:
    if value is None:
        return []
    if isinstance(value, Iterable) and not isinstance(value, str | dict):
        return list(value)
    raise ValueError(f"{name!r} is {describe(value)}; give a list with one item per response.")


def checked_text(value, name: str):
    if value is None or isinstance(value, str):
        return encodable(value, name)
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise ValueError(f"{name!r} is {describe(value)}; give text or a list of messages.")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{name!r} holds {describe(message)}; a message needs 'role' and 'content'.")
        if not isinstance(message["role"], str) or not isinstance(message["content"], str | None):
            raise ValueError(f"{name!r} holds a message whose 'role' or 'content' is not text; give text in both.")
        encodable(message["role"], name), encodable(message["content"], name)
    return messages


def refuse_template_options(row: Row) -> None:
    """Raises ValueError for a row with options of the chat template, where answers are sampled without them."""
    if found := [name for name in TEMPLATE if row.get(name)]:
        raise ValueError(f"{found[0]!r} cannot be used where answers are sampled: remove the column.")


def _checked_template_option(value, name: str) -> list[dict] | dict | None:
    """`tools` or `chat_template_kwargs`, as such or as JSON text."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        found = value
    if name == "tools" and isinstance(found, list) and all(isinstance(tool, dict) for tool in found):
        return found
    if found is None or name != "tools" and isinstance(found, dict):
        return found
    raise ValueError(
        f"{name!r} is {describe(value)}; give {'a list of JSON schemas' if name == 'tools' else 'a dict'}."
    )


def checked_number(value, name: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, Real):
        raise ValueError(f"{name!r} is {describe(value)}; give a number.")
    try:
        return float(value)
    except OverflowError:  # an integer beyond every float
        return math.inf if value > 0 else -math.inf


def encodable(text: str | None, name: str) -> str | None:
    """The text itself.

    Raises:
        ValueError: it holds half a surrogate pair, which no tokenizer and no file takes.
    """
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name!r} holds half a character, {ascii(text[error.start])} at position {error.start}, that cannot be "
            "encoded; repair the text, or leave it out."
        ) from error
    return text


def describe(value) -> str:
    text = repr(value)
    return f"the {type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _implicit_prompt(chosen, rejected) -> tuple[Any, Any, Any]:
    if type(chosen) is not type(rejected):
        raise ValueError("'chosen' is text and 'rejected' messages, or the reverse; give a 'prompt', or both alike.")
    if not chosen or not rejected or chosen[0] != rejected[0]:
        raise Drop("chosen and rejected share no prompt")
    if isinstance(chosen, str) and (chosen.startswith(rejected) or rejected.startswith(chosen)):
        raise Drop("chosen begins like the whole of rejected (or the reverse), so the prompt cannot be told apart")
    split = extract_prompt({"chosen": chosen, "rejected": rejected})
    if isinstance(chosen, str) and any(_is_inside_word(text, len(split["prompt"])) for text in (chosen, rejected)):
        raise ValueError(
            f"there is no 'prompt', and what 'chosen' and 'rejected' share ends inside a word: "
            f"{split['prompt'][-20:]!r}. Give the prompt in a column 'prompt', or name the data_format."
        )
    return split["prompt"], split["chosen"], split["rejected"]


def _is_inside_word(text: str, at: int) -> bool:
    return text[at - 1 : at].isalnum() and text[at : at + 1].isalnum()


def _as_messages(prompt, responses: list) -> tuple[list, list]:
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    wrapped = [[{"role": "assistant", "content": text}] if isinstance(text, str) else text for text in responses]
    return prompt, wrapped


def _is_blank(text) -> bool:
    if isinstance(text, list):
        return all(_is_blank(message["content"]) and not message.get("tool_calls") for message in text)
    return text is None or not text.strip()
