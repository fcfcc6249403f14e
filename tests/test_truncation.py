"""What is cut of rows that are too long, what is dropped, and that TRL cuts and learns the same where it can."""

import copy
import re
import shlex
from pathlib import Path

import pytest
import trl
from datasets import Dataset

from format_cases import assistant, chat_row, user
from helpers import FAMILIES, QWEN, build_tokenizer, family_tokenizer, flags, tiny_llama, write_rows
from test_tokenization import as_dataset, token_row
from trainers import DPOConfig, DPOTrainer, SGPOConfig, SWEPOConfig
from trainers.cli import train
from trainers.data import tokenize_dataset, tokenize_row

LEFT = {"truncate_prompts": "left"}
WORDS = "the quick brown fox jumps over the lazy dog"
TOKENS = "tokens lost by prompts that were cut"
CUT = "prompts cut on the left to max_prompt_length"
NOTHING_LEFT = "nothing that is said would stay of a cut prompt: what the template writes fills max_prompt_length"
ALIKE = "rows with responses that are alike once truncated, and were not before"


def conversation(system="be kind"):
    row = chat_row("the dog", "a lazy fox", prompt=WORDS)
    turns = [{"role": "system", "content": system}] if system else []
    return row | {"prompt": [*turns, user("say it"), assistant(WORDS), *row["prompt"]]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_loses_its_left_end_behind_bos(family):
    tokenizer = family_tokenizer(family)
    row = conversation(system=None)
    whole = tokenize_row(row, tokenizer)
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    cut = tokenize_row(row, tokenizer, max_prompt_length=20, **LEFT)
    assert cut["prompt_ids"] == bos + whole["prompt_ids"][len(bos) - 20 :]
    assert len(cut["prompt_ids"]) == 20 < len(whole["prompt_ids"])
    assert cut["response_ids"] == whole["response_ids"]
    length = len(whole["prompt_ids"])
    assert tokenize_row(row, tokenizer, max_prompt_length=length, **LEFT) == whole


@pytest.mark.parametrize("family", ["llama3", "qwen"])
def test_the_system_turn_stays_if_asked(family):
    tokenizer = family_tokenizer(family)
    row = conversation()
    whole = tokenize_row(row, tokenizer)["prompt_ids"]
    system = tokenizer.apply_chat_template(row["prompt"][:1])["input_ids"]
    behind = len(tokenizer.encode(BEHIND[family], add_special_tokens=False))
    last = behind + 3
    limit = len(system) + last
    kept = tokenize_row(row, tokenizer, max_prompt_length=limit, keep_system=True, **LEFT)["prompt_ids"]
    assert kept == system + whole[-last:] and "be kind" in tokenizer.decode(kept)
    plain = tokenize_row(row, tokenizer, max_prompt_length=limit, **LEFT)["prompt_ids"]
    assert len(plain) == limit and plain[-last:] == whole[-last:] and "be kind" not in tokenizer.decode(plain)
    # A turn that leaves no token to what is asked drops the row; one token less of it does not.
    data = as_dataset(row, conversation(system=None))
    plain = tokenize_row(conversation(system=None), tokenizer)["prompt_ids"]
    for more, kept_rows in ((0, 1), (behind, 1), (behind + 1, 2)):
        limit = len(system) + more
        out, report = tokenize_dataset(data, tokenizer, max_prompt_length=limit, keep_system=True, **LEFT)
        lost = len(plain) - limit + (len(whole) - limit) * (kept_rows == 2)
        assert len(out) == kept_rows and report.notes == {CUT: kept_rows, TOKENS: lost}
        assert report.reasons == ({NOTHING_LEFT: 1} if kept_rows == 1 else {})
    assert tokenizer.decode(out[0]["prompt_ids"]).endswith("g" + BEHIND[family])


# What templates write behind the text of the last message.
BEHIND = {
    "llama3": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen": "<|im_end|>\n<|im_start|>assistant\n",
    "gemma": "<end_of_turn>\n<start_of_turn>model\n",
    "mistral": " [/INST]",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_header_is_nothing_that_is_said(family):
    tokenizer, row = family_tokenizer(family), conversation(system=None)
    bos = tokenizer.bos_token_id is not None
    least = bos + len(tokenizer.encode(BEHIND[family], add_special_tokens=False))
    for limit in range(1 + bos, least + 1):
        with pytest.raises(ValueError, match=re.escape(NOTHING_LEFT)):
            tokenize_row(row, tokenizer, max_prompt_length=limit, **LEFT)
    kept = tokenize_row(row, tokenizer, max_prompt_length=least + 1, **LEFT)["prompt_ids"]
    last = tokenizer.decode(kept[bos:])
    assert last.endswith(BEHIND[family]) and WORDS.endswith(last.removesuffix(BEHIND[family]).strip())


def test_the_text_of_a_last_message_is_told_from_what_stands_behind_it():
    calls = QWEN.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m.tool_calls or '' }}")
    tokenizer = build_tokenizer(calls, bos=None, eos="<|im_end|>", special=["<|im_start|>"])
    row = conversation(system=None)
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    row["prompt"].append(assistant("") | {"tool_calls": [call]})
    least = len(tokenizer.encode(BEHIND["qwen"], add_special_tokens=False))
    kept = tokenize_row(row, tokenizer, max_prompt_length=least + 3, **LEFT)["prompt_ids"]
    assert tokenizer.decode(kept) == "}}]" + BEHIND["qwen"]
    with pytest.raises(ValueError, match=re.escape(NOTHING_LEFT)):
        tokenize_row(row, tokenizer, max_prompt_length=least, **LEFT)
    strict = QWEN.replace(
        "{% for m", "{% if messages[-1].content == 'a' %}{{ raise_exception('a') }}{% endif %}{% for m", 1
    )
    tokenizer = build_tokenizer(strict, bos=None, eos="<|im_end|>", special=["<|im_start|>"])
    with pytest.raises(ValueError, match=r"row 0: .*refuses another text in its last message \(a\).*'drop'"):
        tokenize_row(row, tokenizer, max_prompt_length=least, **LEFT)


