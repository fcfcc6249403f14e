"""Responses of several messages: which tokens the assistant wrote, by templates of several families."""

import re
from itertools import islice
from pathlib import Path

import pytest
import trl
from datasets import Dataset, IterableDataset

from format_cases import assistant, chat_row, user
from helpers import FAMILIES, QWEN, build_tokenizer, family_tokenizer, tiny_llama, write_rows
from trainers import DPOConfig, DPOTrainer
from trainers.cli.dry_run import first_row
from trainers.data import PreferenceCollator, canonicalize, load_preferences, tokenize_dataset, tokenize_row
from trainers.data.stream import TokenStream
from trainers.data.turns import MARKS

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
QWEN3 = {"bos": None, "eos": "<|im_end|>", "special": ["<|im_start|>"]}


def tool(text):
    return {"role": "tool", "content": text}


def turns_row(*turns, short="no"):
    """A row with a response of several messages and one of a single message."""
    return chat_row("", short) | {"responses": [list(turns), [assistant(short)]]}


def trl_template(name):
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def shown(tokenizer, row, **options):
    """The responses as text, with what is trained on in brackets."""
    row, texts = tokenize_row(row, tokenizer, **options), []
    for ids, mask in zip(row["response_ids"], row["assistant_masks"], strict=True):
        cuts = [i for i in range(1, len(ids)) if mask[i] != mask[i - 1]]
        parts = [slice(*pair) for pair in zip([0, *cuts], [*cuts, None], strict=True)]
        texts.append("".join(("[{}]" if mask[p.start] else "{}").format(tokenizer.decode(ids[p])) for p in parts))
    return texts


