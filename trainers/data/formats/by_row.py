"""Layouts with one row per prompt: functions from a row of the source to a canonical row."""

import re
from collections.abc import Callable
from operator import itemgetter

from ..drops import Drop
from ..rows import Row, checked_text, pair_to_row

HUMAN = re.compile(r"\n\n(Human|Assistant):")
LAST = "\n\nAssistant:"
ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
PLACEHOLDER = "N/A"


def user(content: str | None) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str | None) -> dict:
    return {"role": "assistant", "content": content}


def in_turns(texts: list[str]) -> list[dict]:
    """Messages of a user and an assistant in turns, the user's first."""
    return [user(text) if i % 2 == 0 else assistant(text) for i, text in enumerate(texts)]


# Rows, and pairs of a better and a worse response.


def rows(row: Row) -> Row:
    """Rows that are canonical already."""
    row["responses"]  # a KeyError here is reported with the row, and the columns that there are
    return row


def scored_pairs(row: Row) -> Row:
    """TRL preference pairs with `score_chosen` and `score_rejected` as the scores, which may tie."""
    return _scored(row, "score_chosen", "score_rejected")


def argilla_cleaned(row: Row) -> Row:
    """argilla/ultrafeedback-binarized-preferences-cleaned: pairs with the means of their aspect ratings (1 to 5)."""
    return _scored(row, "chosen-rating", "rejected-rating")


def _scored(row: Row, *names: str) -> Row:
    pair = pair_to_row({name: value for name, value in row.items() if name not in names})
    return {**pair, "scores": [row[name] for name in names]}


def argilla(row: Row) -> Row:
    """argilla/ultrafeedback-binarized-preferences: two responses with the mean of their aspect ratings (1 to 5)."""
    return {
        "prompt": [user(row["instruction"])],
        "responses": [row[f"{side}_response"] for side in ("chosen", "rejected")],
        "scores": [row[f"{side}_avg_rating"] for side in ("chosen", "rejected")],
        **_if_there(row, "source"),
    }


# Dialogues written as one text with "\n\nHuman: " and "\n\nAssistant: " before each turn.


def has_markers(row: Row) -> bool:
    """Whether a pair looks like one of hh-rlhf: two whole dialogues and no column for the prompt."""
    texts = row.get("chosen"), row.get("rejected")
    return "prompt" not in row and all(isinstance(t, str) and t.startswith("\n\nHuman:") and LAST in t for t in texts)


def hh_rlhf(row: Row) -> Row:
    """Anthropic/hh-rlhf: two dialogues that differ in the last answer; scores 1 and 0.

    The answer begins after the last assistant marker, so an answer that quotes this marker itself does not share its
    prompt with the other side and is left out.
    """
    prompts, answers = zip(*(_split_dialogue(row[side] or "") for side in ("chosen", "rejected")), strict=True)
    if prompts[0] != prompts[1]:
        raise Drop("chosen and rejected do not share one prompt")
    if answers[0] == answers[1]:
        raise Drop("chosen and rejected are the same answer")
    return {"prompt": _human_turns(prompts[0]), "responses": answers, "scores": [1.0, 0.0]}


def nectar(row: Row) -> Row:
    """berkeley-nest/Nectar: up to seven ranked answers, score = -rank, so that the first is the best."""
    prompt, rest = _split_dialogue(row["prompt"] or "")
    if rest.strip():
        raise Drop("the prompt does not end where the assistant's turn begins")
    answers = row["answers"] or []
    return {
        "prompt": _human_turns(prompt),
        "responses": [answer["answer"] for answer in answers],
        "scores": [None if answer["rank"] is None else -answer["rank"] for answer in answers],
        "models": [answer.get("model") for answer in answers],
        "good_natured": bool(row.get("good_natured")),
    }


def _split_dialogue(dialogue: str) -> tuple[str, str]:
    """What lies before the last assistant marker, and the answer after it without the one space of the format."""
    before, marker, answer = dialogue.rpartition(LAST)
    if not marker:
        raise Drop("no assistant marker")
    return before, answer.removeprefix(" ")


def _human_turns(dialogue: str) -> list[dict]:
    start, *parts = HUMAN.split(dialogue)
    roles, texts = parts[::2], [part.removeprefix(" ") for part in parts[1::2]]
    # Two turns of one side: somebody quoted a marker, and who said what cannot be told.
    if start or not roles or any(role != ("Human", "Assistant")[i % 2] for i, role in enumerate(roles)):
        raise Drop("the turns of the prompt do not alternate between Human and Assistant")
    if len(roles) % 2 == 0:
        raise Drop("the prompt does not end with a human turn")
    return in_turns(texts)


