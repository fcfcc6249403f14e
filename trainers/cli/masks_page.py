"""The page of scripts/show_masks.py: tokens on a coloured ground, and curves over training, in one file."""

import io
from html import escape
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

MAPS = (  # title, and the value of a token from its terms
    ("reward mask m_u", lambda v, t: v["reward_mask"][t]),
    ("KL mask m_d", lambda v, t: v["kl_mask"][t]),
    ("m_u × log-ratio", lambda v, t: v["reward_mask"][t] * v["logratios"][t]),
    ("m_d × KL", lambda v, t: v["kl_mask"][t] * v["kls"][t]),
)
BLUE, RED = (31, 111, 235), (209, 36, 47)
CURVES = (
    ("mask_sparsity", "Exact zeros among response tokens, %"),
    ("mask_mean", "Mean mask value"),
    ("kl", "KL of a response, nats"),
    ("masked_kl", "Masked KL of a response, nats"),
)
LINES = {"reward_chosen": ("#1f6feb", "-"), "reward_rejected": ("#1f6feb", "--"), "kl_chosen": ("#d1242f", "-"),
         "kl_rejected": ("#d1242f", "--"), "chosen": ("#1c2430", "-"), "rejected": ("#1c2430", "--")}  # fmt: skip

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1240px; padding: 20px; background: #fff; color: #1c2430;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 1.8em 0 .5em; border-bottom: 2px solid #e3e7ee; }
h3 { font-size: .95rem; margin: .2em 0 .3em; } .key { margin: 1em 0 0; } small { color: #5b6675; font-weight: normal; }
.prompt { white-space: pre-wrap; background: #f8fafc; border: 1px solid #d9dfe8; border-radius: 8px; padding: 8px 12px;
  max-height: 9em; overflow: auto; }
.pair, .curves { display: grid; gap: 18px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; font-size: .93rem; }
.tokens span { border-radius: 3px; padding: 1px 0; }
.scale { display: inline-block; width: 90px; height: 10px; border: 1px solid #d9dfe8; vertical-align: middle; }
figure { margin: 0; border: 1px solid #d9dfe8; border-radius: 8px; padding: 6px; }
figure svg { display: block; width: 100%; height: auto; }
"""


class Heatmap(NamedTuple):
    """One row: its number, its prompt, and by side ("chosen", "rejected") the texts of the tokens and their values."""

    row: int
    prompt: str
    sides: dict[str, tuple[list[str], dict[str, list[float]]]]


def render(title: str, heatmaps: list[Heatmap], history: list[dict]) -> str:
    """The whole page; `history` is the trainer's log."""
    logs = [log for log in history if "loss" in log]
    parts = [f"<h1>{escape(title)}</h1>", curves(logs)]
    parts += [heatmap_section(heatmap) for heatmap in heatmaps]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def heatmap_section(heatmap: Heatmap) -> str:
    """A row's prompt and its two responses side by side, once per map; both sides share a map's scale."""
    blocks = []
    for title, value in MAPS:
        values = {side: [value(v, t) for t in range(len(tokens))] for side, (tokens, v) in heatmap.sides.items()}
        top = max((abs(x) for side in values.values() for x in side), default=0.0)
        sides = [
            f"<div><h3>{escape(title)}, {side} <small>{summary(values[side])}</small></h3>"
            f'<div class="tokens">{spans(tokens, values[side], top)}</div></div>'
            for side, (tokens, _) in heatmap.sides.items()
        ]
        blocks.append(f'<p class="key">{key(top, signed=min(min(v, default=0) for v in values.values()) < 0)}</p>')
        blocks.append(f'<div class="pair">{"".join(sides)}</div>')
    return f'<h2>Row {heatmap.row}</h2><div class="prompt">{escape(heatmap.prompt)}</div>' + "".join(blocks)


def spans(tokens: list[str], values: list[float], top: float) -> str:
    """Tokens as spans; a token's number is shown when the pointer rests on it."""
    return "".join(
        f'<span style="background:{colour(value, top)}" title="{value:.4g}">{escape(shown(token))}</span>'
        for token, value in zip(tokens, values, strict=True)
    )


def colour(value: float, top: float) -> str:
    """White at 0, blue upwards, red downwards, full at `top`."""
    share = min(1.0, abs(value) / top) if top > 0 else 0.0
    red, green, blue = BLUE if value >= 0 else RED
    return f"rgba({red},{green},{blue},{0.75 * share:.3f})"


def shown(token: str) -> str:
    return token.replace("\n", "↵\n") or "∅"


def summary(values: list[float]) -> str:
    zeros = sum(value == 0 for value in values)
    mean = sum(values) / max(1, len(values))
    return f"{100 * zeros / max(1, len(values)):.0f} % zeros, mean {mean:.3g}, sum {sum(values):.3g}"


def key(top: float, *, signed: bool) -> str:
    ends = [colour(-top, top), "#fff", colour(top, top)] if signed else ["#fff", colour(top, top)]
    low = f"{-top:.3g}" if signed else "0"
    scale = f'<span class="scale" style="background:linear-gradient(90deg,{",".join(ends)})"></span>'
    return f"<small>{low} {scale} {top:.3g}</small>"


def curves(logs: list[dict]) -> str:
    figures = [curve(logs, prefix, title) for prefix, title in CURVES]
    figures = [figure for figure in figures if figure]
    return f'<h2>Over training</h2><div class="curves">{"".join(figures)}</div>' if figures else ""


def curve(logs: list[dict], prefix: str, title: str) -> str:
    """A picture of what was logged under `prefix`, empty if nothing was."""
    names = [name for name in LINES if any(f"{prefix}/{name}" in log for log in logs)]
    if not names:
        return ""
    matplotlib.rcParams["svg.hashsalt"] = "polypo"
    figure = Figure(figsize=(5.4, 2.9), layout="constrained")
    axes = figure.add_subplot()
    for name in names:
        points = [(log["step"], log[f"{prefix}/{name}"]) for log in logs if f"{prefix}/{name}" in log]
        tone, line = LINES[name]
        axes.plot(*zip(*points, strict=True), color=tone, ls=line, lw=1.5, label=name.replace("_", ", "))
    axes.set(title=title, xlabel="step")
    axes.set_ylim(bottom=0)
    axes.grid(color="#e3e7ee")
    axes.legend(frameon=False, fontsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"
