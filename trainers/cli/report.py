"""Renders the page that `make demo` ends with; it needs nothing but itself, so it opens without a network.

    python scripts/report.py runs/demo

Reads results.json and trainer_state.json of the folder and writes report.html there.
"""

import io
import json
import re
import sys
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

BEFORE, AFTER, INK, GRID = "#8a94a6", "#1f6feb", "#1c2430", "#e3e7ee"
CURVES = (  # logged name, title, value that means nothing was learned
    ("loss", "Loss", None),
    ("rewards/margins", "Reward margin, best minus worst answer", 0),
    ("ranking/pairwise_accuracy", "Pairwise ranking accuracy", 0.5),
)
RANKINGS = {
    "after": "Trained policy: log-ratio to the base model",
    "before": "The same before training: all log-ratios are 0, so chance by construction",
}
SAMPLES_PER_GROUP = 3

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


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/report.py FOLDER")
    try:
        print(f"{write_report(Path(sys.argv[1]))} is ready.")
    except ValueError as error:
        sys.exit(f"error: {error}")


def write_report(folder: Path) -> Path:
    """Renders `folder`/report.html and returns its path.

    Raises:
        ValueError: results.json or trainer_state.json is missing.
    """
    files = {name: folder / name for name in ("results.json", "trainer_state.json")}
    for path in files.values():
        if not path.is_file():
            raise ValueError(f"there is no {path}: run scripts/demo.py first.")
    results, state = (json.loads(path.read_text()) for path in files.values())
    page = folder / "report.html"
    page.write_text(render(results, state["log_history"]), encoding="utf-8")
    return page


