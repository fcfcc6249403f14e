r"""Dialogues written as one text with "\n\nHuman: " and "\n\nAssistant: " before each turn."""

import re

from ..drops import Drop
from ..rows import Row
from .fields import assistant, user

MARKER = re.compile(r"\n\n(Human|Assistant):")
LAST = "\n\nAssistant:"


def has_markers(row: Row) -> bool:
    """Whether a pair looks like one of hh-rlhf: two whole dialogues and no column for the prompt."""
    texts = row.get("chosen"), row.get("rejected")
    return "prompt" not in row and all(isinstance(t, str) and t.startswith("\n\nHuman:") and LAST in t for t in texts)


def hh_rlhf(row: Row) -> Row:
    """Anthropic/hh-rlhf: two dialogues that differ in the last answer; scores 1 and 0.

    The answer begins after the last assistant marker, so an answer that quotes this marker itself does not share its
    prompt with the other side and is left out.
    """
    prompts, answers = zip(*(_split(row[side] or "") for side in ("chosen", "rejected")), strict=True)
    if prompts[0] != prompts[1]:
        raise Drop("chosen and rejected do not share one prompt")
    if answers[0] == answers[1]:
        raise Drop("chosen and rejected are the same answer")
    return {
        "prompt": _turns(prompts[0]),
        "responses": [[assistant(answer)] for answer in answers],
        "scores": [1.0, 0.0],
    }


def nectar(row: Row) -> Row:
    """berkeley-nest/Nectar: up to seven ranked answers, score = -rank, so that the first is the best."""
    prompt, rest = _split(row["prompt"] or "")
    if rest.strip():
        raise Drop("the prompt does not end where the assistant's turn begins")
    answers = row["answers"] or []
    return {
        "prompt": _turns(prompt),
        "responses": [[assistant(answer["answer"])] for answer in answers],
        "scores": [None if answer["rank"] is None else -answer["rank"] for answer in answers],
        "models": [answer.get("model") for answer in answers],
        "good_natured": bool(row.get("good_natured")),
    }


def _split(dialogue: str) -> tuple[str, str]:
    """What lies before the last assistant marker, and the answer after it without the one space of the format."""
    before, marker, answer = dialogue.rpartition(LAST)
    if not marker:
        raise Drop("no assistant marker")
    return before, answer.removeprefix(" ")


def _turns(dialogue: str) -> list[dict]:
    start, *parts = MARKER.split(dialogue)
    roles, texts = parts[::2], [part.removeprefix(" ") for part in parts[1::2]]
    # Two turns of one side: somebody quoted a marker, and who said what cannot be told.
    if start or not roles or any(role != ("Human", "Assistant")[i % 2] for i, role in enumerate(roles)):
        raise Drop("the turns of the prompt do not alternate between Human and Assistant")
    if len(roles) % 2 == 0:
        raise Drop("the prompt does not end with a human turn")
    return [user(t) if i % 2 == 0 else assistant(t) for i, t in enumerate(texts)]
