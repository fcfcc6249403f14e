"""Local files keep the values that stand in them, whatever their size, and however many there are."""

import json
import logging

import pytest
import torch
from datasets import Dataset, DatasetDict

from trainers.data import load_preferences

ROW = {"prompt": "q", "responses": ["a", "b"], "scores": [1, 0]}
MESSAGE = {"role": "user", "content": "q"}
CHAT = {
    "prompt": [MESSAGE],
    "responses": [[{"role": "assistant", "content": text}] for text in "ab"],
    "scores": [1, 0],
}
MANY = 2500  # rows, more than are looked at in one go


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "first, last, field",
    [
        (ROW, CHAT, "prompt"),
        (CHAT, ROW, "prompt"),
        (ROW, ROW | {"responses": [4, 5]}, "responses"),
        (ROW, ROW | {"scores": ["3", "2"]}, "scores"),
        (ROW | {"annotator": "a"}, ROW | {"annotator": 7}, "annotator"),
        (ROW | {"annotator": 7}, ROW | {"annotator": "007"}, "annotator"),
        (ROW | {"weight": 1}, ROW | {"weight": "2"}, "weight"),
    ],
)
def test_a_type_that_changes_late_in_a_large_file_is_named_with_its_row(first, last, field, streaming, tmp_path):
    path = write(tmp_path / "data.jsonl", [first] * MANY + [last])
    with pytest.raises(ValueError, match=f"row {MANY}.*'{field}"):
        list(load_preferences(path, streaming=streaming))


def test_numbers_may_be_whole_at_first_and_values_missing(tmp_path):
    last = ROW | {"scores": [7.5, 2], "weight": 0.5, "annotator": "x"}
    rows = [ROW | {"weight": 1, "annotator": None}] * MANY + [last]
    found = load_preferences(write(tmp_path / "data.jsonl", rows))
    assert found[MANY] == last and found[0] == ROW | {"weight": 1.0, "annotator": None}


def test_dates_and_odd_texts_stay_text(tmp_path):
    row = {"prompt": "2024-01-01", "responses": ["2024-01-01T00:00:00", "1"], "scores": [1, 0], "day": "2024-01-01"}
    assert list(load_preferences(write(tmp_path / "data.jsonl", [row]))) == [row]


def test_a_column_that_nothing_reads_may_mix_types_and_is_then_text(tmp_path, caplog):
    rows = [ROW | {"id": 7}, ROW | {"id": "007"}, ROW | {"id": None}]
    found = load_preferences(write(tmp_path / "data.jsonl", rows))
    assert found["id"][:] == ["7", '"007"', None]
    assert "Column 'id' mixes types" in caplog.text
    with pytest.raises(ValueError, match="row 1 of 'data.jsonl': 'id' is the str '007'"):
        load_preferences(tmp_path / "data.jsonl", data_format=lambda row: row)  # which may read it


def test_messages_may_have_different_keys(tmp_path):
    rows = [CHAT, CHAT | {"prompt": [MESSAGE | {"name": "n"}]}]
    found = load_preferences(write(tmp_path / "data.jsonl", rows))
    assert [row["prompt"][0]["name"] for row in found] == [None, "n"]


def test_a_file_that_changes_is_read_again(tmp_path):
    assert load_preferences(write(tmp_path / "data.jsonl", [ROW]))["prompt"][:] == ["q"]
    assert load_preferences(write(tmp_path / "data.jsonl", [ROW | {"prompt": "p"}]))["prompt"][:] == ["p"]


# Folders.


def test_the_files_of_a_folder_may_differ_in_what_loses_nothing(tmp_path):
    write(tmp_path / "a.jsonl", [ROW])
    write(tmp_path / "b.jsonl", [ROW | {"scores": [0.5, 0.25], "annotator": "z"}])
    found = load_preferences(tmp_path)
    assert found["scores"][:] == [[1.0, 0.0], [0.5, 0.25]] and found["annotator"][:] == [None, "z"]
    assert load_preferences(tmp_path, split="train[1:]")["annotator"][:] == ["z"]
    with pytest.raises(ValueError, match=r"unknown split 'tset' of .*; give one of \['train'\]"):
        load_preferences(tmp_path, split="tset")
    write(tmp_path / "c.jsonl", [ROW | {"scores": [True, False]}])
    with pytest.raises(ValueError, match="row 0 of 'c.jsonl': 'scores'"):
        load_preferences(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_of_a_folder_too(streaming, tmp_path):
    for name, change in {"a": {}, "b": {"scores": [0.5, 1.5]}}.items():
        Dataset.from_list([ROW | change]).to_parquet(tmp_path / f"{name}.parquet")
    assert [row["scores"] for row in load_preferences(tmp_path, streaming=streaming)] == [[1.0, 0.0], [0.5, 1.5]]
    Dataset.from_list([ROW | {"prompt": 7}]).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="'c.parquet' differs from the files before it: .*prompt"):
        load_preferences(tmp_path, streaming=streaming)


