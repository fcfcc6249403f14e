"""scripts/prepare_data.py: canonical files that load_preferences reads unchanged, complete or not there."""

from pathlib import Path

import pyarrow
import pytest
import yaml
from datasets import Dataset
from pyarrow import parquet

from format_cases import CASES
from helpers import flags, write_rows
from trainers.cli import prepare as prepare_data
from trainers.data import load_preferences

pytestmark = pytest.mark.usefixtures("own_cache")


def run(folder, **options):
    prepare_data.main(flags(**options))
    return yaml.safe_load(prepare_data.manifest_path(folder / options["output"]).read_text())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", prepare_data.SUFFIXES)
@pytest.mark.parametrize("name", ["oasst1", "rows"])
def test_the_output_loads_unchanged(name, suffix, streaming, tmp_path, capsys, caplog):
    source, expected, dropped, responses_dropped = CASES[name]
    data, output = write_rows(tmp_path / "data.jsonl", source), tmp_path / f"out{suffix}"
    manifest = run(tmp_path, dataset_name=data, data_format="auto", output=output, streaming=streaming)
    caplog.clear()
    assert load_preferences(output).to_list() == expected
    assert not caplog.records  # nothing is dropped a second time
    assert manifest["rows"] == len(expected) and manifest["data_format"] == name
    assert manifest["dropped"]["reasons"] == dropped
    assert manifest["dropped"]["responses_dropped"] == responses_dropped
    assert manifest["sha256"] == prepare_data.file_digest(output)
    assert manifest["source"]["sha256"] == prepare_data.file_digest(Path(data))
    assert f"{len(expected)} kept" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == sorted(
        ["data.jsonl", output.name, f"{output.name}.manifest.yaml"]
    )


def test_the_same_rows_give_the_same_bytes(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", CASES["prism"][0])
    common = {"dataset_name": data, "data_format": "prism"}
    for suffix in prepare_data.SUFFIXES:
        outputs = [tmp_path / f"{i}{suffix}" for i in range(2)]
        first, second = (run(tmp_path, **common, output=o, streaming=i > 0) for i, o in enumerate(outputs))
        assert first["sha256"] == second["sha256"]


def test_a_failed_run_leaves_nothing_and_keeps_what_was_there(tmp_path):
    good = CASES["rows"][0][0]
    bad = {**good, "scores": [1.0]}
    data, output = write_rows(tmp_path / "data.jsonl", [*[good] * 70, bad]), tmp_path / "out.parquet"
    output.write_text("earlier")
    with pytest.raises(ValueError, match="out.parquet is there already"):
        run(tmp_path, dataset_name=data, output=output)
    for streaming in (False, True):
        with pytest.raises(ValueError, match="row 70: 'responses' has 2 items but 'scores' has 1"):
            run(tmp_path, dataset_name=data, output=output, overwrite=True, streaming=streaming)
    assert output.read_text() == "earlier"
    assert {path.name for path in tmp_path.iterdir()} <= {"data.jsonl", "out.parquet", "cache"}


def test_what_cannot_be_done_is_said(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", CASES["rows"][0])
    with pytest.raises(ValueError, match="--output .*out.csv: give a name that ends in .parquet, .jsonl, .jsonl.gz"):
        run(tmp_path, dataset_name=data, output=tmp_path / "out.csv")
    with pytest.raises(ValueError, match="revision has no effect on the local path"):
        run(tmp_path, dataset_name=data, output=tmp_path / "out.jsonl", revision="main")
    rows = [{"prompt": "a", "responses": ["x", "y"], "scores": [1.0, 2.0], "extra": float("nan")}]
    Dataset.from_list(rows).to_parquet(tmp_path / "nan.parquet")
    with pytest.raises(ValueError, match="not JSON compliant"):
        run(tmp_path, dataset_name=tmp_path / "nan.parquet", output=tmp_path / "out.jsonl")


def test_large_ids_are_written_as_they_are(tmp_path):
    row = {"prompt": "a", "responses": ["x", "y"], "scores": [1.0, 2.0], "id": 2**63 + 5}
    columns = {name: [value] for name, value in row.items()} | {"id": pyarrow.array([row["id"]], pyarrow.uint64())}
    parquet.write_table(pyarrow.table(columns), tmp_path / "data.parquet")
    run(tmp_path, dataset_name=tmp_path / "data.parquet", output=tmp_path / "out.parquet")
    assert load_preferences(tmp_path / "out.parquet").to_list() == [row]
