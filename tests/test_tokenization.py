import logging

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from format_cases import assistant, chat_row
from helpers import FAMILIES, QWEN, build_tokenizer, family_tokenizer, write_rows
from trainers.data import (
    PreferenceCollator,
    canonicalize,
    load_preferences,
    tokenization,
    tokenize_dataset,
    tokenize_row,
)
from trainers.generation.sampler import encode_prompt

PLAIN = {"prompt": "say something", "responses": [" kind", " kind today", " the dog"], "scores": [1.0, 2.0, 3.0]}

# decoded prompt, and what follows the text of a response
EXPECTED = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nsay it<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "{}<|eot_id|>",
    ),
    "qwen": (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nsay it<|im_end|>\n<|im_start|>assistant\n",
        "{}<|im_end|>\n",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nsay it<end_of_turn>\n<start_of_turn>model\n",
        "{}<end_of_turn>\n",
    ),
    "mistral": ("<s>[INST] say it [/INST]", " {}</s>"),
}
END_OF_TURN = {"llama3": "<|eot_id|>", "qwen": "<|im_end|>", "gemma": "<end_of_turn>", "mistral": "</s>"}


def as_dataset(*rows):
    return canonicalize(Dataset.from_list(list(rows)))[0]


def token_row(**changes):
    return {"prompt_ids": [7, 8], "response_ids": [[1, 2, 3], [4]], "scores": [1.0, 0.0], **changes}


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_template_writes_bos_and_end_of_turn_exactly_once(family):
    tokenizer = family_tokenizer(family)
    texts = ["the dog", "a lazy fox", "Paris"]
    row = tokenize_row(chat_row(*texts), tokenizer, max_length=200)
    prompt, response = EXPECTED[family]
    assert tokenizer.decode(row["prompt_ids"]) == prompt
    assert [tokenizer.decode(ids) for ids in row["response_ids"]] == [response.format(text) for text in texts]
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN[family])
    for text, ids in zip(texts, row["response_ids"], strict=True):
        assert ids.count(end) == 1
        full = chat_row(text)["prompt"] + [assistant(text)]
        assert row["prompt_ids"] + ids == tokenizer.apply_chat_template(full)["input_ids"]
        if tokenizer.bos_token_id is not None:
            assert (row["prompt_ids"] + ids).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("add_eos", [False, True])
