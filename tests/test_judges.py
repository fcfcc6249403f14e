"""Answer files of AlpacaEval 2, Arena-Hard-Auto v2 and MT-Bench: fields, texts, a killed run, hostile questions."""

import json
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from helpers import family_tokenizer, save_start, tiny_llama, write_rows
from servers import serving
from tiny_engine import Engine
from trainers.cli import config_files, generate
from trainers.generation import SamplingConfig, sample_responses

HELLO, DOG, FRANCE = "say something kind", "the lazy dog\nhad a bad day", "what is the capital of France?"
ALPACA = [
    {"dataset": "helpful_base", "instruction": text, "output": "of another", "generator": "gpt4_1106_preview"}
    for text in (HELLO, DOG, FRANCE)
]
ARENA = [
    {"uid": uid, "category": "hard_prompt", "subcategory": "coding", "prompt": text}
    for uid, text in (("0b3f", HELLO), ("77aa", DOG), ("0253", FRANCE))
]
MT = [
    {"question_id": 81, "category": "writing", "turns": [HELLO, "who is the friend?"]},
    {"question_id": 111, "category": "math", "turns": [DOG, "say it in other words"], "reference": ["", ""]},
    {"question_id": 112, "category": "math", "turns": [FRANCE, "say it again"]},
    {"question_id": 141, "category": "stem", "turns": ["the quick brown fox"]},
    {"question_id": 161, "category": "a category of one's own", "turns": ["the quick brown fox", "and then"]},
]
QUESTIONS = {"alpaca_eval": ALPACA, "arena_hard": ARENA, "mt_bench": MT}
OUTPUT = {"alpaca_eval": "tiny.json", "arena_hard": "tiny.jsonl", "mt_bench": "tiny.jsonl"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def read(path: Path) -> list[dict]:
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def without_time(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "tstamp"} for row in rows]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_start(folder / "chat", "llama3")
    save_start(folder / "plain")
    (folder / "alpaca_eval").write_text(json.dumps(ALPACA, indent=2))
    write_rows(folder / "arena_hard", ARENA)
    write_rows(folder / "mt_bench", MT)
    return folder


def arguments(inputs, answers, folder, **changes) -> generate.GenerateArguments:
    options = {
        "model": str(inputs / "chat"), "prompts": str(inputs / answers), "output": str(folder / OUTPUT[answers]),
        "answers": answers, "max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0,
    }  # fmt: skip
    return generate.GenerateArguments(**options | changes)


def answer(prompts, temperature, model=None, tokenizer=None) -> list[str]:
    """What the policy answers, sampled without the command."""
    tokenizer = tokenizer or family_tokenizer("llama3")
    config = SamplingConfig(num_generations=1, max_new_tokens=8, temperature=temperature, top_p=1.0)
    drawn = sample_responses(model or tiny_llama(len(tokenizer)), tokenizer, prompts, config, progress=False)
    return [sample.text.strip() for (sample,) in drawn]


def test_alpaca_eval_is_a_list_of_instruction_output_and_generator(inputs, tmp_path):
    statistics = generate.generate(arguments(inputs, "alpaca_eval", tmp_path, generator="tiny policy"))
    texts = answer([[user(q["instruction"])] for q in ALPACA], 1.0)
    assert read(tmp_path / "tiny.json") == [
        {"dataset": "helpful_base", "instruction": q["instruction"], "output": text, "generator": "tiny policy"}
        for q, text in zip(ALPACA, texts, strict=True)
    ]
    assert statistics["responses"] == 3 and "mean_score" not in statistics
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.json", "tiny.json.manifest.json"]


def test_arena_hard_has_the_conversation_with_the_answer(inputs, tmp_path):
    generate.generate(arguments(inputs, "arena_hard", tmp_path, limit=2))
    texts, rows = answer([[user(q["prompt"])] for q in ARENA[:2]], 1.0), read(tmp_path / "tiny.jsonl")
    assert [list(row) for row in rows] == [["uid", "ans_id", "model", "messages", "tstamp"]] * 2
    assert [row["uid"] for row in rows] == ["0b3f", "77aa"] and {row["model"] for row in rows} == {"tiny"}
    assert [row["messages"] for row in rows] == [
        [user(q["prompt"]), assistant({"answer": text})] for q, text in zip(ARENA, texts, strict=False)
    ]
    assert len({row["ans_id"] for row in rows}) == 2 and all(row["tstamp"] > 1.7e9 for row in rows)


