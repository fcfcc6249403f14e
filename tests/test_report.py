"""The demo's figures and its page: known intervals, paired gains, a complete and escaped page without a network."""

import json
import math
import re

import numpy as np
import pytest

from scripts.demo import summary
from test_pages import HOSTILE, check_page
from trainers.cli.answers import compare_answers, matched_gain, repetition
from trainers.cli.demo_report import COURSE, side_by_side
from trainers.cli.report import write_report
from trainers.runs.files import write_json, write_rows
from trainers.statistics import bootstrap_interval


def answers(offset, prompts=11, k=3):
    """Scores and lengths that grow with prompt and slot."""
    return [
        [
            {"text": f"answer {i} {j} to it", "score": -0.6 + 0.1 * i + 0.02 * j + offset, "tokens": 5 + i + j,
             "truncated": j == 2}
            for j in range(k)
        ]
        for i in range(prompts)
    ]  # fmt: skip


def results():
    before, after = answers(0.0), answers(0.25)
    before[2][0]["text"] = HOSTILE
    one, point = {"mean": 0.61, "low": 0.55, "high": 0.67, "count": 7}, {"mean": 3.0, "low": 0, "high": 4}
    return {
        "created": "2020-02-03", "train_command": "accelerate launch scripts/train.py", "estimate": "about 5 minutes",
        "config": {"model_name_or_path": "runs/models/tiny", "output_dir": "runs/demo", "dtype": "float32"},
        "sampling": {"num_generations": 3, "max_new_tokens": 16}, "machine": {"instruction set": "AVX7"},
        "versions": {"torch": "1.2.3"}, "seconds": {"Training: it": 12.4},
        "course": [{"step": step} | dict.fromkeys(COURSE, point) for step in (0, 24)],
        "generation": compare_answers(before, after),
        "ranking": {"after": one, "before": one | {"mean": 0.5}, "longer answer first": one},
        "checks": {"KL": one},
        "answers": [
            {"prompt": f"prompt {i}: {HOSTILE}", "before": b, "after": a}
            for i, (b, a) in enumerate(zip(before, after, strict=True))
        ],
    }  # fmt: skip


def history():
    training = [
        {"step": s, "loss": 0.7 / s, "rewards/margins": 0.1 * s, "ranking/pairwise_accuracy": 0.5 + s / 100}
        for s in (2, 4, 6)
    ]
    evaluation = {"step": 6, "eval_loss": 0.5, "eval_rewards/margins": 0.2, "eval_runtime": 1.0}
    return [*training, evaluation, {"step": 6, "train_runtime": 9.0}]


def test_interval_of_zeros_and_ones_is_that_of_the_binomial_and_leaves_undefined_values_out():
    # The mean of a resample of n zeros and ones is binomial(n, p) / n; for n = 400 and p = 0.3 the 2.5 % and 97.5 %
    # points of the binomial are 102 and 138.
    found = bootstrap_interval(np.repeat([1.0, math.nan, 0.0], [120, 9, 280]))
    assert found["mean"] == pytest.approx(0.3) and found["count"] == 400
    assert [found["low"], found["high"]] == pytest.approx([102 / 400, 138 / 400], abs=1 / 400)


def test_measures_of_the_answers_and_their_paired_gain():
    # Prompts differ widely and the change is the same everywhere: the gain's interval has no width.
    compared = compare_answers(answers(0.0), answers(0.25))["reward"]
    assert compared["before"]["high"] - compared["before"]["low"] > 0.1
    assert [compared["gain"][k] for k in ("mean", "low", "high")] == pytest.approx([0.25] * 3)
    before, after = answers(0.0, prompts=2), answers(0.0, prompts=2)
    after[0][1] |= {"tokens": 36, "text": "so good! so good! so good!"}
    compared = compare_answers(before, after)
    assert compared["length in tokens"]["before"]["mean"] == pytest.approx(6.5)
    assert compared["length in tokens"]["gain"]["mean"] == pytest.approx(5.0)  # 30 tokens over 6 answers
    assert compared["share cut off at the limit"]["after"]["mean"] == pytest.approx(1 / 3)
    assert compared["exclamation marks"]["gain"]["mean"] == pytest.approx(3 / 6)
    assert compared["share of repeated word triples"]["gain"]["mean"] == pytest.approx(0.5 / 6)


def count_good(prompts, completions):
    return [float(text.split().count("good")) for text in completions]


def test_gain_at_equal_length_ignores_what_only_the_longer_answer_says():
    before = [[{"text": "it was"}, {"text": "good bad bad bad bad"}], [{"text": "bad good"}, {"text": "a good b"}]]
    after = [
        [{"text": "good it good good"}, {"text": "good good"}],
        [{"text": "bad good good good"}, {"text": "good"}],
    ]
    # Prompt 1: "it was" against "good it", "good bad" against "good good"; prompt 2: no change, "a" against "good".
    assert matched_gain(before, after, count_good) == pytest.approx({"mean": 0.75, "low": 0.5, "high": 1, "count": 2})


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0), ("two words", 0), ("one two three four", 0), ("a b c a b c", 1 / 4), ("So, so SO so so!", 2 / 3)],
)
def test_repetition(text, share):
    assert repetition(text) == pytest.approx(share)


