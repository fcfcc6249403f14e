"""Sampling: exact distribution, independence of the batch, stops, chat templates, state of the model afterwards."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from transformers import TopKLogitsWarper, TopPLogitsWarper

from helpers import FAMILIES, build_tokenizer, family_tokenizer, tiny_llama
from trainers.generation import GumbelSampler, SamplingConfig, sample_responses, sampler
from trainers.generation.sampler import encode_prompt, encode_prompts, sample_seed

PROMPTS = ["the quick brown", "say something kind to a friend who had a bad day today", "what", "of course the dog"]
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def policy():
    tokenizer = build_tokenizer()
    return tiny_llama(len(tokenizer)), tokenizer


def ids(samples):
    return [[sample.token_ids for sample in row] for row in samples]


def draws(logits, count, **options):
    """`count` samples of the next token, each with its own stream."""
    sampler = GumbelSampler(list(range(1000, 1000 + count)), **options)
    return sampler(None, logits.expand(count, -1).clone()).argmax(-1)


@pytest.mark.parametrize("top_p, top_k", [(1.0, 0), (0.8, 12)])
def test_tokens_follow_the_softmax_with_and_without_a_cut(top_p, top_k):
    logits = torch.randn(1, 23, generator=torch.Generator().manual_seed(3)) * 1.5
    count = 40_000
    cut = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k or 23)(None, logits / 0.9))[0]
    kept = cut > -torch.inf
    assert kept.sum() == 23 if top_k == 0 else 2 < kept.sum() < 12
    seen = torch.bincount(draws(logits, count, temperature=0.9, top_p=top_p, top_k=top_k), minlength=23)
    expected = cut[kept].double().softmax(0) * count
    assert seen[~kept].sum() == 0 and expected.min() > 5  # what the test below needs
    assert chisquare(seen[kept].double(), expected).pvalue > 0.01


def test_nucleus_without_sorting_is_the_argmax_over_the_transformers_nucleus():
    generator = torch.Generator().manual_seed(5)
    for spread, top_p in ((0.01, 0.1), (1.0, 0.3), (3.0, 0.95), (8.0, 0.6)):
        logits = torch.randn(37, 501, generator=generator) * spread
        seeds = list(range(37))
        chosen = GumbelSampler(seeds, top_p=top_p)(None, logits.clone()).argmax(-1)
        plain = GumbelSampler(seeds)
        noise = plain._gumbel(logits, plain.generators)
        assert torch.equal(chosen, (TopPLogitsWarper(top_p)(None, logits) + noise).argmax(-1))


def test_seed_is_stable_and_depends_on_every_part():
    # A number, not a recomputation: committed data depends on it staying what it is.
    assert sample_seed(0, 0, "hello", 0) == 6004562126718069562
    chat = [{"role": "user", "content": "hello"}]
    seeds = {sample_seed(*key) for key in [(0, 0, "hello", 0), (1, 0, "hello", 0), (0, 1, "hello", 0)]}
    seeds |= {sample_seed(*key) for key in [(0, 0, "hello", 1), (0, 0, "hell", 0), (0, 0, chat, 0)]}
    assert sample_seed(0, 0, "hello", 0, 0) in seeds and sample_seed(0, 0, "hello", 0, 1) not in seeds
    assert len(seeds) == 6
    assert sample_seed(0, 0, [{"content": "hello", "role": "user"}], 0) == sample_seed(0, 0, chat, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_do_not_depend_on_the_batch(policy, dtype):
    model, tokenizer = policy
    model = tiny_llama(len(tokenizer)).to(dtype)
    runs = [
        ids(sample_responses(model, tokenizer, PROMPTS, config(batch_size=size), **QUIET)) for size in (1, 4, 5, 64)
    ]
    assert all(run == runs[0] for run in runs)
    assert len({tuple(row) for prompt in runs[0] for row in prompt}) == 12  # 4 prompts x 3 different samples
    backwards = ids(sample_responses(model, tokenizer, PROMPTS[::-1], config(), **QUIET))
    assert backwards[::-1] == runs[0]
    more = ids(sample_responses(model, tokenizer, PROMPTS[:2], config(num_generations=5), **QUIET))
    assert [row[:3] for row in more] == runs[0][:2]


def config(**changes) -> SamplingConfig:
    options = {"num_generations": 3, "max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9, "batch_size": 4}
    return SamplingConfig(**options | {"seed": 7} | changes)


def test_stops_at_every_end_token_and_reports_truncation(policy):
    model, tokenizer = policy
    free = sample_responses(model, tokenizer, PROMPTS, config(max_new_tokens=20), **QUIET)
    other = free[0][0].token_ids[3]  # make a token that this model samples an end token as well
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    try:
        samples = sample_responses(model, tokenizer, PROMPTS, config(max_new_tokens=20), **QUIET)
    finally:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    ends = {tokenizer.eos_token_id, other}
    for before, after in zip(sum(free, []), sum(samples, []), strict=True):
        stop = next((t + 1 for t, token in enumerate(before.token_ids) if token in ends), None)
        assert after.token_ids == before.token_ids[:stop]
        assert after.truncated == (stop is None)
        assert len(after.token_ids) == 20 or not after.truncated
        assert after.text == tokenizer.decode(after.token_ids, skip_special_tokens=True)
    assert {sample.truncated for sample in sum(samples, [])} == {True, False}


def test_a_model_cannot_bend_the_distribution_through_its_generation_config(policy):
    model, tokenizer = policy
    plain = ids(sample_responses(model, tokenizer, PROMPTS, config(), **QUIET))
    before = model.generation_config.to_dict()
    model.generation_config.update(
        repetition_penalty=5.0, no_repeat_ngram_size=1, min_length=30, num_beams=2, max_new_tokens=3, temperature=0.1
    )
    try:
        assert ids(sample_responses(model, tokenizer, PROMPTS, config(), **QUIET)) == plain
    finally:
        model.generation_config.update(**before)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_is_the_chat_template_with_generation_prompt(family):
    tokenizer = family_tokenizer(family)
    chat = [{"role": "user", "content": "what is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    encoded = encode_prompt(tokenizer, chat)
    assert tokenizer.decode(encoded) == text
    bos = FAMILIES[family][1]
    assert bos is None or encoded.count(tokenizer.bos_token_id) == 1
    resumed = encode_prompt(tokenizer, [*chat, {"role": "assistant", "content": "it is Par"}])
    assert tokenizer.decode(resumed).endswith("it is Par")


def test_a_chat_template_sees_the_keys_that_were_given():
    """A table gives all messages the keys of one, and templates ask which are there."""
    tokenizer, message = build_tokenizer("{{ messages[0].keys() | join }}"), {"role": "user", "content": "hi"}
    assert encode_prompt(tokenizer, [message | {"tool_calls": None}]) == encode_prompt(tokenizer, [message])


def test_texts_among_messages_are_encoded_in_one_call(monkeypatch):
    tokenizer, calls = family_tokenizer("llama3"), []
    prompts = ["the dog", [{"role": "user", "content": "hi"}], "", "a friend"]
    expected = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    text_ids = sampler.text_ids
    monkeypatch.setattr(sampler, "text_ids", lambda *given: calls.append(given) or text_ids(*given))
    assert encode_prompts(tokenizer, prompts) == expected and len(calls) == 1


def test_plain_prompts_keep_no_end_token_and_are_never_empty_or_too_long(policy):
    closing = build_tokenizer(add_eos=True)
    assert encode_prompt(closing, "the dog")[-1] != closing.eos_token_id
    assert encode_prompt(closing, "the dog") == build_tokenizer()("the dog")["input_ids"]
    assert encode_prompt(build_tokenizer(), "") == [build_tokenizer().bos_token_id]
    with pytest.raises(ValueError, match="has no tokens"):
        encode_prompt(build_tokenizer(bos=None), "")
    with pytest.raises(ValueError, match="Prompt 1: the chat template refuses .*chat_template is not set"):
        sample_responses(*policy, ["fine", [{"role": "user", "content": "hi"}]], config(), **QUIET)
    no_system = family_tokenizer("gemma")
    with pytest.raises(ValueError, match="Prompt 0: the chat template refuses these messages: no system turn"):
        sample_responses(policy[0], no_system, [[{"role": "system", "content": "hi"}]], config(), **QUIET)
    with pytest.raises(ValueError, match="Prompt 1 has .* context of 512"):
        sample_responses(*policy, ["fine", "the dog " * 300], config(), **QUIET)


def test_training_mode_and_checkpointing_are_put_back(policy):
    model, tokenizer = policy
    expected = ids(sample_responses(model, tokenizer, PROMPTS, config(), **QUIET))
    model = tiny_llama(len(tokenizer), attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    before = [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()]
    during = []
    model.model.register_forward_pre_hook(
        lambda m, _: during.append(m.training or any(x.training or x.gradient_checkpointing for x in m.layers))
    )
    assert ids(sample_responses(model, tokenizer, PROMPTS, config(), **QUIET)) == expected
    assert during and not any(during)
    assert [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()] == before
    ids_ = torch.tensor([encode_prompt(tokenizer, PROMPTS[0])])
    model(ids_, labels=ids_).loss.backward()  # sampling left nothing behind that autograd cannot use
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_adapters_change_the_samples(policy):
    _, tokenizer = policy
    model = get_peft_model(
        tiny_llama(len(tokenizer)), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    fresh = ids(sample_responses(model, tokenizer, PROMPTS, config(), **QUIET))
    assert fresh == ids(sample_responses(*policy, PROMPTS, config(), **QUIET))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2.0, generator=torch.Generator().manual_seed(0))
    assert ids(sample_responses(model, tokenizer, PROMPTS, config(), **QUIET)) != fresh
