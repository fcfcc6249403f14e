"""Helpers of the SGPO report until it stands on trainers.pages."""

import io
import re
from html import escape

import matplotlib
from matplotlib.figure import Figure

BEFORE, AFTER, INK, GRID = "#8a94a6", "#1f6feb", "#1c2430", "#e3e7ee"

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 24px 20px 64px; background: #fff; color: #1c2430;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .4em 0 .3em; }
h2 { font-size: 1.3rem; margin: 2.2em 0 .6em; padding-bottom: .25em; border-bottom: 2px solid #e3e7ee; }
h3 { font-size: 1.02rem; margin: 1.6em 0 .5em; }
p, li { max-width: 75ch; }
.muted { color: #5b6675; }
.cards, .figures { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.card { border: 1px solid #d9dfe8; border-radius: 10px; padding: 14px 18px; background: #f8fafc; }
.card b { display: block; font-size: 1.75rem; line-height: 1.25; color: #0f4fb8; }
figure { margin: 0; border: 1px solid #d9dfe8; border-radius: 10px; padding: 10px; }
figure svg { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .94rem; }
th, td { text-align: left; padding: 6px 10px 6px 0; border-bottom: 1px solid #e3e7ee; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
.whole { white-space: nowrap; display: inline-block; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: #f1f4f8; padding: 1px 5px;
  border-radius: 4px; }
.sample { border: 1px solid #d9dfe8; border-radius: 10px; margin: 0 0 14px; padding: 12px 16px; }
.pair { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.answer { border-left: 4px solid #8a94a6; padding-left: 12px; white-space: pre-wrap; }
.answer.after { border-color: #1f6feb; }
.answer small { display: block; color: #5b6675; }
@media (max-width: 560px) { body { padding: 14px 14px 48px; } h1 { font-size: 1.5rem; }
  table { font-size: .84rem; } th, td { padding-right: 6px; } }
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML already. Numbers stand right, so every column after the first does in tables of figures."""
    numeric = head[0] != "Setting"

    def line(tag: str, cells: list[str]) -> str:
        right = ' class="number"' if numeric else ""
        return "<tr>" + "".join(f"<{tag}{right if i else ''}>{c}</{tag}>" for i, c in enumerate(cells)) + "</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def figures(svgs: list[str]) -> str:
    return '<div class="figures">' + "".join(f"<figure>{svg}</figure>" for svg in svgs) + "</div>"


def new_figure(title: str, xlabel: str):
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=12, color=INK)
    axes.set_xlabel(xlabel)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def to_svg(figure: Figure, title: str) -> str:
    """An inline <svg> that scales with its box; text stays text, and nothing refers to the outside."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "polypo", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    svg = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])  # one page has several figures, ids are unique
    return re.sub(r'^<svg[^>]*(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{escape(title)}">', svg)
