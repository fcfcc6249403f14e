"""Rows that come and go in a batch give the samples that `generate` gives each alone, and no work is done twice."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)

from helpers import build_tokenizer, tiny_llama
from trainers.generation import HuggingFace, Request, SamplingConfig
from trainers.generation.decoding import can_decode

TOKENIZER = build_tokenizer()
TEXTS = [  # the longest is longer than a window, and all of them are with a response
    "say something kind to a friend who had a bad day today", "over the lazy dog jumps the quick fox", "the quick",
    "of course the dog", "what",
]  # fmt: skip
ENDS = [2, *range(40, 52)]  # so many that responses differ in length
SHAPE = {
    "vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": ENDS,
}  # fmt: skip
GPT2 = {"vocab_size": len(TOKENIZER), "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
LAYERS = ["sliding_attention", "full_attention"]
TAKEN = {
    "llama": LlamaConfig(**SHAPE),
    "mistral, window 6": MistralConfig(**SHAPE, sliding_window=6),
    "gemma 3, one layer with window 6": Gemma3TextConfig(**SHAPE, sliding_window=6, layer_types=LAYERS),
    "qwen 3": Qwen3Config(**SHAPE),
    "gpt 2": GPT2Config(**GPT2, bos_token_id=1, eos_token_id=ENDS),
}
LEFT = {
    "mamba, whose state is no keys and values": MambaConfig(vocab_size=len(TOKENIZER), hidden_size=32,
        num_hidden_layers=2, state_size=4, pad_token_id=0, bos_token_id=1, eos_token_id=ENDS),
    "bloom, without position ids": BloomConfig(vocab_size=len(TOKENIZER), hidden_size=32, n_layer=2, n_head=4),
    "lfm 2, one of whose layers has another state": Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]),
    "phi 3, which prepares its inputs itself": Phi3Config(**SHAPE),
}  # fmt: skip


def build(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).double().eval()


def requests(samples=3):
    """Longest prompt first, as they are handed over."""
    return [Request(TOKENIZER(t)["input_ids"], 100 * i + j) for i, t in enumerate(TEXTS) for j in range(samples)]


def config(**changes):
    return SamplingConfig(**{"max_new_tokens": 24, "temperature": 1.0, "batch_size": 6} | changes)


def sampled(backend, wanted, options):
    found = {}
    for portion in backend.sample(wanted, options):
        assert portion and not portion.keys() & found.keys()
        found |= portion
    return [found[at] for at in range(len(wanted))]


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("name", [*TAKEN, next(iter(LEFT))])
def test_samples_are_those_of_generate_with_each_request_alone(name, temperature):
    model = build((TAKEN | LEFT)[name])
    assert can_decode(model) == (name in TAKEN)
    backend, options = HuggingFace(model, TOKENIZER), config(temperature=temperature)
    found = sampled(backend, requests(), options)
    assert found == [backend.generate([request], options)[0] for request in requests()]
    lengths = {len(sample.token_ids) for sample in found}
    assert temperature == 0 or len(lengths) > 4 and {sample.truncated for sample in found} == {True, False}


@pytest.mark.parametrize("name", list(LEFT))
def test_models_that_are_called_in_another_way_are_left_to_generate(name):
    assert not can_decode(build(LEFT[name]))


def test_adapters_that_put_something_before_the_prompt_or_look_for_tokens_are_left_to_generate():
    lora = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    assert can_decode(get_peft_model(tiny_llama(50), LoraConfig(**lora)))
    assert not can_decode(get_peft_model(tiny_llama(50), LoraConfig(**lora, alora_invocation_tokens=[7])))
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert not can_decode(get_peft_model(tiny_llama(50), prompt))


def test_every_prompt_and_every_drawn_token_goes_through_the_model_once():
    model, shapes = build(TAKEN["llama"]), []
    model.register_forward_pre_hook(
        lambda _, args, options: shapes.append(options["input_ids"].shape), with_kwargs=True
    )
    # A quarter of the batch holds both samples of a prompt, and one of 8 is enough for a change.
    found = sampled(HuggingFace(model, TOKENIZER), requests(samples=2), config(batch_size=8))
    prompts, steps = [s for s in shapes if s[1] > 1], [s for s in shapes if s[1] == 1]
    assert sum(rows for rows, _ in prompts) == len(TEXTS)
    assert [rows for rows, _ in prompts] == [4, 1]  # 8 samples come in first, and the last 2 when 2 are finished
    assert sum(rows for rows, _ in steps) == sum(len(sample.token_ids) - 1 for sample in found)
    assert max(rows for rows, _ in steps) == 8


def test_between_two_portions_the_model_is_as_it_was():
    model = build(TAKEN["llama"]).train()
    portions = HuggingFace(model, TOKENIZER).sample(requests(), config())
    assert len(next(portions)) < len(requests())
    assert model.training and torch.is_grad_enabled()
