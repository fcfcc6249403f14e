"""HannahRoseKirk/prism-alignment, configuration `utterances`: one row per response that a person rated."""

from collections.abc import Iterable, Iterator
from operator import itemgetter

from ..drops import Drop
from ..rows import Row
from .fields import assistant, in_groups, in_runs, user


def prism(rows: Iterable[Row]) -> Iterator[Row | Drop]:
    """One row per interaction: a prompt, the responses to it and their scores (1 to 100); `annotator` is `user_id`.

    Earlier turns of the conversation, with the response that the person chose, are part of the prompt. Keeps one
    conversation, whose rows must follow each other, and the ids of those before it.
    """
    for conversation in in_groups(rows, "conversation_id"):
        history: list[dict] | Drop = []
        by_turn = sorted(conversation, key=itemgetter("turn", "interaction_id"))
        for expected, group in enumerate(in_runs(by_turn, "interaction_id")):
            if not isinstance(history, Drop) and group[0]["turn"] != expected:
                history = Drop("an earlier turn of the conversation is missing, or there twice")
            if isinstance(history, Drop):
                yield history
                continue
            group = sorted(group, key=itemgetter("within_turn_id"))
            question = group[0]["user_prompt"]
            if any(row["user_prompt"] != question for row in group):
                history = Drop("the responses of an interaction answer different prompts")
                yield history
                continue
            yield {
                "prompt": [*history, user(question)],
                "responses": [[assistant(row["model_response"])] for row in group],
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
