"""Streams of files, archives and formats, from Python and from the command line: read, counted and gone on with."""

import io
import json
import tarfile
from itertools import islice
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset, load_dataset

from helpers import family_tokenizer, flags, write_rows
from test_stream import ROWS, UNUSABLE, gone_on, token_stream, trainer
from trainers import load_preferences
from trainers.cli import train
from trainers.cli.dry_run import describe
from trainers.data import canonical, tokenize_dataset
from trainers.data import stream as streams


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_is_streamed_from_the_command_line_and_shown_before(suffix, start, tmp_path, caplog):
    path = str(tmp_path / f"rows{suffix}")
    if suffix == ".jsonl":
        write_rows(tmp_path / "rows.jsonl", [*ROWS, UNUSABLE])
    else:
        Dataset.from_list([*ROWS, UNUSABLE]).to_parquet(path)
    argv = flags(
        trainer="SWEPOTrainer", model_name_or_path=str(start), dataset_name=path, streaming="true", max_steps=3,
        output_dir=str(tmp_path / "out"), use_cpu="true", report_to="none", per_device_train_batch_size=4,
        save_strategy="no", stream_buffer=6, logging_steps=1,
    )  # fmt: skip
    train.main(argv)
    assert "The stream ends after 12 rows and is read again. 12 rows in, 11 kept, 1 dropped" in caplog.text
    *_, told = json.loads((tmp_path / "out" / "run.json").read_text())["left_out"]
    assert told["reasons"] == {"fewer than 2 usable responses left": 1} and told["rows_in"] == 18
    trainer_class, data, args, model = train.parse(argv)
    report = describe(trainer_class, data, args, model)
    assert "the first 6 rows are shown and stand for all" in report and "3 in all" in report
    with pytest.raises(ValueError, match="With a stream max_steps"):
        describe(*train.parse([*argv, "--max_steps", "-1"]))
    with pytest.raises(ValueError, match="streaming reads one data set"):
        train.parse([*argv, "--dataset_name", path, path])


def test_shards_of_webdataset_are_gone_on_with(tokenizer, tmp_path):
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as file:
            for i, row in enumerate(ROWS[shard::3]):
                content = json.dumps(row).encode()
                member = tarfile.TarInfo(f"{i}.json")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))

    def make():
        files = [str(tmp_path / f"{shard}.tar") for shard in range(3)]
        source = load_dataset("webdataset", data_files=files, split="train", streaming=True, cache_dir=tmp_path)
        return token_stream(source.map(lambda row: row["json"]), tokenizer)

    stream = make()
    expected = [*islice(stream, 20)]
    again = gone_on(make, stream, 14)
    assert [*islice(again, 6)] == expected[14:]
    whole, _ = tokenize_dataset(Dataset.from_list(ROWS), tokenizer)
    assert sorted(row["response_ids"] for row in expected[:11]) == sorted(whole["response_ids"])


def test_what_a_format_drops_is_counted_with_its_place(tokenizer):
    def read(shards):
        for shard in shards:
            yield from [{"prompt": None}, {"chosen": "a", "rejected": "b", "prompt": f"{shard} "}]

    source = IterableDataset.from_generator(read, gen_kwargs={"shards": [0, 1, 2]})

    def make():
        rows = canonical.canonical_stream(source, lambda row: row if row["prompt"] else None, keep_dropped=True)
        return token_stream(rows, tokenizer, buffer=2)

    stream = make()
    expected = [*islice(stream, 5)]
    again = gone_on(make, stream, 3)
    assert [*islice(again, 2)] == expected[3:]
    assert again.report == stream.report and again.report.reasons == {"left out by <lambda>": 5}
    assert again.counts() == {"stream/rows": 10, "stream/dropped": 5, "stream/passes": 2}


