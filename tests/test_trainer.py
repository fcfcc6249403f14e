"""The whole stack, from rows to a step: closed forms, equivalences, what is trained and what is saved."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TrainerCallback, pipeline

from helpers import tiny_llama
from trainers import PreferenceConfig, SWEPOTrainer
from trainers.forward.run import LayoutError

WORDS = "the cat sat on a mat and saw the sun rise over an old green hill by the sea".split()
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def rows(n=8, seed=0):
    """Ragged K from 2 to 5, ragged lengths, one row without a signal."""
    generator = torch.Generator().manual_seed(seed)

    def text(low, high):
        count = int(torch.randint(low, high, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator))

    out = []
    for i in range(n):
        k = 2 + i % 4
        scores = [float(s) for s in torch.randperm(7, generator=generator)[:k]]
        prompt = text(3, 9) + " "
        responses = [text(1, 9) for _ in range(k)]
        out.append({"prompt": prompt, "responses": responses, "scores": [1.0] * k if i == 3 else scores})
    return out


def signal_rows(n=8):
    return [row for row in rows(n) if len(set(row["scores"])) > 1]


def config(tmp_path, cls=SWEPOTrainer, **kwargs):
    defaults = {
        "output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "learning_rate": 1e-2, "max_steps": 2,
        "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optim": "sgd",
    }  # fmt: skip
    return cls.config_class(**{**defaults, **kwargs})


def trainer(tmp_path, tokenizer, model=None, data=None, eval_data=None, cls=SWEPOTrainer, **kwargs):
    arguments = ("peft_config", "ref_model", "compute_metrics", "callbacks", "optimizers", "data_collator")
    extra = {name: kwargs.pop(name) for name in arguments if name in kwargs}
    data, eval_data = Dataset.from_list(data or rows()), Dataset.from_list(eval_data) if eval_data else None
    return cls(
        model or tiny_llama(len(tokenizer)), args=config(tmp_path, cls, **kwargs), train_dataset=data,
        eval_dataset=eval_data, processing_class=tokenizer, **extra,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["rows", "shared"])
@pytest.mark.parametrize("kind", ["full", "lora", "pretrained"])
def test_step_zero_is_the_closed_form(tmp_path, tokenizer, kind, layout):
    kwargs = {"layout": layout, "weighting": "none"}
    model = tiny_llama(len(tokenizer), attention_dropout=0.5)  # dropout must be off in policy and reference
    if kind == "lora":
        kwargs["peft_config"] = LoraConfig(**LORA, lora_dropout=0.5)
    if kind == "pretrained":
        torch.manual_seed(5)
        model = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))
    data = signal_rows()
    t = trainer(tmp_path, tokenizer, model=model, data=data, eval_data=data, **kwargs)
    expected = sum(
        math.log(len(s) / sum(x > sum(s) / len(s) for x in s)) for s in (row["scores"] for row in data)
    ) / len(data)
    metrics = t.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert metrics["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)
    own, before = t.reference.model, copy.deepcopy(t.model.state_dict(keep_vars=True))
    frozen = {} if own is None else copy.deepcopy(own.state_dict())
    t.train()
    moved = {name for name, p in t.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if kind == "full" or "lora" in name and ".default." in name}
    assert bool(frozen) == (kind == "full") and all(torch.equal(own.get_parameter(n), p) for n, p in frozen.items())
    after = t.evaluate()
    assert abs(after["eval_loss"] - expected) > 1e-4 and abs(after["eval_rewards/margins"]) > 1e-5


def logged(t, name="loss"):
    """A metric of each step."""
    return [log[name] for log in t.state.log_history if name in log]


class Grab(TrainerCallback):
    """Takes the gradients of the last optimiser step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_step(tmp_path, tokenizer, model=None, **kwargs):
    """Gradients of one optimiser step, by default over all eight rows, and the trainer that made it."""
    grab, options = Grab(), {"max_steps": 1, "per_device_train_batch_size": 8} | kwargs
    t = trainer(tmp_path, tokenizer, model, callbacks=[grab], **options)
    t.train()
    return grab.gradients, t


