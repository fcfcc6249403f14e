"""A reference that follows the policy, one that is an adapter by name, and what callbacks see of it."""

import copy
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import DPOConfig, SyncRefModelCallback
from trl import DPOTrainer as TRLsDPOTrainer

from helpers import tiny_llama
from test_reference import KINDS, Stop, loaded, predicted
from test_trainer import LORA, logged, signal_rows, trainer
from trainers import DPOTrainer, EMDPOTrainer, RRHFTrainer, SGPOTrainer, SparsePOTrainer
from trainers.forward.identity import adapter_weights
from trainers.forward.reference import REFERENCE
from trainers.runs.checkpoints import last_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6}


def pairs():
    return [
        {"prompt": row["prompt"], "chosen": row["responses"][0], "rejected": row["responses"][1]}
        for row in signal_rows(6)
    ]


def adapter_copies(model, adapter):
    return {place: weight.detach().clone() for place, weight in adapter_weights(model, adapter).items()}


class Weights(TrainerCallback):
    """The weights of the adapter in training after each step."""

    def __init__(self):
        self.found = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.found.append(adapter_copies(model, model.active_adapter))


def mixed(weights, start, alpha, steps):
    """What the reference should be: a mixture after every so many steps."""
    for i, now in enumerate(weights, start=1):
        if i % steps == 0:
            start = {name: (1 - alpha) * start[name] + alpha * now[name] for name in start}
    return start


