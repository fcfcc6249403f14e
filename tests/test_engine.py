"""Servers that a run samples from: given or started on a stage's weights, checked, and ended with their stage.

With POLYPO_VLLM, the command of a real engine ("vllm serve"), the tests at the end run through that.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from helpers import family_tokenizer, tiny_llama
from servers import serving
from test_server import PROMPTS
from tiny_engine import Engine
from trainers import SGPOConfig
from trainers.generation import SamplingConfig, collect_samples, leash, server
from trainers.generation.engine import opened, started
from trainers.generation.server import ServerError
from trainers.generation.start import policies, weights_of

OWN = shlex.join([sys.executable, str(Path(__file__).with_name("tiny_engine.py")), "serve"])
CONFIG = SamplingConfig(num_generations=2, max_new_tokens=8, temperature=1.0, top_p=0.9, seed=7, batch_size=4)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, one with other weights, and an adapter on it; vLLM has no kernels for heads of less than 32."""
    folder, tokenizer = tmp_path_factory.mktemp("inputs"), family_tokenizer("llama3")
    heads = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    for seed, name in enumerate(("model", "other")):
        model = tiny_llama(len(tokenizer), seed=seed, **heads)
        model.generation_config.eos_token_id = list(range(2, 70))  # any of these ends an answer
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    lora = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2.0, generator=torch.Generator().manual_seed(0))
    lora.save_pretrained(folder / "adapter")
    return folder


def weights(inputs, start=None):
    args = SGPOConfig(output_dir=str(inputs), use_cpu=True, report_to="none")
    return weights_of(str(inputs / "model"), start and inputs / start, args)


def draw(name, weights, folder=None):
    config = replace(CONFIG, engine=name)
    return collect_samples(folder, lambda: opened(name, weights, folder), PROMPTS, config, progress=False)


@pytest.mark.parametrize("start", [None, "other", "adapter"])
def test_a_given_server_samples_from_the_weights_of_the_stage(inputs, start, capsys):
    served = Engine(str(inputs / (start if start == "other" else "model")), "some name")
    with serving(served.answer) as running:
        drawn = draw(running.url, weights(inputs, start))
    assert drawn == draw("transformers", weights(inputs, start))
    assert start is None or drawn != draw("transformers", weights(inputs))
    assert not served.adapters
    assert "serves the policy: the log-probabilities of" in capsys.readouterr().out


