"""What a trainer takes as its data: one data set of rows in any format, and columns that it does not read."""

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from helpers import tiny_llama
from test_trainer import config, rows
from trainers import SGPOTrainer, SWEPOTrainer
from trainers.data import canonicalize
from trainers.emdpo.m_step import m_step_rows

ROWS = rows(4)
EMPTY = Dataset.from_list(ROWS).select([])


def trainer(tmp_path, tokenizer, dataset, *, cls=SWEPOTrainer, **options):
    model = tiny_llama(len(tokenizer))
    return cls(model, args=config(tmp_path, **options), train_dataset=dataset, processing_class=tokenizer)


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def expected(tmp_path_factory, tokenizer):
    return losses(trainer(tmp_path_factory.mktemp("expected"), tokenizer, Dataset.from_list(ROWS)))


@pytest.mark.parametrize("budget", [None, 512])
def test_several_splits_are_no_training_rows(budget, tmp_path, tokenizer):
    splits = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS))
    with pytest.raises(ValueError, match=r"A DatasetDict is no data set .*such as one split"):
        trainer(tmp_path, tokenizer, splits, max_tokens_per_batch=budget)
    one = trainer(tmp_path, tokenizer, splits["train"], max_tokens_per_batch=budget)
    with pytest.raises(ValueError, match="A DatasetDict is no data set"):
        one.predict(splits)
    found = one.evaluate(splits)
    assert found["eval_train_loss"] == found["eval_test_loss"]


@pytest.mark.parametrize("given, named", [
    ({"train_dataset": EMPTY}, "train_dataset"),
    ({"eval_dataset": EMPTY}, "eval_dataset"),
    ({"eval_dataset": {"a": Dataset.from_list(ROWS), "b": EMPTY}}, r"eval_dataset\['b'\]"),
])  # fmt: skip
def test_a_data_set_without_rows_is_named(given, named, tmp_path, tokenizer):
    data = {"train_dataset": Dataset.from_list(ROWS)} | given
    with pytest.raises(ValueError, match=f"^{named} has no rows"):
        SWEPOTrainer(tiny_llama(len(tokenizer)), args=config(tmp_path), processing_class=tokenizer, **data)


@pytest.mark.parametrize("cls, known", [(SWEPOTrainer, "train, test"), (SGPOTrainer, "train, preferences, test, sft")])
def test_a_split_that_no_run_reads_is_named(cls, known, tmp_path):
    data = {"train": Dataset.from_list(ROWS), "eval": Dataset.from_list(ROWS)}
    with pytest.raises(ValueError, match=f"'eval' is not known; those that are read are {known}"):
        cls.run(config(tmp_path, cls), data, "nowhere")


def test_a_token_budget_without_training_rows(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="training requires a train_dataset"):
        trainer(tmp_path, tokenizer, None, max_tokens_per_batch=512).train()


@pytest.mark.parametrize("kind", ["numpy", "pandas", "torch"])
def test_the_format_of_a_data_set_changes_nothing(kind, tmp_path, tokenizer, expected):
    dataset = Dataset.from_list(ROWS)
    assert losses(trainer(tmp_path, tokenizer, dataset.with_format(kind))) == expected
    plain = trainer(tmp_path, tokenizer, dataset).train_dataset
    tokens = plain.with_format(kind)  # tokenised rows too
    assert trainer(tmp_path, tokenizer, tokens).train_dataset.to_list() == plain.to_list()


def test_a_transform_of_ones_own_is_kept():
    def louder(batch):
        return {**batch, "prompt": [text.upper() for text in batch["prompt"]]}

    found, _ = canonicalize(Dataset.from_list(ROWS).with_transform(louder))
    assert found["prompt"][:] == [row["prompt"].upper() for row in ROWS]


COLUMNS = {
    "repeated": [0] * 4,
    "mask": [1] * 4,
    "input_ids": [[1, 2, 3]] * 4,
    "embedding": [[0.5] * 7] * 4,
    "row_id": np.array([2**64 - 1, 5, 6, 7], dtype=np.uint64),
    "reference_row": [9] * 4,
}


@pytest.mark.parametrize("precompute", [False, True])
def test_columns_that_no_method_reads_change_nothing(precompute, tmp_path, tokenizer, expected):
    dataset = Dataset.from_list(ROWS)
    for name, values in COLUMNS.items():
        dataset = dataset.add_column(name, values)
    options = {"precompute_ref_logps": precompute, "ref_cache_dir": str(tmp_path / "cache")}
    one = trainer(tmp_path, tokenizer, dataset, **options)
    assert not COLUMNS.keys() & set(one.train_dataset.column_names) - {"reference_row"}
    torch.testing.assert_close(losses(one), expected, rtol=1e-6, atol=0)


def test_columns_that_a_method_declares_reach_its_loss(tmp_path, tokenizer):
    seen = []

    class Reader(SWEPOTrainer):
        columns = ("margin", "quality")

        def loss(self, batch, policy, reference):
            seen.append(batch)
            return super().loss(batch, policy, reference)

    own = [row | {"margin": i / 2, "quality": row["scores"], "other": 7} for i, row in enumerate(ROWS)]
    losses(trainer(tmp_path, tokenizer, Dataset.from_list(own), cls=Reader, max_steps=1))
    assert sorted(seen[0]["margin"].tolist()) == [0.0, 0.5, 1.0, 1.5] and "other" not in seen[0]
    torch.testing.assert_close(seen[0]["quality"], seen[0]["scores"], rtol=0, atol=0)


def test_an_m_step_takes_no_posterior_of_the_data_set():
    data = Dataset.from_list(
        [{"prompt_ids": [5], "response_ids": [[1], [2]], "scores": [1.0, 0.0], "posterior": 9}] * 2
    )
    arguments = (data, np.array([0.25, 0.5]), np.ones(2), [[0.0, 0.0]] * 2)
    assert m_step_rows(*arguments, "batch")["posterior"][:] == [0.25, 0.5]
    found = m_step_rows(*arguments, "posterior")
    assert "posterior" not in found.column_names and found["weight"][:] == [0.5, 1.0]
