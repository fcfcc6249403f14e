"""The loss of a mixture's router: the model's own value and gradient, in both layouts, and its weight in a step."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig
from transformers import DogeConfig, DogeForCausalLM, JetMoeConfig, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from batches import RAGGED, make_batch, real_responses
from helpers import build_tokenizer
from test_trainer import LORA, Grab, signal_rows, trainer
from trainers.forward import tree
from trainers.forward.layout import lay_out
from trainers.forward.router import router_loss
from trainers.forward.run import prepare_forward, run

VOCAB = 61
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def mixtral(vocab=VOCAB, coefficient=100.0):
    config = MixtralConfig(
        vocab_size=vocab, **SIZES, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
        output_router_logits=True, router_aux_loss_coef=coefficient, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return MixtralForCausalLM(config)


def own_loss(model, batch):
    """What the model itself gives for padded rows that end before the last token."""
    inputs = lay_out(batch, "rows")
    lengths = batch["prompt_mask"].sum(1, keepdim=True) + batch["response_mask"].sum(2) - 1
    at = torch.arange(inputs.input_ids.size(1))
    mask = (at < lengths[batch["mask"]].unsqueeze(1)).long()
    return model(input_ids=inputs.input_ids, attention_mask=mask).aux_loss


def own_loss_of_shared_prompts(model, batch):
    """Mixtral's loss of the router logits that the model has for each response alone, a beginning taken once."""
    layers, seen = [[] for _ in range(model.config.num_hidden_layers)], set()
    for _, _, prompt, response in real_responses(batch):
        ids = [*prompt.tolist(), *response.tolist()][:-1]
        new = [n for n in range(len(ids)) if (*ids[: n + 1],) not in seen]
        seen |= {(*ids[: n + 1],) for n in new}
        found = model(input_ids=torch.tensor([ids])).router_logits
        for layer, logits in zip(layers, found, strict=True):
            layer.append(logits[new])
    return load_balancing_loss_func(tuple(map(torch.cat, layers)), 4, 2)


OWN = [("rows", own_loss), ("shared", own_loss_of_shared_prompts)]


@pytest.fixture(autouse=True)
def shared_from_the_first_token_on(monkeypatch):
    monkeypatch.setattr(tree, "SAVED", 1)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout, own", OWN)
def test_the_loss_and_its_gradient_are_the_models_own(layout, own, checkpointing):
    model, batch = mixtral(), make_batch(RAGGED, VOCAB)
    expected = own(model, batch)
    expected_gradients = gradients(model, expected)
    assert prepare_forward(model, share=layout == "shared") is None
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    found = run(model, batch, lay_out(batch, layout))
    assert not found.values  # the loss is no value of a token
    torch.testing.assert_close(found.aux_loss, expected, rtol=1e-5, atol=0)
    found_gradients = gradients(model, found.aux_loss)
    assert expected_gradients["model.layers.1.mlp.gate.weight"].abs().max() > 1e-3
    for name, value in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()))


def step(tmp_path, coefficient, batch, accumulation, **keywords):
    """One step: what is logged, the gradients of the optimiser's step, the micro-batches and the trainer."""
    grab, batches, tokenizer = Grab(), [], build_tokenizer()
    data = signal_rows()[:6]
    t = trainer(tmp_path, tokenizer, mixtral(len(tokenizer), coefficient), data, callbacks=[grab], max_steps=1,
                per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, learning_rate=0.0,
                **keywords)  # fmt: skip
    loss = t.loss

    def seen(inputs, policy, reference):
        batches.append(inputs)
        return loss(inputs, policy, reference)

    t.loss = seen
    t.train()
    return t.state.log_history[0], grab.gradients, batches, t


