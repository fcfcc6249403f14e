"""Which tokens of a chat its assistant wrote.

Some templates mark them ({% generation %}). With any other, what it writes for the chat up to a turn of the assistant,
and with that turn, must be how it begins the whole chat: the turn lies between the two.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from os.path import commonprefix  # of any sequences

import numpy as np
from jinja2 import TemplateError

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
UNSAID = (
    "the chat template does not tell which tokens of several messages are the assistant's: {}. Give the tokenizer a "
    "template with generation marks (of many models tokenizer.chat_template = trl.get_training_chat_template("
    "tokenizer)), or set assistant_only_loss to false to train on the other turns too."
)
OTHERWISE = (
    "message {} reads otherwise when others follow it, as where earlier thinking is left out, or where the last turn "
    "ends in another way"
)

Span = tuple[int, int]  # of characters
Render = Callable[..., list[str]]  # chats -> what the template writes


def has_turns(responses: list[list[dict]]) -> bool:
    """Whether any response is more than one message of the assistant."""
    return any([message["role"] for message in response] != ["assistant"] for response in responses)


def encode_turns(
    chats: list[list[dict]], begins: list[int | None], apply: Callable, template: str, where: str
) -> Iterator[tuple[list[int], list[bool] | None]]:
    """Token ids of each chat, and which of them the assistant wrote or None.

    Args:
        begins: from which message of each chat on the assistant's tokens are asked for; None where they are not.
        apply: the tokenizer's `apply_chat_template` with its options.
        template: the text of the chat template.
        where: what an error begins with.

    Raises:
        ValueError: the template does not tell which tokens these are.
        TemplateError: it refuses the chats.
    """
    asked = {
        i: [n for n in range(begin, len(chats[i])) if chats[i][n]["role"] == "assistant"]
        for i, begin in enumerate(begins)
        if begin is not None
    }
    if MARKS.search(template):
        encoded = apply(chats, return_dict=True, return_assistant_tokens_mask=True)
        found = {i: list(map(bool, encoded["assistant_masks"][i])) for i in asked}
        if any(turns and not any(found[i]) for i, turns in asked.items()):
            raise ValueError(f"{where}: {UNSAID.format('its generation marks mark nothing')}")
    else:
        encoded = apply(chats, return_dict=True, tokenizer_kwargs={"return_offsets_mapping": True})
        render = partial(apply, tokenize=False)
        spans = {i: _spans(chats[i], turns, render, where) for i, turns in asked.items()}
        found = {i: _within(encoded["offset_mapping"][i], own) for i, own in spans.items()}
    return ((ids, found.get(i)) for i, ids in enumerate(encoded["input_ids"]))


def _spans(chat: list[dict], turns: list[int], render: Render, where: str) -> list[Span]:
    """Where these messages, which are the assistant's, lie in what the template writes for the chat."""
    if not turns:
        return []
    try:
        befores = render([chat[:i] for i in turns])
        asked = render([chat[:i] for i in turns], add_generation_prompt=True)
        *ends, whole = render([*(chat[: i + 1] for i in turns), chat])
    except TemplateError as error:
        raise ValueError(f"{where}: {UNSAID.format(f'it refuses the beginnings of this chat ({error})')}") from error
    spans = []
    for i, before, head, end in zip(turns, befores, asked, ends, strict=True):
        if not (head.startswith(before) and end.startswith(before) and whole.startswith(end)):
            raise ValueError(f"{where}: {UNSAID.format(OTHERWISE.format(i + 1))}")
        # Some templates ask for an answer with more than an answer begins with.
        header = commonprefix([head[len(before) :], end[len(before) :]])
        spans.append((len(before) + len(header), len(end)))
    return spans


def _within(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """Which tokens lie in the spans, in part at least."""
    begins, ends = np.asarray(offsets).T
    inside = np.zeros(len(offsets), bool)
    for begin, end in spans:
        inside |= (begins < end) & (ends > begin)
    return inside.tolist()
