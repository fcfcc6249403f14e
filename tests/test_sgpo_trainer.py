"""The two trainings of SGPO on tiny models: the improver's loss on the answer only, and the DPO stage."""

import copy
import json

import pytest
import torch
from datasets import Dataset

from helpers import family_tokenizer, tiny_llama
from trainers.sgpo import SGPOTrainer
from trainers.sgpo.config import SGPOConfig
from trainers.sgpo.improver import fits, sft_config, sft_rows, train_sft
from trainers.sgpo.text import improver_prompt

LN_2 = 0.6931472


def user(text):
    return [{"role": "user", "content": text}]


EXAMPLES = [
    (improver_prompt(user("where is the dog"), "over"), "it is in Paris"),
    (improver_prompt(user("a"), "b"), "the lazy dog sleeps a day"),
    (improver_prompt(user("how was it"), "bad"), "kind"),
    (user("say something"), "the quick fox"),
]
GUARD = [(user(text), "it rains") for text in ("where is the dog", "a", "how was it", "say something")]


def config(folder, **changes):
    options = {"use_cpu": True, "report_to": "none", "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no",
               "learning_rate": 0.01, "max_steps": 2, "per_device_train_batch_size": 2, "seed": 1}  # fmt: skip
    return SGPOConfig(output_dir=str(folder), **options | changes)


def token_mean(model, tokenizer, examples):
    """Mean negative log-likelihood over the answer tokens of all examples, from the model's own logits."""
    total, count = 0.0, 0
    for ids, labels in zip(*sft_rows(examples, tokenizer).values(), strict=True):
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        learned = [i for i, label in enumerate(labels) if label != -100]
        total -= sum(float(logps[i - 1, ids[i]]) for i in learned)
        count += len(learned)
    return total / count


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_improver_learns_from_the_answers_alone(tmp_path, weight, steps):
    """The loss of the first step is the mean over the answer tokens, plus the guard's, also when accumulated."""
    tokenizer = family_tokenizer("llama3")
    model = tiny_llama(len(tokenizer), max_position_embeddings=2048)
    expected = token_mean(model, tokenizer, EXAMPLES) + weight * token_mean(model, tokenizer, GUARD)
    before = copy.deepcopy(model.state_dict())
    args = config(tmp_path, max_steps=1, per_device_train_batch_size=4 // steps, gradient_accumulation_steps=steps)
    options = sft_config(args, {"learning_rate": 0.02}, tmp_path, 1)
    train_sft(model, tokenizer, options, EXAMPLES, policy_examples=GUARD, policy_weight=weight)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["log_history"][0]["loss"] == pytest.approx(expected, rel=1e-4)
    steps_taken = [(tensor - before[name]).abs().max() for name, tensor in model.state_dict().items()]
    assert 0.015 < max(steps_taken) < 0.021  # one Adam step at the stage's own learning rate
    with pytest.raises(ValueError, match="^seed cannot be set for one stage alone"):
        sft_config(args, {"seed": 3}, tmp_path, 1)


def test_what_is_too_long_is_left_out_and_never_cut():
    tokenizer = family_tokenizer("llama3")
    lengths = [len(ids) for ids in sft_rows(EXAMPLES, tokenizer)["input_ids"]]
    limit = sorted(lengths)[1]
    assert fits(EXAMPLES, tokenizer, limit) == [n <= limit for n in lengths]
    assert fits(EXAMPLES, tokenizer, None) == [True] * 4 and fits([], tokenizer, 5) == []


def pairs():
    responses = [("it is in Paris", "over"), ("kind", "the lazy dog sleeps"), ("a bad day", "it rains")]
    return Dataset.from_list([
        {"prompt": user(f"say something {i}"), "scores": [1.0, 0.0],
         "responses": [[{"role": "assistant", "content": text}] for text in pair]} for i, pair in enumerate(responses)
    ])  # fmt: skip


def dpo_trainer(folder, *, ref_model=None, **changes):
    tokenizer = family_tokenizer("llama3")
    return SGPOTrainer(tiny_llama(len(tokenizer)), ref_model, args=config(folder, **changes), train_dataset=pairs(),
                       processing_class=tokenizer)  # fmt: skip


def test_a_stale_reference_is_found_before_the_first_step(tmp_path):
    trainer = dpo_trainer(tmp_path)
    with torch.no_grad():
        trainer.reference.model.lm_head.weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="the policy differs from its reference by"):
        trainer.train()
    tokenizer = family_tokenizer("llama3")
    trainer = dpo_trainer(tmp_path, ref_model=tiny_llama(len(tokenizer), seed=1), max_steps=1)
    trainer.train()  # a reference of one's own may be any model
    with pytest.raises(ValueError, match="^ref='initial' has no effect without ref_model"):
        dpo_trainer(tmp_path, ref="initial")


def test_a_trained_policy_may_be_trained_again(tmp_path):
    """Step 0 of a second training is not the start, also where the first one went on from a checkpoint."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.3}
    dpo_trainer(tmp_path, **options).train()
    trainer = dpo_trainer(tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2 and abs(losses[0] - LN_2) > 1e-2
