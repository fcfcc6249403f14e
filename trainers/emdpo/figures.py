"""Pictures of a run: who is of which type, how the likelihood rose, and what each type regrets."""

import numpy as np

from ..pages.plots import COLOURS, Series, chart, panels, svg

SHOWN = 5  # rounds in the map of annotators: the first, the last, and what lies evenly between


def responsibilities(posteriors: list[np.ndarray]) -> str:
    """A map of annotators by types for some rounds; annotators are sorted by their last posterior."""
    shown = sorted({round(i) for i in np.linspace(0, len(posteriors) - 1, SHOWN).tolist()})
    last = posteriors[-1]
    order = np.lexsort((-last.max(1), last.argmax(1)))
    figure, axes = panels(len(shown), size=(1.7 + 1.25 * len(shown), 4.6), sharey=True)
    for one, index in zip(axes, shown, strict=True):
        # From 0 to N, so that the axis counts annotators.
        image = one.imshow(posteriors[index][order], aspect="auto", cmap="Blues", vmin=0, vmax=1,
                           interpolation="nearest", extent=(-0.5, last.shape[1] - 0.5, len(last), 0))  # fmt: skip
        one.grid(False)
        one.set(title=f"round {index + 1}", xlabel="type", xticks=range(last.shape[1]))
    axes[0].set_ylabel("annotators, sorted by their last type")
    figure.colorbar(image, ax=axes[-1], label="probability of the type", fraction=0.3)
    return svg(figure)


def log_likelihood(histories: list[list[dict]]) -> str:
    """Observed log-likelihood per row over rounds, one line per restart; dashed: rows of held-out annotators.

    Per row, because with held-out halves the first round scores fewer rows than the others.
    """
    lines, name = [], "log_likelihood_per_item"
    for history, colour in zip(histories, COLOURS * len(histories), strict=False):
        rounds = [m["round"] + 1 for m in history]
        own = f", restart {history[0]['restart']}" if len(histories) > 1 else ""
        lines.append(Series(f"training rows{own}", rounds, [m[name] for m in history], "o-", colour))
        if "held_out" in history[0]:
            values = [m["held_out"][name] for m in history]
            lines.append(Series(f"held-out rows{own}", rounds, values, "s--", colour))
    return chart("", "round", lines, ylabel="log-likelihood per row, nats")


def regrets(table: dict[str, dict]) -> str:
    """Regret of each type under each policy or mixture: {name: {"regret": (T,), and perhaps "low" and "high"}}."""
    rows, names = list(table.values()), list(table)
    lines = []
    for k in range(len(rows[0]["regret"])):
        ends = [(row["low"][k], row["high"][k]) if "low" in row else (None, None) for row in rows]
        values = [{"mean": row["regret"][k], "low": low, "high": high}
                  for row, (low, high) in zip(rows, ends, strict=True)]  # fmt: skip
        places = (np.arange(len(rows)) + 0.1 * k).tolist()
        lines.append(Series(f"type {k}", places, values, "o"))
    ticks = {"xticks": range(len(rows)), "xticklabels": [name.replace(" ", "\n", 1) for name in names]}
    size = (1.6 + 1.3 * len(rows), 4)
    return chart("", "", lines, level=(0, "its own policy"), size=size, ylabel="regret, nats per response", **ticks)