@pytest.mark.parametrize("prompt", ["say something", "<s>say something", "say something</s>"])
def test_text_gets_one_bos_and_one_eos(prompt, add_eos, caplog):
    tokenizer = build_tokenizer(add_eos=add_eos)
    row = tokenize_row({**PLAIN, "prompt": prompt, "responses": [" kind", " the dog", " kind</s>"]}, tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "<s>" + prompt.removeprefix("<s>")
    assert row["prompt_ids"] == encode_prompt(tokenizer, prompt)
    assert [tokenizer.decode(ids) for ids in row["response_ids"]] == [" kind</s>", " the dog</s>", " kind</s>"]
    assert not caplog.records


def test_prompt_is_cut_at_the_prefix_common_to_all_responses(caplog):
    # "th" + "e" is one token in this vocabulary, so the prompt alone is no token prefix of the first response only
    tokenizer = build_tokenizer()
    row = {"prompt": "say th", "responses": ["is", "e dog", "ey"], "scores": [0.0, 1.0, 2.0]}
    alone = tokenizer("say th")["input_ids"]
    assert tokenizer("say this")["input_ids"][: len(alone)] == alone
    assert tokenizer("say the dog")["input_ids"][: len(alone)] != alone
    dataset, report = tokenize_dataset(as_dataset(row, row), tokenizer)
    prompt_ids, response_ids = dataset[0]["prompt_ids"], dataset[0]["response_ids"]
    assert len(prompt_ids) < len(alone) and prompt_ids == alone[: len(prompt_ids)]
    for text, ids in zip(row["responses"], response_ids, strict=True):
        assert prompt_ids + ids == tokenizer("say th" + text)["input_ids"] + [tokenizer.eos_token_id]
    [record] = caplog.records
    assert repr(tokenizer.decode(alone[len(prompt_ids) :])) in record.getMessage()
    assert list(report.notes.values()) == [2]


def test_a_space_at_the_end_of_a_prompt_is_named_once(caplog):
    """Decoders of the Llama kind drop it where it stands first."""
    vocabulary = {token: i for i, token in enumerate(("<s>", "</s>", "\u2581", "a", ":", "\u2581a"))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u2581", "a")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        of.Metaspace(prepend_scheme="first", split=False) for of in (pre_tokenizers, decoders)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    row = {"prompt": "a: ", "responses": ["a", "aa"], "scores": [0.0, 1.0]}
    tokenization._warn_of_cut.cache_clear()  # of earlier tests
    for _ in range(2):
        tokenize_dataset(as_dataset(row), tokenizer)
    [record] = caplog.records
    assert "counted to the responses: ' '." in record.getMessage()


def test_template_that_renders_the_prompt_differently_is_cut_and_named(caplog):
    thinking = QWEN.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
    tokenizer = build_tokenizer(thinking, bos=None, eos="<|im_end|>", special=["<|im_start|>"])
    dataset, _ = tokenize_dataset(as_dataset(chat_row("the dog", "a fox", "it")), tokenizer)
    assert tokenizer.decode(dataset[0]["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(dataset[0]["response_ids"][2]) == "it<|im_end|>\n"
    assert "'<think>'" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_that_was_cut_gets_no_end(family):
    tokenizer = family_tokenizer(family)
    row = chat_row("the dog", "a lazy fox", " Par\ufffd")
    marked = tokenize_row(row | {"unfinished_responses": [False, True, True]}, tokenizer)
    plain = tokenize_row(row, tokenizer)
    assert set(marked) == set(plain) and marked["prompt_ids"] == plain["prompt_ids"]
    assert marked["response_ids"][0] == plain["response_ids"][0]
    # As the policy wrote it after the prompt: the template adds nothing before it and nothing after it.
    assert [tokenizer.decode(ids) for ids in marked["response_ids"][1:]] == ["a lazy fox", " Par"]
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN[family])
    assert [end in ids for ids in marked["response_ids"]] == [True, False, False]
    text = {"prompt": "say", "responses": [" kind", " kind to\ufffd", " kind"], "scores": [0.0, 1.0, 2.0]}
    ids = tokenize_row(text | {"unfinished_responses": [False, True, True]}, tokenizer)["response_ids"]
    assert [tokenizer.decode(part) for part in ids] == [f" kind{tokenizer.eos_token}", " kind to", " kind"]
    assert ids[0] == [*ids[2], tokenizer.eos_token_id]


def test_which_responses_were_cut_comes_through_files_and_goes_no_further(tmp_path):
    tokenizer = family_tokenizer("qwen")
    rows = [chat_row("the dog", "", "a fox", prompt="p") | {"unfinished_responses": [True, False, False]},
            chat_row("a day", "it rains") | {"unfinished_responses": [False, True]}]  # fmt: skip
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    tokens = tokenize_dataset(load_preferences(str(tmp_path / "rows.jsonl")), tokenizer)[0]
    found = [[tokenizer.decode(ids) for ids in row] for row in tokens["response_ids"]]
    assert found == [["the dog", "a fox<|im_end|>\n"], ["a day<|im_end|>\n", "it rains"]]
    assert sorted(tokens.column_names) == ["prompt", "prompt_ids", "response_ids", "scores"]
    turns = chat_row("the dog", "a fox") | {"unfinished_responses": [True, False]}
    turns["responses"][0] += [{"role": "tool", "content": "3"}, assistant("it")]
    with pytest.raises(ValueError, match="row 0: unfinished_responses marks a response of several messages"):
        tokenize_row(turns, tokenizer)


def test_prompt_that_fills_the_window_is_dropped_and_one_token_less_is_kept():
    tokenizer = build_tokenizer()
    p = len(tokenize_row(PLAIN, tokenizer)["prompt_ids"])
    short = {"prompt": "say", "responses": [" a", " b"], "scores": [0.0, 1.0]}
    data = as_dataset(PLAIN, short)
    dataset, report = tokenize_dataset(data, tokenizer, max_length=p)
    assert len(dataset) == 1 and len(dataset[0]["response_ids"]) == 2
    assert report.reasons == {"prompt fills max_length and leaves no room for a response": 1}
    assert (report.rows_in, report.rows_out) == (2, 1)
    dataset, report = tokenize_dataset(data, tokenizer, max_length=p + 1)
    assert len(dataset) == 2 and [len(ids) for ids in dataset[0]["response_ids"]] == [1, 1, 1]
    with pytest.raises(ValueError, match="row 0: prompt fills max_length"):
        tokenize_dataset(data, tokenizer, max_length=p, invalid="error")


def test_prompt_without_tokens_is_dropped():
    # without BOS and with everything merged into the responses nothing is left of the prompt
    row = {"prompt": "th", "responses": ["e dog", "e fox"], "scores": [0.0, 1.0]}
    dataset, report = tokenize_dataset(as_dataset(row, PLAIN), build_tokenizer(bos=None))
    assert len(dataset) == 1
    assert report.reasons == {"prompt has no tokens, so the first response token would have no context": 1}


def test_token_ids_with_a_weight_that_no_average_takes_are_dropped_as_texts_are():
    rows = Dataset.from_list([token_row(weight=weight) for weight in (0.5, None, float("nan"), -1.0)])
    dataset, report = tokenize_dataset(rows, build_tokenizer())
    assert dataset["weight"][:] == [0.5]
    assert report.reasons == {"weight is missing or not finite": 2, "weight is negative": 1}


def test_token_ids_are_accepted_and_truncated_with_their_per_token_columns():
    given = token_row(weights=[[0.1, 0.2, 0.3], [0.4]], ref=[-1.5, -2.5], annotator="anna")
    holed = {
        "prompt_ids": [7, 8], "response_ids": [[1], [], [5, 6]], "scores": [1.0, 2.0, 3.0],
        "weights": [[1.0], [], [0.5, 0.6]], "ref": [-1.0, -2.0, -3.0],
    }  # fmt: skip
    rows = Dataset.from_list([given, holed | {"annotator": "bert"}])
    dataset, report = tokenize_dataset(rows, build_tokenizer(), max_length=4, columns=("weights", "ref"))
    whole = {name: value if name == "prompt_ids" else [value[0], value[2]] for name, value in holed.items()}
    assert dataset.to_list() == [
        given | {"response_ids": [[1, 2], [4]], "weights": [[0.1, 0.2], [0.4]]},
        whole | {"annotator": "bert"},
    ]
    assert report.responses_dropped == {"no tokens": 1}
    batch = PreferenceCollator(0, columns=("weights", "ref"))(dataset.to_list())
    assert batch["weights"].shape == (2, 2, 2) and batch["ref"].shape == (2, 2)


def test_token_rows_with_faults():
    tokenizer = build_tokenizer()
    data = Dataset.from_list([token_row(), token_row(scores=[None, 1.0]), token_row(scores=[float("nan"), 1.0])])
    dataset, report = tokenize_dataset(data, tokenizer)
    assert len(dataset) == 1
    assert report.responses_dropped == {"missing score": 2}
    _, report = tokenize_dataset(Dataset.from_list([token_row(), token_row(scores=[1e39, 1.0])]), tokenizer)
    assert report.responses_dropped == {"score too large for float32": 1}
    with pytest.raises(ValueError, match="row 1: response: missing score"):
        tokenize_dataset(data, tokenizer, invalid="error")
    with pytest.raises(ValueError, match="row 1: 'response_ids' has 2 items but 'scores' has 1"):
        tokenize_dataset(Dataset.from_list([token_row(), token_row(scores=[1.0])]), tokenizer)


def test_scalar_columns_and_the_prompt_are_kept_and_other_text_is_not():
    row = {**PLAIN, "annotator": "anna", "weight": 0.5, "id": 3, "models": ["m", "n", "o"], "ref": [1.0, 2.0, 3.0]}
    dataset, _ = tokenize_dataset(as_dataset(row), build_tokenizer(), columns=("id",))
    ids = {"prompt", "prompt_ids", "response_ids", "scores"}
    assert set(dataset.column_names) == ids | {"annotator", "weight", "id"}
    assert (dataset[0]["annotator"], dataset[0]["weight"], dataset[0]["id"]) == ("anna", 0.5, 3)


def test_keys_that_arrow_adds_to_messages_do_not_reach_the_template():
    strict = QWEN.replace("{{ m['content'] }}", "{{ m['content'] }}{% if m.name is defined %} NAME{% endif %}")
    tokenizer = build_tokenizer(strict, bos=None, eos="<|im_end|>", special=["<|im_start|>"])
    named = chat_row("a", "b")
    named["prompt"][0]["name"] = "eve"
    dataset, _ = tokenize_dataset(as_dataset(chat_row("a", "b"), named), tokenizer)
    assert ["NAME" in tokenizer.decode(ids) for ids in dataset["prompt_ids"]] == [False, True]


def test_errors_say_the_fix():
    with pytest.raises(
        ValueError, match="row 0 has messages .* no chat template; use the tokenizer of an instruct model"
    ):
        tokenize_dataset(as_dataset(chat_row("a", "b")), build_tokenizer())
    with pytest.raises(ValueError, match="row 0 is text, .* no EOS token .* set tokenizer.eos_token"):
        tokenize_dataset(as_dataset(PLAIN), build_tokenizer(eos=None))
    system = chat_row("a", "b")
    system["prompt"].insert(0, {"role": "system", "content": "be kind"})
    with pytest.raises(ValueError, match="row 1: the chat template refuses these messages: no system turn"):
        tokenize_dataset(as_dataset(chat_row("a", "b"), system), family_tokenizer("gemma"))
    with pytest.raises(ValueError, match="fewer than 2 usable responses left"):
        tokenize_row(token_row(response_ids=[[1], []]), build_tokenizer())


def test_fingerprint_depends_on_content_and_options_only(tmp_path):
    saved = tmp_path / "tokenizer"
    build_tokenizer().save_pretrained(saved)
    data = as_dataset(PLAIN)

    def fingerprint(tokenizer, **kwargs):
        return tokenize_dataset(data, tokenizer, **kwargs)[0]._fingerprint

    first, second = AutoTokenizer.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    fresh = fingerprint(first, max_length=64)
    first(["used", "before this"], padding=True, truncation=True, max_length=2)
    first(["and again"])
    assert fresh == fingerprint(first, max_length=64) == fingerprint(second, max_length=64)
    assert fresh != fingerprint(first, max_length=65)
    assert fresh != fingerprint(build_tokenizer(sentences=["another corpus about other things"]), max_length=64)


def test_several_processes_give_the_same_rows_and_counts(caplog):
    tokenizer = build_tokenizer()
    rows = [{"prompt": "say" + " dog" * k, "responses": [" a", " b b b"], "scores": [0.0, 1.0]} for k in range(9)]
    one, one_report = tokenize_dataset(as_dataset(*rows), tokenizer, max_length=10)
    with caplog.at_level(logging.ERROR):
        two, two_report = tokenize_dataset(as_dataset(*rows), tokenizer, max_length=10, num_proc=2)
    assert one.to_list() == two.to_list()
    assert one_report == two_report
    assert 0 < one_report.rows_out < 9


def test_rows_in_a_batch_are_those_of_rows_alone(tmp_path):
    """Also where neighbours give the template different options."""
    flagged = QWEN.replace("{% for", "{{ tools }}{{ flag }}{% for", 1)
    tokenizer = build_tokenizer(flagged, bos=None, eos="<|im_end|>", special=["<|im_start|>"])
    rows = [
        chat_row("dog " * k, "a fox", prompt=f"say {k}")
        | {"unfinished_responses": [k % 3 == 0, k % 5 == 0], "tools": [{"name": "f"}] if k % 7 == 0 else None}
        | {"chat_template_kwargs": {"flag": [1, True][k % 2]} if k % 4 < 2 else None}
        for k in range(1, tokenization.BATCH + 20)
    ]
    dataset, _ = tokenize_dataset(load_preferences(write_rows(tmp_path / "rows.jsonl", rows)), tokenizer)
    for row, found in zip(rows, dataset, strict=True):
        alone = tokenize_row(row, tokenizer)
        assert (found["prompt_ids"], found["response_ids"]) == (alone["prompt_ids"], alone["response_ids"])
    firsts = [tokenizer.decode(ids).split("<|im_start|>user")[0] for ids in dataset["prompt_ids"][3:5]]
    assert firsts[0].endswith("1") and firsts[1].endswith("True")


@pytest.mark.parametrize("method", ["__call__", "_encode_plus"])
def test_rows_are_tokenised_as_the_tokenizer_does_it_whatever_it_did_before(method):
    original = getattr(PreTrainedTokenizerFast, method)

    def lower(self, text, *arguments, **options):
        return original(self, [some.lower() for some in text], *arguments, **options)

    Lower = type("Lower", (PreTrainedTokenizerFast,), {method: lower})
    plain, used = build_tokenizer(), build_tokenizer()
    used(["used", "before this"], padding=True, truncation=True, max_length=2)
    own = Lower(tokenizer_object=plain.backend_tokenizer, **plain.special_tokens_map)
    upper = PLAIN | {"prompt": PLAIN["prompt"].upper(), "responses": [text.upper() for text in PLAIN["responses"]]}
    assert tokenize_row(PLAIN, plain) == tokenize_row(PLAIN, used)
    assert tokenize_row(upper, own)["response_ids"] == tokenize_row(PLAIN, plain)["response_ids"]


def test_of_several_rows_with_faults_the_first_is_named():
    tokenizer = family_tokenizer("gemma")
    rows = [chat_row("a", "b") for _ in range(30)]
    rows[12]["prompt"].insert(0, {"role": "system", "content": "be kind"})
    rows[20]["scores"] = [1.0]
    with pytest.raises(ValueError, match="row 12: the chat template refuses"):
        tokenize_dataset(Dataset.from_list(rows), tokenizer)
    rows[3]["scores"] = [1.0]
    with pytest.raises(ValueError, match="row 3: 'responses' has 2 items but 'scores' has 1"):
        tokenize_dataset(Dataset.from_list(rows), tokenizer)
