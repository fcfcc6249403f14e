"""Options of SGPO, rows of many forms, the monitor, and the word diff of its page."""

import json
import re
from html import unescape
from pathlib import Path

import pytest

from trainers.cli import sgpo_report
from trainers.cli.sgpo_report import word_diff, write_report
from trainers.runs.processes import Processes
from trainers.sgpo import filters
from trainers.sgpo.config import SGPOConfig
from trainers.sgpo.data import read_rows, without
from trainers.sgpo.monitor import Limits, alarms
from trainers.sgpo.revisers import collect_revisions
from trainers.sgpo.targets import _target_fault

EXTERNAL = {"reviser": "external", "reviser_function": "trainers.sgpo.revisers.reference_answer"}


def of_drafts(drafts):
    return drafts


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
        ({"improver": {"output_dir": "elsewhere"}}, "improver: output_dir cannot be set for this stage alone"),
        ({"improver": {"bf16": True}}, "improver: bf16 cannot be set for this stage alone"),
        ({"improver": {"completion_only_loss": False}}, "improver: completion_only_loss cannot be set"),
        ({"sft": {"dataset_name": "a/b", "seed": 3}}, "sft: seed cannot be set for this stage alone"),
        ({"sft": {"dataset_name": "a/b", "eval_steps": 3}}, "sft: eval_steps cannot be set for this stage alone"),
        ({"reviser": "external", "reviser_function": "test_sgpo_parts.of_drafts"},
         "must take prompts, drafts, references by keyword: got an unexpected keyword argument 'prompts'"),
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
        ([{"prompt": p, "responses": ["a", "b"], "scores": [1.0, 3.0], "unfinished_responses": cut}
          for p, cut in (("Hi", [False, True]), ("Yo", [True, True]))], "best", ["Hi"], ["a"]),
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


def write(path, data):
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(path)


@pytest.mark.parametrize(
    "row, fault",
    [
        ({"prompt": "Yo", "answer": " "}, "no reference answer at the end"),
        ({"prompt": "", "answer": "b"}, "no prompt"),
    ],
)
def test_the_first_fault_is_refused_where_that_is_asked_for(tmp_path, caplog, row, fault):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "Hi", "answer": "a"}, {"prompt": "hi ", "answer": "b"}, row])
    with pytest.raises(ValueError, match=rf"row 2 of .*rows.jsonl, train: {fault}. Repair it"):
        read_rows(path, None, source="answer", invalid="error")
    assert len(read_rows(path, None, source="answer", invalid="drop")) == 1
    path = write(tmp_path / "repeats.jsonl", [{"prompt": "Hi", "answer": "a"}, {"prompt": "hi ", "answer": "b"}])
    assert [row["reference"] for row in read_rows(path, None, source="answer", invalid="error")] == ["a"]
    assert "1 (the same prompt again)" in caplog.text  # which is no fault


def test_invalid_rows_reach_the_reader_of_a_data_format(tmp_path):
    good = {"instruction": "Hi", "completions": [{"response": text, "overall_score": 2.0} for text in ("a", "b")]}
    bad = {"instruction": "Yo", "completions": []}
    path = write(tmp_path / "pools.jsonl", [good, bad])
    options = {"source": "best", "data_format": "ultrafeedback"}
    with pytest.raises(ValueError, match="row 1: .*invalid_rows='drop'"):
        read_rows(path, None, **options, invalid="error")
    assert len(read_rows(path, None, **options)) == 1


def test_what_cannot_be_an_answer_is_said(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "1 + 1", "answer": 2}])
    with pytest.raises(ValueError, match=r"the reference answer is a number \(int\), and not text"):
        read_rows(path, None, source="answer")
    with pytest.raises(
        ValueError, match=r"columns \['answer', 'prompt'\], but sft_target_source='best' takes the resp"
    ):
        read_rows(path, None, source="best")


def test_how_many_prompts_are_in_another_set_is_said(caplog):
    rows = [{"prompt": "Hi"}, {"prompt": "Yo"}]
    assert without(rows, [{"prompt": "hi"}], "preference prompts", "their prompts are held out") == rows[1:]
    assert "1 of 2 preference prompts are left out, since their prompts are held out." in caplog.text


@pytest.mark.parametrize(
    "given, message",
    [
        (None, "reviser_function gave None, of type NoneType: it must return a list"),
        ("ab", "reviser_function gave 'ab', of type str: it must return a list"),
        (["a"], "reviser_function gave 1 texts for 2 drafts"),
        (["a", 3], "reviser_function gave 3: every revision must be a text"),
        (["a", "b \ud83d"], r"reviser_function gave 'b \\ud83d', which holds half of a surrogate pair"),
    ],
)
def test_what_a_reviser_cannot_give(tmp_path, given, message):
    columns = [["p", "q"], ["a", "b"], ["c", "d"]]
    with pytest.raises(ValueError, match=message):
        collect_revisions(tmp_path, lambda prompts, drafts, references: given, *columns, Processes())
    assert not list(tmp_path.glob("*.jsonl"))
    taken = ("b \U0001f642", None)
    assert collect_revisions(tmp_path, lambda prompts, drafts, references: taken, *columns, Processes()) == [*taken]


@pytest.mark.parametrize(
    "target, options, reason",
    [
        ({"target_tokens": 9}, {}, filters.UNPARSABLE),
        ({"target_tokens": 9, "target_truncated": True}, {}, filters.TRUNCATED),
        ({"target_tokens": 0}, {}, filters.TOO_LONG),
        ({"target_tokens": 1}, {"reviser_analysis": False}, filters.EMPTY),
        ({"target_truncated": False}, EXTERNAL, filters.NONE),
        ({"target": " ", "target_truncated": False}, EXTERNAL, filters.EMPTY),
    ],
)
def test_a_target_that_is_missing_has_its_reason(tmp_path, target, options, reason):
    args = SGPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)
    row = {"current": "a", "target": None, "target_truncated": False} | target
    assert _target_fault(row, args) == f"target: {reason}"


def test_the_report_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sgpo_report.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        sgpo_report.main()
    assert ended.value.code == 0 and "output_dir of the run; report.html is written there" in capsys.readouterr().out