def test_mt_bench_asks_the_second_turn_after_the_first_answer_at_the_temperature_of_the_category(inputs, tmp_path):
    generate.generate(arguments(inputs, "mt_bench", tmp_path))
    rows = read(tmp_path / "tiny.jsonl")
    expected = []
    for heat, at in ((0.7, [0, 4]), (0.0, [1, 2]), (0.1, [3])):
        turns = [MT[i]["turns"] for i in at]
        first = answer([[user(said[0])] for said in turns], heat)
        both = [[user(said[0]), assistant(a), user(said[1])] for said, a in zip(turns, first, strict=True) if said[1:]]
        second = [[text] for text in answer(both, heat)] if both else [[]]
        expected += [(i, [a, *b]) for i, a, b in zip(at, first, second, strict=True)]
    assert [row["choices"] for row in rows] == [[{"index": 0, "turns": texts}] for _, texts in sorted(expected)]
    assert [list(row) for row in rows] == [["question_id", "answer_id", "model_id", "choices", "tstamp"]] * 5
    assert [row["question_id"] for row in rows] == [81, 111, 112, 141, 161]
    assert {row["model_id"] for row in rows} == {"tiny"}


def test_an_adapter_answers_on_its_base(inputs, tmp_path):
    model = get_peft_model(tiny_llama(len(family_tokenizer("llama3"))), LoraConfig(r=4, init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(inputs / "chat")
    model.save_pretrained(tmp_path / "adapter")
    family_tokenizer("llama3").save_pretrained(tmp_path / "adapter")
    generate.generate(arguments(inputs, "arena_hard", tmp_path, model=str(tmp_path / "adapter")))
    prompts = [[user(q["prompt"])] for q in ARENA]
    texts = [row["messages"][1]["content"]["answer"] for row in read(tmp_path / "tiny.jsonl")]
    assert texts == answer(prompts, 1.0, model) != answer(prompts, 1.0)


def test_without_a_chat_template_the_question_is_the_prompt_and_two_turns_are_refused(inputs, tmp_path, tokenizer):
    generate.generate(arguments(inputs, "alpaca_eval", tmp_path, model=str(inputs / "plain")))
    texts = answer([HELLO, DOG, FRANCE], 1.0, tiny_llama(len(tokenizer)), tokenizer)
    assert [row["output"] for row in read(tmp_path / "tiny.json")] == texts
    with pytest.raises(ValueError, match="asks 2 turns, and the tokenizer has no chat template"):
        generate.generate(arguments(inputs, "mt_bench", tmp_path, model=str(inputs / "plain")))


@pytest.fixture(scope="module")
def parts(inputs, tmp_path_factory):
    """The partial results of a run on MT-Bench that was stopped before they went, and its rows."""
    folder = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate.shutil, "rmtree", lambda *args, **kwargs: None)
        generate.generate(arguments(inputs, "mt_bench", folder))
    return folder / "tiny.jsonl.parts.done", without_time(read(folder / "tiny.jsonl"))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("name", ["turn-1-at-0.0", "turn-1-at-0.7", "turn-2-at-0.7"])
def test_a_killed_run_goes_on_to_the_same_answers(inputs, parts, tmp_path, name, share):
    copied = shutil.copytree(parts[0], tmp_path / "tiny.jsonl.parts")
    cut = copied / f"{name}-00000.jsonl"
    cut.write_bytes(cut.read_bytes()[: int(share * cut.stat().st_size)])
    for later in copied.glob("turn-2-*" if name.startswith("turn-1") else "no more"):
        later.unlink()
    generate.generate(arguments(inputs, "mt_bench", tmp_path, batch_size=1))
    assert without_time(read(tmp_path / "tiny.jsonl")) == parts[1]


def test_a_server_gives_the_same_answers_and_is_opened_once_for_all_turns(inputs, parts, tmp_path):
    with serving(Engine(str(inputs / "chat"), "tiny").answer) as server:
        generate.generate(arguments(inputs, "mt_bench", tmp_path, engine=server.url))
    assert [path for path, _ in server.requests].count("/v1/models") == 1
    assert without_time(read(tmp_path / "tiny.jsonl")) == parts[1]


def test_other_settings_do_not_go_on(inputs, parts, tmp_path):
    shutil.copytree(parts[0], tmp_path / "tiny.jsonl.parts")
    with pytest.raises(ValueError, match="generator was 'tiny' and is 'another'; max_new_tokens was 8 and is 9"):
        generate.generate(arguments(inputs, "mt_bench", tmp_path, max_new_tokens=9, generator="another"))


@pytest.mark.parametrize(
    "answers, content, message",
    [
        ("alpaca_eval", "", "has no questions"),
        ("alpaca_eval", "[{", "is not JSON"),
        ("alpaca_eval", b"[\xff\xfe", "is not JSON"),
        ("alpaca_eval", '{"instruction":\n "a"}', "line 1 is not JSON"),
        ("alpaca_eval", json.dumps(ARENA), "question 0 of .* has no instruction: --answers alpaca_eval reads"),
        ("alpaca_eval", '[{"instruction": "a"}, {"instruction": ""}]', "question 1 of .* has no instruction"),
        ("alpaca_eval", '[{"instruction": ["a"]}]', "question 0 of .*: instruction must be a text"),
        ("alpaca_eval", '["a"]', "question 0 of .* has no instruction"),
        ("arena_hard", json.dumps(MT), "has no uid, prompt: --answers arena_hard reads questions with uid, prompt"),
        ("mt_bench", '{"question_id": 1, "category": "math", "turns": "a b"}', "turns must be a list of texts"),
        ("mt_bench", '{"question_id": 1, "category": "math", "turns": [{"a": 1}]}', "turns must be a list of texts"),
        ("mt_bench", '{"question_id": 1, "turns": ["a"]}', "has no category"),
    ],
)
def test_what_is_no_question_file_is_named(tmp_path, answers, content, message):
    (tmp_path / answers).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        generate.generate(arguments(tmp_path, answers, tmp_path))
    assert not list(tmp_path.glob("*.parts"))


def test_a_folder_of_a_reward_model_may_be_called_like_one_with_a_weight(tmp_path):
    folder = tmp_path / "lr=1e-5"
    cut, whole = ({"spec": f"{tmp_path}/lr", "weight": 1e-5}, {"spec": str(folder), "weight": 1.0})
    assert generate.parse_scorers([str(folder)]) == [cut]
    folder.mkdir()
    assert generate.parse_scorers([str(folder), f"{folder}=0.5"]) == [whole, whole | {"weight": 0.5}]


def test_the_command_line_names_what_is_wrong(inputs, tmp_path):
    with pytest.raises(ValueError, match="no_such_file is no file: --answers mt_bench reads"):
        generate.generate(arguments(inputs, "mt_bench", tmp_path, prompts="no_such_file"))
    with pytest.raises(ValueError, match="tiny.jsonl: --answers alpaca_eval writes a file that ends in .json"):
        arguments(inputs, "alpaca_eval", tmp_path, output="tiny.jsonl")
    with pytest.raises(ValueError, match="answers='mtbench' is unknown: choose one of alpaca_eval, arena_hard, mt_be"):
        generate.GenerateArguments(model="a", prompts="b", output="c.jsonl", answers="mtbench")
    argv = ["--model", "a", "--prompts", "b", "--output", "c.jsonl"]
    for more in ([], ["--answers", "mt_bench", "--scorer", "x.y"]):
        with pytest.raises(
            ValueError, match="give --scorer, for scored rows, or --answers, for a judge's answer file"
        ):
            config_files.read([*argv, *more], generate.GenerateArguments)
    (args,) = config_files.read([*argv, "--scorer", "x.y", "z.u=0.5"], generate.GenerateArguments)
    assert args.scorer == ["x.y", "z.u=0.5"] and args.answers is None
    parsed = generate.parse_scorers([*args.scorer, "runs/lr=1e-5/rm", '{"judge": "u"}'])
    weights = {"x.y": 1.0, "z.u": 0.5, "runs/lr=1e-5/rm": 1.0}
    assert parsed == [*({"spec": name, "weight": weight} for name, weight in weights.items()), {"judge": "u"}]
