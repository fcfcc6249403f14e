"""Which weights learn: dropout, frozen weights, adapters as they were given, optimizers of the user."""

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from helpers import save_start, tiny_llama
from test_trainer import LORA, logged, rows, trainer
from trainers.forward import run


def test_a_policy_of_which_nothing_is_trainable_is_refused(tmp_path, tokenizer):
    frozen = tiny_llama(len(tokenizer)).requires_grad_(False)
    with pytest.raises(ValueError, match="No weight .*requires_grad_"):
        trainer(tmp_path, tokenizer, model=frozen).train()
    get_peft_model(tiny_llama(len(tokenizer)), LoraConfig(**LORA)).save_pretrained(tmp_path / "a")
    model = PeftModel.from_pretrained(tiny_llama(len(tokenizer)), tmp_path / "a")
    t = trainer(tmp_path, tokenizer, model=model, eval_data=rows(4))
    t.evaluate()  # looks at the reference, which must not make anything trainable
    with pytest.raises(ValueError, match="No weight .*is_trainable=True"):
        t.train()


@pytest.mark.parametrize("kind", ["lora", "pretrained"])
def test_what_is_frozen_by_hand_stays_so(tmp_path, tokenizer, kind):
    model, kwargs = tiny_llama(len(tokenizer)), {"peft_config": LoraConfig(**LORA, init_lora_weights=False)}
    if kind == "pretrained":
        model, kwargs = get_peft_model(model, kwargs["peft_config"]), {}
    t = trainer(tmp_path, tokenizer, model=model, learning_rate=0.5, **kwargs)
    frozen = [name for name, p in t.model.named_parameters() if "lora_A.default" in name]
    t.model.get_parameter(frozen[0]).requires_grad_(False)
    norm = next(name for name, _ in t.model.named_parameters() if name.endswith("model.norm.weight"))
    t.model.get_parameter(norm).requires_grad_(True)
    before = {name: p.detach().clone() for name, p in t.model.named_parameters()}
    t.train()
    moved = {name for name, p in t.model.named_parameters() if not torch.equal(p, before[name])}
    assert norm in moved and frozen[0] not in moved and frozen[1] in moved


@pytest.mark.parametrize("layout, tokens", [("rows", 2 * (20 + 1)), ("shared", 20 + 1 + 1)])
def test_operations_are_counted_as_the_trainer_does(tmp_path, tokenizer, layout, tokens):
    data = [{"prompt_ids": [5, 6, 7, 8] * 5, "response_ids": [[9, 2], [8, 2]], "scores": [1.0, 0.0]}]
    t = trainer(tmp_path, tokenizer, data=data, layout=layout, max_steps=3)
    t.train()
    weights = sum(p.numel() for n, p in t.model.named_parameters() if "embed" not in n)
    assert t.state.total_flos == 3 * 6 * tokens * weights


@pytest.mark.parametrize("layout", ["rows", "shared"])
def test_a_group_in_parts_is_counted_and_never_laid_out_as_a_whole(tmp_path, tokenizer, layout, monkeypatch):
    sizes, whole = [], run.lay_out

    def watched(batch, *options):
        sizes.append(int(batch["mask"].sum()))
        return whole(batch, *options)

    monkeypatch.setattr(run, "lay_out", watched)
    data = [{"prompt_ids": [5, p] * 5, "response_ids": [[k, 2] for k in range(20, 28)], "scores": [*range(8)]}
            for p in (6, 7)]  # fmt: skip
    fields, found = {"data": data, "layout": layout, "per_device_train_batch_size": 2, "max_steps": 1}, []
    for budget in (None, 20):
        sizes.clear()
        t = trainer(tmp_path, tokenizer, tokens_per_backward=budget, **fields)
        t.train()
        found.append((t.state.total_flos, max(sizes)))
    assert found[0] == (found[1][0], 16) and found[1][1] < 16


def test_a_path_to_an_adapter_goes_on_with_it(tmp_path, tokenizer):
    save_start(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(5)
    get_peft_model(base, LoraConfig(**LORA, init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    found, adapter = [], tmp_path / "adapter"
    for model in (str(adapter), PeftModel.from_pretrained(base, adapter, is_trainable=True)):
        t = trainer(tmp_path / "out", tokenizer, model=model, eval_data=rows(4))
        assert t.evaluate()["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)
        t.train()
        found.append(logged(t))
        assert t.evaluate()["eval_rewards/margins"] != pytest.approx(0, abs=1e-4)
    assert found[0] == found[1]


def test_an_adapter_without_the_name_of_its_base_says_what_to_write(tmp_path, tokenizer):
    torch.manual_seed(5)
    get_peft_model(tiny_llama(len(tokenizer)), LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="model_name_or_path: .*adapter is an adapter .* as base_model_name_or_path"):
        trainer(tmp_path / "out", tokenizer, model=str(tmp_path / "adapter"))


def test_a_folder_of_named_adapters_points_to_them(tmp_path, tokenizer):
    save_start(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(**LORA), "policy")
    model.add_adapter("sft", LoraConfig(**LORA))
    t = trainer(tmp_path / "out", tokenizer, model=model, ref_model="sft")
    t.train()
    t.save_model()
    with pytest.raises(ValueError, match=r"holds its adapters in folders: name .*out/policy or .*out/sft\.$"):
        trainer(tmp_path / "again", tokenizer, model=str(tmp_path / "out"))
    again = trainer(tmp_path / "again", tokenizer, model=str(tmp_path / "out/policy"))
    weights = again.model.state_dict()
    trained = {n.replace(".policy.", ".default."): w for n, w in t.model.state_dict().items() if ".policy." in n}
    assert trained and all(weights[name].equal(weight) for name, weight in trained.items())


def test_virtual_tokens_are_refused(tmp_path, tokenizer):
    peft_config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="PrefixTuningConfig puts virtual tokens"):
        trainer(tmp_path, tokenizer, model=get_peft_model(tiny_llama(len(tokenizer)), peft_config))


def test_an_optimizer_of_another_model_is_refused(tmp_path, tokenizer):
    model = tiny_llama(len(tokenizer))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="holds none of the model's trainable weights"):
        trainer(tmp_path, tokenizer, model=model, peft_config=LoraConfig(**LORA), optimizers=(optimizer, None))
    model = tiny_llama(len(tokenizer))
    before = model.lm_head.weight.detach().clone()
    some = torch.optim.SGD([model.lm_head.weight], lr=0.1)
    trainer(tmp_path, tokenizer, model=model, optimizers=(some, None)).train()
    assert not torch.equal(model.lm_head.weight, before)
