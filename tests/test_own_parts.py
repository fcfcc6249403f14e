"""What users bring with them: collators, metrics, samplers and loaders of their own, on one process."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler, WeightedRandomSampler
from transformers import TrainerCallback

from helpers import tiny_llama
from test_trainer import config, logged, rows, signal_rows, trainer
from trainers import EMDPOTrainer, SWEPOTrainer
from trainers.data import PreferenceCollator

ROOT = Path(__file__).resolve().parents[1]


class ByLength(PreferenceCollator):
    """Prompts with a long first response weigh more."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        return batch | {"weight": batch["response_mask"][:, 0].sum(-1).float()}


@pytest.mark.parametrize("fields", [
    {}, {"max_tokens_per_batch": 300}, {"precompute_ref_logps": True}, {"tokens_per_backward": 30},
    {"dataloader_num_workers": 1},
], ids=lambda fields: next(iter(fields), "plain"))  # fmt: skip
def test_a_collator_that_adds_weights_trains_as_rows_that_hold_them(tmp_path, tokenizer, fields):
    plain = trainer(tmp_path, tokenizer, data=rows(24))
    weights = [float(len(row["response_ids"][0])) for row in plain.train_dataset]
    weighted = [row | {"weight": weight} for row, weight in zip(rows(24), weights, strict=True)]
    fields = {"max_steps": 3, "ref_cache_dir": str(tmp_path / "cache"), "dataloader_pin_memory": False, **fields}
    found = []
    for data, collator in ((weighted, None), (rows(24), ByLength(tokenizer.pad_token_id))):
        t = trainer(tmp_path, tokenizer, data=data, eval_data=data, data_collator=collator, **fields)
        before = t.evaluate()["eval_loss"]
        t.train()
        found.append([before, *logged(t), t.evaluate()["eval_loss"]])
    assert t.data_collator is collator and found[1] == pytest.approx(found[0], abs=1e-6)  # cached values are rounded
    other = trainer(tmp_path, tokenizer, data=rows(24), eval_data=rows(24), **fields)
    other.train()
    assert max(abs(a - b) for a, b in zip(logged(other), found[0][1:-1], strict=True)) > 1e-4


def test_the_reference_is_cached_for_the_rows_and_not_for_what_a_collator_makes_of_them(tmp_path, tokenizer):
    class Shorter(PreferenceCollator):
        def __call__(self, rows):
            return super().__call__([row | {"prompt_ids": row["prompt_ids"][1:]} for row in rows])

    fields = {"precompute_ref_logps": True, "ref_cache_dir": str(tmp_path / "cache"), "data": signal_rows(4)}
    with pytest.raises(ValueError, match="These rows have no cached reference log-probabilities"):
        trainer(tmp_path, tokenizer, data_collator=Shorter(tokenizer.pad_token_id), **fields).train()
    t = trainer(tmp_path, tokenizer, **fields)
    t.train()
    assert t.reference.model is None


def without(name):
    return lambda batch: {k: v for k, v in batch.items() if k != name}


def changed(**changes):
    return lambda batch: batch | {name: change(batch[name]) for name, change in changes.items()}


def left_padded(batch):
    return batch | {name: batch[name].flip(-1) for name in ("prompt_ids", "prompt_mask")}