def test_responses_that_become_alike_are_counted():
    rows = [
        token_row(response_ids=[[1, 2, 3, 4], [1, 2, 3, 5], [6]], scores=[9.0, 5.0, 1.0]),
        token_row(response_ids=[[1, 2, 3], [1, 2], [4] * 9, []], scores=[1.0, 2.0, 3.0, 4.0]),
        token_row(response_ids=[[1] * 9, [1] * 9, [2]], scores=[1.0, 2.0, 3.0]),  # alike before
        token_row(response_ids=[[1, 2], [1, 2, 3, 4], [1, 2, 3, 5]], scores=[1.0, 2.0, None]),  # one goes
    ]
    out, report = tokenize_dataset(
        Dataset.from_list(rows), build_tokenizer(), max_length=len(rows[0]["prompt_ids"]) + 3
    )
    assert out[0]["response_ids"] == [[1, 2, 3], [1, 2, 3], [6]] and len(out) == 4
    assert report.notes == {"responses truncated to fit max_length": 6, ALIKE: 1}
    assert f"1 {ALIKE}" in str(report)


def test_tools_and_keys_of_messages_are_written_into_the_system_turn_as_in_the_prompt():
    strict = QWEN.replace("{% for", "{{ tools }}{% for", 1).replace(
        "['role'] }}", "['role'] }}{{ m.name is defined }}"
    )
    tokenizer = build_tokenizer(strict, bos=None, eos="<|im_end|>", special=["<|im_start|>"])
    row = conversation() | {"tools": [{"name": "f"}]}
    row["prompt"][0]["name"] = None
    length = len(tokenize_row(row, tokenizer)["prompt_ids"])
    kept = tokenize_row(row, tokenizer, max_prompt_length=length - 1, keep_system=True, **LEFT)["prompt_ids"]
    assert tokenizer.decode(kept).startswith("[{'name': 'f'}]<|im_start|>systemFalse\nbe kind<|im_end|>\n")


def test_a_system_turn_that_cannot_be_kept_is_named():
    row, short = conversation(), chat_row("the dog", "a fox")
    limits = {"max_prompt_length": 30, "keep_system": True, **LEFT}
    last = QWEN.replace("{% for", "{% if messages|length == 1 %}!{% endif %}{% for", 1)
    alone = QWEN.replace("{% for", "{% if messages|length == 1 %}{{ raise_exception('no user') }}{% endif %}{% for", 1)
    for template, reason in (
        (last, "writes it otherwise when a turn follows"),
        (alone, r"refuses it alone \(no user"),
    ):
        tokenizer = build_tokenizer(template, bos=None, eos="<|im_end|>", special=["<|im_start|>"])
        with pytest.raises(ValueError, match=f"row 0: .* keep_system cannot keep its system turn: .*{reason}"):
            tokenize_dataset(as_dataset(row), tokenizer, **limits)
    tokens = Dataset.from_list([token_row(), token_row(prompt_ids=[7] * 31)])
    with pytest.raises(ValueError, match="row 1: .* given as token ids, which do not tell where it ends"):
        tokenize_dataset(tokens, family_tokenizer("qwen"), **limits)
    assert len(tokenize_row(short, family_tokenizer("llama3"), **limits)["prompt_ids"]) < 30  # nothing to keep


