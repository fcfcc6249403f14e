"""What is asked over HTTP: requests as vLLM wants them, attempts that are repeated, errors that say what failed."""

import os
import resource
import signal
import sys
import threading
import time
from contextlib import nullcontext

import pytest

import processes
from helpers import build_tokenizer
from servers import serving
from trainers.generation import SamplingConfig, collect_samples, server
from trainers.generation.sampler import encode_prompt, sample_seed
from trainers.generation.server import Server, ServerError, in_flight
from trainers.generation.vllm import VLLMServer

PROMPTS = ["the quick brown", "say something kind to a friend", "what", "of course the dog"]
CONFIG = SamplingConfig(num_generations=3, max_new_tokens=12, top_p=0.9, seed=7)
END = 2


def choice(content) -> dict:
    ids = [content["seed"] % 97 + 3, END][: 1 + content["seed"] % 2]
    return {"token_ids": ids, "text": "", "finish_reason": "stop" if ids[-1] == END else "length"}


def samples(url, folder=None):
    tokenizer = build_tokenizer()
    backend = VLLMServer(Server(url), "tiny", tokenizer, [END])
    return collect_samples(folder, lambda: nullcontext(backend), PROMPTS, CONFIG, round=2, progress=False), tokenizer


def test_each_sample_is_a_request_with_its_own_seed():
    with serving(lambda path, content, count: (200, {"choices": [choice(content)]})) as served:
        drawn, tokenizer = samples(served.url)
    for prompt, row in zip(PROMPTS, drawn, strict=True):
        seeds = [sample_seed(7, 2, prompt, j) for j in range(3)]
        assert [sample.token_ids for sample in row] == [choice({"seed": seed})["token_ids"] for seed in seeds]
        assert [sample.truncated for sample in row] == [not seed % 2 for seed in seeds]
    paths, contents = zip(*served.requests, strict=True)
    assert set(paths) == {"/v1/completions"} and len(paths) == 12
    assert [c["prompt"] for c in contents].count(encode_prompt(tokenizer, PROMPTS[2])) == 3
    fixed = {"model": "tiny", "max_tokens": 12, "temperature": 0.8, "top_p": 0.9, "top_k": 0, "min_p": 0.0}
    assert all(fixed.items() <= content.items() for content in contents)


def test_what_may_pass_is_asked_again_and_counted(caplog, monkeypatch):
    monkeypatch.setattr(server.Told, "last", -1e9)

    def answer(path, content, count):
        return (200, {"count": count}) if count == 3 else (503, b"starting")

    with serving(answer) as served:
        asked = Server(served.url + "/v1/")
        assert asked.ask("/v1/models") == {"count": 3}
        assert asked.repeated == 3
    assert "is asked again: status 503" in caplog.text


@pytest.mark.parametrize(
    "answer, message",
    [
        ((404, {"error": "no such model"}), r"refused a request \(404\).*no such model"),
        ((503, b"overloaded"), r"refused a request \(503\).*overloaded"),
        ((200, b'{"choices": [{"tok'), "did not answer with a JSON object"),
        ((200, {"choices": []}), "no whole answer"),
        ((200, {"choices": [{"token_ids": None, "finish_reason": "stop"}]}), "no whole answer with token_ids"),
        ((200, {"choices": [{"token_ids": [5], "finish_reason": "abort"}]}), "no whole answer"),
    ],
)
def test_what_does_not_pass_is_said_and_nothing_is_lost(tmp_path, answer, message):
    def at_first_right(path, content, count):
        return (200, {"choices": [choice(content)]}) if count < 5 else answer

    with serving(at_first_right) as served, pytest.raises(ServerError, match=message):
        samples(served.url, tmp_path)
    kept = sum(1 for path in tmp_path.glob("samples-*.jsonl") for _ in path.open())
    assert kept == 5
    with serving(lambda path, content, count: (200, {"choices": [choice(content)]})) as served:
        gone_on, _ = samples(served.url, tmp_path)
        assert len(served.requests) == 12 - kept
        assert gone_on == samples(served.url)[0]


def test_an_answer_that_does_not_come_in_time_is_asked_for_again():
    def answer(path, content, count):
        time.sleep(1 if count == 0 else 0)
        return 200, {"count": count}

    with serving(answer) as served:
        asked = Server(served.url, timeout=0.3)
        assert asked.ask("/v1/models") == {"count": 1} and asked.repeated == 1


def test_a_full_disk_loses_no_whole_sample(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(lambda path, content, count: (200, {"choices": [choice(content)]})) as served:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                samples(served.url, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        *kept, cut = (tmp_path / "samples-00000.jsonl").read_text().split("\n")
        assert len(kept) >= 2 and cut
        assert samples(served.url, tmp_path)[0] == samples(served.url)[0]
        lines = (tmp_path / "samples-00000.jsonl").read_text().splitlines()
        assert lines[: len(kept)] == kept and len(lines) == 12


def test_a_server_that_is_not_there_is_named():
    with serving(lambda *_: (200, {})) as served:
        url = served.url
    with pytest.raises(ServerError, match=f"{url}/health cannot be reached"):
        Server(url).ask("/health")


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    assert Server("http://localhost", key="SOME_KEY")._session.headers["Authorization"] == "Bearer secret"


def ask_twice(url):
    list(in_flight(lambda _: Server(url).ask("/slow"), [1, 2], 2))


def test_a_program_that_is_interrupted_does_not_wait_for_its_calls(tmp_path):
    hold = threading.Event()
    with serving(lambda *_: (200, {"held": hold.wait(100)})) as served:
        [process] = processes.start(ask_twice, served.url, log=tmp_path / "log")
        while len(served.requests) < 2 and process.is_alive():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        process.join(50)
        code = process.exitcode
        hold.set()
        process.kill()
    assert code == 1 and "KeyboardInterrupt" in (tmp_path / "log").read_text()


def exit_in_a_call(_):
    list(in_flight(sys.exit, [3, 3], 2))


def test_a_call_that_ends_the_program_ends_it(tmp_path):
    [process] = processes.start(exit_in_a_call, None, log=tmp_path / "log")
    process.join(50)
    process.kill()
    assert process.exitcode == 3


def test_calls_overlap_as_far_as_asked_for():
    together = threading.Barrier(3)

    def call(item):
        together.wait(10)
        return item * 10

    made = {at: result for portion in in_flight(call, [1, 2, 3], 3) for at, result in portion.items()}
    assert made == {0: 10, 1: 20, 2: 30}
