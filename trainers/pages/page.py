"""A report as one HTML file that needs nothing but itself; page.html has all the markup and the style.

    write(path, "Title", "A sentence.", heading("Part"), table(["name", "value"], rows), figures([svg, svg]))

A part that is plain text becomes a paragraph. Everything is escaped but what the blocks and `plots.svg` made.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..runs.files import write_atomic

_BLOCKS: Any = (  # the template's macros are its attributes
    Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    .get_template("page.html")
    .module
)


def render(title: str, *parts: str) -> str:
    """The whole page: `title` as its heading, then the parts in order. Empty parts are left out."""
    blocks = [part if isinstance(part, Markup) else _BLOCKS.paragraph(part) for part in parts if part]
    return str(_BLOCKS.page(title, blocks)) + "\n"


def write(path: Path, title: str, *parts: str) -> Path:
    """`render` into a file, atomically; returns its path."""
    write_atomic(path, render(title, *parts).encode())
    return path


def heading(text: str, level: int = 2) -> Markup:
    return _BLOCKS.heading(text, level)


def table(head: list[str], rows: list[list[str]], *, numbers: bool = True) -> Markup:
    """A cell may be text or markup. With `numbers` every column after the first stands right."""
    return _BLOCKS.table(head, rows, numbers)


def settings(values: dict) -> Markup:
    """A table of names and values."""
    return _BLOCKS.settings(values)


def cards(rows: list[tuple[str, str, str]]) -> Markup:
    """What the reader shall see first: (name, figure in large, remark)."""
    return _BLOCKS.cards(rows)


def figures(svgs: list[str]) -> Markup:
    """Pictures of `plots`, beside each other where there is room; "" for none."""
    shown = [Markup(svg) for svg in svgs if svg]
    return _BLOCKS.figures(shown) if shown else Markup()


def alarm(text: str) -> Markup:
    """A sentence that must not be overlooked."""
    return _BLOCKS.alarm(text)


def prompt(text: str) -> Markup:
    """A text as it is, with its line breaks."""
    return _BLOCKS.prompt(text)


def edits(parts: list[tuple[str, str]]) -> Markup:
    """Text with what goes and what comes: (tag "", "del" or "ins", text)."""
    return _BLOCKS.edits(parts)


def pair(text: str, sides: list[tuple[str, str, str]]) -> Markup:
    """A prompt and two texts that are compared: (CSS class "" or "after", caption, text) of each side."""
    return _BLOCKS.pair(text, sides)


def heatmap(title: str, scale: list[tuple[str, str]], sides: list[tuple[str, str, list]]) -> Markup:
    """Texts on coloured ground, beside each other.

    `scale` has (label, CSS colour) from low to high; a side has its name, a remark, and its (text, value, colour).
    """
    return _BLOCKS.heatmap(title, scale, sides)
