"""What a mixture that is served says of its arguments."""

import logging
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from emdpo_runs import LORA
from helpers import build_tokenizer, tiny_llama
from trainers import MixturePolicy

IDS = torch.tensor([[5, 6], [7, 8]])


@pytest.fixture(scope="module")
def mixture():
    tokenizer = build_tokenizer()
    return MixturePolicy([tiny_llama(len(tokenizer)).eval() for _ in range(2)], [0.3, 0.7], tokenizer)


@pytest.fixture(scope="module")
def adapters():
    tokenizer = build_tokenizer()
    config = LoraConfig(**LORA, lora_dropout=0.3)
    model = get_peft_model(tiny_llama(len(tokenizer)), config, adapter_name="type-0")
    model.add_adapter("type-1", config)
    return MixturePolicy(model.eval(), [0.3, 0.7], tokenizer)


@pytest.mark.parametrize(
    "weights, word",
    [
        ([1.0], "one probability for each of the 2 policies"),
        ([0.2, 0.3, 0.5], "one probability for each of the 2 policies"),
        ([[0.5, 0.5]], "one probability for each of the 2 policies"),
        ([math.nan, 1.0], "probabilities that sum to 1"),
        ([math.nan, math.nan], "probabilities that sum to 1"),
        ([-0.5, 1.5], "probabilities that sum to 1"),
    ],
)
def test_weights_are_one_probability_per_policy(mixture, adapters, weights, word):
    for models in (mixture.models, adapters.models):
        with pytest.raises(ValueError, match=f"weights=.* must be {word}"):
            MixturePolicy(models, weights, mixture.tokenizer)


@pytest.mark.parametrize("types", [[0], [0, 1, 0], [0, 2], [-1, 0], [0.0, 1.0], [[0, 1]], [True, False], 1])
def test_types_are_one_policy_per_prompt(mixture, types):
    with pytest.raises(ValueError, match="types=.* must be one whole number from 0 to 1 for each of the 2 prompts"):
        mixture.generate(IDS, types=types, max_new_tokens=2)


@pytest.mark.parametrize(
    "kwargs, word",
    [
        ({"num_return_sequences": 2}, "num_return_sequences=2 does not work .* repeat the prompts"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True does not work"),
        (
            {"generation_config": GenerationConfig(num_return_sequences=3, do_sample=True)},
            "num_return_sequences=3 does not work",
        ),
        ({"streamer": object()}, "streamer does not work"),
        ({"token_type_ids": torch.zeros_like(IDS)}, "token_type_ids does not work"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask has shape \(2, 3\)"),
    ],
)
def test_arguments_of_generate_that_cannot_be_put_together_are_named(mixture, kwargs, word):
    with pytest.raises(ValueError, match=word):
        mixture.generate(IDS, max_new_tokens=2, **kwargs)


def test_prompts_without_tokens_are_named(mixture):
    for ids in (torch.empty(0, 3, dtype=torch.long), torch.empty(2, 0, dtype=torch.long), torch.tensor([5, 6])):
        with pytest.raises(ValueError, match="input_ids has shape"):
            mixture.generate(ids, max_new_tokens=2)
    for prompts, responses, word in (
        ([], [], "prompt_ids has 0 prompts"),
        ([[5]], [], "prompt_ids has 1 prompts and response_ids 0"),
        ([[5], []], [[[6]], [[6]]], r"prompt_ids\[1\] is empty"),
        ([[5], [5]], [[[6]], []], r"response_ids\[1\] has no response"),
        ([[5]], [[[6], []]], r"response_ids\[0\] has no response or an empty one"),
    ):
        with pytest.raises(ValueError, match=word):
            mixture.logps(prompts, responses)


def test_the_arguments_that_say_what_happens_anyhow_are_taken(mixture):
    found = mixture.generate(IDS, types=[1, 1], max_new_tokens=2, num_return_sequences=1, do_sample=False,
                             generation_config=GenerationConfig())  # fmt: skip
    expected = mixture.policy(1).generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert found.tolist() == expected.tolist()


def test_adapters_with_dropout_are_served_without_it_and_prompts_stay_shared(adapters, caplog):
    prompts, responses = [[5, 6, 7]], [[[8, 9], [10, 11, 2]]]
    with caplog.at_level(logging.WARNING):
        first = adapters.logps(prompts, responses)
    assert "dropout" not in caplog.text and adapters._runner.layout == "auto"
    adapters.models.train()
    torch.testing.assert_close(adapters.logps(prompts, responses), first)
    adapters.models.eval()
