"""Rows of token ids made to fit: prompts lose their left end and responses their right one, or they are dropped."""

from collections.abc import Callable
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

from ..config import Truncation
from .rows import TRAINED, Row, is_per_token, score_fault, without_responses

PROMPT_CUT = "prompts cut on the left to max_prompt_length"
RESPONSE_CUT = "responses truncated to fit max_length"
LONG_PROMPT = "prompt longer than max_prompt_length"
LONG_HEAD = "what stays of a cut prompt (BOS, and with keep_system the system turn) fills max_prompt_length"
LONG_RESPONSE = "longer than the room that max_length leaves after the prompt"
UNTRAINED = "no token that is trained on, or none left within max_length"
SYSTEM = ("system", "developer")  # roles
NO_SYSTEM = (
    "{}: the prompt is longer than max_prompt_length, and keep_system cannot keep its system turn: {}. Leave "
    "keep_system out, drop such rows with truncate_prompts='drop', or raise max_prompt_length."
)


def fit(
    row: Row, limits: Truncation, where: str, head: Callable[[list[int]], list[int]]
) -> tuple[Row | None, list[str]]:
    """A tokenised row within the limits, with its per-token columns, or None; and what was cut or dropped.

    Args:
        head: gives what stays at the beginning of a prompt whose left end is cut.

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
        kept = head(prompt_ids)
        if len(kept) >= longest:
            return None, [f"row: {LONG_HEAD}"]
        prompt_ids = kept + prompt_ids[len(kept) - longest :]
        row, notes = row | {"prompt_ids": prompt_ids}, [f"note: {PROMPT_CUT}"]
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
    return kept_row, reasons + notes


def head_of(
    prompt_ids: list[int], prompt: str | list[dict] | None, where: str, *, tokenizer, options: dict[str, Any],
    keep_system: bool,
) -> list[int]:  # fmt: skip
    """What stays at the beginning of a prompt that is cut: its BOS, or what the template writes for system messages.

    Args:
        prompt: what was tokenised, None where that is not known.
        options: of the chat template.

    Raises:
        ValueError: the system turn is no beginning of the prompt.
    """
    bos = prompt_ids[:1] if prompt_ids[0] == tokenizer.bos_token_id else []
    if not keep_system or isinstance(prompt, str):
        return bos
    if prompt is None:
        raise ValueError(NO_SYSTEM.format(where, "the row is given as token ids, which do not tell where it ends"))
    system = list(takewhile(lambda message: message["role"] in SYSTEM, prompt))
    if not system:
        return bos
    try:
        ids = tokenizer.apply_chat_template(system, return_dict=True, **options)["input_ids"]
    except TemplateError as error:
        raise ValueError(NO_SYSTEM.format(where, f"the chat template refuses it alone ({error})")) from error
    if prompt_ids[: len(ids)] != ids:
        raise ValueError(NO_SYSTEM.format(where, "the chat template writes it otherwise when a turn follows"))
    return ids
