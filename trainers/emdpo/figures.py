"""Pictures of a run: who is of which type, how the likelihood rose, and what each type regrets."""

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..runs.files import write_atomic

COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#0a7b83", "#57606a")


def draw_run(folder: Path, posteriors: list[np.ndarray], histories: list[list[dict]]) -> None:
    """responsibilities.svg and log_likelihood.svg from each round's posterior (N,T) and each run's manifests."""
    write_atomic(folder / "responsibilities.svg", responsibilities(posteriors).encode())
    write_atomic(folder / "log_likelihood.svg", log_likelihood(histories).encode())


def responsibilities(posteriors: list[np.ndarray]) -> str:
    """A map of annotators by types for up to five rounds; annotators are sorted by their last posterior."""
    shown = shown_rounds(len(posteriors))
    last = posteriors[-1]
    order = np.lexsort((-last.max(1), last.argmax(1)))
    figure = Figure(figsize=(1.7 + 1.25 * len(shown), 4.6), layout="constrained")
    for axes, index in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        # From 0 to N, so that the axis counts annotators.
        image = axes.imshow(posteriors[index][order], aspect="auto", cmap="Blues", vmin=0, vmax=1,
                            interpolation="nearest", extent=(-0.5, last.shape[1] - 0.5, len(last), 0))  # fmt: skip
        axes.set_title(f"round {index + 1}", fontsize=10)
        axes.set_xticks(range(last.shape[1]))
        axes.set_xlabel("type")
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.tick_params(labelleft=index == 0, left=index == 0)
    figure.axes[0].set_ylabel("annotators, sorted by their last type")
    figure.colorbar(image, ax=figure.axes[-1], label="probability of the type", fraction=0.3)
    return to_svg(figure)


def shown_rounds(count: int) -> list[int]:
    """Indices of at most five rounds: the first, the last, and what lies evenly between."""
    return sorted({round(i) for i in np.linspace(0, count - 1, 5).tolist()})


def log_likelihood(histories: list[list[dict]]) -> str:
    """Observed log-likelihood per row over rounds, one line per restart; dashed: rows of held-out annotators.

    Per row, because with held-out halves the first round scores fewer rows than the others.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for history, colour in zip(histories, COLOURS * len(histories), strict=False):
        rounds = [m["round"] + 1 for m in history]
        own = f", restart {history[0]['restart']}" if len(histories) > 1 else ""
        dot, square = ("o-", "s--") if len(rounds) <= 20 else ("-", "--")
        values = [m["log_likelihood_per_item"] for m in history]
        axes.plot(rounds, values, dot, color=colour, label=f"training rows{own}")
        if "held_out" in history[0]:
            values = [m["held_out"]["log_likelihood_per_item"] for m in history]
            axes.plot(rounds, values, square, color=colour, label=f"held-out rows{own}")
    axes.set_xlabel("round")
    axes.set_ylabel("log-likelihood per row, nats")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=9)
    return to_svg(_plain(figure))


def regret_bars(
    regrets: dict[str, np.ndarray], intervals: dict[str, tuple] | None = None, labels: list[str] | None = None
) -> str:
    """Regret of each type, one group of bars per policy or mixture: {name: (T,)} in nats, lower is better.

    `intervals` hold (low, high) of each name, `labels` the names of the types.
    """
    figure = Figure(figsize=(1.6 + 1.3 * len(regrets), 4), layout="constrained")
    axes = figure.subplots()
    types = len(next(iter(regrets.values())))
    width = 0.8 / types
    for k in range(types):
        places = np.arange(len(regrets)) + (k - (types - 1) / 2) * width
        errors = None
        if intervals is not None:
            errors = np.array([[regrets[n][k] - intervals[n][0][k], intervals[n][1][k] - regrets[n][k]]
                               for n in regrets]).T.clip(min=0)  # fmt: skip
        axes.bar(places, [values[k] for values in regrets.values()], 0.9 * width, yerr=errors, capsize=2,
                 color=COLOURS[k % len(COLOURS)], label=labels[k] if labels else f"type {k}")  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(regrets)), [name.replace(" ", "\n", 1) for name in regrets], fontsize=9)
    axes.set_ylabel("regret, nats per response")
    axes.legend(frameon=False, fontsize=9)
    return to_svg(_plain(figure))


def _plain(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.grid(color="#e3e7ee")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def to_svg(figure: Figure) -> str:
    """A file that is the same for the same figures."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "polypo", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
