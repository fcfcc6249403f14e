"""Malformed rows, of our own layout and of the hub's: an error that names the row, or a counted drop."""

import math
from functools import cache

import pytest
from datasets import IterableDataset

from format_cases import CASES, assistant, user
from trainers.data.canonical import canonical_stream
from trainers.data.drops import collected_reports
from trainers.data.formats import FORMATS

GOOD = {"prompt": "Name a colour.", "responses": ["Red.", "Blue!"], "scores": [1.0, 2.0]}
NAN, INF = math.nan, math.inf


def read(rows, adapter=None):
    """Canonical rows and the report of one pass over rows that need not fit into Arrow."""
    source = IterableDataset.from_generator(iter_rows, gen_kwargs={"rows": tuple(rows)})
    with collected_reports() as reports:
        kept = list(canonical_stream(source, adapter))
    [(_, report)] = reports
    assert report.rows_in - report.rows_out == report.reasons.total()
    return kept, report


def iter_rows(rows):
    yield from rows


ERRORS = {
    "prompt": [
        5, True, b"x", {}, {"role": "user"}, ["a"], [None], [[]], [{"role": "user"}], [{"role": None, "content": "a"}],
        [{"role": "user", "content": ["a"]}], [user("a"), "b"], [[user("a")]],
    ],
    "responses": [
        5, "text", {"0": "a", "1": "b"}, ["a"], ["a", "b", "c"], ["a", 5], ["a", b"b"], ["a", {"role": "assistant"}],
        ["a", ["b"]], ["a", [[assistant("b")]]], ["a", [{"role": "assistant", "content": 5}]], None,
    ],
    "scores": [5, "high", {"0": 1, "1": 2}, [], [1], [1, 2, 3], ["1", "2"], [1, "2"], ["nan", 1], [[1], [2]], [{}, {}],
               [1 + 2j, 0], "12", [0.5, True]],
    "weight": ["2", [1.0], {}],
    "annotator": [1.5, [1], {"id": 1}, True, " ", NAN],
    "unfinished_responses": [["true", "false"], [0.7, 0.2], [True], True],
}  # fmt: skip
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
    ("scores", [INF, 1], "infinite score"),
    ("scores", [1e39, 1], "score too large for float32"),
    ("scores", [-1e300, 1], "score too large for float32"),
    ("scores", [10**400, 1], "infinite score"),
    ("weight", None, "weight is missing or not finite"),
    ("weight", NAN, "weight is missing or not finite"),
    ("weight", INF, "weight is missing or not finite"),
    ("weight", -1, "weight is negative"),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in ERRORS for value in ERRORS[field]],
                         ids=lambda value: ascii(value)[:40])  # fmt: skip
def test_a_wrongly_built_row_is_an_error_that_names_row_and_field(field, value):
    good = {**GOOD, **{name: {"weight": 1.0, "annotator": "a"}[name] for name in {field} & {"weight", "annotator"}}}
    with pytest.raises(ValueError, match=rf"row 1: .*'?{field}") as caught:
        read([good, {**good, field: value}, good])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("field", "value", "reason"), DROPS, ids=lambda value: ascii(value)[:40])
def test_unusable_content_is_dropped_and_counted(field, value, reason):
    good = {**GOOD, **({"weight": 1.0} if field == "weight" else {})}
    rows, report = read([good, {**good, field: value}, good])
    assert rows == [good, good]
    assert (report.rows_in, report.rows_out) == (3, 2)
    assert any(reason in text for text in [*report.reasons, *report.responses_dropped])


@pytest.mark.parametrize("prompt", ["a\udfff", [user("\udc80")]])
def test_half_a_character_is_an_error_that_names_row_and_column(prompt):
    with pytest.raises(ValueError, match="row 0: 'prompt' holds half a .*surrogates not allowed.; write the whole"):
        read([{**GOOD, "prompt": prompt}])


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        ({}, {"note": "x"}, "column 'note' is not in the rows before it; give it in every row"),
        ({"note": 7}, {"note": "7"}, "'note' is the str '7', unlike in the rows before it"),
        ({"note": 1.5}, {"note": 2**60 + 1}, "'note' is the int 1152921504606846977, unlike"),  # a float rounds it
        ({"note": 1}, {"note": 2**64}, "'note' is the int 18446744073709551616, unlike"),
        (dict.fromkeys("dbcae", 1), dict.fromkeys("dbcae", "x"), "'a' is the str 'x', unlike"),  # whatever sets do
    ],
)
def test_a_column_that_comes_or_changes_late_is_named(first, last, message):
    with pytest.raises(ValueError, match=f"row 1100: {message}"):
        read([*[GOOD | first] * 1100, GOOD | last])


# The layouts of the hub: every column of a good row, replaced by values of another type.

HOSTILE = {"null": None, "int": 5, "text": "text", "record": {}, "nested": [[["x"]]], "half": "\ud800"}


def hub_cases():
    for name in FORMATS:
        for column, value in CASES[name][0][0].items():
            for kind, hostile in HOSTILE.items():
                if type(hostile) is not type(value) and not (isinstance(value, int | float) and kind == "int"):
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
        assert str(error).startswith(("no usable row is left", "row ", "the group that was read up to row ", "column"))
        return
    if (report.reasons, report.responses_dropped) == (before.reasons, before.responses_dropped):
        for field in ("prompt", "responses", "scores"):  # the column is carried along, or not read at all
            assert [row.get(field) for row in rows] == [row.get(field) for row in plain]


def misses(row):
    return row["absent"]


def returns_text(row):
    return "text"


def calls(row):
    return row["prompt"]()


def fails_late(rows):
    yield from rows
    raise TypeError("late")


@pytest.mark.parametrize("adapter", [misses, returns_text, calls, fails_late])
def test_a_broken_adapter_of_ones_own_is_named_with_its_row(adapter):
    with pytest.raises(ValueError, match=r"row \d+: .*(found columns|repair|give)"):
        read([GOOD, GOOD], adapter)