def test_token_ids_are_cut_as_texts_are_with_their_columns():
    tokenizer = build_tokenizer()
    text = {"prompt": WORDS, "responses": [" kind", " kind today"], "scores": [1.0, 2.0]}
    whole = tokenize_row(text, tokenizer)
    limits = {"max_prompt_length": 6, "max_length": 8, **LEFT}
    given = {name: whole[name] for name in ("prompt_ids", "response_ids", "scores")}
    weights = [[float(i) for i in range(len(ids))] for ids in whole["response_ids"]]
    out, report = tokenize_dataset(
        Dataset.from_list([given | {"weights": weights}]), tokenizer, columns=("weights",), **limits
    )
    of_text = tokenize_row(text, tokenizer, **limits)
    assert out[0]["prompt_ids"] == of_text["prompt_ids"] == [tokenizer.bos_token_id, *whole["prompt_ids"][-5:]]
    assert out[0]["response_ids"] == of_text["response_ids"] == [ids[:2] for ids in whole["response_ids"]]
    assert out[0]["weights"] == [values[:2] for values in weights]
    long = sum(len(ids) > 2 for ids in whole["response_ids"])
    lost = len(whole["prompt_ids"]) - 6
    assert long and report.notes == {CUT: 1, TOKENS: lost, "responses truncated to fit max_length": long, ALIKE: 1}
    again, report = tokenize_dataset(out, tokenizer, columns=("weights",), **limits)
    assert again.to_list() == out.to_list() and not report.notes


def test_what_is_too_long_can_be_dropped_and_is_counted():
    rows = [
        token_row(),
        token_row(prompt_ids=[1, 2, 3]),
        token_row(response_ids=[[1, 2, 3], [4], [5, 6]], scores=[1.0, 0.0, 2.0]),
        token_row(response_ids=[[1] * 9, [2] * 9, [3], []], scores=[1.0, None, 0.0, 1.0]),
    ]
    limits = {"max_prompt_length": 2, "max_length": 4, "truncate_responses": "drop"}
    out, report = tokenize_dataset(Dataset.from_list(rows), build_tokenizer(), **limits)
    assert out.to_list() == [token_row(response_ids=[[4], [5, 6]], scores=[0.0, 2.0])]
    assert report.reasons == {
        "prompt longer than max_prompt_length": 1, "fewer than 2 usable responses left": 2,
    }  # fmt: skip
    long = "longer than the room that max_length leaves after the prompt"
    assert report.responses_dropped == {long: 3, "missing score": 1, "no tokens": 1}
    with pytest.raises(ValueError, match="row 0: response: longer than the room that max_length leaves"):
        tokenize_dataset(Dataset.from_list(rows), build_tokenizer(), invalid="error", **limits)


def test_a_response_without_a_trained_token_is_dropped():
    marks = [[False, True, True], [False, False, True], [True, False, False], [False, False, False]]
    row = token_row(response_ids=[[1, 2, 3]] * 4, scores=[1.0, 0.0, 2.0, 3.0], assistant_masks=marks)
    out, report = tokenize_dataset(
        Dataset.from_list([row]), build_tokenizer(), max_length=4, columns=("assistant_masks",)
    )
    assert out[0]["scores"] == [1.0, 2.0] and out[0]["assistant_masks"] == [[False, True], [True, False]]
    assert report.responses_dropped == {"no token that is trained on, or none left within max_length": 2}


def test_limits_that_make_no_sense_are_refused():
    for options, error in (
        (
            {"max_prompt_length": 8, "max_length": 8},
            "max_prompt_length=8 leaves no room for a response in max_length=8",
        ),
        ({"max_prompt_length": 0}, "max_prompt_length=0 must be a finite number, at least 1"),
        ({"truncate_prompts": "left"}, "truncate_prompts='left' needs max_prompt_length"),
        ({"truncate_prompts": "right"}, "choose one of drop, left"),
        ({"keep_system": True, "max_prompt_length": 8}, "keep_system has no effect .* set truncate_prompts='left'"),
        ({"truncate_responses": "left"}, "choose one of right, drop"),
    ):
        with pytest.raises(ValueError, match=error):
            tokenize_dataset(Dataset.from_list([token_row()]), build_tokenizer(), **options)
        with pytest.raises(ValueError, match=error):
            SWEPOConfig(use_cpu=True, **options)


def test_bos_alone_is_no_prompt_and_a_token_is():
    row, limits = (
        {"prompt": WORDS, "responses": [" kind", " it"], "scores": [1.0, 0.0]},
        {"max_prompt_length": 1, **LEFT},
    )
    plain = build_tokenizer(bos=None)
    assert tokenize_row(row, plain, **limits)["prompt_ids"] == plain(WORDS)["input_ids"][-1:]
    with pytest.raises(ValueError, match="fills max_prompt_length"):
        tokenize_row(row, build_tokenizer(), **limits)


