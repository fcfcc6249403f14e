"""Several data sets as one: from the command line and in a file, with shares, configurations and formats."""

from collections import Counter

import pytest
import yaml
from datasets import Dataset

from helpers import write_rows
from trainers.cli import train
from trainers.data import load_preferences
from trainers.data.mixture import mix
from trainers.sgpo.data import read_data

pytestmark = pytest.mark.usefixtures("own_cache")


def rows(name, count, **more):
    return [{"prompt": f"{name}{i} ", "chosen": "good", "rejected": "bad", **more} for i in range(count)]


def arguments(tmp_path, *flags, **keys):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"output_dir": "runs/x", "use_cpu": True, **keys}))
    return train.parse(["--config", str(tmp_path / "run.yaml"), *flags])[1:3]


def read(tmp_path, *flags, split="train", **keys):
    data, args = arguments(tmp_path, *flags, **keys)
    found = data.load(args, split)
    return None if found is None else [row["prompt"].strip() for row in found]


def test_several_data_sets_from_flags_and_from_a_file(tmp_path):
    names = [write_rows(tmp_path / "a.jsonl", rows("a", 3)), write_rows(tmp_path / "b.jsonl", rows("b", 2))]
    expected = ["a0", "a1", "a2", "b0", "b1"]
    assert read(tmp_path, "--dataset_name", *names) == read(tmp_path, dataset_name=names) == expected
    assert read(tmp_path, "--dataset_name", names[1]) == read(tmp_path, dataset_name=[names[1]]) == ["b0", "b1"]
    assert read(tmp_path, dataset_name=names, split="test") is None
    assert read(tmp_path, dataset_name=names, dataset_test_split=[None, "train[:1]"], split="test") == ["b0"]
    assert read(tmp_path, dataset_name=names, dataset_train_split="train[1:]") == ["a1", "a2", "b1"]


def test_shares_of_the_training_rows(tmp_path):
    names = [write_rows(tmp_path / "a.jsonl", rows("a", 8)), write_rows(tmp_path / "b.jsonl", rows("b", 2))]
    flags = ["--dataset_name", *names, "--dataset_weights", "0.5", "2.5"]
    found = Counter(read(tmp_path, *flags))
    assert sorted(found[f"a{i}"] for i in range(8)) == [0] * 4 + [1] * 4
    assert sorted((found["b0"], found["b1"])) == [2, 3]
    assert found == Counter(read(tmp_path, *flags)) != Counter(read(tmp_path, *flags, "--seed", "1"))
    assert len(read(tmp_path, *flags, "--dataset_test_split", "train", split="test")) == 10
    cut = read(tmp_path, *flags, "--max_train_rows", "6")
    assert len(cut) == 6 and not Counter(cut) - found and {text[0] for text in cut} == {"a", "b"}
    assert len(read(tmp_path, "--dataset_name", names[0], "--dataset_weights", "0.25")) == 2


def test_a_limit_for_each_data_set(tmp_path, caplog):
    names = [
        write_rows(tmp_path / f"{name}.jsonl", rows(name, count)) for name, count in (("a", 8), ("b", 2), ("c", 5))
    ]
    keys = {"dataset_name": names, "dataset_max_rows": [3, None, 4]}
    found = Counter(text[0] for text in read(tmp_path, **keys))
    assert found == {"a": 3, "b": 2, "c": 4}
    assert f"  3 rows (33.3%) from the 8 of {names[0]}\n" in caplog.text
    assert f"  2 rows (22.2%) from the 2 of {names[1]}\n" in caplog.text
    weighed = Counter(text[0] for text in read(tmp_path, **keys, dataset_weights=[0.25, 2, 1]))
    assert weighed == {"a": 2, "b": 4, "c": 4}  # a limit holds for what the share is
    drawn = [read(tmp_path, "--dataset_max_rows", "4", "--seed", str(seed), **keys | {"dataset_max_rows": 9})
             for seed in (0, 0, 1)]  # fmt: skip
    assert len(drawn[0]) == 4 + 2 + 4 and drawn[0] == drawn[1] != drawn[2]
    assert len(read(tmp_path, dataset_name=names[0], dataset_max_rows=[2])) == 2
    assert len(read(tmp_path, **keys, dataset_test_split="train", split="test")) == 15
    caplog.clear()
    cut = Counter(text[0] for text in read(tmp_path, **keys, max_train_rows=5))
    assert sum(cut.values()) == 5 and f"  {cut['c']} rows ({cut['c'] / 5:.1%}) from the 5 of {names[2]}" in caplog.text


