"""The reference is the policy that training starts from and stays it, whatever is trained. Copies run themselves."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from batches import own_logps
from helpers import tiny_llama
from test_trainer import LORA, signal_rows, trainer
from trainers.forward.identity import adapter_weights

TWO = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
KINDS = {
    "default": LoraConfig(**TWO),
    "pissa": LoraConfig(**TWO, init_lora_weights="pissa"),
    "olora": LoraConfig(**TWO, init_lora_weights="olora"),
    "random": LoraConfig(**TWO, init_lora_weights=False),
    "dora": LoraConfig(**TWO, use_dora=True, init_lora_weights=False),
    "whole modules": LoraConfig(**TWO, modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": LoraConfig(**TWO, trainable_token_indices=[5, 6, 7, 8]),
    "no bias there": LoraConfig(**TWO, bias="all"),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    "norms": LNTuningConfig(target_modules=["input_layernorm"]),
    "adalora": AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=9, tinit=1, tfinal=1),
}


@torch.no_grad()
def summed(model, t):
    """Log-probability of each response, from the logits of `model`."""
    return torch.stack([own_logps(model, row["prompt_ids"], ids).sum()
                        for row in t.train_dataset for ids in row["response_ids"]])  # fmt: skip


def predicted(t):
    """The policy's and the reference's log-probability of each response of the training rows."""
    output = t.predict(t.train_dataset)
    return [torch.tensor(p[output.label_ids[1] == 1]) for p in output.predictions]


@pytest.mark.parametrize("how", ["peft_config", "PeftModel"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_of_an_adapter_is_the_start_and_stays_it(tmp_path, tokenizer, kind, how):
    model, kwargs = tiny_llama(len(tokenizer)), {"peft_config": copy.deepcopy(KINDS[kind])}
    if how == "PeftModel":
        torch.manual_seed(5)
        model, kwargs = get_peft_model(model, kwargs["peft_config"]), {}
        with torch.no_grad():  # as if it had been trained
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.1)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
    t = trainer(tmp_path, tokenizer, model=model, data=signal_rows(5), learning_rate=0.3, max_steps=4, **kwargs)
    if how == "PeftModel":
        now = dict(t.model.named_parameters())
        assert all(torch.equal(now[name], value) for name, value in before.items())
        assert {name for name, p in now.items() if p.requires_grad} == learning
    start = summed(t.model, t)
    policy, reference = predicted(t)
    torch.testing.assert_close(policy, start, rtol=1e-5, atol=1e-4)
    assert torch.equal(policy, reference) or torch.allclose(policy, reference, rtol=0, atol=1e-4)
    t.train()
    policy, after = predicted(t)
    assert torch.equal(after, reference)
    if kind != "adalora":  # its first steps are tiny
        assert (policy - reference).abs().max() > 1e-3


def test_a_run_that_starts_with_pissa_goes_on(tmp_path, tokenizer):
    def make(folder, **kwargs):
        torch.manual_seed(len(folder))
        fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 0.1, **kwargs}
        return trainer(tmp_path / folder, tokenizer, peft_config=copy.deepcopy(KINDS["pissa"]), **fields)

    whole, part = make("a"), make("other", callbacks=[Stop()])
    whole.train()
    part.train()
    again = make("other")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    found = dict(again.model.named_parameters())
    assert all(torch.equal(found[name], p) for name, p in whole.model.named_parameters())


class Stop(TrainerCallback):
    def __init__(self, step=2):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def qwen(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.2, **sizes)
    return Qwen2ForCausalLM(config)  # its projections have biases


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_refused_or_get_a_reference_of_their_own(tmp_path, tokenizer, bias):
    lora = LoraConfig(**TWO, bias=bias)
    for kwargs in ({"model": qwen(tokenizer), "peft_config": lora}, {"model": get_peft_model(qwen(tokenizer), lora)}):
        with pytest.raises(ValueError, match="would move with the policy: .*q_proj.*bias.* bias='none'.*ref_model"):
            trainer(tmp_path, tokenizer, **kwargs)
    t = trainer(tmp_path, tokenizer, model=qwen(tokenizer), peft_config=lora, ref_model=qwen(tokenizer),
                data=signal_rows(5), learning_rate=0.3)  # fmt: skip
    policy, before = predicted(t)
    torch.testing.assert_close(policy, before, rtol=1e-5, atol=1e-4)
    t.train()
    assert torch.equal(predicted(t)[1], before)


def test_a_reference_that_shares_weights_with_the_policy_is_refused(tmp_path, tokenizer):
    base = tiny_llama(len(tokenizer))
    with pytest.raises(ValueError, match="would move with the policy: .*lora_A.* ref_model anew"):
        trainer(tmp_path, tokenizer, model=get_peft_model(base, LoraConfig(**LORA)), ref_model=base)
    policy, reference = tiny_llama(len(tokenizer)), tiny_llama(len(tokenizer))
    reference.model.embed_tokens = policy.model.embed_tokens
    with pytest.raises(ValueError, match="1 trainable weights belong to both, such as model.embed_tokens.weight"):
        trainer(tmp_path, tokenizer, model=policy, ref_model=reference)
    assert policy.model.embed_tokens.weight.requires_grad


def loaded(adapters, tokenizer, **folders):
    """The first name is in training."""
    model = tiny_llama(len(tokenizer))
    for i, (name, folder) in enumerate(folders.items()):
        if i == 0:
            model = PeftModel.from_pretrained(model, adapters / folder, adapter_name=name, is_trainable=True)
        else:
            model.load_adapter(adapters / folder, adapter_name=name, is_trainable=True)
    model.set_adapter(next(iter(folders)))
    return model


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("name", ["reference", "sft"])
def test_an_adapter_of_the_user_is_the_reference(adapters, tokenizer, name, precompute):
    """The one that is called so, or another one by its name."""
    fields = {"data": signal_rows(5), "learning_rate": 0.3, "precompute_ref_logps": precompute, "max_steps": 3,
              "ref_cache_dir": str(adapters / "cache")}  # fmt: skip
    trainer(adapters, tokenizer, model=loaded(adapters, tokenizer, policy="first"), **fields).train()
    asked, others = ({}, {}) if name == "reference" else ({"ref_model": name}, {"reference": "first"})
    model = loaded(adapters, tokenizer, policy="first", **others, **{name: "second"})
    t = trainer(adapters, tokenizer, model=model, **asked, **fields)
    assert t.ref_model is None and t.reference.adapter == name
    policy, reference = predicted(t)
    first, second = (summed(loaded(adapters, tokenizer, one=one).eval(), t) for one in ("first", "second"))
    torch.testing.assert_close(policy, first, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(reference, second, rtol=1e-5, atol=1e-4)
    before = {place: weight.clone() for place, weight in adapter_weights(t.model, name).items()}
    assert before and not any(weight.requires_grad for weight in adapter_weights(t.model, name).values())
    t.train()
    assert all(torch.equal(weight, before[place]) for place, weight in adapter_weights(t.model, name).items())
    torch.testing.assert_close(predicted(t)[1], second, rtol=1e-5, atol=1e-4)


def test_the_adapter_in_training_may_be_called_reference(adapters, tokenizer):
    model = loaded(adapters, tokenizer, reference="first", other="second")
    other = {n: p.detach().clone() for n, p in model.named_parameters() if ".other." in n}
    t = trainer(adapters, tokenizer, model=model, data=signal_rows(5), learning_rate=0.3)
    policy, before = predicted(t)
    torch.testing.assert_close(policy, before, rtol=0, atol=1e-4)
    t.train()
    policy, after = predicted(t)
    assert torch.equal(after, before) and (policy - after).abs().max() > 1e-3
    assert all(torch.equal(model.get_parameter(name), value) for name, value in other.items())


@pytest.mark.parametrize("kind", ["full", "pretrained"])
def test_a_second_trainer_starts_from_where_the_first_one_ended(adapters, tokenizer, kind):
    model = tiny_llama(len(tokenizer)) if kind == "full" else loaded(adapters, tokenizer, default="first")
    fields = {"model": model, "data": signal_rows(5), "learning_rate": 0.3}
    first = trainer(adapters, tokenizer, **fields)
    start = predicted(first)[1]
    first.train()
    second = trainer(adapters, tokenizer, **fields)
    policy, before = predicted(second)
    torch.testing.assert_close(policy, before, rtol=0, atol=1e-4)
    assert (before - start).abs().max() > 1e-3
    second.train()
    assert torch.equal(predicted(second)[1], before)


@pytest.mark.parametrize(
    "fields", [{}, {"bf16": True}, {"peft_config": LoraConfig(**LORA)}], ids=["full", "bf16", "lora"]
)
def test_a_copy_of_the_trained_model_runs_its_own_weights(tmp_path, tokenizer, fields):
    t = trainer(tmp_path, tokenizer, **copy.deepcopy(fields))
    t.train()
    ids = torch.arange(20, 40)[None]
    other = copy.deepcopy(t.model)
    with torch.no_grad():
        expected = t.model(input_ids=ids).logits
        assert torch.equal(other(input_ids=ids).logits, expected)
        for parameter in other.parameters():
            parameter.zero_()
        assert not other(input_ids=ids).logits.any()
        assert other.generate(input_ids=ids, max_new_tokens=3, do_sample=False)[0, 20:].tolist() == [0, 0, 0]
        assert torch.equal(t.model(input_ids=ids).logits, expected)
        # A trainer prepares the copy once more.
        again = trainer(
            tmp_path, tokenizer, model=other, data=signal_rows(5), **({} if "peft_config" in fields else fields)
        )
        uniform = -torch.log(torch.tensor(float(len(tokenizer))))
        lengths = torch.tensor([len(ids) for row in again.train_dataset for ids in row["response_ids"]])
        torch.testing.assert_close(predicted(again)[0], uniform * lengths, rtol=1e-4, atol=1e-4)