@pytest.mark.parametrize("keep", [True, False])
def test_a_format_that_drops_all_from_a_row_on_ends_with_an_error(keep, tokenizer, monkeypatch):
    for module in (canonical, streams):
        monkeypatch.setattr(module, "GIVE_UP", 300)
    source = IterableDataset.from_generator(lambda: count())
    adapter = lambda row: row if row["i"] < 3 else None  # noqa: E731

    def count():
        i = 0
        while True:
            yield {"i": i, "prompt": "a ", "chosen": "b", "rejected": "c"}
            i += 1

    with pytest.raises(ValueError, match="(?s)no usable row is in the last 3.. rows.*left out by <lambda>"):
        rows = canonical.canonical_stream(source, adapter, keep_dropped=keep)
        list(islice(token_stream(rows, tokenizer), 4))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_going_on_opens_no_file_that_is_done(suffix, tokenizer, tmp_path, monkeypatch):
    for i in range(3):
        if suffix == ".jsonl":
            write_rows(tmp_path / f"{i}.jsonl", ROWS[i::3])
        else:
            Dataset.from_list(ROWS[i::3]).to_parquet(tmp_path / f"{i}.parquet")
    read = []
    checked = canonical.checked_row
    monkeypatch.setattr(
        canonical, "checked_row", lambda row, *a, **k: read.append(row["prompt"]) or checked(row, *a, **k)
    )

    def make():
        return token_stream(load_preferences(tmp_path, streaming=True), tokenizer, buffer=2, mixed=False)

    stream = make()
    expected = [*islice(stream, 11)]
    again = gone_on(make, stream, 10)  # amid the third file
    read.clear()
    assert [*islice(again, 1)] == expected[10:]
    assert read and not {row["prompt"] for row in ROWS[0::3]} & set(read)  # older releases read the second again
    limited = load_preferences(tmp_path, streaming=True, max_rows=5)
    assert [row["prompt"] for row in limited] == [row["prompt"] for row in [*ROWS[0::3], *ROWS[1::3]][:5]]


@pytest.mark.parametrize("kind", ["file", "table"])
def test_chats_with_tools_weights_and_columns_become_the_rows_of_a_table(kind, tmp_path):
    tokenizer = family_tokenizer("qwen")
    tokenizer.chat_template = "{{ tools | length if tools else '' }}" + tokenizer.chat_template
    tool = {"type": "function", "function": {"name": "f", "parameters": {"a": None}}}
    turns = [{"role": role, "content": "d e"} for role in ("assistant", "user", "assistant")]
    content = [
        {"prompt": turns[1:2], "responses": [turns, turns[:1], turns[:1]], "scores": [1.0, i, None], "weight": i / 2,
         "annotator": f"p{i % 2}", "margin": i, "other": [1.5, i], "tools": [tool] * (i % 2)} for i in range(9)
    ]  # fmt: skip
    path = write_rows(tmp_path / "rows.jsonl", content)
    expected, report = tokenize_dataset(load_preferences(path), tokenizer, columns=("margin",))
    source = load_preferences(path, streaming=True) if kind == "file" else load_preferences(path).to_iterable_dataset()
    stream = token_stream(source, tokenizer, columns=("margin",), mixed=False)
    found = [*islice(stream, len(expected))]
    assert found == expected.remove_columns("prompt").to_list() and {"weight", "margin"} <= found[0].keys()
    assert not all(map(all, found[0]["assistant_masks"]))  # the user's turn
    assert stream.report.reasons == report.reasons and stream.report.responses_dropped == report.responses_dropped


def test_a_stream_of_a_hub_format_is_trained_on(tokenizer, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a ", "chosen": "b c", "rejected": "d"}] * 3)
    stream = load_preferences(str(tmp_path / "rows.jsonl"), data_format="pairs", streaming=True)
    found = trainer(tmp_path, tokenizer, stream, max_steps=2)
    found.train()
    assert found.train_dataset.report.rows_in == 3 * 3  # three passes for two steps of four rows


def test_the_example_of_the_page(start, tmp_path, monkeypatch):
    page = (Path(__file__).resolve().parents[1] / "docs/data.md").read_text().partition("## Streams")[2]
    code = page.split("```python")[1].split("```")[0].replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(start))
    pairs = [{"prompt": row["prompt"], "chosen": row["responses"][0], "rejected": row["responses"][1]} for row in ROWS]
    write_rows(tmp_path / "pairs-0.jsonl", pairs[:6]), write_rows(tmp_path / "pairs-1.jsonl", pairs[6:])
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    state = json.loads((tmp_path / "runs/stream/checkpoint-20/trainer_state.json").read_text())
    assert state["global_step"] == 20 and state["log_history"][-1]["stream/passes"] == 8
