"""Malformed rows, of our own layout and of the hub's: an error that names row, field and fix, or a counted drop."""

import logging
import math
import re
from functools import cache

import pytest
from datasets import IterableDataset

from format_cases import CASES, assistant, user
from trainers.data.canonical import canonical_stream
from trainers.data.drops import collected_reports
from trainers.data.formats import FORMATS

GOOD = {"prompt": "Name a colour.", "responses": ["Red.", "Blue!"], "scores": [1.0, 2.0]}
FIX = re.compile(r"\b(give|set|name|repair|rename|leave|sort|load|remove|correct|needs)\b", re.IGNORECASE)
NAN, INF = math.nan, math.inf


def read(rows, adapter=None):
    """Canonical rows and the report of one pass over rows that need not fit into Arrow."""
    source = IterableDataset.from_generator(iter_rows, gen_kwargs={"rows": tuple(rows)})
    with collected_reports() as reports:
        found = list(canonical_stream(source, adapter))
    [(_, report)] = reports
    assert report.rows_in - report.rows_out == report.reasons.total()
    return found, report


def iter_rows(rows):
    yield from rows


def deep(levels):
    value = "x"
    for _ in range(levels):
        value = [value]
    return value


# name: (field, value, what the message or the reason of the drop says)
ERRORS = {
    "prompt": [
        5, 1.5, True, b"x", {1, 2}, 3 + 1j, object, {}, {"a": 1}, {"role": "user"}, [5], ["a"], [None], [[]], deep(50),
        [{"role": "user"}], [{"content": "a"}], [{"role": "user", "content": 5}], [{"role": None, "content": "a"}],
        [{"role": "user", "content": ["a"]}], [{"role": "user", "content": {"text": "a"}}], [user("a"), None],
        [user("a"), "b"], [[user("a")]], "\ud800", "a\udfff", [user("\udc80")], [{"role": "\ud800", "content": "a"}],
    ],
    "responses": [
        5, 1.5, True, "text", {}, {"0": "a", "1": "b"}, ["a"], ["a", "b", "c"], ["a", 5], ["a", True], ["a", b"b"],
        ["a", {}], ["a", {"role": "assistant"}], ["a", ["b"]], ["a", [[assistant("b")]]], ["a", deep(9)],
        ["a", [{"role": "assistant", "content": 5}]], ["a", [None]], ["a", "\udfff"], ["a", [assistant("\ud8ff")]],
        None, [],
    ],
    "scores": [
        5, 1.5, True, "high", {}, {"0": 1, "1": 2}, [], [1], [1, 2, 3], ["1", "2"], [1, "2"], ["nan", 1], [[1], [2]],
        [{}, {}], [1, b"2"], [1 + 2j, 0], [1, object], deep(20), "12",
    ],
    "weight": ["2", [1.0], {}, b"1", 1j, True and "yes", [None]],
    "annotator": [1.5, [1], {"id": 1}, b"x", NAN, [None]],
}  # fmt: skip
ERROR_CASES = [(field, value) for field, values in ERRORS.items() for value in values]
DROPS = [
    ("prompt", None, "prompt is empty"),
    ("prompt", "", "prompt is empty"),
    ("prompt", " \n\t", "prompt is empty"),
    ("prompt", "\u3000\u2003\x85", "prompt is empty"),
    ("prompt", [], "prompt is empty"),
    ("prompt", [user(None)], "prompt is empty"),
    ("prompt", [user(" "), assistant("")], "prompt is empty"),
    ("responses", ["a", None], "empty text"),
    ("responses", ["", ""], "empty text"),
    ("responses", [None, None], "empty text"),
    ("responses", ["a", "\n"], "empty text"),
    ("responses", [[], []], "empty text"),
    ("responses", ["a", [assistant(None)]], "empty text"),
    ("responses", [[user("a")], [assistant("b")]], "starts with a user turn, which belongs to the prompt"),
    ("responses", [[{"role": "system", "content": "a"}], "b"], "starts with a system turn"),
    ("scores", None, "missing score"),
    ("scores", [None, None], "missing score"),
    ("scores", [1, None], "missing score"),
    ("scores", [NAN, 1], "missing score"),
    ("scores", [NAN, NAN], "missing score"),
    ("scores", [INF, 1], "infinite score"),
    ("scores", [-INF, 1], "infinite score"),
    ("scores", [1e39, 1], "score too large for float32"),
    ("scores", [-1e300, 1], "score too large for float32"),
    ("scores", [10**400, 1], "infinite score"),
    ("weight", None, "weight is missing or not finite"),
    ("weight", NAN, "weight is missing or not finite"),
    ("weight", INF, "weight is missing or not finite"),
    ("weight", -1, "weight is negative"),
    ("weight", -1e-300, "weight is negative"),
]
ONE_RESPONSE = [("a", 1.0), (None, 1.0), ("a", None), ([assistant("a")], 2)]


@pytest.mark.parametrize(("field", "value"), ERROR_CASES, ids=lambda value: ascii(value)[:40])
def test_a_wrongly_built_row_is_an_error_that_names_row_field_and_fix(field, value):
    rest = {name: {"weight": 1.0, "annotator": "a"}[name] for name in (field,) if name in ("weight", "annotator")}
    good = {**GOOD, **rest}
    with pytest.raises(ValueError, match=rf"row 1: .*'?{field}") as caught:
        read([good, {**good, field: value}, good])
    assert FIX.search(str(caught.value)) and len(str(caught.value)) < 500


