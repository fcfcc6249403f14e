import gzip
import importlib
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from trainers.data import load, load_preferences

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="shared/data is not here")

ROWS = [
    {"prompt": "a", "responses": ["x", "y", "z"], "scores": [1, 2, 3], "source": "s"},
    {"prompt": "b", "responses": ["x", "y"], "scores": [0.5, 1.5], "source": "t"},
]
PAIRS = [{"prompt": "a", "chosen": "x", "rejected": "y"}, {"prompt": "b", "chosen": "z", "rejected": "x"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(path, rows):
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w")
    with opened as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def assert_is_rows(dataset):
    assert isinstance(dataset, Dataset)
    assert dataset.to_list() == ROWS


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.json.gz"])
def test_json_lines_files(tmp_path, name):
    assert_is_rows(load_preferences(write_jsonl(tmp_path / name, ROWS)))


def test_parquet_and_gzipped_parquet(tmp_path):
    path = tmp_path / "data.parquet"
    Dataset.from_list(ROWS).to_parquet(path)
    assert_is_rows(load_preferences(str(path)))
    with path.open("rb") as plain, gzip.open(f"{path}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    assert_is_rows(load_preferences(f"{path}.gz"))


def test_folder_of_files_and_saved_dataset(tmp_path):
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "files" / "test.jsonl", ROWS[:1])
    assert_is_rows(load_preferences(str(tmp_path / "files")))
    assert len(load_preferences(str(tmp_path / "files"), split="test")) == 1
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "saved")
    assert_is_rows(load_preferences(str(tmp_path / "saved")))
    with pytest.raises(ValueError, match=r"unknown split 'test' of 'saved'; give one of \['train'\]"):
        load_preferences(str(tmp_path / "saved"), split="test")


def test_split_of_a_file_and_max_rows(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", ROWS)
    assert load_preferences(path, split="train[1:]")["prompt"][:] == ["b"]
    assert load_preferences(path, max_rows=1)["prompt"][:] == ["a"]
    assert len(load_preferences(path, max_rows=10)) == 2
    with pytest.raises(ValueError, match=r"unknown split 'test' of 'data.jsonl'; give one of \['train'\]"):
        load_preferences(path, split="test")


def test_pairs_are_recognised_by_their_columns(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    for data_format in (None, "pairs"):
        dataset = load_preferences(path, data_format=data_format)
        assert dataset["responses"][:] == [["x", "y"], ["z", "x"]]
        assert dataset["scores"][:] == [[1.0, 0.0], [1.0, 0.0]]


def test_drops_are_logged_once_with_the_file(tmp_path, caplog):
    path = write_jsonl(tmp_path / "data.jsonl", [*ROWS, {**ROWS[0], "responses": ["x", "", ""]}])
    with caplog.at_level(logging.INFO):
        assert_is_rows(load_preferences(path))
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
    path = write_jsonl(tmp_path / "data.jsonl", [{"question": "a", "answers": ["b", "c"]}])
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
    (tmp_path / "data.txt").write_text("hello")
    with pytest.raises(ValueError, match="cannot read 'data.txt'; give files of one kind, ending in"):
        load_preferences(str(tmp_path / "data.txt"))


def test_adapter_by_import_path_and_its_edits_reach_the_result(tmp_path, monkeypatch):
    module = tmp_path / "my_lab_adapter.py"
    code = (
        "def ranks(row):\n"
        "    return {'prompt': row['q'], 'responses': row['a'], 'scores': [FACTOR * r for r in row['r']]}\n"
    )
    module.write_text("FACTOR = -1\n" + code)
    monkeypatch.syspath_prepend(tmp_path)
    path = write_jsonl(tmp_path / "ranks.jsonl", [{"q": "a", "a": ["x", "y", "z"], "r": [2, 1, 3]}])
    assert load_preferences(path, data_format="my_lab_adapter.ranks")["scores"][:] == [[-2.0, -1.0, -3.0]]
    module.write_text("FACTOR = -10\n" + code)
    importlib.invalidate_caches()
    importlib.reload(sys.modules["my_lab_adapter"])
    assert load_preferences(path, data_format="my_lab_adapter.ranks")["scores"][:] == [[-20.0, -10.0, -30.0]]


@needs_data
def test_real_pairs_with_empty_responses(caplog):
    dataset = load_preferences(str(DATA / "ultrafeedback_pairs.jsonl.gz"))
    assert len(dataset) == 998
    assert "responses dropped: 2 (empty text)" in caplog.text
    assert all(len(row) == 2 for row in dataset["responses"])


def test_a_split_of_a_mapping_and_of_arguments():
    class Arguments:
        def load(self, args, name):
            return args, name

    rows = Dataset.from_list(ROWS)
    assert load.load_split({"train": rows}, None, "train") is rows
    assert load.load_split({"train": rows}, None, "test") is None
    assert load.load_split(Arguments(), "args", "test") == ("args", "test")
