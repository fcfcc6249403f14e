"""Several responses to a prompt, each with the score of a reward model."""

import re

from ..drops import Drop
from ..rows import Row, checked_text
from .fields import assistant, user

PLACEHOLDER = "N/A"


def armorm(row: Row) -> Row:
    """princeton-nlp/*-ultrafeedback-armorm and snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset: all five responses.

    `chosen` and `rejected` there are the best and the worst of them, and are not read.
    """
    return _lists(row, "all_generated_responses", "all_rm_scores")


def list_ultrafeedback(row: Row) -> Row:
    """OPO-alignment/ListUltraFeedback: eight responses with their overall scores."""
    return _lists(row, "all_responses", "overall_scores")


def _lists(row: Row, responses: str, scores: str) -> Row:
    texts = row[responses] or []
    return {
        "prompt": [user(row["prompt"])],
        "responses": [response if isinstance(response, list) else [assistant(response)] for response in texts],
        "scores": row[scores] or [None] * len(texts),
        "prompt_id": row.get("prompt_id"),
    }


def numbered(row: Row) -> Row:
    """ChenDRAG/ultrafeedback_reward and its relatives: chats A0, A1, ... with score_A0, score_A1, ...

    Each chat holds the prompt and ends with one answer. Answers of "N/A" stand for an instruction that did not have
    all its completions.
    """
    names = sorted((name for name in row if re.fullmatch(r"A\d+", name)), key=lambda name: int(name[1:])) or ["A0"]
    chats = [checked_text(row[name], name) for name in names]
    if all(chat is None or isinstance(chat, str) for chat in chats):
        prompt, answers = [user(row["prompt"])], chats
    else:
        prompt, answers = _split_chats(dict(zip(names, chats, strict=True)))
    if all(answer == PLACEHOLDER for answer in answers):
        raise Drop(f"placeholder answers ({PLACEHOLDER})")
    return {
        "prompt": prompt,
        "responses": [[assistant(answer)] for answer in answers],
        "scores": [row[f"score_{name}"] for name in names],
        "prompt_id": row.get("prompt_id"),
    }


def _split_chats(chats: dict[str, list[dict] | None]) -> tuple[list[dict], list[str | None]]:
    """The messages before the last one, which all chats share, and the text of the last."""
    for name, chat in chats.items():
        if chat and chat[-1]["role"] != "assistant":
            raise ValueError(f"{name!r} does not end with an assistant message; give a chat that does.")
    heads = [chat[:-1] for chat in chats.values() if chat]
    if any(head != heads[0] for head in heads):
        raise Drop("the answers do not share one prompt")
    return heads[0] if heads else [], [chat[-1]["content"] if chat else None for chat in chats.values()]