@pytest.mark.parametrize("config, options", [(SGPOConfig, {}), (SWEPOConfig, {"self_enhance": {"scorer": "m.f"}})])
def test_answers_are_not_trained_behind_other_prompts_than_they_are_sampled_from(config, options):
    with pytest.raises(ValueError, match="behind a part of the prompts that .* samples them from"):
        config(use_cpu=True, max_prompt_length=8, **LEFT, **options)


def pairs_with_long_responses():
    words = WORDS.split()
    return [
        {"prompt": [user(" ".join(words[: i + 1]))], "chosen": [assistant(" ".join(words[: 3 * i + 1]))],
         "rejected": [assistant(" ".join(words[i:]))]} for i in range(4)
    ]  # fmt: skip


def losses_of_both(tmp_path, tokenizer, rows, theirs, ours):
    """What TRL's trainer and ours make of the same pairs: their batch as rows of (prompt + response), and the loss."""
    policy, reference = tiny_llama(len(tokenizer)), tiny_llama(len(tokenizer), seed=9)
    common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 4,
              "bf16": False, "beta": 0.3, "gradient_checkpointing": False}  # fmt: skip
    made = []
    for cls, args in ((trl.DPOTrainer, trl.DPOConfig(**common, **theirs)), (DPOTrainer, DPOConfig(**common, **ours))):
        t = cls(copy.deepcopy(policy), ref_model=copy.deepcopy(reference), args=args,
                train_dataset=Dataset.from_list(rows), processing_class=tokenizer)  # fmt: skip
        batch = t.data_collator(list(t.train_dataset))
        made.append((t, batch, t.compute_loss(t.model.eval(), batch).item()))
    (_, theirs, their_loss), (t, _, our_loss) = made
    their_ids = [
        ids[mask.bool()].tolist() for ids, mask in zip(theirs["input_ids"], theirs["attention_mask"], strict=True)
    ]
    marked = [mask.sum().item() for mask in theirs["completion_mask"]]
    our_rows = [
        (row["prompt_ids"], ids) for k in range(2) for row in t.train_dataset for ids in [row["response_ids"][k]]
    ]
    assert [p + r for p, r in our_rows] == their_ids and [len(r) for _, r in our_rows] == marked
    assert our_loss == pytest.approx(their_loss, abs=1e-5)
    return t.train_dataset


def test_trl_cuts_responses_to_the_same_ids_and_gets_the_same_loss(tmp_path):
    tokenizer, rows = family_tokenizer("llama3"), pairs_with_long_responses()
    whole = losses_of_both(tmp_path, tokenizer, rows, {"max_length": None}, {"max_length": None})
    limit = max(len(row["prompt_ids"]) for row in whole)  # the longest prompt fills it: both drop that row
    cut = losses_of_both(tmp_path, tokenizer, rows, {"max_length": limit}, {"max_length": limit})
    assert len(cut) < len(whole) == 4
    assert cut["response_ids"] != whole["response_ids"][: len(cut)]


def test_trl_cuts_prompts_on_the_left_to_the_same_ids_where_there_is_no_bos_and_responses_are_as_long(tmp_path):
    tokenizer, rows = family_tokenizer("qwen"), pairs_with_long_responses()
    rows = [row | {"chosen": [assistant("the dog")], "rejected": [assistant("dog the")]} for row in rows]
    whole = tokenize_dataset(as_dataset(*rows), tokenizer)[0]
    [length] = {len(ids) for row in whole for ids in row["response_ids"]}
    shortest = min(len(row["prompt_ids"]) for row in whole)
    with pytest.warns(FutureWarning, match="keep_end"):
        cut = losses_of_both(
            tmp_path, tokenizer, rows, {"max_length": shortest + length, "truncation_mode": "keep_end"},
            {"max_length": shortest + length, "max_prompt_length": shortest, "truncate_prompts": "left"},
        )  # fmt: skip
    assert {len(row["prompt_ids"]) for row in cut} == {shortest} < {len(row["prompt_ids"]) for row in whole}


def test_the_command_of_the_docs_says_what_would_be_cut(tmp_path, start, capsys):
    page = (Path(__file__).parents[1] / "docs/data.md").read_text()
    command = next(line for line in page.splitlines() if "--truncate_prompts left" in line and "--dry_run" in line)
    rows = [
        {"prompt": WORDS, "responses": [" a", " b " * 300, " c"], "scores": [1.0, 0.0, 2.0]},
        {"prompt": "say", "responses": [" a", " b"], "scores": [1.0, 0.0]},
    ]
    local = {"model_name_or_path": start, "dataset_name": write_rows(tmp_path / "rows.jsonl", rows),
             "use_peft": "false", "dtype": "float32"}  # fmt: skip
    train.main([*shlex.split(command)[2:], *flags(**local)])
    told = capsys.readouterr().out
    assert "1 prompts cut on the left to max_prompt_length" in told and "2 rows in, 2 kept" in told
    assert "responses dropped: 1 (longer than the room that max_length leaves after the prompt)" in told
