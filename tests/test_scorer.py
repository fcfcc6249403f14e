"""Scorers: import paths, reward models, weights, and what is refused."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from helpers import build_tokenizer, family_tokenizer
from trainers.generation.rewards import vader_sentiment
from trainers.generation.scorer import check_scorer, load_scorer

PROMPTS = ["what is the capital", "the dog", "say something", "a bad day"]
TEXTS = ["it is Paris, of course", "lazy", "something kind to a friend who had a bad day", "jumps"]


def length(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def column(prompts, completions, *, topic, **columns):
    return [float(len(prompt) + value) for prompt, value in zip(prompts, topic, strict=True)]


def as_array(prompts, completions):
    return np.arange(len(completions))


def save_reward_model(folder, tokenizer, *, num_labels=1, pad_token_id=None, **options):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=num_labels, pad_token_id=pad_token_id,
                         initializer_range=0.3, **shape, **options)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LlamaForSequenceClassification(config).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


def one_by_one(model, rows):
    with torch.no_grad():
        return [float(model(torch.tensor([row])).logits[0, 0]) for row in rows]


def test_vader_gives_its_compound_score():
    chats = [[{"role": "assistant", "content": text}] for text in ("I love it!", "I hate it.", "It is a table.")]
    texts = ["I love it!", "I hate it.", "It is a table."]
    scores = vader_sentiment(PROMPTS[:3], texts, topic=["x"] * 3)
    assert scores == vader_sentiment(PROMPTS[:3], chats)
    # Published arithmetic of VADER: valence v gives v / sqrt(v^2 + 15); love 3.2 plus 0.292 for one "!", hate -2.7.
    assert scores == pytest.approx(
        [3.492 / math.hypot(3.492, 15**0.5), -2.7 / math.hypot(2.7, 15**0.5), 0.0], abs=1e-4
    )


def test_import_path_and_columns():
    assert load_scorer(f"{__name__}.length")(PROMPTS, TEXTS) == [len(text) for text in TEXTS]
    assert load_scorer(column)(PROMPTS[:2], TEXTS[:2], topic=[100, 200]) == [119.0, 207.0]
    with pytest.warns(FutureWarning, match="trainers.loop is now trainers.generation"):  # old recipes name it
        scores = load_scorer("trainers.loop.rewards.vader_sentiment")(PROMPTS[:2], ["great", "awful"])
    assert scores[0] > 0 > scores[1]


@pytest.mark.parametrize(
    "spec, told",
    [
        ("no_such_package.reward", "no_such_package"),
        ("trainers.generation.rewards.sentimental", "sentimental"),
        (f"{__name__}.PROMPTS", "PROMPTS: it is a list and cannot be called"),
        ([], "empty"),
        ({"spec": length, "weight": math.nan}, "weight must be a finite number, not nan"),
        ([length, {"spec": f"{__name__}.length", "weight": "0.5"}], "length: its weight must be a finite number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_score_is_said_before_anything_is_sampled(spec, told):
    with pytest.raises(ValueError, match=told):
        check_scorer(spec)


def test_weighted_sum():
    parts = [{"spec": f"{__name__}.length", "weight": 0.5}, {"spec": as_array, "weight": -2}]
    expected = [0.5 * len(text) - 2 * i for i, text in enumerate(TEXTS)]
    assert load_scorer(parts)(PROMPTS, TEXTS) == expected
    assert load_scorer(parts[0])(PROMPTS, TEXTS) == [0.5 * len(text) for text in TEXTS]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_must_be_finite_numbers(bad):
    def broken(prompts, completions, **columns):
        return [1.0, 2.0, bad, 3.0]

    with pytest.raises(ValueError, match="broken.* gave .* for completion 2"):
        load_scorer(broken)(PROMPTS, TEXTS)
    with pytest.raises(ValueError, match="gave 3 scores for 4 completions"):
        load_scorer(lambda prompts, completions: [1.0] * 3)(PROMPTS, TEXTS)


@pytest.mark.parametrize("configured_pad", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_reward_model_scores_the_templated_chat(tmp_path, configured_pad, batch_size):
    tokenizer = family_tokenizer("llama3")
    tokenizer.pad_token = "<pad>" if configured_pad else tokenizer.eos_token  # EOS ends each row: no padding it away
    pad = tokenizer.pad_token_id if configured_pad else None
    model = save_reward_model(tmp_path, tokenizer, pad_token_id=pad)
    chats = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": c}]
        for p, c in zip(PROMPTS, TEXTS, strict=True)
    ]
    rows = [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in chats]
    assert len({len(row) for row in rows}) == 4
    assert all(row.count(tokenizer.bos_token_id) == 1 for row in rows)
    scorer = load_scorer(str(tmp_path), batch_size=batch_size, device="cpu")
    expected = one_by_one(model, rows)
    assert max(expected) - min(expected) > 0.1
    assert scorer([chat[:1] for chat in chats], [chat[1:] for chat in chats]) == pytest.approx(expected, abs=1e-5)
    assert scorer(PROMPTS, TEXTS) == pytest.approx(expected, abs=1e-5)  # plain text gets the same template


def test_reward_model_without_template_reads_plain_text(tmp_path):
    tokenizer = build_tokenizer()
    model = save_reward_model(tmp_path, tokenizer, pad_token_id=tokenizer.pad_token_id)
    scorer = load_scorer(tmp_path.as_posix(), device="cpu")
    rows = [tokenizer(p + c)["input_ids"] for p, c in zip(PROMPTS, TEXTS, strict=True)]
    assert scorer(PROMPTS, TEXTS) == pytest.approx(one_by_one(model, rows), abs=1e-5)


def test_reward_model_keeps_the_end_of_long_texts_and_says_so(tmp_path, caplog):
    tokenizer = build_tokenizer()
    model = save_reward_model(tmp_path, tokenizer, pad_token_id=0, max_position_embeddings=16)
    scorer = load_scorer(str(tmp_path), device="cpu")
    ids = tokenizer("the dog " * 20 + "jumps")["input_ids"]
    expected = one_by_one(model, [ids[-16:]])
    for _ in range(2):
        assert scorer(["the dog " * 20], ["jumps"]) == pytest.approx(expected, abs=1e-5)
    assert caplog.text.count("lose their beginning") == 1


def test_reward_model_must_have_one_output(tmp_path):
    save_reward_model(tmp_path, family_tokenizer("llama3"), num_labels=2)
    for spec in (str(tmp_path), {"reward_server": "http://localhost:1", "model": str(tmp_path)}):
        with pytest.raises(ValueError, match="has 2 outputs"):
            load_scorer(spec)