@pytest.mark.parametrize("change, message", [
    (without("response_mask"), "its batch has no response_mask"),
    (without("weight"), "its batch has no weight"),
    (changed(scores=torch.Tensor.double), r"scores is torch.float64 \(8, 5\), not torch.float32 with 2 dimensions"),
    (changed(mask=torch.Tensor.long), r"mask is torch.int64 \(8, 5\), not torch.bool"),
    (changed(scores=lambda scores: scores[:, :3]), r"scores is \(8, 3\) where other tensors have K = 5"),
    (changed(prompt_ids=lambda ids: ids[:, :-1]), r"prompt_mask is \(8, \d+\) where other tensors have P"),
    (changed(response_ids=lambda ids: ids.flatten(0, 1)), r"response_ids is \(40, \d+\) for 8 rows, not a"),
    (changed(scores=lambda scores: scores.tolist()), "scores is a list for 8 rows, not a tensor"),
    (changed(scores=lambda scores: scores / 0), "scores are not finite where mask is true"),
    (changed(mask=torch.ones_like), "mask must be true where response_mask has a token"),
    (lambda batch: batch | {"names": ["a"] * 8}, "names is a list for 8 rows"),
    (lambda batch: batch | {"step": torch.tensor(3)}, r"step is \(\) for 8 rows"),
    (lambda batch: [*batch.values()], "it gives a list, not a dict of tensors"),
    (changed(weight=lambda weight: weight[:, None]), r"weight is torch.float32 \(8, 1\), not .* with 1 dimensions"),
    (changed(weight=torch.Tensor.neg), "weight must be finite and not negative"),
    (changed(weight=lambda weight: weight / 0), "weight must be finite and not negative"),
    (left_padded, "prompt_mask must be true from the first token .* padding is on the right"),
])  # fmt: skip
def test_a_batch_that_would_train_on_something_else_is_named(tmp_path, tokenizer, change, message):
    plain = PreferenceCollator(tokenizer.pad_token_id)
    data = [row | {"weight": 2.0} for row in rows()]
    with pytest.raises(ValueError, match=f"^data_collator: {message}.*PreferenceCollator"):
        trainer(tmp_path, tokenizer, data=data, data_collator=lambda rows: change(plain(rows)))


def test_a_weight_that_a_collator_adds_has_one_number_for_each_row(tmp_path, tokenizer):
    class Column(PreferenceCollator):
        def __call__(self, rows):
            return super().__call__(rows) | {"weight": torch.arange(1.0, len(rows) + 1)[:, None]}

    collate = Column(tokenizer.pad_token_id)
    with pytest.raises(ValueError, match=r"data_collator: weight is torch.float32 \(8, 1\), not"):
        trainer(tmp_path, tokenizer, data_collator=collate)
    unseen = trainer(tmp_path, tokenizer)
    unseen.data_collator = collate
    with pytest.raises(AssertionError, match=r"weight must be \(B,\), got \(4, 1\)"):
        unseen.train()


def test_em_dpo_takes_no_collator_by_name(tmp_path, tokenizer):
    with pytest.raises(TypeError, match="data_collator"):
        trainer(tmp_path, tokenizer, cls=EMDPOTrainer, data_collator=ByLength(tokenizer.pad_token_id))


def test_metrics_of_the_users_see_each_of_several_data_sets_through_the_users_collator(tmp_path, tokenizer):
    class BestTwo(PreferenceCollator):
        """The best and the worst response of each prompt."""

        def __call__(self, rows):
            def cut(row):
                order = np.argsort(row["scores"])[[-1, 0]]
                return row | {name: [row[name][i] for i in order] for name in ("response_ids", "scores")}

            return super().__call__([cut(row) for row in rows])

    seen = []

    def metrics(prediction):
        (policy, reference), (scores, mask) = prediction.predictions, prediction.label_ids
        seen.append((policy.shape, reference.shape, scores.shape, mask.sum()))
        return {
            "best_first": float((scores[:, 0] >= scores[:, 1]).mean()),
            "drift": float(abs(policy - reference).max()),
        }

    t = trainer(tmp_path, tokenizer, data=rows(), compute_metrics=metrics, per_device_eval_batch_size=2,
                data_collator=BestTwo(tokenizer.pad_token_id))  # fmt: skip
    sets = {"a": Dataset.from_list(rows(5)), "b": Dataset.from_list(signal_rows(3))}
    found = t.evaluate(sets)
    assert seen == [((5, 2), (5, 2), (5, 2), 10), ((3, 2), (3, 2), (3, 2), 6)]
    assert found["eval_a_best_first"] == found["eval_b_best_first"] == 1 and found["eval_a_drift"] < 1e-4
    assert found["eval_a_logps/chosen"] != found["eval_b_logps/chosen"]


