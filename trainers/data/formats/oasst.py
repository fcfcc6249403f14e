"""OpenAssistant/oasst1 and oasst2: one row per message of a tree."""

from collections.abc import Iterable, Iterator

from ..drops import Drop
from ..rows import Row
from .fields import assistant, in_groups, user

ROLES = {"prompter": user, "assistant": assistant}


def oasst1(rows: Iterable[Row]) -> Iterator[Row | Drop]:
    """One row per message that has replies of the assistant, score = -rank (rank 0 is the best).

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
                "responses": [[assistant(message["text"])] for message in group],
                "scores": [None if message["rank"] is None else -message["rank"] for message in group],
                "langs": [message.get("lang") for message in group],
                "lang": messages[parent].get("lang"),
                "message_id": parent,
            }


def _path(messages: dict[str | None, Row], last: str | None) -> list[dict]:
    """The messages from the root to `last`."""
    path: list[dict] = []
    name = last
    while True:
        if name not in messages:
            raise Drop("a message of the prompt is missing")
        if len(path) == len(messages):
            raise Drop("the messages of the prompt answer each other in a circle")
        message = messages[name]
        if message.get("deleted"):
            raise Drop("a message of the prompt is deleted")
        path.append(ROLES[message["role"]](message["text"]))
        name = message["parent_id"]
        if name is None:
            break
    if path[0]["role"] == "assistant":
        raise Drop("a reply to a reply of the assistant")
    return path[::-1]
