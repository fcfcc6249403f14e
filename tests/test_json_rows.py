"""Local files keep the values that stand in them, whatever their size, and however many there are."""

import json
import logging
import os

import pytest
import torch
from datasets import Dataset, DatasetDict

from helpers import write_rows
from trainers.data import load_preferences

pytestmark = pytest.mark.usefixtures("own_cache")

ROW = {"prompt": "q", "responses": ["a", "b"], "scores": [1, 0]}
MESSAGE = {"role": "user", "content": "q"}
CHAT = {
    "prompt": [MESSAGE],
    "responses": [[{"role": "assistant", "content": text}] for text in "ab"],
    "scores": [1, 0],
}
MANY = 2500  # rows, more than are looked at in one go


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "first, last, field",
    [
        (ROW, CHAT, "prompt"),
        (CHAT, ROW, "prompt"),
        (ROW, ROW | {"responses": [4, 5]}, "responses"),
        (ROW, ROW | {"scores": ["3", "2"]}, "scores"),
        (ROW | {"annotator": "a"}, ROW | {"annotator": 7}, "annotator"),
        (ROW | {"weight": 1}, ROW | {"weight": "2"}, "weight"),
    ],
)
def test_a_type_that_changes_late_in_a_large_file_is_named_with_its_row(first, last, field, streaming, tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [first] * MANY + [last])
    with pytest.raises(ValueError, match=f"'{field}"):
        list(load_preferences(path, streaming=streaming))


def test_numbers_may_be_whole_at_first_and_values_missing(tmp_path):
    last = ROW | {"scores": [7.5, 2], "weight": 0.5, "annotator": "x"}
    rows = [ROW | {"weight": 1, "annotator": None}] * MANY + [last]
    found = load_preferences(write_rows(tmp_path / "data.jsonl", rows))
    assert found[MANY] == last and found[0] == ROW | {"weight": 1.0, "annotator": None}


VALUES = [
    (1.5, True), ({"a": [1.5]}, {"a": [False]}), (2**60 + 1, 1.5), (1.5, 2**60 + 1), (7, "007"), (1, 2.5),
    (2**64 - 1, None), ("2024-01-01", "x"), ([1], [0.1 + 0.2]), ("a", ["a"]),
]  # fmt: skip


@pytest.mark.parametrize("one, other", VALUES)
@pytest.mark.parametrize("far", [False, True])
def test_a_further_column_keeps_its_values(one, other, far, tmp_path):
    rows = [ROW | {"v": one}] * (MANY if far else 1) + [ROW | {"v": other}]
    kept = load_preferences(write_rows(tmp_path / "data.jsonl", rows))["v"]
    assert [kept[0], kept[-1]] == [one, other]
    assert isinstance(kept[-1], bool) == isinstance(other, bool)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le"])
def test_a_line_may_hold_any_text_in_any_encoding(encoding, tmp_path):
    row = ROW | {"prompt": "\ud55c \u2028 \U0001f468 \xed"}
    (tmp_path / "data.jsonl").write_bytes(json.dumps(row, ensure_ascii=False).encode(encoding))
    assert load_preferences(tmp_path / "data.jsonl")[0] == row


def test_an_integer_that_no_table_takes_is_named(tmp_path):
    with pytest.raises(ValueError, match="column 'v' holds an integer of more than 64 bits"):
        load_preferences(write_rows(tmp_path / "data.jsonl", [ROW | {"v": 2**64}]))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_without_a_weight_beside_others_is_dropped(streaming, tmp_path, caplog):
    rows = [ROW, *[ROW | {"weight": 2.0}] * 3]
    found = list(load_preferences(write_rows(tmp_path / "data.jsonl", rows), streaming=streaming))
    assert [row["weight"] for row in found] == [2.0] * 3 and "1 (weight is missing or not finite)" in caplog.text


# Folders.


