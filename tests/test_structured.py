"""What a chat template reads beside text reaches it as the source had it: tools, their calls, and its options."""

import json

import pytest
from datasets import Dataset, Features, IterableDataset, Json, List, Value

from helpers import build_tokenizer, write_rows
from trainers.cli import generate
from trainers.cli import prepare as prepare_data
from trainers.data import canonicalize, load_preferences, tokenize_dataset
from trainers.data.canonical import canonical_stream
from trainers.data.rows import to_canonical

pytestmark = pytest.mark.usefixtures("own_cache")
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t | tojson }}]{% endfor %}{{ style }}"
    "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.arguments | tojson }}>{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
USER = [{"role": "user", "content": "q"}]
WEATHER = {"name": "weather", "parameters": {"city": {"type": "string"}}}
SUM = {"name": "sum", "parameters": {"x": {"type": "number"}, "y": {"type": "number", "default": None}}}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEMPLATE, bos=None, eos="<|im_end|>", special=["<|im_start|>"])


def call(**arguments):
    return [
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    ]


def pair(chosen, rejected, **more):
    return {"prompt": USER, "chosen": chosen, "rejected": rejected, **more}


def texts(dataset, tokenizer, **options):
    """Decoded prompts, and decoded responses of all rows."""
    rows, _ = tokenize_dataset(canonicalize(dataset)[0], tokenizer, **options)
    return tokenizer.batch_decode(rows["prompt_ids"][:]), [tokenizer.batch_decode(ids) for ids in rows["response_ids"]]


ANSWER = [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]
CALLS = [pair(call(city="Rome"), call(city="Oslo")), pair(call(x=1, y={"z": [2]}), call(x=1))]
WRITTEN = [['{"city": "Rome"}', '{"city": "Oslo"}'], ['{"x": 1, "y": {"z": [2]}}', '{"x": 1}']]


@pytest.mark.parametrize("source", ["list", "jsonl", "parquet", "at once"])
def test_the_nulls_of_a_table_do_not_reach_the_arguments_of_a_call(source, tokenizer, tmp_path):
    table = Dataset.from_list(CALLS)
    if source == "jsonl":
        table = load_preferences(write_rows(tmp_path / "rows.jsonl", CALLS))
    elif source == "parquet":
        table.to_parquet(tmp_path / "rows.parquet")
        table = load_preferences(tmp_path / "rows.parquet")
    rows = tokenize_dataset(table if source == "at once" else canonicalize(table)[0], tokenizer)[0]
    assert [tokenizer.batch_decode(ids) for ids in rows["response_ids"]] == [
        [f"<{text}><|im_end|>" for text in row] for row in WRITTEN
    ]


MIXED = [pair(call(x=None, y=0.1 + 0.2), call(x="2")), pair(call(x={"a": [None]}), call(x=2, y=None))]


@pytest.mark.parametrize("streaming", [False, True])
def test_nulls_and_types_of_a_json_file_are_kept(streaming, tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*MIXED, *[MIXED[0]] * 1100, MIXED[1]])
    found = load_preferences(path, streaming=streaming)
    rows = list(found)
    for index in (0, 1, 1101, 1102):
        source = MIXED[index % 2 if index < 2 else index - 1101]
        assert rows[index]["responses"] == [source["chosen"], source["rejected"]]
    again = Dataset.from_list(rows[:2], features=Features({**found.features}))
    assert texts(again, tokenizer)[1] == [
        ['<{"x": null, "y": 0.30000000000000004}><|im_end|>', '<{"x": "2"}><|im_end|>'],
        ['<{"x": {"a": [null]}}><|im_end|>', '<{"x": 2, "y": null}><|im_end|>'],
    ]


def test_json_inside_a_table_keeps_its_nulls():
    calls = List({"id": Value("string"), "function": {"arguments": Json(), "name": Value("string")}})
    turn = List({"role": Value("string"), "content": Value("string"), "tool_calls": calls})
    features = Features(prompt=turn, chosen=turn, rejected=turn)
    other = {"id": "7", "function": {"name": "g", "arguments": {}}}
    rows = [pair(call(x=None), [{"role": "assistant", "content": "b", "tool_calls": [other]}])]
    found = canonicalize(Dataset.from_list(rows, features=features))[0][0]["responses"]
    assert found[0][0]["tool_calls"] == [{"function": {"arguments": {"x": None}, "name": "f"}}]
    assert found[1][0]["tool_calls"] == [other]


