"""A report as one HTML file that needs nothing but itself; page.html has all the markup and the style.

    write(path, "Title", {"": ["A sentence."], "Part": [blocks.table(["name", "value"], rows), blocks.figures([svg])]})

Everything is escaped but what the blocks and `plots.svg` made.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..runs.files import write_atomic

Sections = dict[str, list[str]]  # parts of a page by their headings

blocks: Any = (  # the template's macros are its attributes: heading, table, settings, cards, figures, ...
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


def write(path: Path, title: str, sections: Mapping[str, Sequence[str]]) -> Path:
    """The page in a file, atomically; returns its path.

    `sections` are the parts by their headings, of which the first may be "". A part that is plain text becomes a
    paragraph; empty parts, and headings of nothing else, are left out.
    """
    write_atomic(path, f"{blocks.page(title, sections)}\n".encode())
    return path
