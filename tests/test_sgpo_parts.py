"""Options of SGPO, rows of many forms, the monitor, and the word diff of its page."""

import json
import re
from html import unescape
from pathlib import Path

import pytest

from sgpo_report import word_diff, write_report
from trainers.improve.config import SGPOConfig
from trainers.improve.data import read_rows
from trainers.improve.monitor import Limits, alarms


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reviser": "gpt"}, "reviser='gpt' is unknown: choose one of self, local, external"),
        ({"reviser": "local"}, "reviser='local' and reviser_model do not fit"),
        ({"reviser_function": "a.b"}, "reviser='self' and reviser_function do not fit"),
        ({"reviser": "external", "reviser_function": "no_lab.edit"}, "reviser_function='no_lab.edit' cannot be"),
        ({"stage": "train"}, "stage='train' is unknown"),
        ({"rounds": 0}, "rounds=0 must be a whole number"),
        ({"sampling": {"top_p": 2}}, r"sampling: top_p must lie in"),
        ({"revision": {"tokens": 3}}, "revision: unknown key 'tokens'"),
        ({"sampling": '{"dtype": "float31"}'}, "sampling: dtype='float31' is unknown"),
        ({"sft": {"learning_rate": 1}}, "sft: dataset_name is missing"),
        ({"policy_weight": -1}, "policy_weight=-1 must be finite"),
        ({"filter_factor": 0}, "filter_factor=0 must be"),
        ({"limits": {"copies": 1}}, "limits: unknown key 'copies'"),
        ({"limits": {"copy_rate": "low"}}, "limits: copy_rate='low' must be a number"),
        ({"improver": [1]}, "improver must be a mapping"),
        ({"improver": {"learning_rat": 1}}, "improver: unknown key 'learning_rat'"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_used_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SGPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_rows_are_read_from_conversations_pairs_and_scored_responses(tmp_path, caplog):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    more = [*chat, {"role": "user", "content": "A colour?"}, {"role": "assistant", "content": "Red."}]
    sources = [
        ([{"messages": more}], "chosen", [more[:3]], ["Red."]),
        ([{"prompt": "Hi", "chosen": chat, "rejected": chat}], "chosen", [chat[:1]], ["Hello"]),
        ([{"prompt": "Hi", "chosen": [chat[1]], "rejected": [chat[1]]}], "chosen", ["Hi"], ["Hello"]),
        ([{"prompt": "Hi", "responses": ["a", "b", "c"], "scores": [1.0, 3.0, 3.0]}], "best", ["Hi"], ["b"]),
        ([{"prompt": "Hi", "answer": "a"}, {"prompt": " hi\n", "answer": "b"}, {"prompt": "Yo", "answer": ""}],
         "answer", ["Hi"], ["a"]),
    ]  # fmt: skip
    for i, (data, source, prompts, references) in enumerate(sources):
        path = tmp_path / f"{i}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in data))
        found = read_rows(str(path), None, source=source)
        assert [row["prompt"] for row in found] == prompts and [row["reference"] for row in found] == references
    assert len(read_rows(str(path), None, source=source, repeats=True)) == 2
    pools = [{"instruction": "Hi", "source": "s", "completions": [
        {"response": text, "overall_score": score} for text, score in (("a", 2.0), ("b", 9.0))
    ]}]  # fmt: skip
    (tmp_path / "pools.jsonl").write_text(json.dumps(pools[0]) + "\n")
    found = read_rows(str(tmp_path / "pools.jsonl"), None, source="best", data_format="ultrafeedback")
    assert [row["reference"] for row in found] == ["b"]
    assert "1 (the same prompt again)" in caplog.text and "1 (no reference answer at the end)" in caplog.text


def test_alarms_name_the_metric_its_limit_and_what_to_do():
    metrics = {"pairs/copy_rate": 0.25, "pairs/mean_word_ratio": 1.3, "pairs/chosen_meta_text": 0.01,
               "dpo/chosen_fall": float("nan"), "measure/policy_distinct_2_fall": 0.2}  # fmt: skip
    found = alarms(metrics, Limits())
    assert len(found) == 3 and found[0].startswith("pairs/copy_rate is 0.25, above 0.2 (limits.copy_rate): ")
    assert alarms(metrics, Limits(copy_rate=0.3, meta_text=None, distinct_fall=None)) == []
    assert alarms({"measure/pairs_scorer_gain": -0.1}, Limits())


def test_a_diff_is_the_two_texts_with_what_changed_marked():
    before, after = "the <b> cat  sat\non it", "the <b> dog sat\non the mat"
    left, right = word_diff(before, after)
    assert [unescape(re.sub("</?(ins|del)>", "", side)) for side in (left, right)] == [before, after]
    assert left == "the &lt;b&gt; <del>cat  </del>sat\non <del>it</del>"
    assert right == "the &lt;b&gt; <ins>dog </ins>sat\non <ins>the mat</ins>"
    assert word_diff("a b", "a b") == ("a b", "a b")
    with pytest.raises(ValueError, match="holds no finished stage"):
        write_report(Path(__file__).parent)
