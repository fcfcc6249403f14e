import gzip
import importlib
import logging
import re
import sys

import pytest
from datasets import Dataset

from helpers import write_rows
from trainers.data import load_preferences

pytestmark = pytest.mark.usefixtures("own_cache")

ROWS = [
    {"prompt": "a", "responses": ["x", "y", "z"], "scores": [1, 2, 3], "source": "s"},
    {"prompt": "b", "responses": ["x", "y"], "scores": [0.5, 1.5], "source": "t"},
]


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.json.gz", "data.parquet", "data.parquet.gz"])
def test_files_of_all_kinds(name, tmp_path):
    path = tmp_path / name
    if ".parquet" not in name:
        write_rows(path, ROWS)
    else:
        Dataset.from_list(ROWS).to_parquet(path)
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    dataset = load_preferences(path)
    assert isinstance(dataset, Dataset) and dataset.to_list() == ROWS


def test_the_splits_of_a_folder_and_files_that_are_not_read(tmp_path, caplog):
    for name, rows in (("train", ROWS), ("test", ROWS[:1]), ("more", ROWS)):
        write_rows(tmp_path / "files" / f"{name}.jsonl", rows)
    Dataset.from_list(ROWS).to_parquet(tmp_path / "files" / "x.parquet")
    assert load_preferences(str(tmp_path / "files")).to_list() == ROWS
    assert "2 file(s) are NOT read: more.jsonl, x.parquet" in caplog.text
    assert load_preferences(tmp_path / "files", split="train+test")["prompt"][:] == ["a", "b", "a"]
    assert [row["prompt"] for row in load_preferences(tmp_path / "files", split="test", streaming=True)] == ["a"]


def test_split_of_a_file_and_max_rows(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", ROWS)
    assert load_preferences(path, split="train[1:]")["prompt"][:] == ["b"]
    assert load_preferences(path, split="train[9:]+train[1:]")["prompt"][:] == ["b"]
    for split in ("train[:0]", "train[9:]"):
        with pytest.raises(ValueError, match=re.escape(f"split {split!r} of 'data.jsonl' has no rows")):
            load_preferences(path, split=split)
    assert load_preferences(path, max_rows=1)["prompt"][:] == ["a"]
    assert len(load_preferences(path, max_rows=10)) == 2


def test_drops_are_logged_once_with_the_file(tmp_path, caplog):
    path = write_rows(tmp_path / "data.jsonl", [*ROWS, {**ROWS[0], "responses": ["x", "", ""]}])
    with caplog.at_level(logging.INFO):
        assert load_preferences(path).to_list() == ROWS
    [record] = [record for record in caplog.records if record.name.startswith("trainers")]
    assert record.levelname == "WARNING"
    assert "data.jsonl: 3 rows in, 2 kept, 1 dropped" in record.getMessage()
    assert "responses dropped: 2 (empty text)" in record.getMessage()
    with pytest.raises(ValueError, match="row 2: response: empty text"):
        load_preferences(path, invalid_rows="error")


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.parquet.gz", "./absent", "/absent/data", "a/b/c"])
def test_missing_path_never_reaches_the_hub(name):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_preferences(name)


def test_unknown_columns_and_formats(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [{"question": "a", "answers": ["b", "c"]}])
    with pytest.raises(ValueError, match=r"columns \['answers', 'question'\] are neither .*ultrafeedback"):
        load_preferences(path)
    with pytest.raises(
        ValueError, match="unknown data_format 'ultrafeedbak'; set it to 'auto' or to one of: .*'ultrafeedback'"
    ):
        load_preferences(path, data_format="ultrafeedbak")
    with pytest.raises(ValueError, match="row 0: no field 'completions' for this data_format; found columns"):
        load_preferences(path, data_format="ultrafeedback")
    with pytest.raises(ValueError, match="row 0: no field 'responses'"):
        load_preferences(path, data_format="rows")
    with pytest.raises(ValueError, match="'no_such_module.f' cannot be imported"):
        load_preferences(path, data_format="no_such_module.f")


def test_adapter_by_import_path_and_its_edits_reach_the_result(tmp_path, monkeypatch):
    module = tmp_path / "my_lab_adapter.py"
    code = (
        "def ranks(row):\n"
        "    return {'prompt': row['q'], 'responses': row['a'], 'scores': [FACTOR * r for r in row['r']]}\n"
    )
    module.write_text("FACTOR = -1\n" + code)
    monkeypatch.syspath_prepend(tmp_path)
    path = write_rows(tmp_path / "ranks.jsonl", [{"q": "a", "a": ["x", "y", "z"], "r": [2, 1, 3]}])
    assert load_preferences(path, data_format="my_lab_adapter.ranks")["scores"][:] == [[-2.0, -1.0, -3.0]]
    module.write_text("FACTOR = -10\n" + code)
    importlib.invalidate_caches()
    importlib.reload(sys.modules["my_lab_adapter"])
    assert load_preferences(path, data_format="my_lab_adapter.ranks")["scores"][:] == [[-20.0, -10.0, -30.0]]
