"""Layouts with one row per response or message: generator functions from all rows to canonical rows."""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter

from ..drops import Drop
from ..rows import Row
from .by_row import assistant, in_turns, user

MARKER = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
OTHER_MARKS = ("correctness", "coherence", "complexity", "verbosity")


def in_runs(rows: Iterable[Row], name: str) -> Iterator[list[Row]]:
    """Rows that follow each other and are equal in a column, one list at a time."""
    return (list(run) for _, run in groupby(rows, key=itemgetter(name)))


def in_groups(rows: Iterable[Row], name: str) -> Iterator[list[Row]]:
    """The same where every value of the column may occur in one run only. Keeps one run, and the values seen.

    Raises:
        ValueError: the rows of a value are not together, or have none.
    """
    seen = set()
    for run in in_runs(rows, name):
        value = run[0][name]
        if not value:
            raise ValueError(f"{name!r} is empty; give every row one.")
        if value in seen:
            raise ValueError(
                f"the rows with {name} {value!r} do not follow each other (the others lie before this row); sort the "
                f"data by {name!r} first."
            )
        seen.add(value)
        yield run


def helpsteer2(rows: Iterable[Row]) -> Iterator[Row | Drop]:
    """nvidia/HelpSteer2: `helpfulness` (0 to 4) as the score; the other marks are kept, one number per response.

    Rows that follow each other with the same prompt belong together. HelpSteer, with up to four responses in a row,
    has the same layout.
    """
    for run in in_runs(rows, "prompt"):
        try:
            prompt = _extra_id_turns(run[0]["prompt"] or "")
        except Drop as drop:
            yield drop
            continue
        yield {
            "prompt": prompt,
            "responses": [row["response"] for row in run],
            "scores": [row["helpfulness"] for row in run],
            **{mark: [row.get(mark) for row in run] for mark in OTHER_MARKS},
        }


def _extra_id_turns(prompt: str) -> list[dict]:
    first, *parts = MARKER.split(prompt)
    if parts[-2:] == ["Assistant", ""]:  # the marker that the response follows
        parts = parts[:-2]
    if any(role != ("Assistant", "User")[i % 2] for i, role in enumerate(parts[::2])) or len(parts) % 4 == 2:
        raise Drop("the turns of the prompt do not alternate, or do not end with the user's")
    return in_turns([first, *parts[1::2]])


def prism(rows: Iterable[Row]) -> Iterator[Row | Drop]:
    """HannahRoseKirk/prism-alignment, `utterances`: one row per interaction, with scores of 1 to 100.

    `annotator` is `user_id`. Earlier turns of the conversation, with the response that the person chose, are part of
    the prompt. Keeps one conversation, whose rows must follow each other, and the ids of those before it.
    """
    for conversation in in_groups(rows, "conversation_id"):
        history: list[dict] | Drop = []
        by_turn = sorted(conversation, key=itemgetter("turn", "interaction_id"))
        for expected, group in enumerate(in_runs(by_turn, "interaction_id")):
            group = sorted(group, key=itemgetter("within_turn_id"))
            question = group[0]["user_prompt"]
            if not isinstance(history, Drop):
                if group[0]["turn"] != expected:
                    history = Drop("an earlier turn of the conversation is missing, or there twice")
                elif any(row["user_prompt"] != question for row in group):
                    history = Drop("the responses of an interaction answer different prompts")
            if isinstance(history, Drop):
                yield history
                continue
            yield {
                "prompt": [*history, user(question)],
                "responses": [row["model_response"] for row in group],
                "scores": [row["score"] for row in group],
                "annotator": group[0]["user_id"],
                "models": [row.get("model_name") for row in group],
                **{name: group[0].get(name) for name in ("conversation_id", "interaction_id", "conversation_type")},
            }
            chosen = [row["model_response"] for row in group if row.get("if_chosen")]
            if len(chosen) == 1 and (chosen[0] or "").strip():
                history = [*history, user(question), assistant(chosen[0])]
            else:
                history = Drop("an earlier turn of the conversation has no single chosen response")


def oasst1(rows: Iterable[Row]) -> Iterator[Row | Drop]:
    """OpenAssistant/oasst1 and oasst2: one row per message with replies of the assistant, score = -rank (0 the best).

    The prompt is the path from the root of the tree. Keeps one tree, whose rows must follow each other, and the ids of
    those before it.
    """
    for tree in in_groups(rows, "message_tree_id"):
        messages = {message["message_id"]: message for message in tree}
        if len(messages) < len(tree):
            raise ValueError(
                "a message_id is there twice in its tree, so a reply would count twice: give each its own."
            )
        replies: dict[str | None, list[Row]] = {}
        for message in tree:
            if message["role"] == "assistant":
                replies.setdefault(message["parent_id"], []).append(message)
        for parent, group in replies.items():
            try:
                prompt = _path(messages, parent)
            except Drop as drop:
                yield drop
                continue
            yield from [Drop("deleted", kind="response") for message in group if message.get("deleted")]
            group = [message for message in group if not message.get("deleted")]
            yield {
                "prompt": prompt,
                "responses": [message["text"] for message in group],
                "scores": [None if message["rank"] is None else -message["rank"] for message in group],
                "langs": [message.get("lang") for message in group],
                "lang": messages[parent].get("lang"),
                "message_id": parent,
            }


def _path(messages: dict[str | None, Row], last: str | None) -> list[dict]:
    """The messages from the root to `last`."""
    path: list[dict] = []
    name = last
    while name is not None or not path:
        if name not in messages:
            raise Drop("a message of the prompt is missing")
        if len(path) == len(messages):
            raise Drop("the messages of the prompt answer each other in a circle")
        message = messages[name]
        if message.get("deleted"):
            raise Drop("a message of the prompt is deleted")
        path.append({"prompter": user, "assistant": assistant}[message["role"]](message["text"]))
        name = message["parent_id"]
    if path[0]["role"] == "assistant":
        raise Drop("a reply to a reply of the assistant")
    return path[::-1]