def render(results: dict, history: list[dict]) -> str:
    """The whole page, from the demo's results and the trainer's log."""
    parts = [
        headline(results),
        "<h2>Is there a trivial explanation?</h2>",
        explanations(results),
        "<h2>Answers to prompts that were not trained on</h2>",
        figures([reward_figure(results), gain_figure(results), length_figure(results)]),
        "<h2>When to stop</h2>",
        course(results["course"]),
        "<h2>Training</h2>",
        figures([curve_figure(history, *curve) for curve in CURVES]),
        "<h2>Side by side</h2>",
        side_by_side(results["answers"]),
        "<h2>Settings</h2>",
        settings(results),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>PolyPO demo</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def headline(results: dict) -> str:
    reward, ranking = results["generation"]["reward"], results["ranking"]["after"]
    clear = "clear of" if reward["gain"]["low"] > 0 else "not clear of"
    cards = (
        ("Mean reward", f"{reward['before']['mean']:.2f} → {reward['after']['mean']:.2f}", "sentiment, from -1 to 1"),
        ("Gain", f"{reward['gain']['mean']:+.2f}", f"95 % interval {interval(reward['gain'], '+.2f')}, {clear} zero"),
        ("Ranking accuracy", f"{ranking['mean']:.2f}", f"95 % interval {interval(ranking)}; chance is 0.50"),
    )
    shown = "".join(f'<div class="card">{a}<b>{b}</b><span class="muted">{c}</span></div>' for a, b, c in cards)
    model = escape(Path(results["config"]["model_name_or_path"]).name)
    return (
        "<h1>What SWEPO taught a small language model</h1>"
        f"<p>A LoRA adapter was trained on {model} with scored answers of the model itself. The reward is the "
        "sentiment of the text by VADER, so the lesson is to sound more positive. "
        f"All figures are from {len(results['answers'])} prompts that were not trained on, each sampled "
        f"{results['sampling']['num_generations']} times with the same random streams before and after. Intervals are "
        f'bootstrapped over prompts.</p><div class="cards">{shown}</div>'
    )


def explanations(results: dict) -> str:
    """The checks that could explain a gain away, as two tables."""
    rows = []
    for name, row in results["generation"].items():
        form = ".1f" if row["before"]["mean"] > 10 else ".3f"
        means = [f"{row[side]['mean']:{form}}" for side in ("before", "after")]
        gain = f"{row['gain']['mean']:+{form}} {interval(row['gain'], '+' + form)}"
        rows.append([escape(name[0].upper() + name[1:]), *means, gain])
    ranked = [
        [escape(RANKINGS.get(name, name[0].upper() + name[1:])), f"{v['mean']:.3f}", interval(v, ".3f")]
        for name, v in results["ranking"].items()
    ]
    checks = [
        [escape(name[0].upper() + name[1:]), f"{v['mean']:.3f}", interval(v, ".3f")]
        for name, v in results["checks"].items()
    ]
    return (
        "<p>A higher score could come from answers that are only longer, cut off, repetitive or full of exclamation "
        "marks.</p>"
        + table(["Mean over prompts", "Before", "After", "Change, 95 % interval"], rows)
        + f"<p>Share of pairs of given answers to {results['ranking']['after']['count']} of these prompts that are "
        "put in the order of their scores, ranked by:</p>"
        + table(["Ranking by", "Accuracy", "95 % interval"], ranked)
        + "<p>The gain with both answers of a pair cut to the length of the shorter one, and how far the trained "
        "model's answers are from the base model's language:</p>"
        + table(["Estimate", "Value", "95 % interval"], checks)
    )


def course(points: list[dict]) -> str:
    """What every further step gave and cost, on prompts that are held out for this."""
    columns = {
        "reward": ("Reward", ".2f"),
        "gain at equal length": ("Gain at equal length", "+.2f"),
        "KL": ("KL, nats", ".1f"),
        "length in tokens": ("Tokens", ".0f"),
        "share cut off at the limit": ("Cut off", ".0%"),
    }
    rows = [
        [
            str(p["step"]),
            *(f"{p[name]['mean']:{form}} {interval(p[name], form)}" for name, (_, form) in columns.items()),
        ]
        for p in points
    ]
    return (
        "<p>Checkpoints of the training answer prompts that are neither trained on nor used above. KL is the mean "
        "log-ratio of these answers to the base model: what the policy has moved. Where the reward grows more slowly "
        "than KL, and answers are cut off, more training stops paying.</p>"
        + figures(
            [
                course_figure(
                    points, "Reward against distance from the base model", ("reward", "gain at equal length")
                ),
                course_figure(points, "Answers cut off at the limit", ("share cut off at the limit",)),
            ]
        )
        + table(["Step", *(title for title, _ in columns.values())], rows)
    )


def course_figure(points: list[dict], title: str, names: tuple[str, ...]) -> str:
    """Measures of the checkpoints against KL."""
    figure, axes = new_figure(title, "KL to the base model, nats per answer")
    kl = [p["KL"]["mean"] for p in points]
    for name, colour in zip(names, (AFTER, BEFORE), strict=False):
        means = [p[name]["mean"] for p in points]
        spread = [[abs(p[name]["mean"] - p[name][side]) for p in points] for side in ("low", "high")]
        axes.errorbar(kl, means, yerr=spread, fmt="o-", color=colour, capsize=4, label=name)
    for x, p in zip(kl, points, strict=True):
        place = {"textcoords": "offset points", "xytext": (5, 6), "fontsize": 8}
        axes.annotate(f"step {p['step']}", (x, p[names[0]]["mean"]), **place)
    axes.legend(frameon=False, fontsize=9)
    return to_svg(figure, title)


def side_by_side(answers: list[dict]) -> str:
    """Samples picked by a rule, so that they are no advertisement."""
    pairs = [(row["prompt"], row["before"][0], row["after"][0]) for row in answers]
    pairs.sort(key=lambda pair: pair[2]["score"] - pair[1]["score"], reverse=True)
    size, middle = SAMPLES_PER_GROUP, len(pairs) // 2 - SAMPLES_PER_GROUP // 2
    groups = {
        "Largest gains": pairs[:size],
        "In the middle": pairs[max(middle, 0) : max(middle, 0) + size],
        "Largest losses": pairs[-size:][::-1],
    }
    rule = (
        f"The first answer to each prompt, sorted by the change of its reward: the {size} largest gains, "
        f"the {size} in the middle and the {size} largest losses. Nothing was picked by hand."
    )
    shown = "".join(f"<h3>{name}</h3>{''.join(map(sample, group))}" for name, group in groups.items())
    return f"<p>{rule}</p>{shown}"


def sample(pair: tuple[str, dict, dict]) -> str:
    prompt, *answers = pair
    shown = "".join(
        f'<div class="answer {name}"><small>{name}, reward {a["score"]:+.2f}, {a["tokens"]} tokens'
        f"{', cut off' if a['truncated'] else ''}</small>{escape(a['text'].strip())}</div>"
        for name, a in zip(("before", "after"), answers, strict=True)
    )
    return f'<div class="sample"><p><b>{escape(prompt)}</b></p><div class="pair">{shown}</div></div>'


def settings(results: dict) -> str:
    def items(values: dict) -> str:
        return table(["Setting", "Value"], [[f"<code>{escape(k)}</code>", escape(str(v))] for k, v in values.items()])

    seconds = {name: f"{value:.0f} s" for name, value in results["seconds"].items()}
    return (
        f"<p>Made {escape(results['created'])} by <code>make demo</code>; training ran <code>"
        f"{escape(results['train_command'])}</code></p><p>{escape(results['estimate'])}</p>"
        f"<h3>Training</h3>{items(results['config'])}<h3>Sampling and scoring</h3>{items(results['sampling'])}"
        f"<h3>Time of each stage</h3>{items(seconds)}<h3>Machine and versions</h3>"
        f"{items(results['machine'] | results['versions'])}"
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML already. Numbers stand right, so every column after the first does in tables of figures."""
    numeric = head[0] != "Setting"

    def line(tag: str, cells: list[str]) -> str:
        right = ' class="number"' if numeric else ""
        return "<tr>" + "".join(f"<{tag}{right if i else ''}>{c}</{tag}>" for i, c in enumerate(cells)) + "</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def interval(value: dict, form: str = ".2f") -> str:
    return f'<span class="whole">[{value["low"]:{form}}, {value["high"]:{form}}]</span>'


def figures(svgs: list[str]) -> str:
    return '<div class="figures">' + "".join(f"<figure>{svg}</figure>" for svg in svgs) + "</div>"


def curve_figure(history: list[dict], name: str, title: str, nothing: float | None) -> str:
    """A logged training metric, and its held-out value where it was evaluated."""
    figure, axes = new_figure(title, "step")
    for key, label, style in ((name, "training", "-"), (f"eval_{name}", "held-out", "o")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=AFTER if style == "-" else INK, label=label)
    if nothing is not None:
        axes.axhline(nothing, color=BEFORE, linestyle="--", linewidth=1, label="nothing learned")
    axes.legend(frameon=False, fontsize=9)
    return to_svg(figure, title)


def reward_figure(results: dict) -> str:
    title = "Reward of the answers"
    figure, axes = new_figure(title, "sentiment")
    histogram(axes, results["answers"], "score", np.linspace(-1, 1, 17))
    return to_svg(figure, title)


def length_figure(results: dict) -> str:
    title = "Length of the answers"
    figure, axes = new_figure(title, "tokens")
    longest = results["sampling"]["max_new_tokens"]
    histogram(axes, results["answers"], "tokens", np.linspace(0, longest, 17))
    return to_svg(figure, title)


def gain_figure(results: dict) -> str:
    title = "Change of the mean reward, prompt by prompt"
    means = [[np.mean([a["score"] for a in row[side]]) for side in ("before", "after")] for row in results["answers"]]
    gains = np.sort([after - before for before, after in means])
    figure, axes = new_figure(title, "prompts, sorted")
    axes.bar(range(len(gains)), gains, width=0.8, color=[AFTER if gain > 0 else BEFORE for gain in gains])
    axes.axhline(0, color=INK, linewidth=0.8)
    return to_svg(figure, title)


def histogram(axes, answers: list[dict], field: str, bins: np.ndarray) -> None:
    for side, colour in (("before", BEFORE), ("after", AFTER)):
        values = [answer[field] for row in answers for answer in row[side]]
        axes.hist(values, bins, color=colour, alpha=0.55, label=f"{side}, mean {np.mean(values):.2f}")
    axes.set_ylabel("answers")
    axes.legend(frameon=False, fontsize=9)


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


if __name__ == "__main__":
    main()