def test_a_configuration_of_a_data_set(tmp_path):
    for name in ("easy", "hard"):
        Dataset.from_list(rows(name, 2)).to_parquet(tmp_path / f"hub/{name}/train-0.parquet")
    configs = [{"config_name": n, "data_files": [{"split": "train", "path": f"{n}/*"}]} for n in ("easy", "hard")]
    (tmp_path / "hub/README.md").write_text("---\n" + yaml.safe_dump({"configs": configs}) + "---\n")
    hub, other = str(tmp_path / "hub"), write_rows(tmp_path / "a.jsonl", rows("a", 1))
    assert read(tmp_path, "--dataset_name", hub, "--dataset_config", "hard") == ["hard0", "hard1"]
    both = read(tmp_path, "--dataset_name", hub, hub, "--dataset_config", "hard", "easy")
    assert both == ["hard0", "hard1", "easy0", "easy1"]
    assert read(tmp_path, dataset_name=[other, hub], dataset_config=[None, "easy"]) == ["a0", "easy0", "easy1"]
    with pytest.raises(ValueError, match="'a.jsonl' takes no name"):
        read(tmp_path, "--dataset_name", other, "--dataset_config", "hard")
    Dataset.from_list(rows("s", 1)).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="'saved' takes no name"):
        read(tmp_path, "--dataset_name", str(tmp_path / "saved"), "--dataset_config", "hard")


def test_each_data_set_has_its_format(tmp_path):
    row = {"instruction": "q", "source": "s", "completions": [
        {"response": text, "overall_score": 1.0 + i} for i, text in enumerate("ab")
    ]}  # fmt: skip
    names = [write_rows(tmp_path / "a.jsonl", rows("a", 1)), write_rows(tmp_path / "b.jsonl", [row])]
    data, args = arguments(tmp_path, dataset_name=names, data_format=["pairs", "ultrafeedback"], as_chat=True)
    found = data.load(args, "train")
    assert found["scores"][:] == [[1.0, 0.0], [1.0, 2.0]]
    assert [prompt[0]["content"] for prompt in found["prompt"]] == ["a0 ", "q"]
    with pytest.raises(ValueError, match="b.jsonl holds .* and the data sets before it .* With as_chat"):
        read(tmp_path, dataset_name=names, data_format=["pairs", "ultrafeedback"])


def test_columns_of_a_mixture(tmp_path):
    parts = [
        rows("a", 1, id=7, note="x", weight=2),
        rows("b", 1, id="u", note="y", annotator="eve", unfinished_responses=[False, True]),
    ]
    parts = [load_preferences(write_rows(tmp_path / f"{i}.jsonl", part)) for i, part in enumerate(parts)]
    common = {"responses": ["good", "bad"], "scores": [1.0, 0.0]}
    assert mix(parts, ["a", "b"]).to_list() == [
        {"prompt": "a0 ", **common, "note": "x", "weight": 2.0, "annotator": None, "unfinished_responses": None},
        {"prompt": "b0 ", **common, "note": "y", "weight": 1.0, "annotator": "eve",
         "unfinished_responses": [False, True]},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_weights": [1]}, "dataset_weights has 1 items for 2 data sets"),
        ({"dataset_weights": [1, 0]}, r"dataset_weights=\[1, 0\]: give positive numbers"),
        ({"dataset_max_rows": [5, 0]}, "dataset_max_rows=.5, 0.: give positive whole numbers, or in a YAML file null"),
        ({"dataset_max_rows": [5, 1.5]}, r"dataset_max_rows=\[5, 1.5\]: give positive whole numbers"),
        ({"dataset_max_rows": [5, 5, 5]}, "dataset_max_rows has 3 items for 2 data sets"),
        ({"dataset_config": ["x", "y", "z"]}, "dataset_config has 3 items for 2 data sets"),
        ({"dataset_train_split": ["", None]}, "dataset_train_split is empty: name a split to train on"),
    ],
)
def test_lists_that_do_not_fit_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, dataset_name=["a", "b"], **change)


def test_a_method_that_reads_one_data_set_says_so(tmp_path):
    data, args = arguments(tmp_path, "--trainer", "SGPOTrainer", dataset_name=["a", "b"])
    with pytest.raises(ValueError, match="SGPO reads one data set"):
        read_data(args, data)
    data, args = arguments(tmp_path, "--trainer", "SGPOTrainer", dataset_name="a", dataset_max_rows=3)
    with pytest.raises(ValueError, match="without dataset_weights, dataset_max_rows and"):
        read_data(args, data)