def test_splits_are_found_by_name_and_files_that_are_not_read_are_named(tmp_path, caplog):
    for name in ("train", "test", "more"):
        write(tmp_path / f"{name}.jsonl", [ROW | {"prompt": name}])
    Dataset.from_list([ROW]).to_parquet(tmp_path / "x.parquet")
    assert load_preferences(tmp_path)["prompt"][:] == ["train"]
    assert "2 file(s) are NOT read: more.jsonl, x.parquet" in caplog.text
    assert load_preferences(tmp_path, split="train+test")["prompt"][:] == ["train", "test"]
    assert [row["prompt"] for row in load_preferences(tmp_path, split="test", streaming=True)] == ["test"]


def test_an_empty_file_beside_others_is_named(tmp_path):
    write(tmp_path / "a.jsonl", [ROW])
    write(tmp_path / "b.jsonl", [])
    with pytest.raises(ValueError, match="'b.jsonl' is empty"):
        load_preferences(tmp_path)


def test_slices_of_a_saved_data_set(tmp_path):
    rows = Dataset.from_list([ROW | {"prompt": str(i)} for i in range(10)])
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.select([9])).save_to_disk(tmp_path / "two")
    assert load_preferences(tmp_path / "one", split="train[:2]")["prompt"][:] == ["0", "1"]
    assert load_preferences(tmp_path / "two", split="train[90%:]+test")["prompt"][:] == ["9", "9"]
    for name, split in (("one", "test"), ("one", "trian"), ("two", "trian")):
        with pytest.raises(ValueError, match=f"unknown split '{split}' of '{name}'"):
            load_preferences(tmp_path / name, split=split)


def test_names_with_brackets(tmp_path):
    Dataset.from_list([ROW]).to_parquet(tmp_path / "a[1].parquet")
    Dataset.from_list([ROW] * 2).to_parquet(tmp_path / "a1.parquet")
    write(tmp_path / "b[1].jsonl", [ROW])
    assert len(load_preferences(tmp_path / "a[1].parquet")) == len(load_preferences(tmp_path / "b[1].jsonl")) == 1
    write(tmp_path / "f[x]" / "a.jsonl", [ROW])
    with pytest.raises(ValueError, match="rename the folder"):
        load_preferences(tmp_path / "f[x]")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_stream_gives_every_row_once_to_a_loader_with_workers(workers, tmp_path):
    for i in range(3):
        Dataset.from_list([ROW | {"prompt": f"{i} {j}"} for j in range(4)]).to_parquet(tmp_path / f"{i}.parquet")
    stream = load_preferences(tmp_path, streaming=True)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)
    assert [row["prompt"] for row in loader] == [f"{i} {j}" for i in range(3) for j in range(4)]


# Options.


def test_options_without_an_effect_are_refused(tmp_path):
    path = write(tmp_path / "data.jsonl", [ROW])
    for options, message in (
        ({"revision": "main"}, "revision has no effect"),
        ({"name": "other"}, "takes no name"),
        ({"streaming": True, "num_proc": 2}, "num_proc has no effect on a stream"),
    ):
        with pytest.raises(ValueError, match=message):
            load_preferences(path, **options)


def test_pairs_beside_all_responses_are_pointed_out(tmp_path, caplog):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [pair | {"score_chosen": 7.5, "score_rejected": 7.5}]
    with caplog.at_level(logging.WARNING):
        load_preferences(write(tmp_path / "scored.jsonl", rows))
        assert "set data_format to 'scored_pairs'" in caplog.text
        caplog.clear()
        load_preferences(write(tmp_path / "plain.jsonl", [pair]))
        load_preferences(write(tmp_path / "rows.jsonl", [ROW]))
    assert "set data_format" not in caplog.text