def test_the_files_of_a_folder_may_differ_in_what_loses_nothing(tmp_path):
    write_rows(tmp_path / "a.jsonl", [ROW])
    write_rows(tmp_path / "b.jsonl", [ROW | {"scores": [0.5, 0.25], "annotator": "z"}])
    found = load_preferences(tmp_path)
    assert found["scores"][:] == [[1.0, 0.0], [0.5, 0.25]] and found["annotator"][:] == [None, "z"]
    assert load_preferences(tmp_path, split="train[1:]")["annotator"][:] == ["z"]


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_of_a_folder_too(streaming, tmp_path):
    for name, change in {"a": {}, "b": {"scores": [0.5, 1.5]}}.items():
        Dataset.from_list([ROW | change]).to_parquet(tmp_path / f"{name}.parquet")
    assert [row["scores"] for row in load_preferences(tmp_path, streaming=streaming)] == [[1.0, 0.0], [0.5, 1.5]]
    Dataset.from_list([ROW | {"prompt": 7}]).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="'c.parquet' differs from the files before it: .*prompt"):
        load_preferences(tmp_path, streaming=streaming)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_that_changes_is_read_again(suffix, tmp_path):
    path = tmp_path / f"data.{suffix}"
    for prompt in "qp":
        rows = Dataset.from_list([ROW | {"prompt": prompt}])
        rows.to_parquet(path) if suffix == "parquet" else rows.to_json(path)
        os.utime(path, ns=(10**18, 10**18))
        for place in (path, tmp_path):
            assert load_preferences(place)["prompt"][:] == [prompt]


def test_slices_of_a_saved_data_set(tmp_path):
    rows = Dataset.from_list([ROW | {"prompt": str(i)} for i in range(10)])
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.select([9])).save_to_disk(tmp_path / "two")
    assert load_preferences(tmp_path / "one", split="train[:2]")["prompt"][:] == ["0", "1"]
    assert load_preferences(tmp_path / "two", split="train[90%:]+test")["prompt"][:] == ["9", "9"]
    for name, split in (("one", "test"), ("one", "trian"), ("two", "trian")):
        with pytest.raises(ValueError, match=f"unknown split '{split}' of '{name}'; give one of .*'train'"):
            load_preferences(tmp_path / name, split=split)


def test_names_with_brackets(tmp_path):
    Dataset.from_list([ROW]).to_parquet(tmp_path / "a[1].parquet")
    Dataset.from_list([ROW] * 2).to_parquet(tmp_path / "a1.parquet")
    write_rows(tmp_path / "b[1].jsonl", [ROW])
    assert len(load_preferences(tmp_path / "a[1].parquet")) == len(load_preferences(tmp_path / "b[1].jsonl")) == 1
    for name in ("c[1]", "c1"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "train.jsonl", [ROW])
    with pytest.raises(ValueError, match="rename 'c.1.'"):
        load_preferences(tmp_path / "c[1]")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_stream_gives_every_row_once_to_a_loader_with_workers(workers, tmp_path):
    for i in range(3):
        Dataset.from_list([ROW | {"prompt": f"{i} {j}"} for j in range(4)]).to_parquet(tmp_path / f"{i}.parquet")
    stream = load_preferences(tmp_path, streaming=True)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)
    found = [row["prompt"] for row in loader]
    assert (sorted(found) if workers else found) == [f"{i} {j}" for i in range(3) for j in range(4)]


# Options.


def test_options_without_an_effect_are_refused(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [ROW])
    for options, message in (
        ({"revision": "main"}, "revision has no effect"),
        ({"name": "other"}, "takes no name"),
        ({"field": "data"}, "takes no field"),
    ):
        for place in (path, tmp_path) if "name" not in options else (path,):
            with pytest.raises(ValueError, match=message):
                load_preferences(place, **options)


def test_pairs_beside_all_responses_are_pointed_out(tmp_path, caplog):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [pair | {"score_chosen": 7.5, "score_rejected": 7.5}]
    with caplog.at_level(logging.WARNING):
        load_preferences(write_rows(tmp_path / "scored.jsonl", rows))
        assert "set data_format to 'scored_pairs'" in caplog.text
        caplog.clear()
        load_preferences(write_rows(tmp_path / "plain.jsonl", [pair]))
        load_preferences(write_rows(tmp_path / "rows.jsonl", [ROW]))
    assert "set data_format" not in caplog.text