@pytest.mark.parametrize("how", ["option", "TRL's callback"])
def test_losses_are_those_of_trl_across_mixtures(tmp_path, tokenizer, how):
    common = {
        "output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 2, "seed": 4,
        "max_steps": 7, "logging_steps": 1, "learning_rate": 0.01, "optim": "sgd", "bf16": False, "beta": 0.3,
        "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    ours = DPOTrainer.config_class(**common, **SYNC | {"sync_ref_model": how == "option"})
    found = []
    for cls, args in ((TRLsDPOTrainer, DPOConfig(**common, **SYNC)), (DPOTrainer, ours)):
        t = cls(
            tiny_llama(len(tokenizer)), ref_model=tiny_llama(len(tokenizer)), args=args,
            train_dataset=Dataset.from_list(pairs()), processing_class=tokenizer,
        )  # fmt: skip
        if cls is DPOTrainer and how != "option":
            t.add_callback(SyncRefModelCallback(ref_model=t.ref_model, accelerator=t.accelerator))
        t.train()
        found.append((logged(t), t.ref_model.state_dict()))
    (theirs, their_reference), (ours, our_reference) = found
    assert ours == pytest.approx(theirs, abs=1e-5) and max(theirs) - min(theirs) > 0.02
    for name, weight in their_reference.items():
        torch.testing.assert_close(our_reference[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    fixed = DPOTrainer(
        tiny_llama(len(tokenizer)), args=DPOTrainer.config_class(**common),
        train_dataset=Dataset.from_list(pairs()), processing_class=tokenizer,
    )  # fmt: skip
    fixed.train()
    assert logged(fixed)[:2] == pytest.approx(theirs[:2], abs=1e-5)
    assert all(abs(a - b) > 1e-3 for a, b in zip(logged(fixed)[2:], theirs[2:], strict=True))


@pytest.mark.parametrize("kind", [*(k for k in KINDS if k != "adalora"), "by name"])  # adalora's first steps are tiny
def test_an_adapter_is_mixed_weight_by_weight_into_the_reference(adapters, tokenizer, kind):
    fields, weights = {"peft_config": copy.deepcopy(KINDS.get(kind))}, Weights()
    if kind == "by name":
        model = loaded(adapters, tokenizer, policy="first", sft="first")
        with torch.no_grad():
            for weight in adapter_weights(model, "sft").values():
                weight.mul_(1.2)
        fields = {"model": model, "ref_model": "sft"}
    t = trainer(adapters, tokenizer, cls=DPOTrainer, data=signal_rows(5), learning_rate=0.3, max_steps=5,
                callbacks=[weights], **fields, **SYNC)  # fmt: skip
    start = adapter_copies(t.model, t.reference.adapter)
    at_start = t.evaluate(t.train_dataset)["eval_loss"]
    assert (at_start == pytest.approx(math.log(2), abs=1e-6)) == (kind != "by name")
    t.train()
    kept, expected = adapter_weights(t.model, t.reference.adapter), mixed(weights.found, start, 0.6, 2)
    assert kept.keys() == expected.keys() and not any(weight.requires_grad for weight in kept.values())
    for place, value in expected.items():
        torch.testing.assert_close(kept[place], value, rtol=1e-5, atol=1e-6, msg=place)
    assert max(float((value - start[place]).abs().max()) for place, value in expected.items()) > 1e-3


@pytest.mark.parametrize("cls, options", [
    (DPOTrainer, {}), (SGPOTrainer, {}), (SparsePOTrainer, {"mask": "ones", "kl_term": "none"}),
    (DPOTrainer, {"peft_config": LoraConfig(**LORA)}), (DPOTrainer, {"peft_config": KINDS["adalora"]}),
])  # fmt: skip
def test_a_reference_that_is_the_policy_at_every_step_keeps_the_loss_at_ln_2(tmp_path, tokenizer, cls, options):
    found = []
    for alpha in (1.0, 0.5):
        sync = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": alpha}
        t = trainer(tmp_path, tokenizer, cls=cls, data=signal_rows(6), learning_rate=0.3, max_steps=4, **sync,
                    **copy.deepcopy(options))  # fmt: skip
        t.train()
        policy, reference = predicted(t)
        found.append((logged(t), torch.equal(policy, reference)))
    (whole, same), (half, other) = found
    assert whole == pytest.approx([math.log(2)] * 4, abs=1e-6) and same
    assert not other and (options.get("peft_config") is KINDS["adalora"] or abs(half[-1] - math.log(2)) > 1e-3)


# Going on.


@pytest.mark.parametrize("kind", ["full", "lora", "pretrained", "TRL's callback"])
def test_a_run_that_goes_on_has_the_reference_that_it_had(adapters, tokenizer, kind):
    def run(folder, *callbacks, resume=None):
        fields = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6, "learning_rate": 0.1, **SYNC}
        fields |= {"ref_model_sync_steps": 3, "sync_ref_model": kind != "TRL's callback"}
        fields |= {"peft_config": LoraConfig(**LORA)} if kind == "lora" else {}
        fields |= {"model": loaded(adapters, tokenizer, default="first")} if kind == "pretrained" else {}
        t = trainer(
            adapters / folder, tokenizer, cls=DPOTrainer, data=signal_rows(6), callbacks=[*callbacks], **fields
        )
        if kind == "TRL's callback":
            t.add_callback(SyncRefModelCallback(ref_model=t.ref_model, accelerator=t.accelerator))
        start = predicted(t)[1]
        t.train(resume_from_checkpoint=resume)
        return logged(t), *predicted(t), start

    whole, again = run("whole"), run("again", Stop(4)) and run("again", resume=True)
    assert again[0] == whole[0] and len(whole[0]) == 6
    assert torch.equal(again[1], whole[1]) and torch.equal(again[2], whole[2])
    assert (whole[2] - whole[3]).abs().max() > 1e-3
    [path] = (adapters / "again" / "checkpoint-4").glob(REFERENCE)
    assert len(load_file(path)) > 3
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="checkpoint-4 is not a whole checkpoint"):
        run("again", resume=str(path.parents[1]))
    path.unlink()
    assert last_checkpoint(adapters / "again").endswith("checkpoint-6")
    shutil.rmtree(adapters / "again" / "checkpoint-6")
    assert last_checkpoint(adapters / "again") is None


@pytest.mark.parametrize("named", [False, True])
def test_the_best_checkpoint_is_evaluated_against_its_own_reference(adapters, tokenizer, named):
    fields = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6,
              "load_best_model_at_end": True, "metric_for_best_model": "eval_logps/chosen", "learning_rate": 0.1,
              "greater_is_better": False}  # fmt: skip
    if named:  # as on the page of the reference
        fields |= {"model": loaded(adapters, tokenizer, policy="first", sft="first"), "ref_model": "sft"}
    t = trainer(adapters / "out", tokenizer, cls=DPOTrainer, data=signal_rows(6), eval_data=signal_rows(6), **fields,
                **SYNC | {"ref_model_sync_steps": 1})  # fmt: skip
    t.train()
    best = int(t.state.best_model_checkpoint.rpartition("-")[2])
    evaluated = next(log for log in t.state.log_history if "eval_loss" in log and log["step"] == best)
    assert best < 6
    assert t.evaluate()["eval_loss"] == pytest.approx(evaluated["eval_loss"], abs=1e-7)


# What is refused.


@pytest.mark.parametrize("cls, options, message", [
    (DPOTrainer, {"precompute_ref_logps": True}, "sync_ref_model=True changes .* precompute_ref_logps keeps"),
    (RRHFTrainer, {}, "sync_ref_model has no effect: RRHF needs no reference"),
    (EMDPOTrainer, {}, "sync_ref_model does not work with EM-DPO"),
    (SparsePOTrainer, {}, "sync_ref_model does not reach what mask and KL keep of the reference"),
])  # fmt: skip
def test_what_cannot_follow_says_so(tmp_path, tokenizer, cls, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, tokenizer, cls=cls, **SYNC | options)