def test_the_example_of_the_page_runs(tmp_path, tokenizer):
    """As it stands there, but for the model, the data and the size."""
    text = (ROOT / "docs/python.md").read_text()
    script = re.findall(r"```python\n(.*?)```", text[text.index("## Your own parts") :], flags=re.S)[0]
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    Dataset.from_list(rows(12)).to_json(tmp_path / "rows.jsonl")
    small = 'max_steps=3, save_strategy="no", report_to="none", use_cpu=True, bf16=False, logging_steps=1, output_dir='
    for theirs, ours in {
        '"HuggingFaceTB/SmolLM2-135M-Instruct"': repr(str(tmp_path / "model")),
        '"openbmb/UltraFeedback", data_format="ultrafeedback"': repr(str(tmp_path / "rows.jsonl")),
        'output_dir="runs/': f'{small}"{tmp_path}/', "range(100)": "range(4)",
    }.items():  # fmt: skip
        assert theirs in script
        script = script.replace(theirs, ours)
    scope = {}
    exec(compile(script, "python.md", "exec"), scope)
    t = scope["trainer"]
    assert len(logged(t)) == 3 and 0 <= t.evaluate()["eval_first_is_best"] <= 1
    assert isinstance(t._get_train_sampler(), WeightedRandomSampler)


# Samplers and loaders.


class Drawn(Sampler):
    """Rows in this order."""

    def __init__(self, order):
        self.order = order

    def __iter__(self):
        return iter(self.order)

    def __len__(self):
        return len(self.order)


class Sampled(SWEPOTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return Drawn([6, 1, 1, 4, 0, 5])


class Loaded(SWEPOTrainer):
    def get_train_dataloader(self):
        loader = DataLoader(self.train_dataset, 2, sampler=Drawn([6, 1, 1, 4, 0, 5]), collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


class Seen(TrainerCallback):
    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
        self.length = len(train_dataloader)


@pytest.mark.parametrize("cls", [Sampled, Loaded])
def test_rows_are_those_that_an_own_sampler_draws(tmp_path, tokenizer, cls):
    data, seen = rows(), Seen()
    fields = {"per_device_train_batch_size": 2, "max_steps": -1, "num_train_epochs": 1, "optim": "sgd"}
    t = trainer(tmp_path, tokenizer, cls=cls, data=data, callbacks=[seen], **fields)
    t.train()
    in_order = trainer(tmp_path, tokenizer, data=[data[i] for i in (6, 1, 1, 4, 0, 5)],
                       train_sampling_strategy="sequential", **fields)  # fmt: skip
    in_order.train()
    assert logged(t) == logged(in_order) and len(logged(t)) == seen.length == 3


def test_a_sampler_that_draws_nothing_is_an_error(tmp_path, tokenizer):
    class Empty(SWEPOTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return Drawn([])

    with pytest.raises(ValueError, match="^Empty._get_train_sampler draws no row to train on"):
        trainer(tmp_path, tokenizer, cls=Empty).train()


def test_a_sampler_that_nobody_would_ask_is_an_error(tmp_path, tokenizer):
    t = trainer(tmp_path, tokenizer, cls=Sampled, max_tokens_per_batch=100)
    with pytest.raises(ValueError, match="Sampled._get_train_sampler has no effect on max_tokens_per_batch: "):
        t.train()
    model, stream = tiny_llama(len(tokenizer)), Dataset.from_list(rows()).to_iterable_dataset()
    t = Sampled(model, args=config(tmp_path), train_dataset=stream, processing_class=tokenizer)
    with pytest.raises(ValueError, match="Sampled._get_train_sampler has no effect on a stream"):
        t.train()
