"""Scorers on a server: what is asked, read, kept and counted, and what of it a run's settings say."""

import json
import re
import threading
import time

import pytest
from datasets import Dataset

import processes
from helpers import family_tokenizer, flags, save_start
from servers import serving
from test_scorer import PROMPTS, TEXTS
from trainers import LIREConfig, LIRETrainer
from trainers.cli import generate
from trainers.generation.judge import AGAIN, TEMPLATE
from trainers.generation.scorer import check_scorer, compared_scorer, load_scorer
from trainers.generation.server import ServerError
from trainers.rounds import Rounds

SECRET = "sk-do-not-write-me"
NONE = {"scorer_calls": 0, "scorer_repeated": 0, "scorer_answers_known": 0}


def said(text, reason="stop"):
    choice = {"message": {"content": text}, "finish_reason": reason}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 20}}


def asked(content) -> str:
    [message] = content["messages"]
    assert message["role"] == "user"
    return message["content"]


def number(question) -> int:
    """The score that `strict` gives a response of PROMPTS and TEXTS; another one to each."""
    return 2 * next(i for i, text in enumerate(TEXTS) if text in question) + 1


def strict(path, content, count):
    return said(f"Could be better in 100 ways.\nScore: {number(asked(content))}")


def judge(served, folder, **options) -> dict:
    return {"judge": served.url + "/v1", "model": "strict", "cache": str(folder / "cache"), **options}


def score(spec, prompts=PROMPTS, texts=TEXTS, **columns):
    counts = {}
    return load_scorer(spec, counts=counts)(prompts, texts, **columns), counts


def test_each_response_is_a_question_and_its_last_number_the_score(tmp_path):
    with serving(strict) as served:
        scores, counts = score(judge(served, tmp_path, weight=0.5, prices=[2.0, 10.0]))
    assert scores == [0.5, 1.5, 2.5, 3.5]
    contents = {asked(content): content for _, content in served.requests}
    assert contents.keys() == {TEMPLATE.format(prompt=p, completion=t) for p, t in zip(PROMPTS, TEXTS, strict=True)}
    assert {path for path, _ in served.requests} == {"/v1/chat/completions"}
    for content in contents.values():
        del content["messages"]
        assert content == {"model": "strict", "temperature": 0.0, "max_tokens": 1024}
    tokens = {"scorer_prompt_tokens": 400, "scorer_completion_tokens": 80, "scorer_cost": 0.0016}
    assert counts == NONE | tokens | {"scorer_calls": 4}  # 400 tokens for 2 and 80 for 10 a million


def test_an_own_template_has_columns_and_braces_and_other_numbers(tmp_path):
    template = tmp_path / "question.txt"
    template.write_text('{{"is": "{completion}", "should": "{reference}"}} of {prompt}?')
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "{reference} is no column here"}]
    with serving(lambda path, content, count: said("-20")) as served:
        spec = judge(served, tmp_path, template=str(template), scale=[-50, 0], request={"max_completion_tokens": 5})
        answer = [{"role": "assistant", "content": "yes"}]
        assert score(spec, [chat], [answer], reference=["no"])[0] == [-20.0]
        with pytest.raises(ValueError, match="a row has no 'reference'"):
            score(spec, [chat], [answer], reference=[None])
    [(_, content)] = served.requests
    assert content.pop("messages")[0]["content"] == (
        '{"is": "yes", "should": "no"} of system: be kind\n\nuser: {reference} is no column here?'
    )
    assert content == {"model": "strict", "max_completion_tokens": 5}


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("Score: 7", 7), ("**Score: 7.5**.", 7.5), ("3 facts are wrong, 8/10", 8), ("8 out of 10", 8), ("[[9]]", 9),
        ("between 6-7", 7), ("Score: 11", None), ("Score: -3", None), ("none", None), ("as v2 did", None),
        ("Score: 7,5", None), ("nan 1e999", None), ("7, all in all", 7), ("75,5", None),
        (None, None),
    ],
)  # fmt: skip
def test_which_number_is_the_score(tmp_path, answer, expected):
    with serving(lambda path, content, count: said(answer)) as served:
        spec = judge(served, tmp_path, fallback=1.0)
        scores, counts = score(spec, ["a"], ["b"])
    assert scores == [expected or 1.0]
    assert counts.get("scorer_without_score", 0) == (expected is None)
    assert counts["scorer_calls"] == (2 if expected is None else 1)


