"""Figures as text: a mean with its interval, and tables in Markdown."""

from collections.abc import Iterable


def interval(value: dict | None, form: str = ".3f") -> str:
    """`mean [low, high]` of an interval of `trainers.statistics`, the mean alone where it has none, "" for None."""
    if value is None:
        return ""
    mean = f"{value['mean']:{form}}"
    return mean if value["low"] is None else f"{mean} [{value['low']:{form}}, {value['high']:{form}}]"


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table in Markdown, one line per row."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
