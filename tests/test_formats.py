"""Every format of trainers.data.formats: exact rows, drops by reason, streams, recognition by columns."""

from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset

from format_cases import CASES
from helpers import write_rows
from trainers.data import canonicalize, load_preferences
from trainers.data.canonical import canonical_stream
from trainers.data.drops import Drop
from trainers.data.formats import FORMATS, recognise

SAMPLES = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "hub_samples"
pytestmark = pytest.mark.usefixtures("own_cache")
needs_samples = pytest.mark.skipif(not SAMPLES.exists(), reason="shared/data is not here")


@pytest.mark.parametrize("name", FORMATS)
def test_exact_rows_and_drops_by_reason(name):
    source, expected, dropped, responses_dropped = CASES[name]
    dataset, report = canonicalize(Dataset.from_list(source), FORMATS[name].adapter)
    assert dataset.to_list() == expected
    assert (dict(report.reasons), dict(report.responses_dropped)) == (dropped, responses_dropped)
    assert report.rows_in - report.rows_out == report.reasons.total() and report.rows_out == len(expected)
    assert report.source_rows == (len(source) if name in ("helpsteer2", "prism", "oasst1") else None)


def test_aspect_ratings_need_no_overall_score_beside_them():
    source, expected, *_ = CASES["ultrafeedback_fine_grained"]
    rows = [
        row | {"completions": [{k: v for k, v in c.items() if k != "overall_score"} for c in row["completions"]]}
        for row in source
    ]
    dataset, _ = canonicalize(Dataset.from_list(rows), FORMATS["ultrafeedback_fine_grained"].adapter)
    assert dataset.to_list() == expected


@pytest.mark.parametrize("name, column", [("list_ultrafeedback", "prompt_id"), ("ultrafeedback", "source")])
def test_a_column_that_is_not_there_is_not_made(name, column):
    source, expected, *_ = CASES[name]
    rows = Dataset.from_list([{k: v for k, v in row.items() if k != column} for row in source])
    dataset, _ = canonicalize(rows, FORMATS[name].adapter)
    assert dataset.to_list() == [{k: v for k, v in row.items() if k != column} for row in expected]


@pytest.mark.parametrize("name", CASES)
def test_files_and_streams_give_the_same_rows_and_auto_says_what_it_recognised(name, tmp_path, caplog):
    source, expected, dropped, responses_dropped = CASES[name]
    path = write_rows(tmp_path / "data.jsonl", source)
    data_format = name if name == "ultrafeedback_fine_grained" else "auto"
    assert list(load_preferences(path, data_format=data_format)) == expected
    stream = load_preferences(path, data_format=data_format, streaming=True)
    assert isinstance(stream, IterableDataset)
    assert caplog.text.count(f"data_format 'auto' reads it as {name!r}") == 2 * (data_format == "auto")
    for _ in range(2):  # every pass counts anew
        caplog.clear()
        assert list(stream) == expected
        records = [record.getMessage() for record in caplog.records if record.name == "trainers.data.canonical"]
        assert len(records) == bool(dropped)
        for reason, count in (dropped | responses_dropped).items():
            assert f"{count} ({reason})" in records[0]


def test_auto_lists_the_candidates_where_columns_fit_several_formats(tmp_path):
    both = {"prompt": "a", "responses": ["x", "y"], "scores": [1, 2], "chosen": "y", "rejected": "x"}
    path = write_rows(tmp_path / "data.jsonl", [both])
    message = r"fit several formats: rows, pairs. Set data_format to one of: 'rows' \(.*\); 'pairs' \(.*\); or to the"
    with pytest.raises(ValueError, match=message) as caught:
        load_preferences(path, data_format="auto")
    assert "nectar" not in str(caught.value)