@pytest.mark.parametrize("layout, sft_weight", [("rows", 0.0), ("shared", 0.3)])
def test_micro_batches_do_not_change_the_gradients(tmp_path, tokenizer, layout, sft_weight):
    fields = {"layout": layout, "sft_weight": sft_weight}
    whole, t = one_step(tmp_path, tokenizer, **fields)
    loss = logged(t)
    assert max(g.abs().max() for g in whole.values()) > 1e-4
    for batch, accumulation in ((2, 4), (1, 8), (4, 2)):
        size = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        parts, t = one_step(tmp_path, tokenizer, **size, **fields)
        assert logged(t) == pytest.approx(loss, rel=1e-5)
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_weight_column_is_a_weighted_mean_and_zero_removes_a_row(tmp_path, tokenizer):
    data = rows()
    weighted = [row | {"weight": 0.0 if i in (1, 5) else 2.0} for i, row in enumerate(data)]
    kept = [row for i, row in enumerate(data) if i not in (1, 5)]
    model = tiny_llama(len(tokenizer))
    losses = []
    for part in (weighted, kept):
        models = {"model": copy.deepcopy(model), "ref_model": tiny_llama(len(tokenizer), seed=9)}
        losses.append(trainer(tmp_path, tokenizer, eval_data=part, **models).evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_eval_loss_is_a_mean_over_prompts_whatever_the_batch_size(tmp_path, tokenizer):
    reference = tiny_llama(len(tokenizer), seed=9)
    found = []
    for batch in (1, 3, 8):
        options = {"ref_model": copy.deepcopy(reference), "per_device_eval_batch_size": batch}
        t = trainer(tmp_path, tokenizer, eval_data=rows(7), **options)
        metrics = t.evaluate()
        found.append([metrics[k] for k in ("eval_loss", "eval_rewards/margins", "eval_ranking/pairwise_accuracy")])
        assert metrics["eval_prompts/without_signal"] == pytest.approx(1 / 7)
    torch.testing.assert_close(torch.tensor(found[1:]), torch.tensor(found[:1] * 2), rtol=1e-5, atol=1e-6)


def test_saved_model_generates_the_same_text_through_a_pipeline(tmp_path, tokenizer):
    for kind in ("full", "lora"):
        folder = tmp_path / kind
        base = tiny_llama(len(tokenizer))
        base.save_pretrained(tmp_path / "base")
        kwargs = {"peft_config": LoraConfig(**LORA)} if kind == "lora" else {}
        t = trainer(folder, tokenizer, model=base, learning_rate=0.5, **kwargs)
        t.train()
        t.save_model()
        prompt = "the cat sat on "
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        t.model.eval()
        expected = t.model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        if kind == "full":
            loaded = AutoModelForCausalLM.from_pretrained(folder)
        else:
            loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
            loaded = loaded.merge_and_unload()
        pipe = pipeline("text-generation", model=loaded, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu")
        text = pipe(prompt, max_new_tokens=8, do_sample=False, return_full_text=True)[0]["generated_text"]
        assert text == tokenizer.decode(expected[0], skip_special_tokens=True)


def test_a_callback_may_leave_the_model_in_evaluation_mode(tmp_path, tokenizer):
    class Eval(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.eval()

    logs = []
    for callbacks in ([], [Eval()]):
        t = trainer(tmp_path, tokenizer, eval_data=rows(4), eval_strategy="steps", eval_steps=1, callbacks=callbacks)
        t.train()
        timed = ("_runtime", "_per_second")
        logs.append([{n: v for n, v in log.items() if not n.endswith(timed)} for log in t.state.log_history])
    assert logs[0] == logs[1]
    for log in logs[1]:
        assert ("rewards/accuracies" in log, "logps/chosen" in log) == ("loss" in log,) * 2


def test_rows_that_fill_no_batch_are_an_error(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="dataloader_drop_last leaves no batch of the 3 rows"):
        trainer(tmp_path, tokenizer, data=rows(3), dataloader_drop_last=True).train()
    t = trainer(tmp_path, tokenizer, data=rows(4), dataloader_drop_last=True)
    t.train()
    assert t.state.global_step == 2


def test_compute_metrics_sees_sums_scores_and_which_slots_are_real(tmp_path, tokenizer):
    seen = {}

    def metrics(prediction):
        seen["logps"], seen["ref_logps"] = prediction.predictions
        seen["scores"], seen["mask"] = prediction.label_ids
        return {"mine": 1.0}

    data = rows(5)
    t = trainer(tmp_path, tokenizer, eval_data=data, compute_metrics=metrics, per_device_eval_batch_size=2)
    assert t.evaluate()["eval_mine"] == 1.0
    assert seen["scores"].shape == seen["logps"].shape == (5, 5)
    for i, row in enumerate(data):
        k = len(row["scores"])
        assert seen["scores"][i, :k].tolist() == row["scores"]
        assert (seen["mask"][i, :k] == 1).all() and (seen["mask"][i, k:] != 1).all()
        assert (seen["logps"][i, :k] < -1).all()


def test_a_model_with_logits_of_its_own_kind_is_refused_on_the_first_batch(tmp_path, tokenizer, monkeypatch):
    original = LlamaForCausalLM.forward

    def forward(self, *args, **kwargs):  # scales its logits where the config does not say so
        out = original(self, *args, **kwargs)
        out.logits = out.logits * 3
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(LayoutError, match="own logits"):
        trainer(tmp_path, tokenizer, layout="rows").train()


def test_wrong_arguments_say_the_fix(tmp_path, tokenizer):
    model, data = tiny_llama(len(tokenizer)), Dataset.from_list(rows())
    fine = {"args": config(tmp_path), "train_dataset": data, "processing_class": tokenizer}
    for wrong, fix in (
        ({"ref_model": model}, "omit ref_model"),
        ({"args": PreferenceConfig(output_dir=str(tmp_path))}, "SWEPOConfig"),
        ({"processing_class": None}, "processing_class"),
        ({"train_dataset": rows()}, "from_list"),
    ):
        with pytest.raises(ValueError, match=fix):
            SWEPOTrainer(model, **fine | wrong)
    eager = tiny_llama(len(tokenizer))
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="shared"):
        trainer(tmp_path, tokenizer, model=eager, layout="shared")


@pytest.mark.parametrize("layout", ["rows", "auto"])
def test_the_first_batch_is_checked_without_dropout_and_nothing_else_is(tmp_path, tokenizer, layout):
    """The check would fail by what dropout removes; training must go on with it, and with checkpointing."""
    found = []
    for dropout in (0.0, 0.3):
        model = tiny_llama(len(tokenizer), attention_dropout=dropout)
        t = trainer(
            tmp_path, tokenizer, model=model, disable_dropout=False, gradient_checkpointing=True, layout=layout
        )
        t.train()
        found.append(logged(t))
        assert all(module.training for module in t.model.modules()) and t.model.is_gradient_checkpointing
    assert found[0] != pytest.approx(found[1], abs=1e-4)


def test_an_untrained_policy_is_evaluated_in_the_precision_of_the_reference(tmp_path, tokenizer):
    metrics = trainer(tmp_path, tokenizer, eval_data=rows(), bf16=True).evaluate()
    assert metrics["eval_rewards/chosen"] == 0 and metrics["eval_rewards/margins"] == 0
