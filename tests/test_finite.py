"""A loss that is not finite ends the run, and says where."""

import pytest
import torch

from helpers import tiny_llama
from test_trainer import rows, trainer


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_the_step_and_the_rows_are_named_and_no_weight_is_touched(tmp_path, tokenizer, wrong):
    data = rows()
    data[5]["prompt"] = "a very bad row "
    t = trainer(tmp_path, tokenizer, data=data, max_steps=4)
    before, loss = [], t.loss

    def lose(batch, policy, reference):
        losses, metrics = loss(batch, policy, reference)
        bad = [tokenizer.decode(ids).count("very bad") > 0 for ids in batch["prompt_ids"]]
        before.append({name: p.detach().clone() for name, p in t.model.named_parameters()})
        return losses + torch.tensor([wrong if b else 0.0 for b in bad]), metrics

    t.loss = lose
    with pytest.raises(FloatingPointError, match=r"1 of 4 prompts is not finite.*'.*a very bad row ?'") as error:
        t.train()
    step = t.state.global_step
    assert f"loss of step {step + 1} is {wrong}" in str(error.value) and f"those of step {step}" in str(error.value)
    assert len(before) == step + 1
    for name, parameter in t.model.named_parameters():
        assert torch.equal(parameter, before[-1][name]) and parameter.isfinite().all()


@pytest.mark.parametrize("layout", ["rows", "shared", "auto"])
def test_weights_that_are_not_finite_are_not_blamed_on_the_layout(tmp_path, tokenizer, layout):
    model = tiny_llama(len(tokenizer))
    model.model.norm.weight.data[3] = float("nan")
    t = trainer(tmp_path, tokenizer, model=model, eval_data=rows(4), layout=layout)
    for run in (t.train, trainer(tmp_path, tokenizer, model=model, eval_data=rows(4), layout=layout).evaluate):
        with pytest.raises(FloatingPointError, match="first batch are not finite: the weights hold NaN"):
            run()


@pytest.mark.parametrize("prompts", [1, 4])
def test_an_evaluation_loss_that_is_not_finite_is_never_the_best(tmp_path, tokenizer, prompts):
    """As docs/distributed.md says: it is logged as it is, ends nothing, and is no best checkpoint."""
    fields = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3,
              "load_best_model_at_end": True}  # fmt: skip
    t = trainer(tmp_path, tokenizer, eval_data=rows(4), **fields)
    loss = t.loss

    def lose(batch, policy, reference):
        losses, metrics = loss(batch, policy, reference)
        if not t.model.training and t.state.global_step != 2:
            losses = losses.masked_fill(torch.arange(len(losses)) < prompts, torch.nan)
        return losses, metrics

    t.loss = lose
    t.train()
    found = [log["eval_loss"] for log in t.state.log_history if "eval_loss" in log]
    assert [value == value for value in found] == [False, True, False]
    assert t.state.best_model_checkpoint.endswith("checkpoint-2")
