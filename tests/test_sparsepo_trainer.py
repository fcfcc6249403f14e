"""SparsePO through the whole stack: closed forms, what is trained, saved, resumed, reloaded and refused."""

import copy
import json
import math
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from helpers import tiny_llama
from test_trainer import LORA, rows
from trainers import DPOConfig, DPOTrainer, SparsePOConfig, SparsePOTrainer
from trainers.sparsepo import MaskHeads

DENSE = {"mask_init": "dense", "mask_init_std": 0.5}


def pairs(n=8, seed=0):
    return [
        row | {"responses": row["responses"][:2], "scores": row["scores"][:2]}
        for row in rows(n + 1, seed)
        if len(set(row["scores"][:2])) > 1
    ]


def config(tmp_path, **kwargs):
    defaults = {
        "output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "learning_rate": 1e-2, "max_steps": 2,
        "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "lr_scheduler_type": "constant", "optim": "adamw_torch", **DENSE,
    }  # fmt: skip
    return SparsePOConfig(**{**defaults, **kwargs})


def trainer(tmp_path, tokenizer, model=None, data=None, **kwargs):
    extra = {k: kwargs.pop(k) for k in ("peft_config", "ref_model", "callbacks", "optimizers") if k in kwargs}
    data = Dataset.from_list(data or pairs())
    return SparsePOTrainer(
        model or tiny_llama(len(tokenizer)), args=config(tmp_path, **kwargs), train_dataset=data, eval_dataset=data,
        processing_class=tokenizer, **extra,
    )  # fmt: skip


KINDS = {
    "common": {},
    "independent": {"independent": True},
    "activations": {"mask": "activations"},
    "random": {"mask": "random"},
    "tdpo1": {"mask": "ones"},
    "tdpo2": {"mask": "ones", "kl_term": "tdpo2"},
    "reward only": {"mask_kl": False},
    "no kl": {"kl_term": "none"},
    "dpo": {"mask": "ones", "kl_term": "none"},
}


@pytest.mark.parametrize("layout", ["rows", "shared"])
@pytest.mark.parametrize("adapter", [None, "fresh", "pretrained"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_step_zero_is_log_two_and_training_changes_it(tmp_path, tokenizer, kind, adapter, layout):
    kwargs, model = {**KINDS[kind], "layout": layout}, tiny_llama(len(tokenizer))
    if adapter == "fresh":
        kwargs["peft_config"] = LoraConfig(**LORA)
    if adapter == "pretrained":
        torch.manual_seed(5)
        model = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))
    t = trainer(tmp_path, tokenizer, model=model, **kwargs)
    before = t.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    if kind not in ("dpo", "no kl"):
        assert before["eval_kl/chosen"] == pytest.approx(0, abs=1e-6)
    t.train()
    after = t.evaluate()
    assert after["eval_loss"] < math.log(2) - 1e-3 and after["eval_rewards/margins"] > 1e-3
    if kind not in ("dpo", "no kl"):
        assert after["eval_kl/chosen"] > 1e-4


def test_step_zero_with_penalties_is_log_two_plus_the_sum_of_the_masks(tmp_path, tokenizer):
    for kind in ({}, {"independent": True}):
        found = trainer(tmp_path, tokenizer, reward_l1=0.01, kl_l1=0.01, **kind).evaluate()
        l1 = {k: sum(found[f"eval_mask_l1/{k}_{side}"] for side in ("chosen", "rejected")) for k in ("reward", "kl")}
        # A common mask is counted once, two masks each.
        expected = 0.01 * (l1["reward"] + l1["kl"]) / (1 if kind else 2)
        assert expected > 0.01
        assert found["eval_loss"] == pytest.approx(math.log(2) + expected, abs=1e-5)


