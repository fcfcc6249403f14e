"""CSV files: text stays as it is, numbers are numbers where the schema says so, and faults name their row."""

import gzip
import json
from pathlib import Path

import pytest

from test_hostile_files import refused
from trainers.data import load_preferences

pytestmark = pytest.mark.usefixtures("own_cache")
PAIR = '"Say ""hi"",\r\n007","NA\n2024-01-01",null,007,7,\r\n'
HEAD = "prompt,chosen,rejected,annotator,id,note\n"


def write(path, text, encoding="utf-8"):
    content = text.encode(encoding)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv"])
def test_text_stays_text(name, streaming, tmp_path):
    text = HEAD + PAIR + "True, 1.50 ,,,0x1,#N/A\n\n  x ,TRUE,1e5,,,\u00e9\n"
    for change in (lambda t: t, lambda t: "\ufeff" + t, lambda t: t.replace(",", ";"), lambda t: t.replace(",", "\t")):
        changed = change(text)
        mark = next(mark for mark in (";", "\t", ",") if mark in changed)
        found = list(load_preferences(write(tmp_path / name, changed), streaming=streaming))
        assert found == [
            {"prompt": f'Say "hi"{mark}\r\n007', "responses": ["NA\n2024-01-01", "null"], "scores": [1.0, 0.0],
             "annotator": "007", "id": "7", "note": ""},
            {"prompt": "  x ", "responses": ["TRUE", "1e5"], "scores": [1.0, 0.0], "annotator": None, "id": "",
             "note": "\u00e9"},
        ]  # fmt: skip


def test_numbers_and_lists_and_messages(tmp_path):
    chat = json.dumps([{"role": "user", "content": "a, b"}]).replace('"', '""')
    cells = [f'"{chat}","[""x"", ""7""]","[1, 2.5]",1e1', f'"{chat}","[""y"",""z""]","[0,null]",']
    found = load_preferences(write(tmp_path / "rows.csv", "\n".join(["prompt,responses,scores,weight", *cells])))
    assert found.to_list() == [
        {"prompt": [{"role": "user", "content": "a, b"}], "scores": [1.0, 2.5], "weight": 10.0,
         "responses": [[{"role": "assistant", "content": text}] for text in "x7"]},
    ]  # fmt: skip
    numbered = "prompt,A0,score_A0,A1,score_A1,A10,score_A10\n1,a,1,b,2,c,-3\n2,a,1,b,.5,,\n"
    found = load_preferences(write(tmp_path / "numbered.csv", numbered), data_format="auto")
    assert found.to_list() == [  # texts, and no column that is not there
        {"prompt": "1", "responses": ["a", "b", "c"], "scores": [1.0, 2.0, -3.0]},
        {"prompt": "2", "responses": ["a", "b"], "scores": [1.0, 0.5]},
    ]
    scored = "prompt,chosen,rejected,score_chosen,score_rejected\nq,a,b,007,-1\n"
    found = load_preferences(write(tmp_path / "scored.csv", scored), data_format="auto")
    assert found["scores"][:] == [[7.0, -1.0]]


def test_the_example_of_the_page(tmp_path):
    page = (Path(__file__).resolve().parents[1] / "docs/data.md").read_text()
    text = page.partition("In CSV files")[2].split("```")[1].lstrip()
    path = write(tmp_path / "a.csv", text)
    [row] = load_preferences(path, data_format="numbered", as_chat=True)
    assert [chat[0]["content"] for chat in row["responses"]] == ["Red.", "Do it yourself.", 'Blue, or "azure".']
    assert row["scores"] == [7.5, 1.0, 8.0]
    [plain] = load_preferences(path, data_format="numbered")
    texts = [chat[0]["content"] for chat in row["responses"]]
    assert plain == row | {"prompt": "Name a colour.", "responses": texts}


def test_a_text_longer_than_the_limit_of_the_reader(tmp_path):
    found = load_preferences(write(tmp_path / "a.csv", f"{HEAD}q,{'ab ' * 200_000},b,,,\n"))
    assert found["responses"][0] == ["ab " * 200_000, "b"]


def test_a_folder_of_csv_files(tmp_path):
    for name in ("train", "test"):
        write(tmp_path / f"{name}.csv", HEAD + f"{name},a,b,,,\n")
    assert load_preferences(tmp_path, "test")["prompt"][:] == ["test"]


SCORED = "prompt,chosen,rejected,score_chosen,score_rejected\nq,a,b,1,2\n"
BROKEN = {  # content, and what the message must say
    "a field too many": (HEAD + PAIR + "q,a,b,,,,\n", "row 1 of 'a.csv', which ends in line 5,.*7 fields for 6"),
    "a field too few": (HEAD + PAIR + "q,a\n", "row 1 of .*2 fields for 6 columns"),
    "a quote that stays open": (HEAD + PAIR + 'q,"a,b,,,\nq,a,b,,,\n', "row 1 of .*ends in line 6, .*unexpected end"),
    "quotes with backslashes": (HEAD + PAIR + r'q,"a \"b\"",b,,,' + "\n", "row 1 of .*quotes inside of it twice"),
    "a decimal comma": (SCORED.replace(",", ";") + "q;a;b;7,5;1\n", "'score_chosen' is '7,5', .*write it as 7.5"),
    "a word for a score": (SCORED + "q,a,b,1,NA\n", "row 1 of .*'score_rejected' is 'NA', which is no number"),
    "an underscore": (SCORED + "q,a,b,1_0,1\n", "'score_chosen' is '1_0', which is no number"),
    "lists of Python": ("prompt,responses,scores\nq,\"['a', 'b']\",\"[1, 2]\"\n", "row 0 .*'responses' .*json.dumps"),
    "messages of Python": ("chosen,rejected\n\"[{'role': 'user', 'content': 'a'}]\",b\n", "'chosen' .*no messages as"),
    "text for a list": ('prompt,responses,scores\nq,"""ab""","[1, 2]"\n', "row 0: 'responses' is the str 'ab'"),
    "text beside messages": ('prompt,chosen,rejected\n"[{""role"": ""user"", ""content"": ""a""}]",b,c\nq,b,c\n',
                             "row 1: 'prompt' is the str 'q', unlike in the rows before it"),
    "two columns of one name": ("prompt,chosen,chosen\nq,a,b\n", "two columns 'chosen'"),
    "no rows": (HEAD, "'a.csv' is empty"),
    "nothing": ("", "'a.csv' is empty"),
    "no such columns": ("a|b\n1|2\n", "columns .'a|b'. are neither"),
    "NUL": ("prompt,chosen\0,rejected\nq,a,b\n", "are neither canonical"),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", BROKEN)
def test_a_fault_is_named(case, streaming, tmp_path):
    content, match = BROKEN[case]
    refused(write(tmp_path / "a.csv", content), match, streaming=streaming)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_is_named(encoding, tmp_path):
    path = write(tmp_path / "a.csv", HEAD + "caf\u00e9,a,b,,,\n", encoding)
    refused(path, f"line {1 if encoding == 'utf-16' else 2} of 'a.csv' is no UTF-8 .*: save the file as UTF-8")