@pytest.mark.parametrize(("field", "value", "reason"), DROPS, ids=lambda value: ascii(value)[:40])
def test_unusable_content_is_dropped_and_counted(field, value, reason):
    good = {**GOOD, **({"weight": 1.0} if field == "weight" else {})}
    rows, report = read([good, {**good, field: value}, good])
    assert rows == [good, good]
    assert (report.rows_in, report.rows_out) == (3, 2)
    assert any(reason in text for text in [*report.reasons, *report.responses_dropped])


@pytest.mark.parametrize(("response", "score"), ONE_RESPONSE)
def test_one_response_is_dropped_and_counted(response, score):
    rows, report = read([GOOD, {**GOOD, "responses": [response], "scores": [score]}])
    assert rows == [GOOD] and report.reasons == {"fewer than 2 responses given": 1}


@pytest.mark.parametrize("field", ["prompt", "responses", "scores"])
def test_a_row_without_a_field_is_named(field):
    with pytest.raises(ValueError, match=f"row 1: missing column '{field}'; found columns .* Give 'prompt'"):
        read([GOOD, {name: value for name, value in GOOD.items() if name != field}])


def test_a_column_that_comes_late_is_named():
    with pytest.raises(ValueError, match="row 70: column 'note' is not in the rows before it; give it in every row"):
        read([*[GOOD] * 70, {**GOOD, "note": "x"}])


@pytest.mark.parametrize("value", [{"a": [1, "b"]}, [1, "b"], 1j, object()], ids=["map", "list", "complex", "object"])
def test_a_further_column_that_fits_into_no_table_is_named(value):
    with pytest.raises(ValueError, match="column 'note' .*give"):
        read([{**GOOD, "note": value}] * 2)


def test_duplicate_and_many_responses_are_kept_as_they_are():
    twice = {**GOOD, "responses": ["a", "a", "a"], "scores": [1.0, 2.0, 1.0]}
    many = {"prompt": "p", "responses": [f"r{i}" for i in range(64)], "scores": [float(i % 7) for i in range(64)]}
    rows, report = read([twice, many])
    assert rows == [twice, many] and not report.reasons and not report.responses_dropped


# The layouts of the hub: every column of a good row, replaced by values of another type.

HOSTILE = {"null": None, "int": 5, "text": "text", "record": {}, "list": [None], "nested": [[["x"]]], "half": "\ud800"}
CORE = ("prompt", "responses", "scores", "annotator")


def hub_cases():
    for name in FORMATS:
        for column, value in CASES[name][0][0].items():
            for kind, hostile in HOSTILE.items():
                number = isinstance(value, int | float) and kind == "int"  # a good one, but for a flag
                if type(hostile) is not type(value) and not number or kind in ("half", "list", "nested"):
                    yield pytest.param(name, column, hostile, id=f"{name}-{column}-{kind}")


@cache
def plain_rows(name):
    return read(CASES[name][0], FORMATS[name].adapter)


@pytest.mark.parametrize(("name", "column", "value"), list(hub_cases()))
def test_a_column_of_another_type_is_an_error_or_a_counted_drop_or_not_read(name, column, value):
    source = CASES[name][0]
    plain, before = plain_rows(name)
    try:
        rows, report = read([{**source[0], column: value}, *source[1:]], FORMATS[name].adapter)
    except ValueError as error:
        if not str(error).startswith("no usable row is left"):  # the counts follow
            assert re.search(r"\b(row \d+|column)\b", str(error)) and f"'{column}" in str(error), error
            assert FIX.search(str(error))
        return
    if (report.reasons, report.responses_dropped) == (before.reasons, before.responses_dropped):
        for name_ in CORE:  # the column is carried along, or not read at all
            assert [row.get(name_) for row in rows] == [row.get(name_) for row in plain]


def broken_adapters():
    def returns_text(row):
        return "text"

    def divides(row):
        return 1 // 0

    def misses(row):
        return row["absent"]

    def indexes(row):
        return row["responses"][9]

    def calls(row):
        return row["prompt"]()

    def yields_text(rows):
        for _ in rows:
            yield "text"

    def fails_late(rows):
        yield from rows
        raise TypeError("late")

    return {f.__name__: f for f in (returns_text, misses, indexes, calls, yields_text, fails_late)}


@pytest.mark.parametrize("name", broken_adapters())
def test_a_broken_adapter_of_ones_own_is_named_with_its_row(name):
    with pytest.raises(ValueError, match=r"row \d+: .*(found columns|repair|give)"):
        read([GOOD, GOOD], broken_adapters()[name])


def test_there_are_at_least_300_cases():
    assert len(ERROR_CASES) + len(DROPS) + len(list(hub_cases())) >= 300


def test_nothing_is_said_about_good_rows(caplog):
    with caplog.at_level(logging.WARNING):
        assert read([GOOD, GOOD])[0] == [GOOD, GOOD]
    assert not caplog.records
