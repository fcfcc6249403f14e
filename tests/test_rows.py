import math
from collections import Counter

import pytest
from datasets import Dataset

from format_cases import assistant, user
from trainers.data import canonicalize
from trainers.data.drops import Drop
from trainers.data.rows import to_canonical

ROW = {"prompt": "Name a colour.", "responses": ["Red.", "Blue!", "Green?"], "scores": [1, 2.5, -3]}


def dataset_with_faults():
    rows = [
        ("a", ["x", "y", "z"], [1.0, 2.0, 3.0]), ("b", ["x", " \n", "z"], [1.0, 2.0, 3.0]),
        ("c", ["x", "y"], [None, 2.0]), ("d", ["x", "y", "z"], [math.nan, 1.0, 0.0]),
        ("e", ["x"], [1.0]), (" ", ["x", "y"], [1.0, 0.0]),
    ]  # fmt: skip
    names = ("prompt", "responses", "scores", "models", "id")
    rows = [(*row, list("mno")[: len(row[2])], index) for index, row in enumerate(rows)]
    return Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows])


HEAD = [user("Hi"), assistant("Hello."), user("Sing.")]
CHAT = {"chosen": [*HEAD, assistant("La.")], "rejected": [*HEAD, assistant("No.")]}
PAIRS = {  # a pair, and what it becomes
    "explicit": ({"prompt": "p", "chosen": "good", "rejected": "bad"}, ("p", "good", "bad")),
    "implicit text": ({"chosen": "Sky? Blue.", "rejected": "Sky? Green."}, ("Sky?", " Blue.", " Green.")),
    "implicit chat": (CHAT, (HEAD, [assistant("La.")], [assistant("No.")])),
    "implicit chat beside messages": (CHAT | {"messages": HEAD}, (HEAD, [assistant("La.")], [assistant("No.")])),
    "chat with its prompt as text": ({"prompt": "Sing.", **CHAT}, (HEAD, [assistant("La.")], [assistant("No.")])),
    "text prompt, chat answers": (
        {"prompt": "Hi", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        ([user("Hi")], [assistant("a")], [assistant("b")]),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    pair, (prompt, chosen, rejected) = PAIRS[name]
    expected = {"prompt": prompt, "responses": [chosen, rejected], "scores": [1.0, 0.0], "margin": 7.0}
    assert to_canonical(pair | {"margin": 7.0}).items() >= expected.items()


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("same", "same"), ("Q: a", "Q: a b"), ("x ", "y "), ("", "a"), ([user("a")], [user("b")]), ([], [user("b")])],
)
def test_pair_without_a_recognisable_prompt_is_dropped(chosen, rejected):
    with pytest.raises(Drop, match="prompt"):
        to_canonical({"chosen": chosen, "rejected": rejected})


@pytest.mark.parametrize(("name", "value"), [("question", "capital?"), ("messages", [user("q")])])
@pytest.mark.parametrize("answers", ["text", "messages"])
def test_a_prompt_in_a_column_of_another_name_is_not_guessed(name, value, answers):
    pair = {"chosen": "The capital is Paris", "rejected": "The capital is Rome"}
    pair = pair if answers == "text" else {side: [assistant(text)] for side, text in pair.items()}
    with pytest.raises(ValueError, match=rf"missing column 'prompt' .* there is '{name}': rename it .*'{name}'"):
        to_canonical({name: value, **pair})
    assert to_canonical({name: value, "prompt": "Hi", **pair})["prompt"] in ("Hi", [user("Hi")])


@pytest.mark.parametrize(
    ("chosen", "rejected", "end"),
    [("The capital is Paris", "The city is Rome", "The c"), ("Q: cats", "Q: cat", None),
     ("Q: cats!", "Q: cat!", "cat"), ("\n\nAssistant: This", "\n\nAssistant: That", "Th"),
     ("首都是巴黎", "首都是伦敦", "首都是")],
    ids=["words", "beginning", "plural", "dialogue", "chinese"],
)  # fmt: skip
def test_a_prompt_that_would_end_inside_a_word_is_refused(chosen, rejected, end):
    kind = Drop if end is None else ValueError
    with pytest.raises(kind, match="told apart" if end is None else rf"inside a word: '.*{end}'. Give the prompt in"):
        to_canonical({"chosen": chosen, "rejected": rejected})


@pytest.mark.parametrize("num_proc", [None, 2])
def test_canonicalize_counts_every_drop(num_proc):
    dataset, report = canonicalize(dataset_with_faults(), num_proc=num_proc)
    assert dataset["id"][:] == [0, 1, 3]
    assert dataset["responses"][:] == [["x", "y", "z"], ["x", "z"], ["y", "z"]]
    assert dataset["scores"][:] == [[1.0, 2.0, 3.0], [1.0, 3.0], [1.0, 0.0]]
    assert dataset["models"][:] == [["m", "n", "o"], ["m", "o"], ["n", "o"]]
    assert (report.rows_in, report.rows_out) == (6, 3)
    reasons = ("fewer than 2 usable responses left", "fewer than 2 responses given", "prompt is empty")
    assert report.reasons == Counter(reasons)
    assert report.responses_dropped == Counter({"missing score": 2, "empty text": 1})


def test_as_chat_wraps_text_and_leaves_messages():
    dataset, _ = canonicalize(Dataset.from_list([ROW]), as_chat=True)
    assert dataset[0]["prompt"] == [user("Name a colour.")]
    assert dataset[0]["responses"] == [[assistant("Red.")], [assistant("Blue!")], [assistant("Green?")]]
    again, _ = canonicalize(dataset, as_chat=True)
    assert again[:] == dataset[:]


def first_score_only(row):
    return None if row["id"] == 0 else {**row, "scores": [row["scores"][0], 0.0, 0.0][: len(row["responses"])]}


def test_fingerprint_is_the_same_for_the_same_input_and_differs_by_option():
    options = ({}, {"as_chat": True}, {"adapter": first_score_only})
    prints = [[canonicalize(dataset_with_faults(), **some)[0]._fingerprint for some in options] for _ in range(2)]
    assert prints[0] == prints[1] and len(set(prints[0])) == 3


def test_counts_are_right_when_the_result_comes_from_the_cache(tmp_path):
    dataset_with_faults().to_parquet(tmp_path / "data.parquet")
    source = Dataset.from_parquet(str(tmp_path / "data.parquet"), cache_dir=str(tmp_path / "cache"))
    first, first_report = canonicalize(source)
    second, second_report = canonicalize(source)
    assert first.cache_files and first.cache_files == second.cache_files
    assert first_report == second_report
    assert second_report.responses_dropped["missing score"] == 2


def test_a_table_keeps_the_types_of_its_columns_also_where_the_first_rows_do_not_tell_them():
    rows = Dataset.from_list([{**ROW, "note": None}] * 1100 + [{**ROW, "note": 7}])
    dataset, _ = canonicalize(rows)
    assert dataset[1100]["note"] == 7 and dataset.features["note"] == rows.features["note"]