def test_two_dialogues_as_text_are_hh_rlhf_only_with_its_markers():
    assert recognise(["chosen", "rejected"], {"chosen": "Sky? Blue.", "rejected": "Sky? Red."}) == "pairs"
    marked = {side: f"\n\nHuman: a\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    assert recognise(marked, marked) == "hh_rlhf"
    assert recognise(["prompt", *marked], {"prompt": "p", **marked}) == "pairs"


@pytest.mark.parametrize(
    ("name", "again", "column"), [("prism", 0, "conversation_id 'c1'"), ("oasst1", 1, "message_tree_id 'r'")]
)
def test_a_group_that_is_torn_apart_is_an_error_that_names_the_row(name, again, column):
    source = CASES[name][0]
    rows = Dataset.from_list([*source, source[again]])
    with pytest.raises(ValueError, match=f"row {len(source)}: the rows with {column} do not follow each other.*sort"):
        canonicalize(rows, FORMATS[name].adapter)


def test_a_reply_that_is_there_twice_in_its_tree_is_refused():
    source = CASES["oasst1"][0]
    with pytest.raises(ValueError, match="message_id is there twice"):
        canonicalize(Dataset.from_list([*source[:2], *source[1:]]), FORMATS["oasst1"].adapter)


@pytest.mark.parametrize("name", ["nectar", "prism", "oasst1"])
def test_a_drop_is_refused_where_invalid_rows_are_errors(name):
    with pytest.raises(ValueError, match="row .*invalid_rows='drop'"):
        canonicalize(Dataset.from_list(CASES[name][0]), FORMATS[name].adapter, invalid="error")


def by_topic(rows):
    """A generator function of one's own: a topic per row, the shortest answers first."""
    found = {}
    for row in rows:
        found.setdefault(row["topic"], []).append(row["text"])
    for topic, texts in found.items():
        if topic == "spam":
            yield Drop("spam")
            continue
        if "" in texts:
            yield Drop("no text", kind="response")
        texts = [text for text in texts if text]
        yield {"prompt": topic, "responses": texts, "scores": [-len(text) for text in texts]}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_generator_function_of_ones_own(streaming, tmp_path, caplog):
    rows = [{"topic": t, "text": x} for t, x in zip("abaab", ("x", "yy", "zz", "", "y"), strict=True)]
    rows.append({"topic": "spam", "text": "buy"})
    path = write_rows(tmp_path / "data.jsonl", rows)
    dataset = load_preferences(path, data_format="test_formats.by_topic", streaming=streaming)
    assert list(dataset) == [
        {"prompt": "a", "responses": ["x", "zz"], "scores": [-1.0, -2.0]},
        {"prompt": "b", "responses": ["yy", "y"], "scores": [-2.0, -1.0]},
    ]
    assert "6 rows of the source, grouped: 3 rows in, 2 kept, 1 dropped" in caplog.text
    assert "rows dropped: 1 (spam)" in caplog.text and "responses dropped: 1 (no text)" in caplog.text


def test_a_stream_that_is_left_early_counts_what_it_read(caplog):
    source, expected, *_ = CASES["nectar"]
    stream = canonical_stream(Dataset.from_list(source).to_iterable_dataset(), FORMATS["nectar"].adapter, title="t")
    first = iter(stream)
    assert next(first) == expected[0]
    first.close()
    assert "t: 1 rows in, 1 kept, 0 dropped" in caplog.text and "1 (missing score)" in caplog.text


# file: format, rows kept, rows dropped, and the scores of the first row
HUB = {
    "openbmb__UltraFeedback": ("ultrafeedback", 3, 2, [4.0, 9.0, 8.0, 2.0]),
    "berkeley-nest__Nectar": ("nectar", 3, 1, [-3.0, -1.0, -7.0, -2.0, -5.0, -4.0, -6.0]),
    "princeton-nlp__llama3-ultrafeedback-armorm": ("armorm", 3, 1, [0.1621, 0.0713, 0.1289, 0.1543, 0.1718]),
    "snorkelai__Snorkel-Mistral-PairRM-DPO-Dataset": ("armorm", 3, 0, [0.8125, 0.4434, -2.1875, 1.9062, -3.0312]),
    "nvidia__HelpSteer2": ("helpsteer2", 2, 1, [4.0, 1.0]),
    "HannahRoseKirk__prism-alignment.utterances": ("prism", 2, 1, [88.0, 12.0, 74.0]),
    "OpenAssistant__oasst1": ("oasst1", 1, 1, [0.0, -2.0, -1.0]),
    "Anthropic__hh-rlhf": ("hh_rlhf", 3, 2, [1.0, 0.0]),
    "argilla__ultrafeedback-binarized-preferences": ("argilla", 2, 1, [5.0, 1.75]),
    "trl-lib__ultrafeedback_binarized": ("scored_pairs", 3, 1, [9.0, 3.0]),
    "ChenDRAG__ultrafeedback_reward": ("numbered", 3, 1, [9.0, 7.5, 4.0, 1.0]),
    "OPO-alignment__ListUltraFeedback": ("list_ultrafeedback", 2, 1, [0.61, 0.83, 0.22, 0.9, 0.31, 0.86, 0.35, 0.79]),
}


@needs_samples
@pytest.mark.parametrize("name", HUB)
def test_samples_of_the_hub_layouts(name, caplog):
    data_format, kept, dropped, scores = HUB[name]
    path = str(SAMPLES / f"{name}.jsonl")
    dataset = load_preferences(path, data_format="auto")
    assert f"reads it as {data_format!r}" in caplog.text
    assert f"{kept + dropped} rows in, {kept} kept, {dropped} dropped" in caplog.text
    assert dataset[0]["scores"] == scores and len(dataset) == kept
    assert list(load_preferences(path, data_format=data_format, streaming=True)) == dataset.to_list()
    assert all(row["prompt"][-1]["role"] == "user" for row in dataset)