def test_the_page_of_the_demo_is_whole_and_escaped(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results()))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history()}))
    page = check_page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.text.count("prompt 2: " + HOSTILE) == 1 and "before, reward -0.40, 7 tokens" + HOSTILE in page.text
    labels = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg"]
    assert len(labels) == 8 and {"Reward against distance from the base model", "Loss"} < {*labels}
    for shown in ("-0.08 → 0.17", "0.610 [0.550, 0.670]", "+3.00 [+0.00, +4.00]", "1.2.3", "evaluation", "12 s"):
        assert shown in page.text.replace("\xa0", " "), shown
    assert "+0.250 [+0.250, +0.250]" in summary(results())


def test_samples_are_chosen_by_their_change_and_not_by_hand():
    change = {"a": 0.0, "b": 0.9, "c": -0.5, "d": 0.4, "e": 0.1, "f": 0.2, "g": -0.1, "h": 0.3, "i": 0.5, "j": -0.9}
    first = {"text": "x", "score": 0.0, "tokens": 1, "truncated": False}
    rows = [{"prompt": f"={k}=", "before": [first], "after": [first | {"score": v}]} for k, v in change.items()]
    assert re.findall(r"=(\w)=", "".join(side_by_side(rows))) == list("bidfeajcg")


def write_round(folder, texts, *, name="held-out"):
    """A finished round: the answers spread over the journals of two processes, out of order."""
    lines = {
        "samples": [
            {"prompt": i, "index": j, "text": text, "token_ids": text.split(), "truncated": len(text) > 9}
            for i, row in enumerate(texts) for j, text in enumerate(row)
        ],
        "scores": [{"prompt": i, "scores": [float(t.count("good")) for t in row]} for i, row in enumerate(texts)],
    }  # fmt: skip
    for part, records in lines.items():
        (folder / name / part).mkdir(parents=True)
        for rank in range(2):
            write_rows(folder / name / part / f"{part}-{rank:05d}.jsonl", records[rank::2][::-1])
    if name == "held-out":
        write_json(folder / "manifest.json", {"samples": {"mean_score": 0.5}, "training": {"steps": 7}})


def test_rounds_report_reads_all_journals_and_compares_the_same_prompt_and_sample(tmp_path):
    scorer = "test_report.count_good"
    (tmp_path / "self_enhance.json").write_text(json.dumps({"settings": {"self_enhance.scorer": scorer}}))
    write_round(tmp_path, [["good", "no"], ["no", "no"], ["bad", "so"]], name="before")
    with pytest.raises(ValueError, match="no finished round yet"):
        write_report(tmp_path)
    write_round(tmp_path / "round-00", [["good", "no"], ["good", "no"], ["bad", "so"]])
    # the second good of a text is beyond the length of what it is compared with
    write_round(tmp_path / "round-01", [["good good", "good"], ["good good", "no"], ["bad", "so good"]])
    (tmp_path / "round-02").mkdir()  # not finished: no manifest
    for number, loss in enumerate((0.5, 0.25)):
        log = [{"step": 1, "loss": loss}]
        (tmp_path / f"round-0{number}/checkpoint").mkdir()
        write_json(tmp_path / f"round-0{number}/checkpoint/trainer_state.json", {"log_history": log})
    page = check_page(write_report(tmp_path).read_text())
    text = (tmp_path / "rounds.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert [row[0] for row in rows] == ["start", "round 1", "round 2"]
    assert [row[1].split()[0] for row in rows] == ["0.167", "0.333", "1.000"]
    assert [row[2].split()[0] for row in rows[1:]] == ["+0.167", "+0.667"]
    assert [row[3].split()[0] for row in rows[1:]] == ["+0.167", "+0.833"]
    assert [row[4].split()[0] for row in rows[1:]] == ["+0.167", "+0.333"]
    assert [row[5] for row in rows] == ["1", "1", "1.5"] and [row[-1] for row in rows] == ["", "7", "7"]
    assert "round 2" in page.text and "round 2" in (tmp_path / "rounds.svg").read_text()
    assert "Metricround 1round 2" in page.text.replace("\n", "") and "loss0.50.25" in page.text.replace("\n", "")


def test_rounds_without_held_out_answers_have_the_page_of_their_trainings(tmp_path):
    write_json(tmp_path / "self_enhance.json", {"settings": {}})
    for number, loss in enumerate((0.5, 0.25)):
        (tmp_path / f"round-0{number}/checkpoint").mkdir(parents=True)
        write_json(tmp_path / f"round-0{number}/manifest.json", {})
        log = {"log_history": [{"step": 1, "loss": loss}]}
        write_json(tmp_path / f"round-0{number}/checkpoint/trainer_state.json", log)
    page = check_page(write_report(tmp_path).read_text())
    text = page.text.replace("\n", "")
    assert "held_out_generations asks for" in text and "Metricround 1round 2" in text and "loss0.50.25" in text


def test_a_report_of_rounds_asks_no_server(tmp_path):
    scorer = {"judge": "a model", "template": "0" * 64, "weight": 1.0}  # as the settings hold it, without an address
    (tmp_path / "self_enhance.json").write_text(json.dumps({"settings": {"self_enhance.scorer": scorer}}))
    write_round(tmp_path, [["good", "no"]], name="before")
    write_round(tmp_path / "round-00", [["good", "good"]])
    write_report(tmp_path)
    [line] = [line for line in (tmp_path / "rounds.md").read_text().splitlines() if "round 1" in line]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[3].split()[0] == "+0.500" and cells[4] == "not asked"