@pytest.mark.parametrize("calls", ["x", {}, ["x"], [None], [{}], [{"function": "f"}], [{"function": {"name": "f"}}],
                                   [{"function": {"name": None, "arguments": {}}}], [{"name": "f", "arguments": [1]}],
                                   [*call(x=1)[0]["tool_calls"], {"function": None}]])  # fmt: skip
@pytest.mark.parametrize("name", ["responses.0.", "prompt"])
def test_wrong_calls_are_named_with_row_and_field(name, calls, tokenizer, tmp_path):
    turn = {"role": "assistant", "content": "a", "tool_calls": calls}
    wrong = {"prompt": USER, "responses": [[turn], ANSWER[1]], "scores": [1.0, 0.0]}
    if name == "prompt":
        wrong = {"prompt": [*USER, turn], "responses": [*ANSWER], "scores": [1.0, 0.0]}
    good = pair(call(x=1), [ANSWER[0][0] | {"tool_calls": None}])
    told = f"row 1: '{name}' holds a message whose 'tool_calls' is the .*; give a list of"
    with pytest.raises(ValueError, match=told):
        load_preferences(write_rows(tmp_path / "rows.jsonl", [to_canonical(good), wrong]))
    for right in (
        [],
        [{"name": "f", "arguments": {}}],
        [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
    ):
        to_canonical(pair([turn | {"tool_calls": right}], ANSWER[1]))


def test_any_failure_of_a_template_names_the_row():
    failing = TEMPLATE.replace("{{ m.content or '' }}", "{{ m.content or '' }}{{ 1 + m.content if m.content == 'x' }}")
    tokenizer = build_tokenizer(failing, bos=None, eos="<|im_end|>", special=["<|im_start|>"])
    rows = [pair(*ANSWER), pair(ANSWER[0], [{"role": "assistant", "content": "x"}])]
    with pytest.raises(
        ValueError, match="row 1: the chat template refuses these messages: TypeError: unsupported oper"
    ):
        tokenize_dataset(Dataset.from_list(rows), tokenizer)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "jsonl.gz"])
def test_a_prepared_file_holds_the_same_calls_and_tools(suffix, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [row | {"tools": [SUM]} for row in MIXED])
    prepare_data.main(["--dataset_name", str(path), "--output", str(tmp_path / f"out.{suffix}")])
    assert load_preferences(tmp_path / f"out.{suffix}").to_list() == load_preferences(path).to_list()


def test_tools_reach_the_template_row_by_row(tokenizer):
    rows = [
        pair(*ANSWER, tools=tools) for tools in ([WEATHER], [SUM, WEATHER], None, [])
    ]  # as many tools as responses, which do not belong to them
    found = texts(Dataset.from_list(rows), tokenizer)[0]
    bare = "<|im_start|>user:q<|im_end|><|im_start|>assistant:"
    weather = f"[{json.dumps(WEATHER)}]"
    # A table fills in nulls, and its own `default` cannot be told from them.
    total = '[{"name": "sum", "parameters": {"x": {"type": "number"}, "y": {"type": "number"}}}]'
    assert found == [weather + bare, total + weather + bare, bare, bare]


def test_tools_as_json_text_and_from_a_stream_keep_everything(tokenizer):
    rows = [pair(*ANSWER, tools=json.dumps([SUM]))]
    assert texts(Dataset.from_list(rows), tokenizer)[0][0].startswith(f"[{json.dumps(SUM)}]")
    stream = IterableDataset.from_generator(lambda: iter([pair(*ANSWER, tools=[SUM])] * 2))
    assert [row["tools"] for row in canonical_stream(stream, None)] == [[SUM]] * 2