# What stands in a response of the assistant, a user and the assistant.
EXPECTED = {
    "llama3": (
        "[hi<|eot_id|>]<|start_header_id|>user<|end_header_id|>\n\nmore<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[the dog<|eot_id|>]"
    ),
    "qwen": "[hi<|im_end|>\n]<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n[the dog<|im_end|>\n]",
    "gemma": (
        "[hi<end_of_turn>\n]<start_of_turn>user\nmore<end_of_turn>\n<start_of_turn>model\n[the dog<end_of_turn>\n]"
    ),
    "mistral": "[ hi</s>][INST] more [/INST][ the dog</s>]",
}
# How many of its tokens are trained on, not, and trained on again, and how many the response of a single message has.
COUNTS = {"llama3": (3, 18, 4, 3), "qwen": (4, 15, 5, 4), "gemma": (4, 13, 5, 4), "mistral": (4, 7, 4, 4)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_assistants_tokens_are_trained_on_and_no_others(family):
    tokenizer, row = family_tokenizer(family), turns_row(assistant("hi"), user("more"), assistant("the dog"))
    single = tokenize_row(chat_row("no", "no"), tokenizer)
    assert shown(tokenizer, row) == [EXPECTED[family], f"[{tokenizer.decode(single['response_ids'][0])}]"]
    masked = tokenize_row(row, tokenizer)
    assert masked["prompt_ids"] == single["prompt_ids"]  # so the boundary is the one of single messages
    everything = tokenize_row(row, tokenizer, assistant_only_loss=False)
    assert everything | {"assistant_masks": masked["assistant_masks"]} == masked
    batch = PreferenceCollator(0)([masked, single])
    first, between, second, short = COUNTS[family]
    whole = [True] * short + [False] * (first + between + second - short)
    assert batch["response_mask"].tolist() == [
        [[True] * first + [False] * between + [True] * second, whole], [whole, whole]
    ]  # fmt: skip


def test_rows_of_single_messages_are_as_they_were():
    tokenizer, plain = family_tokenizer("llama3"), chat_row("the dog", "a fox")
    rows, _ = tokenize_dataset(canonicalize(Dataset.from_list([plain]))[0], tokenizer)
    assert "assistant_masks" not in rows.column_names
    both = canonicalize(Dataset.from_list([plain, turns_row(assistant("a"), user("b"), assistant("c"))]))[0]
    rows, _ = tokenize_dataset(both, tokenizer)
    assert rows["assistant_masks"][0] is None and [len(mask) for mask in rows["assistant_masks"][1]] == [
        len(ids) for ids in rows["response_ids"][1]
    ]


CHATS = {
    "turns": turns_row(assistant("hi"), user("more"), assistant("the dog"), user("and"), assistant("a fox")),
    "call": turns_row(assistant("") | {"tool_calls": [CALL]}, tool("3"), tool("4"), assistant("the dog")),
    "thinking": turns_row(assistant("<think>\nhm\n</think>\n\nhi"), user("more"), assistant("the dog")),
}


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma"])
def test_growing_beginnings_tell_what_generation_marks_tell_and_trl_trains_on(name, tmp_path):
    special = {"llama3": FAMILIES["llama3"], "gemma": FAMILIES["gemma"], "qwen3": (None, *QWEN3.values())}[name]
    bos, eos, more = special[-3:]
    marked = build_tokenizer(trl_template(f"{name}_training"), bos=bos, eos=eos, special=more)
    plain = build_tokenizer(
        re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", marked.chat_template), bos=bos, eos=eos, special=more
    )
    assert MARKS.search(marked.chat_template) and not MARKS.search(plain.chat_template)
    rows = [row for kind, row in CHATS.items() if name != "gemma" or kind != "call"]  # it has no tools
    found = [tokenize_row(row, marked) for row in rows]
    assert found == [tokenize_row(row, plain) for row in rows]
    args = trl.SFTConfig(
        output_dir=str(tmp_path), assistant_only_loss=True, use_cpu=True, bf16=False, report_to="none"
    )
    given = [{"prompt": row["prompt"], "completion": row["responses"][0]} for row in rows]
    theirs = trl.SFTTrainer(
        tiny_llama(len(marked)), args=args, train_dataset=Dataset.from_list(given), processing_class=marked
    )
    for row, labels in zip(found, theirs.train_dataset["labels"], strict=True):
        ids, mask = row["response_ids"][0], row["assistant_masks"][0]
        assert labels == [-100] * len(row["prompt_ids"]) + [i if on else -100 for i, on in zip(ids, mask, strict=True)]


def test_a_template_that_leaves_thinking_out_is_named_with_a_fix_that_helps():
    tokenizer = build_tokenizer(trl_template("qwen3"), **QWEN3)
    thought = [assistant("") | {"reasoning_content": "hm", "tool_calls": [CALL]}, tool("3"), assistant("the dog")]
    assert shown(tokenizer, turns_row(*thought))[0] == (
        '[<think>\nhm\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n]'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "[<think>\n\n</think>\n\nthe dog<|im_end|>\n]"
    )
    rows = [chat_row("a", "b"), CHATS["turns"]]
    with pytest.raises(ValueError, match=r"row 1: .*message 2 reads otherwise .*trl.get_training_chat_template"):
        tokenize_dataset(Dataset.from_list(rows), tokenizer)
    assert tokenize_row(rows[1], tokenizer, assistant_only_loss=False)["response_ids"]
    training = trl.get_training_chat_template(tokenizer)
    by_option = tokenize_row(rows[1], tokenizer, chat_template_kwargs={"chat_template": training})
    tokenizer.chat_template = training
    assert tokenize_row(rows[1], tokenizer) == by_option
    assert shown(tokenizer, rows[1])[0].startswith("[<think>\n\n</think>\n\nhi<|im_end|>\n]<|im_start|>user\nmore")


def test_marks_that_mark_nothing_and_beginnings_that_are_refused_are_named():
    row = turns_row(assistant("hi"), user("more"), assistant("the dog"))
    unmarked = QWEN.replace("{% for m", "{% generation %}{% endgeneration %}{% for m", 1)
    with pytest.raises(ValueError, match="row 0: .* generation marks mark nothing. Give the tokenizer a template"):
        tokenize_row(row, build_tokenizer(unmarked, **QWEN3))
    even = QWEN.replace(
        "{% for m", "{% if messages | length == 3 %}{{ raise_exception('odd') }}{% endif %}{% for m", 1
    )
    with pytest.raises(ValueError, match=r"row 0: .* refuses the beginnings of this chat \(odd\)"):
        tokenize_row(row, build_tokenizer(even, **QWEN3))
    with pytest.raises(ValueError, match="row 0: the chat template refuses these messages: .* must alternate"):
        tokenize_row(CHATS["call"], build_tokenizer(trl_template("gemma"), bos="<bos>", eos="<eos>"))


def test_a_response_may_begin_with_a_tools_turn_and_one_without_the_assistant_is_dropped(caplog):
    tokenizer = family_tokenizer("qwen")
    row = chat_row("", "", "", "") | {"responses": [
        [tool("3"), assistant("the dog")], [tool("3")], [assistant("a fox")], [tool("4"), assistant(""), tool("5")],
    ]}  # fmt: skip
    dataset, report = tokenize_dataset(canonicalize(Dataset.from_list([row]))[0], tokenizer)
    assert report.responses_dropped == {"no token that is trained on, or none left within max_length": 1}
    assert dataset[0]["scores"] == [0.0, 2.0, 3.0]
    assert not caplog.records  # of the header that the prompt ends with nothing is trained on
    assert shown(tokenizer, row) == [
        "tool\n3<|im_end|>\n<|im_start|>assistant\n[the dog<|im_end|>\n]",
        "assistant\n[a fox<|im_end|>\n]",
        "tool\n4<|im_end|>\n<|im_start|>assistant\n[<|im_end|>\n]<|im_start|>tool\n5<|im_end|>\n",
    ]


def test_what_is_cut_off_takes_its_marks_along():
    tokenizer = family_tokenizer("qwen")
    row = chat_row("", "", "") | {"responses": [
        [assistant("hi"), tool("the lazy dog")], [tool("the lazy dog"), assistant("hi")], [assistant("no")],
    ]}  # fmt: skip
    whole = tokenize_row(row, tokenizer)
    room = whole["assistant_masks"][1].index(True)
    dataset, report = tokenize_dataset(
        canonicalize(Dataset.from_list([row]))[0], tokenizer, max_length=len(whole["prompt_ids"]) + room
    )
    assert report.responses_dropped == {"no token that is trained on, or none left within max_length": 1}
    assert dataset[0]["response_ids"] == [whole["response_ids"][k][:room] for k in (0, 2)]
    assert dataset[0]["assistant_masks"] == [whole["assistant_masks"][k][:room] for k in (0, 2)]


def test_an_unfinished_response_beside_several_turns_is_trained_on():
    tokenizer = family_tokenizer("qwen")
    row = turns_row(assistant("hi"), tool("3"), assistant("the dog"), short="a lazy")
    assert shown(tokenizer, row | {"unfinished_responses": [False, True]})[1] == "[a lazy]"


def test_turns_come_through_files_and_marks_through_tokenised_rows(tmp_path):
    tokenizer = family_tokenizer("llama3")
    rows = load_preferences(write_rows(tmp_path / "rows.jsonl", [CHATS["call"] | {"id": 1}, CHATS["turns"]]))
    once = tokenize_dataset(rows, tokenizer)[0]
    assert shown(tokenizer, CHATS["turns"])[0].count("[") == 3
    assert once["assistant_masks"][1] == tokenize_row(CHATS["turns"], tokenizer)["assistant_masks"]
    assert tokenize_dataset(once, tokenizer)[0].to_list() == once.to_list()
    for source in (rows, once):
        stream = TokenStream(source.to_iterable_dataset(), tokenizer, mixed=False, invalid="drop", as_chat=False)
        assert [row["assistant_masks"] for row in islice(stream, 2)] == once["assistant_masks"][:]


MARKED = {"prompt_ids": [1], "response_ids": [[1, 2], [3]], "scores": [0.0, 1.0]}


@pytest.mark.parametrize("marks", [[[True], [True]], [[1, 0.5], [1]], [[1, 2], [1]], [["yes", "no"], ["yes"]]])
def test_marks_are_true_or_false_for_each_token(marks):
    rows = [MARKED | {"assistant_masks": given} for given in ([[1, 0], [1]], marks)]
    tokenizer = build_tokenizer()
    assert tokenize_dataset(Dataset.from_list(rows[:1]), tokenizer)[0]["assistant_masks"][0] == [[True, False], [True]]
    source = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match="row 1: 'assistant_masks' must hold true or false for each token"):
        TokenStream(source, tokenizer, invalid="drop", as_chat=False)


