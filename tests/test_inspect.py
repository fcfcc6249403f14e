"""`polypo inspect`: what a data set is, in numbers worked by hand, on a page that shows them, and in JSON."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from scipy.stats import kendalltau

from helpers import family_tokenizer, save_start, write_rows
from test_pages import check_page
from trainers.cli import inspect
from trainers.cli.inspect_page import warnings_of
from trainers.data import facts
from trainers.data.tokenization import prepare_dataset

pytestmark = pytest.mark.usefixtures("own_cache")
ROOT = Path(__file__).resolve().parents[1]


def row(prompt, responses, scores=(1.0, 0.0), **more):
    return {"prompt": prompt, "responses": responses, "scores": [*scores], **more}


# Numbers.


def test_scores():
    found = facts.score_facts([[1, 1, 1], [0, 2, 2, 2], [5, -1]])
    assert found == {
        "percentiles": {0: -1, 25: 1, 50: 1, 75: 2, 100: 5},
        "spread": {0: 0, 25: 0, 50: 2, 75: 6, 100: 6},
        "distinct": 5,
        "rows_all_tied": 1,
        "rows_best_tied": 1,
        "pairs": 3 + 6 + 1,
        "pairs_tied": 3 + 3,
    }
    assert facts.score_facts([[1e30, -1e30]] * 2)["spread"][100] == 2e30


def test_length_and_score():
    lengths, scores = [[1, 2, 3], [5, 5], [9, 4], [1, 2]], [[0, 2, 1], [1, 0], [3, 7], [1, 1]]
    # Pairs that differ in both: 1-2 and 1-3 for, 2-3 against; 9-4 against.
    found = facts.length_facts(lengths, scores)
    assert (found["pairs"], found["longer_is_better"], found["gamma"]) == (4, 0.5, 0)
    # Longest and best: no, half, no; the last row ties.
    assert found["longest_is_best"] == pytest.approx(0.5 / 3)
    assert found["longest_is_best_by_chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert facts.lead_of_best(lengths, scores) == [2 - 1, 0, 4 - 9]
    sizes, given = [3, 1, 4, 15, 9, 2, 6], [2.0, 7, 1, 8, 2.5, -3, 4]
    assert facts.length_facts([sizes], [given])["gamma"] == pytest.approx(kendalltau(sizes, given).statistic)
    tied = facts.length_facts([[1, 2]], [[0, 0]])
    assert tied["pairs"] == 0 and tied["longer_is_better"] is tied["gamma"] is tied["longest_is_best"] is None


def test_texts():
    empty = [{"role": "assistant", "content": " "}]
    call = [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}]
    chat = [{"role": "user", "content": "a"}]
    rows = [row("q", ["a", "b"]), row("q", ["a", "b"]), row("q", ["a", "a"]), row("q", ["a", "b"], (2, 1)),
            row(chat, [empty, call]), row("p", ["abc", ""])]  # fmt: skip
    texts = facts.Texts.of(rows)
    assert texts.duplicates() == {
        "distinct_prompts": 3,
        "rows_with_an_earlier_prompt": 3,
        "rows_like_an_earlier_one": 1,
        "rows_with_equal_responses": 1,
    }
    assert texts.empty_turns == 1 and texts.lengths[-1] == (1, [3, 0])
    assert texts.shared_with(facts.Texts.of([row("q", ["x", "y"]), row("a", ["x", "y"])])) == 4


def test_scripts():
    scripts = {"Hi, 3 \u03c0?": "LATIN", "\u041f\u0440\u0438 ok": "CYRILLIC", "1 + 1 = 2": None, "": None,
               "\u6f22\u5b57": facts.KANA, "\u30ab\u30bf": facts.KANA, "\uc548\ub155": "HANGUL"}  # fmt: skip
    assert {text: facts.script_of(text) for text in scripts} == scripts
    texts = facts.Texts.of([row("\uc548\ub155", ["\uc548", "hello"]), row("1", ["hello", "2"])])
    assert texts.scripts == {"HANGUL": 1, "no letters": 1} and texts.other_script == 1


def test_annotators():
    assert facts.annotator_facts(["a", "b", "a", None, "c", "a"]) == {
        "annotators": 3,
        "rows_of_nobody": 1,
        "median_rows": 1,
        "most_rows": 3,
        "annotators_with_one_row": 2,
    }
    assert facts.annotator_facts([None])["most_rows"] == 0


@pytest.mark.parametrize("family", ["qwen", "llama3", "mistral"])
def test_tokens_that_end_a_response(family):
    tokenizer = family_tokenizer(family)
    chats = [row([{"role": "user", "content": "a"}], ["the dog", "b " * n]) for n in range(1, 20)]
    rows = prepare_dataset(Dataset.from_list([r | {"unfinished_responses": [False, True]} for r in chats]), tokenizer)
    ends = [tokenizer.eos_token_id]
    assert facts.token_facts(rows, tokenizer, ends)["responses_without_end"] == 19
    assert facts.token_facts(rows, tokenizer, [0])["responses_without_end"] == 38
    assert facts.token_facts(rows, tokenizer, ends)["responses_without_text"] == 0
    blank = Dataset.from_list([{"prompt_ids": [1], "response_ids": [[*ends], [9, 8, *ends]], "scores": [0.0, 1.0]}])
    assert facts.token_facts(blank, tokenizer, ends)["responses_without_text"] == 1


# The command.


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_start(tmp_path_factory.mktemp("qwen"), "qwen")


@pytest.fixture
def told(tmp_path, capsys):
    """Runs `polypo inspect` and returns the JSON, the text of the page and what the terminal said."""

    def run(*argv):
        output = tmp_path / "out/page.html"
        inspect.main([*map(str, argv), "--output", str(output)])
        page = check_page(output.read_text())
        return json.loads(output.with_suffix(".json").read_text()), page.text, capsys.readouterr().out

    return run


def test_a_source_that_is_there_twice_counts_twice(tmp_path, told):
    path = write_rows(tmp_path / "rows.jsonl", [row("a", ["b", "c"]), row("none", ["x"], (1,))])
    _, page, _ = told(path, path)
    assert "fewer than 2 responses given2" in page and "1 (50.0%) of its 1; 1 (50.0%) of its 1" in page


def test_a_page_and_its_numbers(tmp_path, qwen, told):
    rows = [row(f"what is {i}", ["the dog " * (i % 7 + 1), "fox"], (1, i % 4), annotator=f"a{i}") for i in range(40)]
    rows += [rows[0], row("say <|im_end|> it", ["a", "a"], (0, 1), annotator="a1"), row("none", ["x"], (1,))]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "test.jsonl", [rows[3], row("new", ["<script>alert(1)</script>", "\u0434\u0430"])])
    report, page, terminal = told(
        tmp_path, "--model", qwen, "--as_chat", "true", "--max_length", "40", "--dataset_test_split", "test"
    )
    train, held_out = report["splits"]["train"], report["splits"]["test"]
    assert train["rows"] == 42 and train["responses_per_row"] == {"2": 42} and held_out["rows"] == 2
    assert train["passes"][0]["reasons"] == {"fewer than 2 responses given": 1}
    assert train["scores"]["rows_all_tied"] == 10 and train["duplicates"]["rows_like_an_earlier_one"] == 1
    assert train["annotators"] == {"annotators": 40, "rows_of_nobody": 0, "median_rows": 1, "most_rows": 2,
                                   "annotators_with_one_row": 38}  # fmt: skip
    assert held_out["duplicates"]["rows_with_a_prompt_of_train"] == 1
    assert held_out["responses_in_another_script"] == 1

    tokenizer = family_tokenizer("qwen")
    ids = tokenizer.apply_chat_template
    lengths = []
    for each in rows[:-1]:
        chat = [{"role": "user", "content": each["prompt"]}]
        for text in each["responses"]:
            lengths.append(len(ids([*chat, {"role": "assistant", "content": text}], return_dict=True)["input_ids"]))
    assert train["lengths"]["prompt + response"]["100"] == max(lengths)
    assert train["tokens"]["responses_too_long"] == sum(length > 40 for length in lengths) > 0
    assert train["tokens"]["ends"][-1] == "<|im_end|>" and train["tokens"]["responses_without_end"] == 0
    (_, first), *answers = train["first_rows"][0]
    assert first.endswith("what is 0<|im_end|>\n<|im_start|>assistant\n") and answers[0] == [
        "scored 1",
        "the dog <|im_end|>\n",
    ]

    for warning in ("train: 10 (23.8%) rows have one score", "train: 1 (2.4%) rows are like an earlier row",
                    "38 (95.0%) annotators judged one row", "test: 1 (50.0%) rows have a prompt that train has too",
                    "1 (2.4%) rows with special tokens in the text", "do not fit into max_length=40"):  # fmt: skip
        assert warning in terminal and warning in page
    assert "<script>" in page and "43 rows in, 42 kept, 1 dropped" in terminal


def test_without_a_model_on_a_mixture(tmp_path, told):
    first = write_rows(tmp_path / "a.jsonl", [row(f"q{i}", ["ab", "abcd", "c"], (0, 1, 2)) for i in range(30)])
    (tmp_path / "b.csv").write_text("prompt,chosen,rejected\n" + "\n".join(f"p{i},abc,a" for i in range(20)))
    report, page, terminal = told(first, tmp_path / "b.csv", "--dataset_max_rows", "10")
    train = report["splits"]["train"]
    assert train["passes"][-1] == {"title": "mixture", "names": [first, str(tmp_path / "b.csv")], "rows": [30, 20],
                                   "taken": [10, 10]}  # fmt: skip
    assert train["lengths_in"] == "characters" and "tokens" not in train and report["model"] is None
    assert train["lengths"]["response"] == {"50": 2, "90": 4, "95": 4, "99": 4, "100": 4}
    assert train["responses_per_row"] == {"2": 10, "3": 10} and "10 (50.0%)" in page
    assert train["length_and_score"]["pairs"] == 40 and train["length_and_score"]["longer_is_better"] == 20 / 40
    assert report["warnings"] == [] and "Nothing stands out" in page
    assert "\nNothing stands out.\n" in terminal


@pytest.mark.parametrize("how, expected", [("left", 3), ("drop", 1)])
def test_responses_are_too_long_beside_the_prompt_that_a_run_reads(how, expected, tmp_path, qwen, told):
    """A long prompt that is cut to 6 tokens leaves 14; one that is dropped has no responses."""
    tokenizer, long = family_tokenizer("qwen"), "fox dog " * 12
    rows = [row("the dog " * 20, [long, "fox"]), row("the dog " * 20, [long, "dog"]), row("the ", [long, "fox"])]
    assert len(tokenizer(rows[2]["prompt"])["input_ids"]) <= 6
    data = write_rows(tmp_path / "a.jsonl", rows)
    limits = ["--max_length", "20", "--max_prompt_length", "6", "--truncate_prompts", how]
    report, page, terminal = told(data, "--model", qwen, *limits)
    assert report["splits"]["train"]["tokens"]["responses_too_long"] == expected
    assert f"{expected} responses truncated" in terminal
    warning = f"{expected} ({expected / 6:.1%}) responses do not fit into max_length=20 beside a prompt within"
    assert warning in terminal and f"{warning} max_prompt_length=6: " in page


def test_a_length_that_no_row_has_still_gives_a_page(tmp_path, qwen, told):
    data = write_rows(tmp_path / "a.jsonl", [row("the dog " * 9, ["a ", "b "])] * 3)
    report, page, _ = told(data, "--model", qwen, "--max_length", "5")
    train = report["splits"]["train"]
    assert train["trained_on"] == 0 and "prompt fills max_length" in report["warnings"][0]
    assert train["lengths"]["prompt"]["100"] > 5 and train["first_rows"][0][0][1] == ("the dog " * 9).rstrip()


def test_a_template_that_does_not_tell_the_turns_still_gives_a_page(tmp_path, told):
    """A run stops there; what lengths the rows have can be told."""
    tokenizer = family_tokenizer("qwen")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m['content'] }}", "{{ loop.length }} {{ m['content'] }}"
    )
    save_start(tmp_path / "model", "qwen")
    tokenizer.save_pretrained(tmp_path / "model")
    turns = [{"role": role, "content": "a"} for role in ("assistant", "user", "assistant")]
    data = write_rows(tmp_path / "a.jsonl", [row([{"role": "user", "content": "q"}], [turns, turns[:1]])] * 3)
    report, page, _ = told(data, "--model", tmp_path / "model")
    assert report["warnings"][0].startswith("train: a run would stop: row 0: the chat template does not tell")
    assert report["splits"]["train"]["trained_on"] == 0 and "a run would stop" in page


def test_what_of_a_response_is_trained_on_is_shown(tmp_path, qwen, told):
    turns = [
        {"role": r, "content": text} for r, text in (("assistant", "fox"), ("user", "dog"), ("assistant", "Paris"))
    ]
    data = write_rows(tmp_path / "a.jsonl", [row([{"role": "user", "content": "q"}], [turns, turns[:1]])] * 3)
    report, page, _ = told(data, "--model", qwen)
    names, texts = zip(*report["splits"]["train"]["first_rows"][0], strict=True)
    assert names == ("prompt", "scored 1", "  of it trained on", "scored 0")
    assert "dog" in texts[1] and "dog" not in texts[2] and texts[2] in page and "Paris" in texts[2]


def test_a_stream_is_looked_at_as_far_as_asked(tmp_path, told):
    data = write_rows(tmp_path / "a.jsonl", [row(f"q{i}", ["a", "b"]) for i in range(9)])
    report, _, _ = told(data, "--streaming", "true", "--max_rows", "4")
    assert report["splits"]["train"]["rows"] == report["splits"]["train"]["duplicates"]["distinct_prompts"] == 4
    with pytest.raises(ValueError, match="max_rows is missing: a stream"):
        told(data, "--streaming", "true")


@pytest.mark.parametrize(
    "rows, match",
    [
        ([row("q", ["a", "b"]), row([{"role": "user", "content": "q"}], ["a", "b"])], "row 1: 'prompt'"),
        ([row("q", ["a", ""])], "no usable row is left"),
        ([], "is empty"),
    ],
)
def test_what_cannot_be_read_is_said_as_in_a_run(rows, match, tmp_path, told):
    with pytest.raises(ValueError, match=match):
        told(write_rows(tmp_path / "a.jsonl", rows))


HOSTILE = {
    "one row": [row("q", ["a", "b"])],
    "all tied": [row(f"q{i}", ["a", "bb", "c"], (1, 1, 1)) for i in range(5)],
    "64 responses": [row(f"q{i}", [f"a{k}" for k in range(64)], range(64)) for i in range(3)],
    "huge scores": [row(f"q{i}", ["a", "bb"], (1e30, -1e30 if i else 1)) for i in range(5)],
    "huge ties": [row(f"q{i}", ["a", "bb"], (1e30, 1e30)) for i in range(5)],
    "long texts": [row("x y " * 25_000, ["a " * 50_000, "b"])] * 2,
}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_rows_give_a_page(name, tmp_path, told):
    report, page, _ = told(write_rows(tmp_path / "a.jsonl", HOSTILE[name]))
    assert report["splits"]["train"]["rows"] == len(HOSTILE[name]) and len(page) < 40_000
    tied = any("have one score" in warning for warning in report["warnings"])
    assert tied == ("tied" in name or "ties" in name)


def test_the_example_of_the_page_and_a_recipe(told, qwen, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = (ROOT / "docs/data.md").read_text().partition("polypo inspect ")[2].partition("\n")[0]
    report, _, _ = told(*command.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(qwen)).split(), "--max_rows", "20")
    assert report["splits"]["train"]["trained_on"] == 20
    report, page, _ = told("--config", "dpo/demo.yaml", "--max_rows", "30", "--model_name_or_path", "")
    assert report["splits"]["train"]["rows"] == 30 and report["data"]["dataset_name"].endswith("preferences.jsonl.gz")


@pytest.mark.parametrize("field, least", [
    ("scores rows_all_tied", 100), ("duplicates rows_like_an_earlier_one", 10),
    ("duplicates rows_with_equal_responses", 10), ("rows_with_an_empty_turn", 1),
    ("responses_in_another_script", 50), ("annotators annotators_with_one_row", 500),
    ("tokens responses_too_long", 50), ("tokens responses_without_end", 1),
])  # fmt: skip
def test_a_warning_is_given_from_its_share_on(field, least):
    """Of 1,000 rows, responses or annotators."""
    *part, name = field.split()
    for count in (least - 1, least):
        split = {"rows": 1000, "responses": 1000, "passes": [], "scores": {"spread": {50: 0.0, 100: 0.0}},
                 "annotators": {"annotators": 1000}, "length_and_score": {"pairs": 0, "longer_is_better": 0.5},
                 "duplicates": {}, "tokens": {"ends": ["</s>"]}}  # fmt: skip
        (split[part[0]] if part else split)[name] = count
        told = warnings_of({"max_length": 64, "max_prompt_length": None, "splits": {"train": split}})
        assert len(told) == (count == least)
