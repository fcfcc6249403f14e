"""Prompts and responses to token ids, each response tokenised together with its prompt."""

from collections.abc import Callable
from inspect import signature
from itertools import groupby, islice
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .rows import TEMPLATE, UNFINISHED, Row, unfinished
from .turns import encode_turns, has_turns

# Of a prompt, of the prompt with each response, and which of the latter are the assistant's, None for all.
Encoded = tuple[list[int], list[list[int]], list[list[bool]] | None]
PASSED = {"chat_template", "documents", "tools"}  # of `apply_chat_template`: what the template is and is given


def encode(
    rows: list[Row], where: str, tokenizer, template_kwargs: dict[str, Any], assistant_only_loss: bool
) -> list[Encoded]:
    """Neighbours with the same options in one call; an error of several rows names the first one."""
    encoded = []
    for _, alike in groupby(rows, lambda row: repr([isinstance(row["prompt"], list), *map(row.get, TEMPLATE)])):
        same = list(alike)
        if isinstance(same[0]["prompt"], list):
            options = chat_options(same[0], template_kwargs)
            encoded += _encode_chat(same, where, tokenizer, options, assistant_only_loss)
        elif own := [name for name in TEMPLATE if same[0].get(name)]:
            raise ValueError(
                f"{where}: {own[0]!r} is for the chat template, and the prompt is text: give messages, "
                "set as_chat, or remove the column."
            )
        else:
            encoded += _encode_text(same, where, tokenizer)
    return encoded


def chat_options(row: Row, template_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the chat template is given beside the messages; what the row says wins."""
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return template_kwargs | tools | (row.get("chat_template_kwargs") or {})


def chat_template(tokenizer, options: dict[str, Any]) -> Callable:
    """The tokenizer's `apply_chat_template` with these options; all that it raises is a TemplateError."""

    def apply(messages, **more):
        try:
            return tokenizer.apply_chat_template(messages, **options | more)
        except TemplateError:
            raise
        except Exception as error:  # a template fails as the methods and filters do that it calls
            raise TemplateError(f"{type(error).__name__}: {error}") from error

    return apply


def token_ids(tokenizer, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]:
    """What `tokenizer(texts)` gives; nobody asks where the tokens stand, which takes a quarter of its time."""
    options = {"add_special_tokens": add_special_tokens}
    own = type(tokenizer).__call__ is not PreTrainedTokenizerBase.__call__
    if not own and isinstance(tokenizer, PreTrainedTokenizerFast):
        first = tokenizer(texts[:1], verbose=False, **options)["input_ids"]  # then the backend cuts and pads nothing
        ids = [some.ids for some in tokenizer.backend_tokenizer.encode_batch_fast(texts, **options)]
        if ids[:1] == first:  # a class may change texts further inside
            return ids
    return tokenizer(texts, verbose=False, **options)["input_ids"]


def text_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, with one BOS and without the EOS that some tokenizers end every text with."""
    *ids, probe = token_ids(tokenizer, [*texts, "a"], add_special_tokens=True)
    if probe[-1:] == [tokenizer.eos_token_id]:
        ids = [some[:-1] for some in ids]
    bos = tokenizer.bos_token_id
    # A text that was written with a template may begin with BOS, and the tokenizer adds another.
    return [some[1:] if bos is not None and some[:2] == [bos, bos] else some for some in ids]


def _encode_text(rows: list[Row], where: str, tokenizer) -> list[Encoded]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            f"{where} is text, and the tokenizer has no EOS token to end a response with; set tokenizer.eos_token."
        )
    texts = [row["prompt"] + end for row in rows for end in ["", *map(_whole, row["responses"], unfinished(row))]]
    ids = iter(text_ids(tokenizer, texts))
    encoded: list[Encoded] = []
    for row in rows:
        prompt_ids, *full_ids = islice(ids, 1 + len(row["responses"]))
        full_ids = [some[:-1] if some[-1:] == [eos] else some for some in full_ids]
        ends = ([] if cut else [eos] for cut in unfinished(row))
        encoded.append((prompt_ids, [some + end for some, end in zip(full_ids, ends, strict=True)], None))
    return encoded


def _whole(response: str, is_unfinished: bool) -> str:
    """Without what a limit leaves of a character of several tokens."""
    return response.rstrip("\ufffd") if is_unfinished else response


def _encode_chat(
    rows: list[Row], where: str, tokenizer, options: dict[str, Any], assistant_only_loss: bool
) -> list[Encoded]:
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where} has messages but the tokenizer has no chat template; use the tokenizer of an instruct model, "
            "set tokenizer.chat_template, or give prompts and responses as text in all rows."
        )
    if own := sorted(options.keys() & signature(tokenizer.apply_chat_template).parameters.keys() - PASSED):
        raise ValueError(
            f"{where}: {own[0]!r} in chat_template_kwargs is an option of the tokenizer and no variable of the "
            "template: leave it out. What is cut is said by max_length and the options beside it."
        )
    tools = options.get("tools")
    template = tokenizer.get_chat_template(options.get("chat_template"), tools)
    if tools and "tools" not in template:
        raise ValueError(
            f"{where}: it has 'tools', which the chat template does not write: use the tokenizer of a model "
            "that calls tools, or remove the column."
        )
    prompts = [without_none(row["prompt"]) for row in rows]
    chats = [
        prompt + without_none(response)
        for prompt, row in zip(prompts, rows, strict=True)
        for response in row["responses"]
    ]
    begins = [
        len(row["prompt"]) if assistant_only_loss and has_turns(row["responses"]) else None
        for row in rows
        for _ in row["responses"]
    ]
    apply = chat_template(tokenizer, options)
    try:
        prompt_ids = token_ids(tokenizer, apply(prompts, add_generation_prompt=True, tokenize=False))
        if any(begin is not None for begin in begins):
            pairs = encode_turns(chats, begins, apply, template, where)
        else:
            pairs = ((ids, None) for ids in token_ids(tokenizer, apply(chats, tokenize=False)))
    except TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses these messages: {error}.") from error
    encoded: list[Encoded] = []
    for row, ids in zip(rows, prompt_ids, strict=True):
        full_ids, masks = map(list, zip(*islice(pairs, len(row["responses"])), strict=True))
        encoded.append((ids, full_ids, None if masks[0] is None else masks))
    _without_ends(rows, where, encoded, tokenizer)
    return encoded


def _without_ends(rows: list[Row], where: str, encoded: list[Encoded], tokenizer) -> None:
    """Unfinished responses lose what ends a response, so that no stop is learned where none was."""
    places = [(i, k) for i, row in enumerate(rows) for k, cut in enumerate(unfinished(row)) if cut]
    responses = [rows[i]["responses"][k] for i, k in places]
    if any(len(response) > 1 for response in responses):
        raise ValueError(
            f"{where}: {UNFINISHED} marks a response of several messages: mark those of one message only."
        )
    # What a template writes after a message cannot be told from the message, so these go without the template.
    texts = [_whole(response[0]["content"], True) for response in responses]
    ids = token_ids(tokenizer, texts) if texts else []
    for (i, k), some in zip(places, ids, strict=True):
        prompt_ids, full_ids, masks = encoded[i]
        full_ids[k] = [*prompt_ids, *some]
        if masks is not None:
            masks[k] = [False] * len(prompt_ids) + [True] * len(some)


def without_none(messages: list[dict]) -> list[dict]:
    """A table gives every message all keys that any message has; templates ask whether a key is defined."""
    return [{key: value for key, value in m.items() if value is not None or key == "content"} for m in messages]