def test_an_answer_without_a_number_is_asked_for_once_more(tmp_path):
    def answer(path, content, count):
        question = asked(content)
        if number(question) == 3:  # cut before its score: the 10 is none
            return said("5") if question.endswith(AGAIN) else said("Of the 10", reason="length")
        return strict(path, content, count)

    with serving(answer) as served:
        scores, counts = score(judge(served, tmp_path))
    assert scores == [1.0, 5.0, 5.0, 7.0]
    assert counts["scorer_calls"] == 5 and counts["scorer_prompt_tokens"] == 500


def test_no_number_in_two_answers_is_an_error_or_counted_and_never_kept(tmp_path):
    def answer(path, content, count):
        return said("I cannot say.") if number(asked(content)) == 5 else strict(path, content, count)

    with serving(answer) as served:
        with pytest.raises(ServerError, match=rf"(?s)no score from 1 to 10 .*'I cannot say\.'.*{re.escape(TEXTS[2])}"):
            score(judge(served, tmp_path, concurrency=1))
        scores, counts = score(judge(served, tmp_path, fallback=2))
        assert scores == [1.0, 3.0, 2.0, 7.0]
        assert counts["scorer_without_score"] == 1
        before = len(served.requests)
        assert score(judge(served, tmp_path, fallback=4))[0] == [1.0, 3.0, 4.0, 7.0]
        assert len(served.requests) == before + 2


def test_what_may_pass_is_asked_again_and_counted(tmp_path):
    with serving(lambda *asked: (429, b"slow down") if asked[-1] < 2 else strict(*asked)) as served:
        scores, counts = score(judge(served, tmp_path))
    assert scores == [1.0, 3.0, 5.0, 7.0]
    assert counts["scorer_calls"] == 4 and counts["scorer_repeated"] == 2


@pytest.mark.parametrize(
    "failure, message",
    [
        ((401, f"wrong key {SECRET}".encode()), r"refused a request \(401\): wrong key \*\*\*"),
        ((200, {"choices": []}), "gave half an answer"),
        ((200, {"choices": [{"message": {}, "finish_reason": "stop"}]}), "gave half an answer"),
    ],
)
def test_what_does_not_pass_is_said_and_nothing_is_asked_twice(tmp_path, monkeypatch, failure, message):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET + "\n")
    with serving(lambda *asked: strict(*asked) if asked[-1] < 2 else failure) as served:
        with pytest.raises(ServerError, match=message):
            score(judge(served, tmp_path, concurrency=1))
    with serving(strict) as served:
        scores, counts = score(judge(served, tmp_path))
    assert scores == [1.0, 3.0, 5.0, 7.0]
    assert sorted(number(asked(content)) for _, content in served.requests) == [5, 7]
    assert counts["scorer_calls"] == counts["scorer_answers_known"] == 2


def test_a_killed_run_asks_for_the_rest_alone(tmp_path):
    hold = threading.Event()

    def answer(path, content, count):
        if count == 2:
            hold.wait(60)
        return strict(path, content, count)

    cache = tmp_path / "cache"
    with serving(answer) as served:
        spec = judge(served, tmp_path, concurrency=1)
        [process] = processes.start(score, spec, log=tmp_path / "log")
        end = time.monotonic() + 120
        while len(served.requests) < 3 and process.is_alive() and time.monotonic() < end:
            time.sleep(0.01)
        process.kill()
        process.join()
        hold.set()
        assert len(served.requests) == 3, (tmp_path / "log").read_text()
        [file] = cache.glob("*/*.jsonl")
        assert file.read_bytes().count(b"\n") == 2
        with file.open("ab") as torn:
            torn.write(b'{"key": "ab')  # another kill, amid a write
        assert score(spec)[0] == [1.0, 3.0, 5.0, 7.0]
    assert [number(asked(content)) for _, content in served.requests[3:]] == [5, 7]


def write_templates(folder) -> list:
    """Two with the same text, and another."""
    texts = {"one": "{prompt} {completion}", "equal": "{prompt} {completion}", "other": "{completion}, {prompt}"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in texts]


