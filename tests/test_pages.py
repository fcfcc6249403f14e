"""The one page and its parts: complete, escaped, without a network; intervals and tables as text."""

import re
from html.parser import HTMLParser

from trainers.pages import plots
from trainers.pages.page import blocks, write
from trainers.pages.text import interval, markdown

HOSTILE = "<script>alert('x')</script> & <img src=http://example.com/a.png>"


class Page(HTMLParser):
    """Collects the tags, their attributes and the text outside <style>; tags must close in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def check_page(html: str) -> Page:
    """The parsed page, which refers to nothing outside itself."""
    parsed = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in parsed.tags}
    for _, attributes in parsed.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"url\((?!#)|@import", html)
    return parsed


def test_every_block_escapes_what_it_is_given(tmp_path):
    picture = plots.chart(HOSTILE, HOSTILE, [plots.Series(HOSTILE, [1, 2], [3, 4])], level=(3, HOSTILE))
    left = blocks.edits([("", "a"), ("del", HOSTILE)])
    parts = [
        HOSTILE,
        "",
        blocks.heading(HOSTILE),
        blocks.table([HOSTILE, HOSTILE], [[HOSTILE, HOSTILE]]),
        blocks.settings({HOSTILE: HOSTILE}),
        blocks.cards([(HOSTILE, HOSTILE, HOSTILE)]),
        blocks.alarm(HOSTILE),
        blocks.prompt(HOSTILE),
        blocks.pair(HOSTILE, [("", HOSTILE, left), ("after", "b", HOSTILE)]),
        blocks.figures(["", picture]),
    ]
    sections = {"": parts, "not shown": ["", blocks.figures([""])], "shown": ["so"]}
    html = write(tmp_path / "page.html", HOSTILE, sections).read_text()
    assert "not shown" not in html and "<h2>shown</h2>\n<p>so</p>" in html
    shown = check_page(html)
    assert shown.text.replace("\xa0", " ").count(HOSTILE) == 19 + 4 and html.count("<figure>") == 1
    assert [attributes["aria-label"] for tag, attributes in shown.tags if tag == "svg"] == [HOSTILE]


def test_pictures_are_the_same_for_the_same_figures_and_draw_intervals():
    points = [{"mean": 1.0, "low": 0.5, "high": 2.5}, {"mean": 2.0, "low": None, "high": None}, 3]
    first, second = (plots.chart("t", "x", [plots.Series("a", [0, 1, 2], points)]) for _ in range(2))
    assert "#ffffff" in first and "#000000" in first  # as a file it has paper and ink, on a page those of the page
    assert not re.search(r": #(ffffff|000000|1c2430|e3e7ee)", blocks.figures([first]))
    assert first == second and first.startswith("<svg") and "2.5" in first
    assert plots._spread(points)[1].tolist() == [[0.5, 0, 0], [1.5, 0, 0]]
    assert plots.chart("t", "x", [plots.Series("a", [], [])]) == ""


def test_intervals_and_tables_as_text():
    value = {"mean": 0.1234, "low": -0.05, "high": 0.3}
    assert interval(value, "+.2f") == "+0.12 [-0.05, +0.30]"
    assert interval(value | {"low": None, "high": None}) == "0.123" and interval(None) == ""
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
