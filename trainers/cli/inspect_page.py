"""The page of `polypo inspect`: warnings first, then pictures and tables of what it counted."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data import facts
from ..data.budget import Lengths
from ..data.drops import counted
from ..data.tokenization import CONTROL_NOTE, CUT_NOTE
from ..pages import plots
from ..pages.page import blocks, write

DROPPED, LONGER = 0.05, 0.65  # from which share on a warning is given; this and what follows is our choice
PAIRS = 30  # that differ, from which length is judged
WIDE = 100  # the widest spread of scores inside a row in terms of the median one
LONG, ANSWERS = 1000, 8  # characters of a text, and responses of a row, that are shown
TRIVIAL = (
    "The trivial explanation of scores: length is what is learned first. Compare what a policy gains with how much "
    "longer its answers grow."
)
CLEAN = "Nothing stands out."
EDGE = "\u2503"  # where the prompt ends
BINS = 30

Report = dict[str, Any]
Numbers = Mapping[str, tuple[list[Lengths], list[list[float]]]]  # split -> lengths and scores of its rows


def share(count: int, total: int) -> str:
    """A count and what part of all it is."""
    return f"{count:,} ({count / total:.1%})" if total else "0"


# Warnings.

# A count and its whole as `_cell` takes them, the share from which on a warning is given, and its text.
HELD_OUT = (
    ("duplicates rows_with_a_prompt_of_train / rows", 0, "rows have a prompt that train has too: they measure what "
     "was seen."),
)  # fmt: skip
TRAIN = (  # of other rows, what is wrong with them spoils a measurement only
    ("scores rows_all_tied / rows", 0.1, "rows have one score for all their responses: there is no order to learn. "
     "Leave them out, or take finer scores."),
    ("duplicates rows_like_an_earlier_one / rows", 0.01, "rows are like an earlier row: drop them, or give weights."),
    ("duplicates rows_with_equal_responses / rows", 0.01, "rows have two equal responses: their scores differ for "
     "nothing, or tie."),
    ("rows_with_an_empty_turn / rows", 0, "rows have an assistant's turn that says and calls nothing."),
    ("responses_in_another_script / responses", 0.05, "responses are in another script than their prompt."),
    ("annotators annotators_with_one_row / annotators annotators", 0.5, "annotators judged one row: EM-DPO tells "
     "types apart by what one person judged several times."),
    ("tokens responses_too_long / responses", 0.05, "responses do not fit into {room}: see the lengths below, and "
     "raise it where the end matters."),
    ("tokens responses_without_end / responses", 0, "responses lack a token that ends them ({ends}), so that no stop "
     "is learned: take the model's own chat template, or mark them in unfinished_responses."),
    ("tokens responses_without_text / responses", 0, "responses are nothing but special tokens to the model: the chat "
     "template leaves out what they hold."),
)  # fmt: skip
NOTES = {
    CONTROL_NOTE: "clean them, or a turn ends there.",
    CUT_NOTE: "see how they end, or take the model's own chat template.",
}


def warnings_of(report: Report) -> list[str]:
    """What to look at before training: sentences with their numbers and what to do."""
    cut = report["max_prompt_length"]
    room = f"max_length={report['max_length']}" + (f" beside a prompt within max_prompt_length={cut}" if cut else "")
    told = []
    for name, split in report["splits"].items():
        found, ends = _of_passes(split), " ".join(_at(split, "tokens ends") or ())
        for field, least, text in TRAIN if name == "train" else HELD_OUT:
            count, whole = (_at(split, part) for part in field.split(" / "))
            if count and count >= least * whole:
                found.append(f"{share(count, whole)} {text.format(room=room, ends=ends)}")
        found += _of_train(split) if name == "train" else []
        told += [f"{name}: {text}" for text in found]
    return told


def _of_passes(split: Report) -> list[str]:
    told = [error] if (error := split.get("error")) else []
    for one in split["passes"]:
        dropped = sum(one.get("reasons", {}).values())
        if dropped and dropped >= DROPPED * one["rows_in"]:
            reason = max(one["reasons"], key=one["reasons"].get)
            told.append(f"{share(dropped, one['rows_in'])} rows are dropped ({one['title']}), most: {reason}.")
    return told


def _of_train(split: Report) -> list[str]:
    told, spread = [], split["scores"]["spread"]
    for note, remedy in NOTES.items():
        if count := sum(one.get("notes", {}).get(note, 0) for one in split["passes"]):
            told.append(f"{share(count, split['rows'])} {note}: {remedy}")
    if spread[100] > WIDE * spread[50] > 0:
        told.append(
            f"inside a row scores lie {spread[50]:.3g} apart in the median and {spread[100]:.3g} at most: losses that "
            "use their size see the few widest rows. Rescale them, or take a loss on ranks."
        )
    pairs, longer = (split["length_and_score"][name] for name in ("pairs", "longer_is_better"))
    if pairs >= PAIRS and not 1 - LONGER < longer < LONGER:
        word = "longer" if longer > 0.5 else "shorter"
        told.append(
            f"of two responses the {word} one is better in {max(longer, 1 - longer):.0%} of the pairs: length alone "
            f"explains much of the scores, and a policy that only grows {word} will look better."
        )
    return told


# The page.


def write_page(path: Path, report: Report, numbers: Numbers) -> Path:
    """Writes the page of the report; the pictures are of `numbers`."""
    splits, model = report["splits"], report["model"]
    names = report["data"]["dataset_name"]
    title = names if isinstance(names, str) else f"{len(names)} data sets"
    read = f"as {model} reads it" if model else "without a model, so that lengths are in characters"
    warnings = report["warnings"]
    about = f"What this data set is before anything is trained on it, {read}." + ("" if warnings else f" {CLEAN}")
    sections = {
        "": [about, *map(blocks.alarm, warnings), _cards(splits["train"])],
        "Rows": [_table(ROWS, splits), _sources(splits), _left_out(splits)],
        "Scores": [_table(SCORES, splits), blocks.figures(_score_pictures(numbers))],
        "Lengths": [_lengths(splits), blocks.figures(_length_pictures(splits, numbers, report["max_length"]))],
        "Length against score": [TRIVIAL, _table(LENGTH, splits)],
        "Texts": [_table(TEXTS, splits), _scripts(splits)],
        "Tokens": [_table(TOKENS, splits)],
        "Annotators": [_table(ANNOTATORS, splits)],
        "First rows": [f"{EDGE} is where the prompt ends and a response begins.", *_first_rows(splits)],
        "Columns": [blocks.settings(splits["train"]["columns"])],
    }
    return write(path, f"Data: {title}", sections)


def _cards(split: Report) -> str:
    """What the reader shall see first, of the first split."""
    longer, tokens, counts = (
        split["length_and_score"]["longer_is_better"],
        split.get("tokens"),
        split["responses_per_row"],
    )
    fewest, most = min(counts), max(counts)
    tied = split["scores"]["rows_all_tied"] / split["rows"]
    cards = [
        ("rows", f"{split['rows']:,}", f"{split['duplicates']['distinct_prompts']:,} different prompts"),
        ("responses per row", f"{fewest}" if fewest == most else f"{fewest} to {most}", "each with a score"),
        ("rows whose scores all tie", f"{tied:.1%}", "there is no order to learn in them"),
        ("the longer response is better", "-" if longer is None else f"{longer:.0%}", "of the pairs; 50 % by chance"),
    ]
    if tokens:
        cut = tokens["responses_too_long"] / split["responses"]
        cards.append(("responses longer than max_length", f"{cut:.1%}", "together with their prompt, as it is cut"))
    return blocks.cards(cards)


# Name of a measure -> the field of a split, and the one that it is a part of, where it is one.
ROWS = {"rows": "rows", "rows that are trained on, within max_length": "trained_on"}
SCORES = {
    "score: lowest, median, highest": "scores percentiles",
    "different scores": "scores distinct",
    "best minus worst of a row: smallest, median, largest": "scores spread",
    "rows whose scores all tie": "scores rows_all_tied / rows",
    "rows whose best scores tie": "scores rows_best_tied / rows",
    "pairs inside a row that tie": "scores pairs_tied / scores pairs",
}
LENGTH = {
    "pairs inside a row that differ in length and score": "length_and_score pairs",
    "share of them in which the longer one is better": "length_and_score longer_is_better",
    "rank correlation of length and score (Goodman and Kruskal)": "length_and_score gamma",
    "share of rows in which the longest response is the best": "length_and_score longest_is_best",
    "the same by chance": "length_and_score longest_is_best_by_chance",
}
TEXTS = {
    "different prompts": "duplicates distinct_prompts",
    "rows like an earlier one": "duplicates rows_like_an_earlier_one / rows",
    "rows with two equal responses": "duplicates rows_with_equal_responses / rows",
    "rows with a prompt of train": "duplicates rows_with_a_prompt_of_train / rows",
    "rows with an empty turn of an assistant": "rows_with_an_empty_turn / rows",
    "responses in another script than their prompt": "responses_in_another_script / responses",
}
TOKENS = {
    "longer than max_length, with their prompt as it is cut": "tokens responses_too_long / responses",
    "without a token that ends them": "tokens responses_without_end / responses",
    "nothing but special tokens": "tokens responses_without_text / responses",
    "tokens that end a response": "tokens ends",
}
ANNOTATORS = {
    "annotators": "annotators annotators",
    "annotators with one row": "annotators annotators_with_one_row / annotators annotators",
    "rows of an annotator, median": "annotators median_rows",
    "rows of an annotator, most": "annotators most_rows",
    "rows of nobody": "annotators rows_of_nobody / rows",
}


def _table(measures: Mapping[str, str], splits: Mapping[str, Report]) -> str:
    """A row for each measure that a split has, a column for each split."""
    rows = [[name, *(_cell(split, field) for split in splits.values())] for name, field in measures.items()]
    rows = [row for row in rows if any(row[1:])]
    return blocks.table(["", *splits], rows) if rows else ""


def _cell(split: Report, field: str) -> str:
    field, _, whole = field.partition(" / ")
    value = _at(split, field)
    if value is None:
        return ""
    if whole:
        return share(value, _at(split, whole))
    if isinstance(value, dict):
        return " / ".join(f"{value[q]:.4g}" for q in (0, 50, 100))
    return " ".join(value) if isinstance(value, list) else f"{value:.3g}" if isinstance(value, float) else f"{value:,}"


def _at(split: Report, field: str) -> Any:
    """What lies under names one in the other; None where one is missing."""
    value: Any = split
    for name in field.split():
        value = (value or {}).get(name)
    return value


def _sources(splits: Mapping[str, Report]) -> str:
    """What each data set of a mixture gave."""
    taken: dict[str, dict[str, str]] = {}
    for name, split in splits.items():
        for one in split["passes"]:
            for source, there, count in zip(*(one.get(key, ()) for key in ("names", "rows", "taken")), strict=True):
                cells = taken.setdefault(source, {})
                gave = f"{share(count, sum(one['taken']))} of its {there:,}"
                cells[name] = f"{cells[name]}; {gave}" if name in cells else gave
    rows = [[_breakable(source), *(cells.get(name, "") for name in splits)] for source, cells in taken.items()]
    return blocks.table(["rows taken from", *splits], rows) if rows else ""


def _left_out(splits: Mapping[str, Report]) -> str:
    """What the passes over the rows dropped or changed, by reason."""
    counts: dict[str, dict[str, int]] = {}
    for name, split in splits.items():
        for one in split["passes"]:
            for done, reason, count in counted(one):
                cells = counts.setdefault(f"{one['title']}: {done}{reason}", {})
                cells[name] = cells.get(name, 0) + count  # a source may be there twice, in other configurations
    rows = [[_breakable(what), *(f"{times.get(name, 0):,}" for name in splits)] for what, times in counts.items()]
    return blocks.table(["dropped or changed", *splits], rows) if rows else "Nothing is dropped or changed."


def _breakable(name: str) -> str:
    """A path that may be broken at its slashes, for narrow pages."""
    return name.replace("/", "/\u200b")


def _scripts(splits: Mapping[str, Report]) -> str:
    names = dict.fromkeys(name for split in splits.values() for name in split["scripts_of_prompts"])
    rows = [[n, *(share(s["scripts_of_prompts"].get(n, 0), s["rows"]) for s in splits.values())] for n in names]
    return blocks.table(["script of a prompt's letters", *splits], rows)


def _lengths(splits: Mapping[str, Report]) -> str:
    head = [*(f"{q} %" for q in facts.PERCENTILES[:-1]), "longest"]
    rows = [
        [f"{part}, {name}" if len(splits) > 1 else part, *(f"{value:,}" for value in values.values())]
        for name, split in splits.items()
        for part, values in split["lengths"].items()
    ]
    return blocks.table([splits["train"]["lengths_in"], *head], rows)


def _first_rows(splits: Mapping[str, Report]) -> list[str]:
    parts = []
    for name, split in splits.items():
        for number, ((_, prompt), *responses) in enumerate(split["first_rows"], 1):
            shown = [("", told, EDGE * told.startswith("scored") + _short(text)) for told, text in responses]
            left = len(shown) - ANSWERS
            more = f"... and {left} more responses" if left > 0 else ""
            parts += [blocks.heading(f"{name}, row {number}", 3), blocks.prompt(_short(prompt) + EDGE),
                      blocks.pair("", shown[:ANSWERS]), more]  # fmt: skip
    return parts


def _short(text: str) -> str:
    """Both ends of a long text."""
    half = LONG // 2
    return text if len(text) <= LONG else f"{text[:half]} [... {len(text) - LONG:,} characters ...] {text[-half:]}"


# Pictures.


def _score_pictures(numbers: Numbers) -> list[str]:
    scores = {name: [score for row in rows for score in row] for name, (_, rows) in numbers.items()}
    spread = {name: [max(row) - min(row) for row in rows] for name, (_, rows) in numbers.items()}
    counts = {name: [len(row) for row in rows] for name, (_, rows) in numbers.items()}
    return [
        _histogram("Scores", scores, xlabel="score", ylabel="responses"),
        _histogram("Best minus worst score of a row", spread, xlabel="difference", ylabel="rows"),
        _histogram("Responses per row", counts, xlabel="responses", ylabel="rows"),
    ]


def _length_pictures(splits: Mapping[str, Report], numbers: Numbers, max_length: int | None) -> list[str]:
    unit = splits["train"]["lengths_in"]
    parts = {name: facts.parts_of(lengths) for name, (lengths, _) in numbers.items()}
    lead = {n: facts.lead_of_best([own for _, own in lengths], scores) for n, (lengths, scores) in numbers.items()}
    marks = (max_length,) if max_length and unit == "tokens" else ()
    return [
        _histogram("Prompts", {n: p["prompt"] for n, p in parts.items()}, xlabel=unit, ylabel="rows"),
        _histogram("Responses", {n: p["response"] for n, p in parts.items()}, xlabel=unit, ylabel="responses"),
        _histogram("Prompt and response", {n: p["prompt + response"] for n, p in parts.items()}, marks=marks,
                   xlabel=f"{unit}; the line is max_length" if marks else unit, ylabel="responses"),
        _histogram("Best response minus worst", lead, marks=(0,), xlabel=f"{unit} more", ylabel="rows"),
    ]  # fmt: skip


def _histogram(title: str, groups: Mapping[str, Sequence[float]], *, marks: Sequence[float] = (), **labels) -> str:
    """Between the lowest and the highest 0.5 %, which are counted in the first and the last bar; "" of nothing."""
    values = np.concatenate([*map(np.asarray, groups.values())])
    if not len(values):
        return ""
    low, high = np.percentile(values, [0.5, 99.5])
    if values.dtype.kind == "i":  # a bar has as many whole numbers as any other
        step = max(1, math.ceil((high - low) / BINS))
        bins = np.arange(math.floor(low) - 0.5, high + step, step)
    else:
        margin = 0 if high - low > 1e-9 * abs(low) else max(0.5, abs(low) / 100)  # or bars would have no width
        bins = np.linspace(low - margin, high + margin, BINS + 1)
    cut = {name: np.clip(group, low, high).tolist() for name, group in groups.items()}
    return plots.histogram(title, cut, bins, marks=[mark for mark in marks if low <= mark <= high], **labels)