def test_runs_share_the_cache_and_each_writes_a_file_of_its_own(tmp_path):
    templates = write_templates(tmp_path)
    with serving(strict) as served, serving(strict) as elsewhere:
        first, second = (load_scorer(judge(served, tmp_path, template=str(templates[0]))) for _ in range(2))
        assert first(PROMPTS[:3], TEXTS[:3]) == [1.0, 3.0, 5.0]
        assert second(PROMPTS[2:], TEXTS[2:]) == [5.0, 7.0]
        assert len([*(tmp_path / "cache").glob("*/*.jsonl")]) == 2
        moved = judge(elsewhere, tmp_path, template=str(templates[1]), concurrency=2, prices=[1, 2], timeout=5)
        scores, counts = score(moved, PROMPTS * 2, TEXTS * 2)
        assert scores == [1.0, 3.0, 5.0, 7.0] * 2
        assert counts == NONE | {"scorer_answers_known": 8} and not elsewhere.requests
        for changes in ({"model": "kind"}, {"template": str(templates[2])}, {"request": {"temperature": 1.0}}):
            _, counts = score(moved | changes, PROMPTS * 2, TEXTS * 2)  # of equal texts one is asked
            assert (counts["scorer_calls"], counts["scorer_answers_known"]) == (4, 4)


def test_settings_hold_what_scores_depend_on(tmp_path):
    first, equal, other = map(str, write_templates(tmp_path))
    spec = {"judge": "http://one:8000/v1", "model": "strict", "template": first, "weight": 0.5}
    free = {"judge": "https://two/v1", "concurrency": 3, "timeout": 5, "cache": "elsewhere", "prices": [1, 2]}
    request = {"request": {"temperature": 0.0, "max_tokens": 1024}}
    same = [spec | free, spec | {"template": equal}, json.dumps(spec), spec | request]
    assert all(compared_scorer(other) == compared_scorer(spec) for other in same)
    changes = [
        {"model": "kind"},
        {"template": other},
        {"scale": [1, 5]},
        {"fallback": 1},
        {"weight": 1},
        {"request": {}},
    ]
    assert all(compared_scorer(spec | change) != compared_scorer(spec) for change in changes)
    named = ["a.b", {"spec": "a.b", "weight": 2.0}]
    assert compared_scorer([*named, spec]) == [*named, compared_scorer(spec)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"judge": "localhost:8000"}, "'localhost:8000' is no address of a server"),
        ({"judge": f"https://me:{SECRET}@host/v1"}, "leave user, password and query out of the address"),
        ({"judge": f"https://host/v1?key={SECRET}"}, "leave user, password and query out of the address"),
        ({"key_variable": SECRET}, "key_variable must name a variable that is set in the environment"),
        ({"temperature": 0}, "scorer: unknown key 'temperature'"),
        ({"concurrency": 0}, "concurrency=0 must be"),
        ({"prices": [1]}, r"prices=\[1\]: give two"),
        ({"scale": [5, 5]}, r"scale=\[5, 5\]: give the lowest"),
        ({"fallback": 0}, r"fallback=0 is outside of scale=\(1, 10\)"),
        ({"request": 3}, "request must be a mapping"),
        ({"weight": "2"}, "strict at http://host/v1: its weight must be a finite number"),
        ({"reward_server": "http://host"}, "unknown key 'reward_server'"),
        ("no such file", "template .* cannot be read"),
        ("{prompt} alone", r"\{completion\} is not in it"),
        ("{prompt} {completion} {", "other braces are written twice"),
        ('{"score": 1} {prompt} {completion}', "other braces are written twice"),
        ("{prompt} {completion} {refrence}", r"names 'refrence', but rows have \['reference'\]"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_sampled(tmp_path, changes, message):
    if isinstance(changes, str):
        path, text = tmp_path / "template", changes
        if text != "no such file":
            path.write_text(text)
        changes = {"template": str(path)}
    with pytest.raises(ValueError, match=message) as error:
        check_scorer({"judge": "http://host/v1", "model": "strict"} | changes, ["reference"])
    assert SECRET not in str(error.value)


def test_keys_beside_those_of_a_scorer_are_named():
    with pytest.raises(ValueError, match="unknown key 'wieght': did you mean weight"):
        check_scorer({"spec": "a.b", "wieght": 2})
    with pytest.raises(ValueError, match="keys of a server stand beside `weight`"):
        check_scorer({"spec": {"judge": "http://host", "model": "m"}, "weight": 2})


# `polypo generate` and rounds.


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_start(folder / "model", "llama3")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p, "topic": "x"}) + "\n" for p in PROMPTS))
    return folder


def command(inputs, output, *scorers, **changes) -> list[str]:
    given = {"model": inputs / "model", "prompts": inputs / "prompts.jsonl", "output": output, "num_generations": 3,
             "max_new_tokens": 10, "temperature": 1.0}  # fmt: skip
    return [*flags(**given | changes), "--scorer", *(s if isinstance(s, str) else json.dumps(s) for s in scorers)]


