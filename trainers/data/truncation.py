"""Rows of token ids made to fit: prompts lose their left end and responses their right one, or they are dropped."""

from collections.abc import Callable
from itertools import takewhile
from os.path import commonprefix  # of any sequences

from jinja2 import TemplateError

from ..config import Truncation
from .encoding import chat_options, chat_template, without_none
from .rows import TRAINED, Row, is_per_token, score_fault, without_responses

PROMPT_CUT = "prompts cut on the left to max_prompt_length"
TOKENS_CUT = "tokens lost by prompts that were cut"
RESPONSE_CUT = "responses truncated to fit max_length"
ALIKE = "rows with responses that are alike once truncated, and were not before"
LONG_PROMPT = "prompt longer than max_prompt_length"
LONG_ENDS = "nothing that is said would stay of a cut prompt: what the template writes fills max_prompt_length"
LONG_RESPONSE = "longer than the room that max_length leaves after the prompt"
UNTRAINED = "no token that is trained on, or none left within max_length"
SYSTEM = ("system", "developer")  # roles
NO_SYSTEM = (
    "{}: the prompt is longer than max_prompt_length, and keep_system cannot keep its system turn: {}. Leave "
    "keep_system out, drop such rows with truncate_prompts='drop', or raise max_prompt_length."
)
NO_END = (
    "{}: the prompt is longer than max_prompt_length, and the chat template, which refuses another text in its last "
    "message ({}), does not tell what of it is text. Drop such rows with truncate_prompts='drop', or raise "
    "max_prompt_length."
)


def fit(
    row: Row, limits: Truncation, where: str, ends: Callable[[list[int]], tuple[list[int], int]]
) -> tuple[Row | None, list[str]]:
    """A tokenised row within the limits, with its per-token columns, or None; and what was cut or dropped.

    Args:
        ends: of a prompt that is cut: what stays at its beginning, and how many tokens at its end say nothing.

    Raises:
        ValueError: there is not one score per response.
    """
    prompt_ids, response_ids, scores = (row[name] or [] for name in ("prompt_ids", "response_ids", "scores"))
    if len(response_ids) != len(scores):
        raise ValueError(
            f"{where}: 'response_ids' has {len(response_ids)} items but 'scores' has {len(scores)}; give one score "
            "per response."
        )
    if not prompt_ids:
        return None, ["row: prompt has no tokens, so the first response token would have no context"]
    longest, notes = limits.max_prompt_length, []
    if longest is not None and len(prompt_ids) > longest:
        if limits.truncate_prompts == "drop":
            return None, [f"row: {LONG_PROMPT}"]
        head, behind = ends(prompt_ids)
        if len(head) + behind >= longest:
            return None, [f"row: {LONG_ENDS}"]
        notes = [f"note: {PROMPT_CUT}", f"note {len(prompt_ids) - longest}: {TOKENS_CUT}"]
        prompt_ids = head + prompt_ids[len(head) - longest :]
        row = row | {"prompt_ids": prompt_ids}
    room = None if limits.max_length is None else limits.max_length - len(prompt_ids)
    if room is not None and room < 1:
        return None, ["row: prompt fills max_length and leaves no room for a response"]
    faults = [score_fault(score) if ids else "no tokens" for ids, score in zip(response_ids, scores, strict=True)]
    lengths = [len(ids) for ids in response_ids]
    if room is not None and any(length > room for length in lengths):
        long = [length > room and not fault for length, fault in zip(lengths, faults, strict=True)]
        if limits.truncate_responses == "drop":
            faults = [LONG_RESPONSE if too else fault for too, fault in zip(long, faults, strict=True)]
        else:
            notes += [f"note: {RESPONSE_CUT}"] * sum(long)
            per_token = [n for n, v in row.items() if n not in ("prompt", "responses") and is_per_token(v, lengths)]
            row = row | {name: [item[:room] for item in row[name]] for name in per_token}
    if trained := row.get(TRAINED):
        faults = [fault or (None if any(mask) else UNTRAINED) for fault, mask in zip(faults, trained, strict=True)]
    kept_row, reasons = without_responses(row, faults)
    if kept_row and f"note: {RESPONSE_CUT}" in notes:
        before = {tuple(ids) for ids, fault in zip(response_ids, faults, strict=True) if not fault}
        notes += [f"note: {ALIKE}"] * (len({*map(tuple, kept_row["response_ids"])}) < len(before))
    return kept_row, reasons + notes


def fixed_ends(
    prompt_ids: list[int], row: Row, where: str, *, whole: list[int] | None, tokenizer, template_kwargs: dict,
    keep_system: bool,
) -> tuple[list[int], int]:  # fmt: skip
    """What stays at the beginning of a row's prompt that is cut, and how many tokens at its end say nothing.

    The first is its BOS, or what the template writes for system messages; the second what it writes behind the text of
    the last message. Of a text none, and none that are known of token ids.

    Args:
        whole: the token ids of the prompt, of which `prompt_ids` are those that stand before all responses; None where
            the row came with its token ids.

    Raises:
        ValueError: the system turn is no beginning of the prompt, or the template refuses to tell.
    """
    head = prompt_ids[:1] if prompt_ids[0] == tokenizer.bos_token_id else []
    if keep_system and whole is None:
        raise ValueError(NO_SYSTEM.format(where, "the row is given as token ids, which do not tell where it ends"))
    if whole is None or isinstance(row["prompt"], str):
        return head, 0
    prompt, apply = without_none(row["prompt"]), chat_template(tokenizer, chat_options(row, template_kwargs))
    if keep_system and (system := list(takewhile(lambda message: message["role"] in SYSTEM, prompt))):
        head = _head(system, prompt_ids, where, apply)
    *others, last = prompt
    last = {key: value for key, value in last.items() if key != "tool_calls"}
    chats = [[*others, last | {"content": text}] for text in "ab"]  # what is the same behind both is no text
    try:
        texts = apply(chats, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError(NO_END.format(where, error)) from error
    end = commonprefix([text[::-1] for text in texts])[::-1]
    ids = tokenizer(end, add_special_tokens=False, verbose=False)["input_ids"]
    behind = len(commonprefix([ids[::-1], whole[::-1]]))
    return head, max(0, behind - (len(whole) - len(prompt_ids)))


def _head(system: list[dict], prompt_ids: list[int], where: str, apply: Callable) -> list[int]:
    try:
        ids = apply(system, return_dict=True)["input_ids"]
    except TemplateError as error:
        raise ValueError(NO_SYSTEM.format(where, f"the chat template refuses it alone ({error})")) from error
    if prompt_ids[: len(ids)] != ids:
        raise ValueError(NO_SYSTEM.format(where, "the chat template writes it otherwise when a turn follows"))
    return ids