def test_marks_beside_text_are_refused_as_nobody_would_read_them(tmp_path):
    plain = {"prompt": "a ", "responses": ["b c", "c"], "scores": [1.0, 0.0]}
    rows = [plain | {"assistant_masks": marks} for marks in (None, [[True, False], [True]])]
    assert len(tokenize_dataset(Dataset.from_list(rows[:1]), build_tokenizer())[0]) == 1
    for source in (Dataset.from_list(rows), load_preferences(write_rows(tmp_path / "rows.jsonl", rows))):
        with pytest.raises(ValueError, match="row 1: 'assistant_masks' says which token ids .* give 'prompt_ids'"):
            tokenize_dataset(source, build_tokenizer())
    with pytest.raises(ValueError, match="row 0: 'assistant_masks' says which token ids"):
        tokenize_row(rows[1], build_tokenizer())


def test_the_example_of_the_docs_prints_what_it_says(tmp_path, capsys):
    family_tokenizer("qwen").save_pretrained(tmp_path)
    page = (Path(__file__).resolve().parents[1] / "docs/data.md").read_text()
    code = page.partition("## Several turns")[2].partition("```python\n")[2].partition("```")[0]
    exec(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path)), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^# (.*)$", code, flags=re.M)


def test_a_dry_run_shows_what_is_trained_on():
    tokenizer = family_tokenizer("gemma")
    rows = Dataset.from_list([tokenize_row(turns_row(assistant("hi"), user("more"), assistant("a dog")), tokenizer)])
    shown = first_row(rows, tokenizer).splitlines()
    assert shown[2] == r"  of it trained on: 'hi<end_of_turn>\na dog<end_of_turn>\n'"
    assert shown[3:] == [r"scored 1: 'no<end_of_turn>\n'"]