def by_length(path, content, count):
    return said(f"Score: {len(asked(content)) % 10 + 1}")


def test_generate_counts_what_it_asks_and_a_dry_run_says_so_before(inputs, tmp_path, capsys, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    output = tmp_path / "out.jsonl"
    with serving(by_length) as served:
        spec = judge(served, tmp_path, prices=[5.0, 25.0], key_variable="JUDGE_KEY", weight=2)
        argv = command(inputs, output, spec, "trainers.generation.rewards.vader_sentiment=0")
        generate.main([*argv, "--dry_run", "true"])
        told = capsys.readouterr().out
        assert "4 prompts, 12 responses of at most 10 tokens" in told
        assert f"strict at {served.url}/v1: 12 calls and one more for each answer without a score" in told
        tokens = int(re.search(r"about ([\d,]+) tokens", told)[1].replace(",", ""))
        lengths = [len(family_tokenizer("llama3")(prompt)["input_ids"]) for prompt in PROMPTS]
        assert tokens == 3 * (sum(lengths) + 4 * 10) + 12 * len(TEMPLATE) // 4
        cost = (tokens * 5 + 12 * 1024 * 25) / 1e6
        assert f"answers of at most {12 * 1024:,}, for {cost:.2f}" in told
        assert not output.exists() and not served.requests
        generate.main(argv)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    questions = [TEMPLATE.format(prompt=row["prompt"], completion=text) for row in rows for text in row["responses"]]
    assert [score for row in rows for score in row["scores"]] == [2.0 * (len(q) % 10 + 1) for q in questions]
    assert sorted(asked(content) for _, content in served.requests) == sorted(questions)
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    statistics = manifest["statistics"]
    assert (statistics["scorer_calls"], statistics["scorer_prompt_tokens"]) == (12, 1200)
    assert statistics["scorer_cost"] == pytest.approx(12 * (100 * 5 + 20 * 25) / 1e6)
    assert "scorer calls: 12" in capsys.readouterr().out
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3 and all(SECRET.encode() not in path.read_bytes() for path in files)
    assert SECRET not in caplog.text


def test_a_run_that_failed_while_scoring_goes_on_at_another_address_and_counts_all(inputs, tmp_path):
    output = tmp_path / "out.jsonl"
    with serving(lambda *asked: by_length(*asked) if asked[-1] < 5 else (400, b"quota")) as served:
        with pytest.raises(ServerError, match="quota"):
            generate.main(command(inputs, output, judge(served, tmp_path, concurrency=1, prices=[1, 1])))
    with serving(by_length) as served:
        spec = judge(served, tmp_path, concurrency=3)
        generate.main(command(inputs, output, spec))
        assert len(served.requests) == 7
        with pytest.raises(ValueError, match="scorer was .*'judge': 'strict'.* and is .*'judge': 'kind'"):
            generate.main(command(inputs, output, spec | {"model": "kind"}))
    statistics = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())["statistics"]
    assert statistics["scorer_calls"] == 12 and statistics["scorer_answers_known"] == 5
    assert statistics["scorer_cost"] == pytest.approx(5 * 120 / 1e6)  # the second start named no prices


def test_rounds_bind_to_the_model_and_the_template_of_a_judge_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    rows = Dataset.from_list(
        [{"prompt": p, "responses": TEXTS[:2], "scores": [0.0, 1.0], "topic": "x"} for p in PROMPTS]
    )
    model = save_start(tmp_path / "model", "llama3")
    (tmp_path / "template").write_text("{prompt} {completion} {topic}")

    def settings(**options):
        scorer = {"judge": "http://host/v1", "model": "strict", "template": str(tmp_path / "template"), **options}
        args = LIREConfig(
            output_dir=str(tmp_path / "out"), self_enhance={"scorer": scorer}, use_cpu=True, report_to="none"
        )
        return Rounds(LIRETrainer, args, str(model), rows).stage.settings

    before = settings()
    assert settings(judge="http://other", cache="elsewhere", prices=[1, 2], concurrency=2) == before
    assert settings(model="kind") != before and SECRET not in json.dumps(before)
    (tmp_path / "template").write_text("{theme} {prompt} {completion}")
    with pytest.raises(ValueError, match="names 'theme', but rows have"):
        settings()