@pytest.mark.parametrize("layout, own", OWN)
@pytest.mark.parametrize("batch, accumulation", [(6, 1), (2, 3)])
def test_a_step_adds_the_mean_over_its_micro_batches(tmp_path, layout, own, batch, accumulation):
    without, plain, _, _ = step(tmp_path, 0.0, batch, accumulation, layout=layout)
    logged, found, batches, t = step(tmp_path, 100.0, batch, accumulation, layout=layout)
    assert len(batches) == accumulation
    mean = sum(own(t.model, micro) for micro in batches) / accumulation
    assert "aux_loss" not in without
    assert logged["aux_loss"] == pytest.approx(float(mean), rel=1e-5)
    assert logged["loss"] == pytest.approx(without["loss"] + 100 * float(mean), rel=1e-5)
    expected = gradients(t.model, 100 * mean)
    for name, value in expected.items():
        torch.testing.assert_close(found[name] - plain[name], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()))
    name = "model.layers.0.mlp.gate.weight"
    assert expected[name].abs().max() > 0.1


def test_prompts_without_a_signal_do_not_dilute_the_loss(tmp_path, tokenizer):
    """A micro-batch weighs as its prompts do, so one of a prompt that is left out counts for nothing."""
    t = trainer(tmp_path, tokenizer, mixtral(len(tokenizer)))
    batch = t._prepare_inputs(t.data_collator([t.train_dataset[i] for i in (2, 3)]))
    aux = own_loss_of_shared_prompts(t.model, batch) if t.runner.inputs(batch).branches else own_loss(t.model, batch)
    rest = t.compute_loss(t.model, batch) - 100 * aux
    t.runner.router = t.runner.router._replace(coefficient=0.0)
    torch.testing.assert_close(rest, t.compute_loss(t.model, batch), rtol=0, atol=1e-3)


def test_evaluation_counts_it_too_and_an_adapter_has_it(tmp_path):
    data = signal_rows()[:4]
    keywords = {"peft_config": LoraConfig(**{**LORA, "target_modules": ["q_proj", "v_proj"]}), "eval_data": data}
    _, plain, _, t = step(tmp_path, 0.0, 6, 1, **copy.deepcopy(keywords))
    without = t.evaluate()
    _, found, batches, t = step(tmp_path, 100.0, 6, 1, **keywords)
    batches.clear()
    metrics = t.evaluate()
    aux = float(own_loss_of_shared_prompts(t.model.get_base_model(), batches[0]))
    assert "eval_aux_loss" not in without
    assert metrics["eval_aux_loss"] == pytest.approx(aux, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(without["eval_loss"] + 100 * aux, rel=1e-5)
    assert max((found[name] - plain[name]).abs().max() for name in found) > 0.1


def test_reentrant_checkpointing_is_refused_as_the_router_would_not_learn(tmp_path):
    model, batch = mixtral(), make_batch(RAGGED, VOCAB)
    prepare_forward(model, share=False)
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    assert not run(model, batch, lay_out(batch, "rows")).aux_loss.requires_grad
    with pytest.raises(ValueError, match="use_reentrant.*output_router_logits"):
        step(tmp_path, 1.0, 2, 1, gradient_checkpointing=True,
             gradient_checkpointing_kwargs={"use_reentrant": True})  # fmt: skip


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="its Doge does not run")
def test_a_loss_that_is_not_mixtrals_is_refused_at_the_first_batch(tmp_path, tokenizer):
    model = DogeForCausalLM(DogeConfig(vocab_size=len(tokenizer), **SIZES, num_hidden_layers=1, is_moe=True,
                                       num_experts=16, num_experts_per_tok=4, output_router_logits=True))  # fmt: skip
    t = trainer(tmp_path, tokenizer, model)
    with pytest.raises(ValueError, match="another one than Mixtral's.*output_router_logits"):
        t.train()


def test_a_config_that_does_not_say_how_much_it_weighs_is_refused():
    asked = JetMoeConfig(output_router_logits=True)
    with pytest.raises(ValueError, match="router_aux_loss_coef is missing"):
        router_loss(asked)
    asked.router_aux_loss_coef = 0.5
    assert router_loss(asked) == (2, 0.5)
    asked.output_router_logits = False
    assert router_loss(asked) is None
