"""A reward model on a server gives the scores of the one that is loaded here."""

import os
import shlex
import threading

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from helpers import family_tokenizer
from servers import serving
from test_judge import NONE
from test_scorer import PROMPTS, TEXTS, save_reward_model
from trainers.generation.engine import started
from trainers.generation.scorer import load_scorer
from trainers.generation.server import ServerError
from trainers.generation.start import Weights


@pytest.fixture(scope="module", params=["pad", "eos as pad", "no pad"])
def reward_model(request, tmp_path_factory):
    """A folder; with the end of a turn as pad token, which transformers does not read a score at."""
    folder, tokenizer = tmp_path_factory.mktemp("reward"), family_tokenizer("llama3")
    pads = {"pad": "<pad>", "eos as pad": tokenizer.eos_token, "no pad": None}
    pad = pads[request.param] and tokenizer.convert_tokens_to_ids(pads[request.param])
    save_reward_model(folder, tokenizer, pad_token_id=pad, max_position_embeddings=64)
    return folder


LONG = "the lazy dog had a bad day " * 20


def classify(folder):
    """What vLLM answers: the output at the last token, without an activation."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = None
    lock = threading.Lock()

    def answer(path, content, count):
        assert path == "/classify" and content["use_activation"] is False
        with lock, torch.no_grad():
            data = [
                {"index": i, "label": "LABEL_0", "num_classes": 1,
                 "probs": model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).tolist()}
                for i, ids in enumerate(content["input"])
            ]  # fmt: skip
        tokens = sum(map(len, content["input"]))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": None}
        return 200, {"model": content["model"], "data": data[::-1], "usage": usage}

    return answer


def test_a_reward_model_on_a_server_gives_the_scores_of_the_local_one(reward_model, tmp_path):
    prompts, texts = [*PROMPTS, LONG], [*TEXTS, "jumps"]
    local = load_scorer(str(reward_model), device="cpu")
    with serving(classify(reward_model)) as served:
        spec = {"reward_server": served.url, "model": str(reward_model), "served_model_name": "rm",
                "cache": str(tmp_path), "prices": [1e6, 5]}  # fmt: skip
        counts = {}
        scores = load_scorer(spec, batch_size=2, counts=counts)(prompts, texts)
        assert scores == pytest.approx(local(prompts, texts), abs=1e-5)
        assert max(scores) - min(scores) > 0.1
        assert sorted(len(content["input"]) for _, content in served.requests) == [1, 2, 2]
        assert {content["model"] for _, content in served.requests} == {"rm"}
        tokens = sum(len(ids) for _, content in served.requests for ids in content["input"])
        assert counts == NONE | {"scorer_calls": 3, "scorer_prompt_tokens": tokens, "scorer_completion_tokens": 0,
                                 "scorer_cost": tokens}  # fmt: skip
        assert load_scorer(spec)(prompts, texts) == scores and len(served.requests) == 3


@pytest.mark.parametrize(
    "data",
    [
        [{"index": 0, "probs": [0.5]}], [{"index": 0, "probs": [0.5, 0.5]}, {"index": 1, "probs": [0.5, 0.5]}],
        [{"index": 0, "probs": [0.5]}, {"index": 1, "probs": [float("nan")]}], [{"index": 0}, {"index": 1}], None,
    ],
)  # fmt: skip
def test_what_is_not_one_score_per_text_is_refused_and_not_kept(tmp_path, data):
    save_reward_model(tmp_path / "model", family_tokenizer("llama3"))
    with serving(lambda *asked: (200, {"data": data})) as served:
        spec = {"reward_server": served.url, "model": str(tmp_path / "model"), "cache": str(tmp_path / "cache")}
        with pytest.raises(ServerError, match="gave other than a score for 2 texts"):
            load_scorer(spec)(PROMPTS[:2], TEXTS[:2])
    assert not (tmp_path / "cache").exists()


ENGINE = os.environ.get("POLYPO_VLLM")


@pytest.mark.skipif(not ENGINE, reason="needs a real engine: POLYPO_VLLM='/path/bin/vllm serve'")
def test_the_real_engine_gives_the_scores_of_the_local_model(tmp_path):
    tokenizer = family_tokenizer("llama3")  # its chats end with the pad token
    shape = {"max_position_embeddings": 1024, "head_dim": 32}  # the CPU's attention knows no heads of 8
    save_reward_model(tmp_path / "rm", tokenizer, pad_token_id=tokenizer.eos_token_id, **shape)
    weights, counts = Weights(str(tmp_path / "rm"), None, tokenizer, "float32"), {}
    prompts, texts = [*PROMPTS, LONG * 20], [*TEXTS, "jumps"]
    with started(shlex.split(ENGINE), weights, tmp_path / "log") as url:
        names = {"model": weights.model, "served_model_name": weights.name}
        spec = {"reward_server": url, "cache": str(tmp_path), **names}
        scores = load_scorer(spec, batch_size=2, counts=counts)(prompts, texts)
        with pytest.raises(ServerError, match="does not exist"):
            load_scorer(spec | {"served_model_name": "other", "cache": str(tmp_path / "none")})(prompts, texts)
    expected = load_scorer(str(tmp_path / "rm"), device="cpu")(prompts, texts)
    assert scores == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1 and max(map(abs, expected)) > 1  # no probabilities
    assert counts["scorer_calls"] == 3 and counts["scorer_prompt_tokens"] > 100
