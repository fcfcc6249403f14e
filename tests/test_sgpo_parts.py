"""Options of SGPO, rows of many forms, the monitor, and the word diff of its page."""

from pathlib import Path

import pytest
from datasets import Dataset

from helpers import family_tokenizer
from trainers.cli.arguments import DataArguments
from trainers.cli.sgpo_report import read, word_diff
from trainers.data.load import read_dataset
from trainers.runs.files import write_rows
from trainers.runs.stage import Stage
from trainers.sgpo import SGPOConfig, SGPOTrainer, sampling
from trainers.sgpo.data import Rows, read_data, read_rows
from trainers.sgpo.monitor import alarms, dpo_metrics
from trainers.sgpo.stages import Run


def config(folder, **options):
    return SGPOConfig(output_dir=str(folder), use_cpu=True, report_to="none", **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reviser": "local"}, "reviser='local' and reviser_model do not fit"),
        ({"reviser_function": "a.b"}, "reviser='self' and reviser_function do not fit"),
        ({"filter_statistic": "edit_ratio"}, "filter_statistic='edit_ratio' is unknown: choose one of"),
        ({"sampling": {"top_p": 2}}, "top_p=2 must be"),
        ({"improver": {"learning_rat": 1}}, "improver: unknown key 'learning_rat': did you mean learning_rate"),
        ({"self_enhance": {"scorer": "a.b"}}, "self_enhance has no effect on SGPO"),
    ],
)
def test_options_that_cannot_be_used_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_what_is_not_said_is_as_in_other_stages(tmp_path):
    args = config(tmp_path, sampling={"max_new_tokens": 5}, improver={"learning_rate": 1}, max_length=600, rounds=2)
    assert (args.revision["max_new_tokens"], args.revision["temperature"]) == (5, 0.7)
    assert args.improver == {"learning_rate": 1, "max_length": 1200}
    own = args.of_dpo(tmp_path / "dpo", 7)
    assert (own.output_dir, own.seed, own.rounds, args.rounds) == (str(tmp_path / "dpo"), 7, 1, 2)


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
MORE = [*CHAT, {"role": "user", "content": "A colour?"}, {"role": "assistant", "content": "Red."}]


@pytest.mark.parametrize(
    "rows, source, prompts, references",
    [
        ([{"messages": MORE}], "chosen", [MORE[:3]], ["Red."]),
        ([{"prompt": "Hi", "chosen": CHAT, "rejected": CHAT}], "chosen", [CHAT[:1]], ["Hello"]),
        ([{"prompt": "Hi", "chosen": [CHAT[1]], "rejected": [CHAT[1]]}], "chosen", ["Hi"], ["Hello"]),
        ([{"prompt": "Hi", "responses": ["a", "b", "c"], "scores": [1.0, 3.0, 3.0]}], "best", ["Hi"], ["b"]),
        ([{"prompt": p, "responses": ["a", "b"], "scores": [1.0, 3.0], "unfinished_responses": cut}
          for p, cut in (("Hi", [False, True]), ("Yo", [True, True]))], "best", ["Hi"], ["a"]),
        ([{"messages": CHAT}], "best", [CHAT[:1]], ["Hello"]),
        ([{"prompt": "Hi", "answer": "a"}, {"prompt": " hi\n", "answer": "b"}, {"prompt": "Yo", "answer": ""}],
         "answer", ["Hi"], ["a"]),
    ],
)  # fmt: skip
def test_rows_are_read_from_conversations_pairs_and_scored_responses(tmp_path, rows, source, prompts, references):
    found = read_rows(Dataset.from_list(rows), config(tmp_path, sft_target_source=source))
    assert [row["prompt"] for row in found] == prompts and [row["reference"] for row in found] == references


def test_faults_of_rows(tmp_path, caplog):
    args = config(tmp_path, sft_target_source="answer", invalid_rows="error")
    rows = [{"prompt": "Hi", "answer": "a"}, {"prompt": "hi ", "answer": "b"}]  # a repeated prompt is none
    assert [row["reference"] for row in read_rows(Dataset.from_list(rows), args)] == ["a"]
    assert len(read_rows(Dataset.from_list(rows), args, repeats=True)) == 2
    assert "1 (the same prompt again)" in caplog.text
    for row, fault in (
        ({"prompt": "Yo", "answer": " "}, "no reference"),
        ({"prompt": "", "answer": "b"}, "no prompt"),
    ):
        with pytest.raises(ValueError, match=f"row 2 of test: {fault}"):
            read_rows(Dataset.from_list([*rows, row]), args, title="test")
    with pytest.raises(ValueError, match=r"columns \['answer', 'prompt'\]: set sft_target_source"):
        read_rows(Dataset.from_list(rows), config(tmp_path))
    with pytest.raises(ValueError, match="'tools' cannot be used where answers are sampled"):
        read_rows(Dataset.from_list([row | {"tools": ["x"]} for row in rows]), args)