def test_a_dropped_response_leaves_the_tools_alone(tokenizer):
    row = {"prompt": USER, "responses": [*ANSWER, [{"role": "assistant", "content": ""}]], "scores": [2.0, 1.0, 0.0]}
    found, report = canonicalize(Dataset.from_list([row | {"tools": [WEATHER, WEATHER, WEATHER]}]))
    assert report.responses_dropped == {"empty text": 1}
    assert len(found[0]["responses"]) == 2 and found[0]["tools"] == [WEATHER] * 3


def test_options_of_the_template_by_row_win_over_those_of_all(tokenizer):
    rows = [pair(*ANSWER, chat_template_kwargs=own) for own in ({"style": "short"}, {}, None)]
    found = texts(Dataset.from_list(rows), tokenizer, chat_template_kwargs={"style": "long"})[0]
    assert [text.split("<")[0] for text in found] == ["short", "long", "long"]


@pytest.mark.parametrize(
    "own",
    [{"padding": True}, {"truncation": True, "max_length": 3}, {"tokenize": False}, {"add_generation_prompt": True}],
)
def test_options_of_the_tokenizer_are_none_of_the_template(own, tokenizer):
    rows = [pair(*ANSWER, chat_template_kwargs=more) for more in ({"style": "x"}, own)]
    refused = f"{min(own)!r} in chat_template_kwargs is an option of the tokenizer and no variable of the template"
    source = Dataset.from_list(
        [row | {"chat_template_kwargs": json.dumps(row["chat_template_kwargs"])} for row in rows]
    )
    with pytest.raises(ValueError, match=f"row 1: {refused}"):
        tokenize_dataset(source, tokenizer)
    with pytest.raises(ValueError, match=f"row 0: {refused}"):
        texts(Dataset.from_list([pair(*ANSWER)]), tokenizer, chat_template_kwargs=own)
    more = {
        "documents": [{"title": "x", "text": "y"}],
        "tools": [WEATHER],
        "chat_template": TEMPLATE,
        "bos_token": "s",
    }
    assert texts(Dataset.from_list([pair(*ANSWER)]), tokenizer, chat_template_kwargs=more)[0][0].startswith("[")


def test_tools_that_cannot_be_used_are_refused(tokenizer, tmp_path):
    plain = {"prompt": "q ", "responses": ["a", "b"], "scores": [1.0, 0.0], "tools": [WEATHER]}
    with pytest.raises(ValueError, match="row 0: 'tools' is for the chat template, and the prompt is text"):
        texts(Dataset.from_list([plain]), tokenizer)
    deaf = build_tokenizer(TEMPLATE.replace("tools", "none"), bos=None, eos="<|im_end|>", special=["<|im_start|>"])
    with pytest.raises(ValueError, match="row 1: it has 'tools', which the chat template does not write"):
        texts(Dataset.from_list([pair(*ANSWER, tools=None), pair(*ANSWER, tools=[WEATHER])]), deaf)
    for tools in ("weather", ["weather"], {"name": "weather"}):
        with pytest.raises(ValueError, match="row 0: 'tools' is the .*; give a list of JSON schemas"):
            canonicalize(Dataset.from_list([pair(*ANSWER, tools=tools)]))
    with pytest.raises(ValueError, match="row 0: 'chat_template_kwargs' is the list .*; give a dict"):
        canonicalize(Dataset.from_list([pair(*ANSWER, chat_template_kwargs=["x"])]))
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": USER, "reference": "a", "tools": [WEATHER]}])
    with pytest.raises(ValueError, match="'tools' cannot be used where answers are sampled"):
        generate.load_prompts(generate.GenerateArguments(model="m", prompts=str(path), output="o.jsonl", scorer=["s"]))


@pytest.mark.parametrize("name", ["image", "images", "videos"])
def test_what_is_no_text_is_refused(name):
    row = {"prompt": "what is it? ", "chosen": "a dog", "rejected": "a cat"}
    with pytest.raises(ValueError, match=f"row 1: '{name}' cannot be used: only text is trained on"):
        canonicalize(Dataset.from_list([row | {name: []}, row | {name: ["dog.png"]}]))
    assert len(canonicalize(Dataset.from_list([row | {name: []}]))[0]) == 1