@pytest.mark.parametrize("kind", ["single", "call"])
def test_trl_has_the_loss_of_all_tokens(kind, tmp_path):
    """TRL's DPO trains on the tool's turns too: what `assistant_only_loss=False` is."""
    tokenizer = build_tokenizer(trl_template("llama3_training"), bos="<|begin_of_text|>", eos="<|eot_id|>",
                                special=["<|start_header_id|>", "<|end_header_id|>"])  # fmt: skip
    row = CHATS["call"] if kind == "call" else chat_row("the dog", "a lazy fox")
    pair = {"prompt": row["prompt"], "chosen": row["responses"][0], "rejected": row["responses"][1]}
    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "max_length": None}
    models = {"ref_model": tiny_llama(len(tokenizer), seed=9), "train_dataset": Dataset.from_list([pair]),
              "processing_class": tokenizer}  # fmt: skip
    theirs = trl.DPOTrainer(tiny_llama(len(tokenizer)), args=trl.DPOConfig(**common), **models)
    batch = theirs.data_collator([theirs.train_dataset[0]])
    expected = theirs.compute_loss(theirs.model, batch).item()
    losses = {}
    for only in (True, False):
        args = DPOConfig(**common, beta=0.1, assistant_only_loss=only)
        t = DPOTrainer(tiny_llama(len(tokenizer)), args=args, **models)
        losses[only] = t.compute_loss(t.model, t.data_collator([t.train_dataset[0]])).item()
    assert losses[False] == pytest.approx(expected, rel=1e-5)
    assert (losses[True] == losses[False]) == (kind == "single")
    if kind == "call":
        assert abs(losses[True] - expected) > 1e-3