# Several responses to a prompt, each with its score.


def ultrafeedback(row: Row) -> Row:
    """openbmb/UltraFeedback: up to four completions of an instruction, with `overall_score` (1 to 10) as the score.

    Pin `revision="40b436560ca83a8dba36114c22ab3c66e43f6d5e"` or a later one: about 2,600 overall scores of 10 were
    wrong before. Rows with source `truthful_qa` overlap with that benchmark; the column `source` is kept to leave them
    out by. The system prompts that its models were given differ from completion to completion, so they cannot be part
    of the one prompt and are left out.
    """
    return _completions(row, itemgetter("overall_score"))


def ultrafeedback_fine_grained(row: Row) -> Row:
    """The mean of the numeric aspect ratings (1 to 5) as the score; ratings of "N/A" do not count.

    That is the data set's own `fine-grained_score`, where it has one.
    """
    return _completions(row, _mean_rating)


def _completions(row: Row, score: Callable[[dict], float | None]) -> Row:
    completions = row["completions"]
    if not completions:
        raise Drop("no completions")
    return {
        "prompt": [user(row["instruction"])],
        "responses": [completion["response"] for completion in completions],
        "scores": [score(completion) for completion in completions],
        "models": [completion.get("model") for completion in completions],
        **_if_there(row, "source"),
    }


def _mean_rating(completion: dict) -> float | None:
    ratings = [((completion["annotations"] or {}).get(aspect) or {}).get("Rating") for aspect in ASPECTS]
    numbers = [float(rating) for rating in ratings if rating not in (None, "N/A")]
    return sum(numbers) / len(numbers) if numbers else None


def armorm(row: Row) -> Row:
    """princeton-nlp/*-ultrafeedback-armorm and snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset: all five responses.

    `chosen` and `rejected` there are the best and the worst of them, and are not read.
    """
    return _lists(row, "all_generated_responses", "all_rm_scores")


def list_ultrafeedback(row: Row) -> Row:
    """OPO-alignment/ListUltraFeedback: eight responses with their overall scores."""
    return _lists(row, "all_responses", "overall_scores")


def _lists(row: Row, responses: str, scores: str) -> Row:
    return {
        "prompt": [user(row["prompt"])],
        "responses": row[responses],
        "scores": row[scores] or None,
        **_if_there(row, "prompt_id"),
    }


def numbered(row: Row) -> Row:
    """ChenDRAG/ultrafeedback_reward and its relatives: chats A0, A1, ... with score_A0, score_A1, ...

    Each chat holds the prompt and ends with one answer. Texts answer `prompt`, as one's own table has them, and stay
    texts. Answers of "N/A" stand for an instruction that did not have all its completions.
    """
    names = sorted((name for name in row if re.fullmatch(r"A\d+", name)), key=lambda name: int(name[1:])) or ["A0"]
    chats = [checked_text(row[name], name) for name in names]
    if all(chat is None or isinstance(chat, str) for chat in chats):
        prompt, answers = row["prompt"], chats
    else:
        prompt, answers = _split_chats(dict(zip(names, chats, strict=True)))
    if all(answer == PLACEHOLDER for answer in answers):
        raise Drop(f"placeholder answers ({PLACEHOLDER})")
    return {
        "prompt": prompt,
        "responses": answers,
        "scores": [row[f"score_{name}"] for name in names],
        **_if_there(row, "prompt_id"),
    }


def _if_there(row: Row, name: str) -> Row:
    """A column that not every source has."""
    return {name: row[name]} if name in row else {}


def _split_chats(chats: dict[str, list[dict] | None]) -> tuple[list[dict], list[str | None]]:
    """The messages before the last one, which all chats share, and the text of the last."""
    for name, chat in chats.items():
        if chat and chat[-1]["role"] != "assistant":
            raise ValueError(f"{name!r} does not end with an assistant message; give a chat that does.")
    heads = [chat[:-1] for chat in chats.values() if chat]
    if any(head != heads[0] for head in heads):
        raise Drop("the answers do not share one prompt")
    return heads[0] if heads else [], [chat[-1]["content"] if chat else None for chat in chats.values()]