@pytest.mark.parametrize(
    "served, start, message",
    [
        ("other", None, r"does not serve the policy of .*model: the log-probabilities of \d+ sampled tokens differ"),
        ("model", "other", "does not serve the policy of .*other"),
    ],
)
def test_other_weights_are_refused_before_a_sample_is_kept(inputs, tmp_path, served, start, message):
    with (
        serving(Engine(str(inputs / served), "some name").answer) as running,
        pytest.raises(ServerError, match=message),
    ):
        draw(running.url, weights(inputs, start), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_server_of_several_models_must_name_one_like_the_stage(inputs):
    served = Engine(str(inputs / "model"), "one")

    def answer(path, content, count):
        status, body = served.answer(path, content, count)
        if path == "/v1/models":
            body["data"] = [{"id": "another", "parent": None}, *body["data"]]
        return status, body

    with serving(answer) as running:
        assert draw(running.url, weights(inputs)) == draw("transformers", weights(inputs))  # by the root of "one"
        served.folder = "elsewhere"
        with pytest.raises(ServerError, match="offers another, one, and none by the name .*--served-model-name"):
            draw(running.url, weights(inputs))


def test_a_server_without_room_for_adapters_says_how_to_start_it(inputs):
    def answer(path, content, count):
        return (404, {"detail": "Not Found"}) if "lora" in path else (200, {"data": []})

    with serving(answer) as running, pytest.raises(ServerError, match="--enable-lora --max-lora-rank"):
        draw(running.url, weights(inputs, "adapter"))


def test_a_server_is_told_the_absolute_path_of_an_adapter_and_its_hub_id_as_it_is(inputs, monkeypatch):
    def answer(path, content, count):
        return (404, {}) if "lora" in path else (200, {"data": []})

    monkeypatch.chdir(inputs)
    monkeypatch.setattr(policies, "is_adapter", lambda path, revision=None: True)
    with serving(answer) as running:
        for start in ("adapter", "some/adapter"):
            with pytest.raises(ServerError, match="--enable-lora"):
                draw(running.url, replace(weights(inputs), start=Path(start)))
        told = [content["lora_path"] for path, content in running.requests if "lora" in path]
    assert told == [str(inputs / "adapter"), "some/adapter"]


@pytest.mark.parametrize("start", [None, "adapter"])
def test_a_stage_starts_a_server_on_its_weights_and_ends_it(inputs, tmp_path, start, capsys):
    assert draw(OWN, weights(inputs, start), tmp_path) == draw("transformers", weights(inputs, start))
    url = re.search(r"(http://\S+) serves the policy", capsys.readouterr().out)[1]
    with pytest.raises(ServerError, match="cannot be reached"):
        server.Server(url).ask("/v1/models")


def test_a_server_that_dies_is_named_with_the_end_of_its_log_and_nothing_is_lost(inputs, tmp_path, capsys):
    with pytest.raises(ServerError, match=r"(?s)The engine ended with code 3.*engine-00000.log:\n.*out of memory"):
        draw(f"{OWN} --dies-after 9", weights(inputs), tmp_path)
    kept = (tmp_path / "samples-00000.jsonl").read_text().splitlines()
    assert 1 <= len(kept) < 8
    assert draw("transformers", weights(inputs), tmp_path) == draw("transformers", weights(inputs))
    warning = f"WARNING: {len(kept)} of 8 samples in {tmp_path} are not by transformers, but those to come will be."
    assert warning in capsys.readouterr().out
    assert (tmp_path / "samples-00000.jsonl").read_text().splitlines()[: len(kept)] == kept


def test_a_server_that_does_not_start_says_why(inputs, tmp_path):
    with pytest.raises(ServerError, match="(?s)The engine ended with code .*unrecognized arguments"):
        draw(f"{OWN} --nonsense", weights(inputs), tmp_path)


@pytest.mark.parametrize("name", ["", "vlm serve", "127.0.0.1:8000", "vllm 'serve"])
def test_what_is_no_engine_is_said_before_anything(name):
    with pytest.raises(ValueError, match=f"engine='?\"?{re.escape(name)}.*(no program|no command)"):
        SamplingConfig(engine=name)


def test_what_is_too_long_for_the_server_is_said_before_sampling(inputs):
    with serving(Engine(str(inputs / "model"), "some name").answer) as running:
        with opened(running.url, weights(inputs), None) as backend:
            with pytest.raises(ValueError, match="exceeds the model's context of 300"):
                collect_samples(None, lambda: nullcontext(backend), PROMPTS, replace(CONFIG, max_new_tokens=296))


def test_a_server_with_another_key_is_not_waited_for(inputs, tmp_path, monkeypatch):
    refusal = ServerError("refused")
    refusal.status = 401
    monkeypatch.setattr(server.Server, "ask", lambda *given: (_ for _ in ()).throw(refusal))
    with pytest.raises(ServerError, match="refused. Its key is read from OPENAI_API_KEY"):
        draw(f"{sys.executable} -c 'import time; time.sleep(9)'", weights(inputs), tmp_path)


def test_a_killed_process_takes_its_engine_along(tmp_path):
    """Also what the engine has started itself."""
    child = f"import os, time; open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    words = [sys.executable, leash.__file__, sys.executable, "-c", command]
    starter = f"import subprocess, time; subprocess.Popen({words!r}, stdin=subprocess.PIPE); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", starter])
    deadline = time.monotonic() + 30

    def wait(until):
        while not until():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def ended():
        return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

    wait(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    pid = int((tmp_path / "child").read_text())
    process.kill()
    process.wait()
    wait(ended)


REAL = os.environ.get("POLYPO_VLLM")  # the command of a real engine
real = pytest.mark.skipif(not REAL, reason="needs a real engine: make test-engine, or POLYPO_VLLM='vllm serve'")


@real
@pytest.mark.parametrize("start", [None, "other", "adapter"])
def test_a_real_engine_samples_from_the_weights_of_the_stage(inputs, tmp_path, start, capsys):
    """Whole answers with their end token, greedy tokens as those of transformers, the same draws a second time."""
    greedy = replace(CONFIG, temperature=0.0, num_generations=1)
    of_stage = weights(inputs, start)
    expected = collect_samples(None, lambda: opened("transformers", of_stage, None), PROMPTS, greedy, progress=False)
    with opened(REAL, of_stage, tmp_path) as backend:
        draws = [
            collect_samples(None, lambda: nullcontext(backend), PROMPTS, config, progress=False)
            for config in (greedy, CONFIG, CONFIG)
        ]
    assert draws[0] == expected
    assert draws[1] == draws[2] != draws[0]
    found = re.search(r"sampled tokens differ by (\S+) nats", capsys.readouterr().out)
    assert float(found[1]) < 1e-4  # both compute in float32
    assert any(not sample.truncated for row in draws[1] for sample in row)


@real
def test_a_real_engine_serves_stages_after_each_other_by_its_address(inputs, tmp_path, monkeypatch):
    """Adapters are added while it runs; another stage's whole weights are refused."""
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    command = [*shlex.split(REAL), "--enable-lora", "--max-lora-rank", "8"]
    with started(command, weights(inputs), tmp_path / "log") as url:
        first = draw(url, weights(inputs))
        assert draw(url, weights(inputs, "adapter")) != first == draw(url, weights(inputs))
        with pytest.raises(ServerError, match="does not serve the policy of .*other"):
            draw(url, weights(inputs, "other"))