def test_a_reference_of_other_weights_cannot_follow(adapters, tokenizer):
    small = tiny_llama(len(tokenizer), num_hidden_layers=1)
    large = tiny_llama(len(tokenizer), num_hidden_layers=3)
    for options, message in (
        ({"ref_model": large}, "9 are not in both, such as model.layers.2.input_layernorm.weight: leave out"),
        (
            {
                "ref_model": tiny_llama(len(tokenizer), tie_word_embeddings=False),
                "model": tiny_llama(len(tokenizer), tie_word_embeddings=True),
            },
            "1 are not in both, such as lm_head.weight: leave out",
        ),
        ({"ref_model": small}, "9 are not in both, such as model.layers.1.input_layernorm.weight: leave out"),
        ({"ref_model": tiny_llama(len(tokenizer), intermediate_size=48)}, r"mlp.gate_proj.weight is \(48, 32\) there"),
        ({"ref_model": tiny_llama(len(tokenizer)), "peft_config": LoraConfig(**LORA)}, "are not in both, .*lora_A"),
        (
            {"model": loaded(adapters, tokenizer, policy="first", reference="second")},
            "the adapter has r 8 there, not 4",
        ),
    ):
        with pytest.raises(ValueError, match=f"sync_ref_model mixes .*{message}"):
            trainer(adapters, tokenizer, **SYNC, **options)


@pytest.mark.parametrize("other, message", [
    ({"lora_alpha": 32}, "the adapter has lora_alpha 32 there, not 8: leave out ref_model"),
    ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "4 are not in both, such as .*k_proj.lora_A"),
])  # fmt: skip
def test_an_adapter_whose_weights_count_otherwise_cannot_follow(tmp_path, tokenizer, other, message):
    """Mixed to the last bit with a share of 1, it would still be another policy."""
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    model = get_peft_model(tiny_llama(len(tokenizer)), LoraConfig(**fields))
    model.add_adapter("sft", LoraConfig(**fields | other))
    with pytest.raises(ValueError, match=f"sync_ref_model mixes .*{message}"):
        trainer(tmp_path, tokenizer, model=model, ref_model="sft", **SYNC)


# An adapter by its name.


@pytest.mark.parametrize("name, message", [
    ("policy", "ref_model='policy' is the adapter in training: omit ref_model"),
    ("stf", r"ref_model='stf' is no adapter of the model \(policy, sft\), and no model that can be loaded"),
])  # fmt: skip
def test_a_wrong_name_of_an_adapter_is_an_error(adapters, tokenizer, name, message):
    model = loaded(adapters, tokenizer, policy="first", sft="second")
    with pytest.raises(ValueError, match=message):
        trainer(adapters, tokenizer, model=model, ref_model=name)


def test_the_examples_of_the_page_run(tmp_path, tokenizer):
    """As they stand there, but for the model, the data and the size."""
    model = tiny_llama(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    get_peft_model(tiny_llama(len(tokenizer)), KINDS["random"]).save_pretrained(tmp_path / "runs/sft")
    Dataset.from_list(pairs()).to_json(tmp_path / "pairs.jsonl")
    here = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": f"{tmp_path}/model", '"runs/': f'"{tmp_path}/runs/',
        "trl-lib/ultrafeedback_binarized": f"{tmp_path}/pairs.jsonl", "sync_steps=64": "sync_steps=1",
        "output_dir=": 'max_steps=3, save_strategy="no", report_to="none", use_cpu=True, bf16=False, output_dir=',
    }  # fmt: skip
    scope = {}
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs/reference.md").read_text(), flags=re.S)
    for script in examples:
        for name, ours in here.items():
            script = script.replace(name, ours)
        exec(compile(script, "reference.md", "exec"), scope)
    assert len(examples) == 2 and logged(scope["trainer"])[0] == pytest.approx(math.log(2), abs=1e-6)


def test_ref_model_is_the_models_own_one_or_none(tmp_path, tokenizer):
    full = trainer(tmp_path, tokenizer)
    assert full.ref_model is full.reference.model and full.ref_model is not full.model
    assert trainer(tmp_path, tokenizer, peft_config=LoraConfig(**LORA)).ref_model is None
    assert trainer(tmp_path, tokenizer, cls=RRHFTrainer).ref_model is None
