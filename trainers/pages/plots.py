"""Pictures of reports: SVG that is the same for the same figures, whose text stays text."""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#0a7b83", "#57606a")
BEFORE, AFTER, INK, GRID = "#8a94a6", COLOURS[0], "#1c2430", "#e3e7ee"


class Series(NamedTuple):
    """What one line of a chart shows; x and y are numbers, or intervals of `trainers.statistics`, drawn as bars.

    `style` is matplotlib's: "o-" points on a line, "--" a dashed line, "o" points; `notes` stand beside the points.
    """

    label: str
    x: Sequence[float | dict]
    y: Sequence[float | dict]
    style: str = "o-"
    colour: str | None = None
    notes: Sequence[str] = ()


def panels(count: int = 1, *, size: tuple[float, float] = (4.8, 3.3), **options) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes beside each other; `options` are those of `Figure.subplots`."""
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False, **options)[0])
    for one in axes:
        one.grid(color=GRID)
        one.set_axisbelow(True)
        one.locator_params(axis="x", nbins=7)  # more labels would touch in a small picture
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw(axes: Axes, series: Sequence[Series], *, level: tuple[float, str] | None = None, **labels) -> None:
    """Draws the series into `axes` with a legend; `level` is a dashed line and its name, `labels` go to `axes.set`."""
    series = [line for line in series if len(line.x)]
    for line, default in zip(series, COLOURS * len(series), strict=False):
        colour = line.colour or default
        (x, xerr), (y, yerr) = _spread(line.x), _spread(line.y)
        axes.errorbar(x, y, xerr=xerr, yerr=yerr, fmt=line.style, color=colour, capsize=3, elinewidth=0.9,
                      markersize=5, label=line.label)  # fmt: skip
        for place, note in zip(zip(x, y, strict=True), line.notes, strict=False):
            axes.annotate(note, place, (5, 6), textcoords="offset points", fontsize=8, color=colour)
    if level is not None:
        axes.axhline(level[0], color=BEFORE, linestyle="--", linewidth=1, label=level[1])
    axes.set(**labels)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9)


def chart(title: str, xlabel: str, series: Sequence[Series], *, level: tuple[float, str] | None = None,
          size: tuple[float, float] = (4.8, 3.3), **labels) -> str:  # fmt: skip
    """A picture of one set of series, as SVG; "" where no series has a point."""
    if not any(len(line.x) for line in series):
        return ""
    figure, (axes,) = panels(size=size)
    draw(axes, series, level=level, xlabel=xlabel, **labels)
    return svg(figure, title)


def histogram(title: str, groups: Mapping[str, Sequence[float]], bins: Sequence[float] | np.ndarray,
              colours: Sequence[str] = COLOURS, *, marks: Sequence[float] = (), **labels) -> str:  # fmt: skip
    """The values of each group over each other; `marks` are dashed lines, `labels` go to `axes.set`."""
    figure, (axes,) = panels()
    for (label, values), colour in zip(groups.items(), colours, strict=False):
        axes.hist(values, list(bins), color=colour, alpha=0.55, label=label)
    for mark in marks:
        axes.axvline(mark, color=INK, linestyle="--", linewidth=1)
    axes.set(**labels)
    axes.legend(frameon=False, fontsize=9)
    return svg(figure, title)


def svg(figure: Figure, title: str = "") -> str:
    """<svg> for a file or for a page. `title` names it for those who cannot see, and heads a figure of one panel."""
    if title and len(figure.axes) == 1:
        figure.axes[0].set_title(title, loc="left", fontsize=11, color=INK)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "polypo", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])  # a page has several figures, ids are unique
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def _spread(values: Sequence[float | dict]) -> tuple[list[float], np.ndarray | None]:
    """Means, and the distances to the ends of the intervals (2,N) if any value is one."""
    means = [value["mean"] if isinstance(value, dict) else value for value in values]
    ends = [
        [value["low"], value["high"]] if isinstance(value, dict) and value["low"] is not None else [mean, mean]
        for value, mean in zip(values, means, strict=True)
    ]
    whole = any(isinstance(value, dict) for value in values)
    return means, np.abs(np.transpose(ends) - means) if whole else None