def test_dpo_is_the_dpo_trainers_loss_and_gradients_also_from_the_cache(tmp_path, tokenizer):
    # The heads of the two take positions in another order, which float32 rounds differently.
    policy, reference = (tiny_llama(len(tokenizer), seed=seed).double() for seed in (0, 9))
    shared = {"args": DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", beta=0.3),
              "train_dataset": Dataset.from_list(pairs()), "processing_class": tokenizer}  # fmt: skip
    dpo = DPOTrainer(copy.deepcopy(policy), copy.deepcopy(reference), **shared)
    own = trainer(tmp_path, tokenizer, copy.deepcopy(policy), ref_model=copy.deepcopy(reference), beta=0.3,
                  **KINDS["dpo"])  # fmt: skip
    results = []
    for t in (dpo, own):
        loss = t.compute_loss(t.model, t.data_collator([t.train_dataset[i] for i in range(4)]))
        loss.backward()
        results.append(loss.item())
    assert results[0] == pytest.approx(results[1], abs=1e-6) and abs(results[0] - math.log(2)) > 1e-3
    for (name, one), other in zip(dpo.model.named_parameters(), own.model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-7, msg=name)
    losses = []
    for cached in (False, True):
        t = trainer(tmp_path, tokenizer, copy.deepcopy(policy), precompute_ref_logps=cached,
                    ref_cache_dir=str(tmp_path / "cache"), max_steps=3, **KINDS["dpo"])  # fmt: skip
        t.train()
        losses.append([log["loss"] for log in t.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_micro_batches_do_not_change_the_gradients_of_policy_and_head(tmp_path, tokenizer):
    found, data = [], pairs(9)[:8]
    for batch, accumulation in ((8, 1), (2, 4)):
        seen = {}

        class Grab(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, seen=seen, **_):
                seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        trainer(
            tmp_path, tokenizer, data=data, ref_model=tiny_llama(len(tokenizer), seed=9), callbacks=[Grab()],
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=1,
            independent=True, reward_l1=0.01, kl_l1=0.02,
        ).train()  # fmt: skip
        found.append(seen)
    heads = [name for name in found[0] if "mask_heads" in name]
    assert len(heads) == 10 and all(found[0][name].abs().max() > 1e-6 for name in heads)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_head_moves_with_its_own_learning_rate_and_the_reference_stays(tmp_path, tokenizer, adapter):
    kwargs = {"peft_config": LoraConfig(**LORA)} if adapter else {}
    moved = {}
    for rate in (None, 0.0):
        t = trainer(tmp_path, tokenizer, mask_learning_rate=rate, mask_weight_decay=0.0, **kwargs)
        before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
        reference = copy.deepcopy(t.reference.model.state_dict()) if not adapter else {}
        t.train()
        moved[rate] = {n for n, p in t.model.named_parameters() if not torch.equal(p, before[n])}
        if not adapter:
            assert all(torch.equal(v, reference[n]) for n, v in t.reference.model.state_dict().items())
            assert not any("mask_heads" in n for n in reference)
    heads = {n for n in before if "mask_heads" in n}
    assert len(heads) == 5 and heads <= moved[None] and not heads & moved[0.0]
    expected = {n for n in before if "lora" in n} if adapter else set(before) - heads
    assert moved[0.0] == expected


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_saved_policy_is_plain_and_the_masks_lie_beside_it(tmp_path, tokenizer, adapter, caplog):
    base = tiny_llama(len(tokenizer))
    base.save_pretrained(tmp_path / "base")
    kwargs = {"peft_config": LoraConfig(**LORA)} if adapter else {}
    t = trainer(tmp_path / "out", tokenizer, model=base, **kwargs)
    t.train()
    t.save_model()
    file = "adapter_model.safetensors" if adapter else "model.safetensors"
    assert not any("mask" in name for name in load_file(tmp_path / "out" / file))
    ids = tokenizer("the cat sat on ", return_tensors="pt").input_ids
    t.model.eval()
    expected = t.model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    caplog.clear()
    if adapter:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(plain, str(tmp_path / "out"))
    else:
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "mask" not in caplog.text
    assert torch.equal(loaded.generate(input_ids=ids, max_new_tokens=8, do_sample=False), expected)
    states = torch.randn(2, 5, 32)
    assert torch.equal(MaskHeads.load(tmp_path / "out")(states)["common"], t.mask_heads(states)["common"])


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, tokenizer, adapter, caplog):
    def run(folder, **more):
        kwargs = {"peft_config": LoraConfig(**LORA)} if adapter else {}
        return trainer(folder, tokenizer, max_steps=4, save_strategy="steps", save_steps=2,
                       lr_scheduler_type="linear", **{"independent": True, **kwargs, **more})  # fmt: skip

    whole = run(tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    caplog.clear()
    again = run(tmp_path / "cut")
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert "missing keys" not in caplog.text
    expected = dict(whole.model.named_parameters())
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, again)]
    assert losses[0] == losses[1]
    state = json.loads((tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").read_text())
    assert "mask_sparsity/kl_rejected" in state["log_history"][-1]
    with pytest.raises(ValueError, match="independent"):
        run(tmp_path / "cut", independent=False).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_the_best_checkpoint_brings_its_masks(tmp_path, tokenizer):
    t = trainer(tmp_path, tokenizer, max_steps=4, save_strategy="steps", eval_strategy="steps", save_steps=1,
                eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_kl/chosen",
                greater_is_better=False)  # fmt: skip
    t.train()
    assert t.state.best_model_checkpoint.endswith("checkpoint-1")  # the KL only grows
    states = torch.randn(2, 5, 32)
    best = MaskHeads.load(t.state.best_model_checkpoint)
    assert torch.equal(best(states)["common"], t.mask_heads(states)["common"])


def test_metrics_are_those_of_the_terms(tmp_path, tokenizer):
    t = trainer(tmp_path, tokenizer, ref_model=tiny_llama(len(tokenizer), seed=9), independent=True, beta=0.7)
    batch = t.data_collator([t.train_dataset[i] for i in range(4)])
    t.model.eval()
    with torch.no_grad():
        reference = t._reference_forward(t.model, batch)
        policy = t.policy_forward(t.model, batch, reference)
        losses, metrics = t.loss(batch, policy, reference)
        terms = t.token_terms(batch, policy, reference)
    # rewards/margins is z, so the loss follows from it
    torch.testing.assert_close(torch.nn.functional.softplus(-metrics["rewards/margins"]), losses)
    best = batch["scores"].argmax(-1)
    rows = torch.arange(4)
    torch.testing.assert_close(metrics["kl/chosen"], terms["kls"].sum(-1)[rows, best])
    torch.testing.assert_close(metrics["masked_kl/chosen"], (terms["kls"] * terms["kl_mask"]).sum(-1)[rows, best])
    mask, tokens = terms["reward_mask"][rows, best], batch["response_mask"][rows, best]
    torch.testing.assert_close(metrics["mask_mean/reward_chosen"], (mask * tokens).sum(-1) / tokens.sum(-1))
    zeros = ((mask == 0) & tokens).sum(-1) / tokens.sum(-1)
    torch.testing.assert_close(metrics["mask_sparsity/reward_chosen"], 100 * zeros)
    plain = 0.7 * terms["logratios"].sum(-1)
    expected = plain[rows, best] - plain[rows, 1 - best]
    torch.testing.assert_close(metrics["dpo_rewards/margins"], expected)


def test_a_dead_mask_is_called_dead(tmp_path, tokenizer, caplog):
    t = trainer(tmp_path, tokenizer, max_steps=1)
    with torch.no_grad():
        t.mask_heads.heads["common"].mixer.fill_(-1.0)
    t.train()
    assert "since the last log" in caplog.text
    caplog.clear()
    trainer(tmp_path, tokenizer, max_steps=1).train()
    assert "mask is 0" not in caplog.text


@pytest.mark.parametrize(
    "options, sparsity, told",
    [
        ({"reward_l1": 0.01}, (0.9, 1.0), ["reward (0.95)"]),
        ({"reward_l1": 0.01, "independent": True, "kl_l1": 0.01}, (0.0, 0.5), ["reward (0.25)", "kl (0.25)"]),
        ({"mask_init": "released"}, (0.0, 0.0), ["reward (0)", "kl (0)"]),
        ({"reward_l1": 0.01}, (0.9, 1.2), []),
        ({}, (0.0, 0.0), []),  # a dense start without a penalty is meant to be dense
    ],
    ids=str,
)
def test_a_mask_that_stays_dense_against_what_was_asked_is_called_so_once(
    tmp_path, tokenizer, caplog, options, sparsity, told
):
    t = trainer(tmp_path, tokenizer, **options)
    logs = {}
    for name in ("reward", "kl"):
        for side, value in zip(("chosen", "rejected"), sparsity, strict=True):
            logs |= {f"mask_mean/{name}_{side}": 0.5, f"mask_sparsity/{name}_{side}": value}
    for step in (99, 100, 200):
        t.state.global_step = step
        t.log(dict(logs))
        warned = [record.args for record in caplog.records if "asks for zeros" in record.message]
        assert [f"{name} ({value:.2g})" for name, value, _ in warned] == (told if step > 99 else [])
        assert all(at == 100 for *_, at in warned)
    t.log({"eval_loss": 0.5})


def test_ranked_responses_and_gradient_checkpointing(tmp_path, tokenizer):
    data = [row for row in rows(9) if len(set(row["scores"])) > 1]
    for ranking in ("best_worst", "plackett_luce"):
        for adapter in (None, LoraConfig(**LORA)):
            t = trainer(tmp_path, tokenizer, data=data, ranking=ranking, gradient_checkpointing=True,
                        peft_config=adapter)  # fmt: skip
            t.train()
            assert t.evaluate()["eval_rewards/margins"] > 0


def test_which_models_and_references_can_be_used(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="vocabulary"):
        trainer(tmp_path, tokenizer, ref_model=tiny_llama(len(tokenizer) + 3))
    with pytest.raises(ValueError, match="optimizers"):
        model = tiny_llama(len(tokenizer))
        trainer(tmp_path, tokenizer, model=model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))
    adapter = {**LORA, "target_modules": ["q_proj", "lm_head"]}
    with pytest.raises(ValueError, match="LM head"):
        model = get_peft_model(tiny_llama(len(tokenizer)), LoraConfig(**adapter, init_lora_weights=False))
        trainer(tmp_path, tokenizer, model=model)
    trainer(tmp_path, tokenizer, peft_config=LoraConfig(**adapter)).train()  # a fresh one can be switched off
    # A reference of another size gives the masks.
    t = trainer(tmp_path, tokenizer, ref_model=tiny_llama(len(tokenizer), hidden_size=48, num_hidden_layers=3))
    assert t.mask_heads.heads["common"].weight.shape == (3, 48)
    t.train()