def test_a_row_of_a_json_file_may_lack_the_reference(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Hi", "chosen": "2024-01-01"}\n{"prompt": "Yo"}\n')
    found = read_rows(read_dataset(str(path), "train"), config(tmp_path))
    assert (
        found == [{"prompt": "Hi", "reference": "2024-01-01"}] and "1 (no reference answer at the end)" in caplog.text
    )


def test_the_data_of_a_shipped_recipe_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = DataArguments(dataset_name=["data/demo/preferences.jsonl.gz"], dataset_train_split=["train[:3]"])
    found = read_data(config(tmp_path, sft_target_source="best", preference_split="train[3:5]"), data)
    assert (len(found.improver), len(found.preferences)) == (3, 2)


def test_sft_before_stages_that_were_made_without_it_is_refused_at_once(tmp_path):
    family_tokenizer("llama3").save_pretrained(tmp_path / "model")
    row = {"prompt": "Hi", "reference": "a"}
    args = config(tmp_path / "out", sft={"max_rows": 1})
    run = Run(SGPOTrainer, args, str(tmp_path / "model"), Rows([row], [row], [], None))
    own = {"stage": "current", "round": 0, "earlier stages": None}
    stage = Stage(run.at("current", 0), run.settings()["current"] | own)
    stage.open()
    stage.finish()
    with pytest.raises(ValueError, match="current/settings.json was written with other settings: earlier stages"):
        Run(SGPOTrainer, args, str(tmp_path / "model"), Rows([row], [row], [], [row])).run()


def test_the_tokenizer_is_that_of_the_models_revision(tmp_path, revisions):
    family_tokenizer("llama3").save_pretrained(tmp_path / "model")
    args = config(tmp_path / "out", model_init_kwargs={"revision": "b3"})
    Run(SGPOTrainer, args, str(tmp_path / "model"), Rows([], [], [], None))
    assert revisions == {"b3"}


def test_sft_on_conversations_that_max_length_left_out_is_refused_at_another_one(tmp_path):
    family_tokenizer("llama3").save_pretrained(tmp_path / "model")
    row = {"prompt": "Hi", "reference": "a"}

    def stage(**options) -> Stage:
        args = config(tmp_path / "out", **options)
        run = Run(SGPOTrainer, args, str(tmp_path / "model"), Rows([row], [row], [], [row]))
        return Stage(run.at("sft", 0), run.settings()["sft"])

    stage(max_length=40).open()
    stage(max_length=40).finish()
    assert stage(max_length=50, sft={"max_length": 40}).done()
    with pytest.raises(ValueError, match="sft/settings.json .*max_length was 40 and is 50"):
        stage(max_length=50).done()


@pytest.mark.parametrize("conversations", [[], [{"prompt": "Hi " * 50, "reference": "a"}]])
def test_no_conversation_for_sft_ends_the_run_with_its_reason(tmp_path, conversations):
    family_tokenizer("llama3").save_pretrained(tmp_path / "model")
    row = {"prompt": "Hi", "reference": "a"}
    rows = Rows([row], [row], [], conversations)
    reason = "{'longer than max_length': 1}" if conversations else "{}"
    with pytest.raises(ValueError, match=f"no conversation is left for sft. Dropped: {reason}"):
        Run(SGPOTrainer, config(tmp_path / "out", max_length=40), str(tmp_path / "model"), rows).run()


def test_a_dropped_row_names_the_option_that_dropped_it(tmp_path):
    family_tokenizer("llama3").save_pretrained(tmp_path / "model")
    args = config(tmp_path / "out", max_length=40, improver={"max_length": 400}, policy_weight=0.3,
                  filter_statistic="none")  # fmt: skip
    run = Run(SGPOTrainer, args, str(tmp_path / "model"), Rows([], [], [], None))
    row = {"prompt": "a", "reference": "b", "current": "c", "current_truncated": False, "target": "d",
           "target_truncated": False}  # fmt: skip
    expected = {
        "current: no room for sampling.max_new_tokens in the model's context": {"current": None, "target": None},
        "current: cut at sampling.max_new_tokens": {"current_truncated": True, "target": None},
        "target: no room for revision.max_new_tokens in the model's context": {"target": None},
        "target: cut at revision.max_new_tokens": {"target_truncated": True},
        "longer than improver.max_length": {"reference": "b " * 500},
        "longer than max_length": {"target": "d " * 50},
    }
    folders = [run.at(name, 0) for name in ("targets", "filter")]
    for folder in folders:
        folder.mkdir(parents=True)
    write_rows(folders[0] / "rows.jsonl.gz", [row, *(row | changes for changes in expected.values())])
    assert run._filter(0, folders[1]) == {"kept": 1, "dropped": dict.fromkeys(sorted(expected), 1)}


@pytest.mark.parametrize("given", ["abc", {"x": 0, "y": 1, "z": 2}, [1, 2, 3], ["a", "b"], None])
def test_what_no_reviser_may_give_is_refused_and_not_kept(given, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "reference_answer", lambda prompts, drafts, references: given)
    args = config(tmp_path, reviser="external", reviser_function="trainers.sgpo.sampling.reference_answer")
    rows = [{"prompt": "Hi", "current": "a", "reference": "b"}] * 3
    with pytest.raises(ValueError, match="reviser_function gave .* for 3 drafts"):
        sampling.Sampler(args, "no model", None).revise(tmp_path, rows, None, 0)
    assert not any(path.stat().st_size for path in tmp_path.glob("*.jsonl"))


def test_no_prompt_is_in_two_splits_and_limits_hold_for_rows_that_are_handed_over(tmp_path):
    def rows(*prompts):
        return Dataset.from_list([{"prompt": p, "chosen": "x"} for p in prompts])

    splits = {"train": rows("a", "b", "t"), "preferences": rows("B ", "c", "t"), "test": rows("t"),
              "sft": rows("a", "t")}  # fmt: skip
    found = read_data(config(tmp_path), splits)
    assert [[row["prompt"] for row in part] for part in found] == [["a", "b"], ["c"], ["t"], ["a"]]
    more = splits | {name: rows(*(f"{name} {i}" for i in range(5))) for name in ("train", "preferences", "sft")}
    found = read_data(config(tmp_path, max_preference_rows=2, sft={"max_rows": 3}), more)
    assert [len(part) for part in (found.improver, found.preferences, found.conversations)] == [5, 2, 3]
    for changes, message in (({"preferences": rows("a")}, "no prompt is left"), ({"train": None}, "are missing")):
        with pytest.raises(ValueError, match=message):
            read_data(config(tmp_path), splits | changes)


def test_alarms_name_the_metric_its_limit_and_what_to_do():
    metrics = {"copy_rate": 0.25, "mean_word_ratio": 1.3, "chosen_meta_text": 0.01, "rejected_truncated": float("nan")}
    first, second = alarms("pairs", metrics)
    assert first == "pairs/copy_rate is 0.25, above 0.2: the rewrites are copies: train the improver for fewer epochs."
    assert second.startswith("pairs/chosen_meta_text is 0.01, above 0: ")
    assert alarms("sft", metrics) == []


NAMES = ("step", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
LOGS = [dict(zip(NAMES, values, strict=True)) for values in (
    (1, 0.69, 0.1, -0.1, 0.2, 0.0), (10, 0.5, -0.2, -0.7, 0.5, 0.8), (90, 0.4, -0.2, -0.9, 0.7, 0.9),
    (100, 0.2, -0.3, -2.3, 2.0, 1.0))]  # fmt: skip


def test_what_the_log_says_of_the_dpo_stage():
    found = dpo_metrics([*LOGS, {"train_loss": 0.4, "step": 100}], 0.1, starts_at_reference=True)
    assert (found["first_loss"], found["last_loss"], found["margin"], found["accuracy"]) == (0.69, 0.2, 2.0, 1.0)
    assert (found["chosen_drift"], found["rejected_drift"], found["chosen_fall"]) == pytest.approx((-3, -23, 3))
    assert found["early_accuracy"] == 0.8
    found = dpo_metrics(LOGS, 0.1, starts_at_reference=False)  # what the reference thought is subtracted
    assert (found["chosen_drift"], found["rejected_drift"]) == pytest.approx((-4, -22))
    assert dpo_metrics(LOGS[:1], 0.1, starts_at_reference=True) == {}
    assert "early_accuracy" not in dpo_metrics([LOGS[0], LOGS[3]], 0.1, starts_at_reference=True)


def test_a_diff_is_the_two_texts_with_what_changed_marked():
    before, after = "the <b> cat  sat\non it", "the <b> dog sat\non the mat"
    left, right = word_diff(before, after)
    assert ["".join(text for _, text in side) for side in (left, right)] == [before, after]
    assert [text for tag, text in left if tag] == ["cat  ", "it"] and left[1][0] == "del"
    assert [text for tag, text in right if tag] == ["dog ", "the mat"] and right[1][0] == "ins"
    with pytest.raises(ValueError, match="holds no finished stage"):
        read(Path(__file__).parent)
