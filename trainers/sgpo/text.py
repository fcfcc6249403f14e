"""What the reviser and the improver are asked, and how a revision is read from an answer.

The templates of the paper are unknown: these are ours. A changed text is a new constant, because its hash is kept with
the data that it made. Texts stand between delimiters that occur in none of them, so that no prompt or response can end
its own block.
"""

from ..generation.sampler import Prompt

IMPROVER_V1 = """Improve the response to the prompt below. Keep what is right and make it more helpful, correct and \
clear. Keep roughly its length. Write only the improved response.

{prompt}

{response}"""

REVISER_V1 = """You edit answers. Below are a prompt, a draft that answers it and a reference answer of good quality. \
Edit the draft so that it becomes a little, but noticeably, better. Keep its wording, order and length where they are \
fine, and correct what the reference shows to be wrong or missing. Do not paste the reference.

{prompt}

{draft}

{reference}

First name in one or two sentences what should change. Then write a line with nothing but {marker} on it, and after \
it the revised draft and nothing else."""

# For small models: the instruction last, and nothing but the answer to write.
REVISER_DIRECT_V1 = """{prompt}

{draft}

{reference}

The draft above answers the prompt, and the reference is a good answer to it. Rewrite the draft so that it becomes a \
little, but noticeably, better. Keep its wording, order and length where they are fine, and correct what the \
reference shows to be wrong or missing. Do not paste the reference. Write only the rewritten draft, without a word \
about it."""

MARKER = "<<REVISED>>"
BLOCKS = ("prompt", "response", "draft", "reference", "system", "user", "assistant", "tool")
PLAIN_CUE = "\n\nResponse:\n"  # where a model without a chat template begins to write


def improver_prompt(prompt: Prompt, response: str) -> Prompt:
    """m(x, y): one user turn with the instruction, the prompt and the response; text if `prompt` is text."""
    return _ask(IMPROVER_V1, prompt, {"response": response})


def reviser_prompt(prompt: Prompt, draft: str, reference: str, *, analysis: bool = True) -> Prompt:
    """What the reviser sees. With `analysis` its answer is to be read by `parse_revision` with `free_marker`."""
    marker = free_marker([*_contents(prompt), draft, reference])
    template = REVISER_V1 if analysis else REVISER_DIRECT_V1
    return _ask(template, prompt, {"draft": draft, "reference": reference}, marker=marker)


def parse_revision(output: str, marker: str | None) -> str | None:
    """The text after the one marker; None without a marker, with several, or with nothing after it.

    `marker` None takes the whole output.
    """
    parts = ["", output] if marker is None else output.split(marker)
    return parts[1].strip() or None if len(parts) == 2 else None


def free_marker(texts: list[str]) -> str:
    """The marker, numbered so that it occurs in none of the texts."""
    return _marker(_free_number(texts, lambda number: [_marker(number)]))


def turns(prompt: Prompt) -> list[dict]:
    """The messages of a prompt; a text is one user message.

    Raises:
        ValueError: a message whose content is no text.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for message in messages:
        if not isinstance(message.get("content"), str):
            raise ValueError(f"a message of role {message.get('role')!r} has no text as content: SGPO needs text.")
    return messages


def _ask(template: str, prompt: Prompt, texts: dict[str, str], **fields: str) -> Prompt:
    messages = turns(prompt)
    number = _free_number(
        [*_contents(prompt), *texts.values()], lambda number: [side for b in BLOCKS for side in _sides(b, number)]
    )

    def block(name: str, text: str) -> str:
        first, last = _sides(name, number)
        return f"{first}\n{text.strip()}\n{last}"

    shown = messages[0]["content"]
    if len(messages) > 1:
        shown = "\n".join(block(message["role"], message["content"]) for message in messages)
    blocks = {name: block(name, text) for name, text in ({"prompt": shown} | texts).items()}
    content = template.format(**blocks, **fields)
    return content + PLAIN_CUE if isinstance(prompt, str) else [{"role": "user", "content": content}]


def _contents(prompt: Prompt) -> list[str]:
    return [message["content"] for message in turns(prompt)]


def _free_number(texts: list[str], signs) -> int:
    """The smallest number whose `signs(number)` occur in no text."""
    number = 1
    while any(sign in text for sign in signs(number) for text in texts):
        number += 1
    return number


def _sides(name: str, number: int) -> tuple[str, str]:
    label = name if number == 1 else f"{name} {number}"
    return f"[[{label}]]", f"[[/{label}]]"


def _marker(number: int) -> str:
    return MARKER if number == 1 else f"{MARKER[:-2]} {number}>>"
