"""The M-step of EM-DPO: its identities with DPO, the weighted loss, where it starts, and what is in memory."""

import gc
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM, TrainerCallback

from emdpo_runs import LORA, em, em_config, opposed_rows, quick_collection, round_folder, same, trained, weights  # noqa: F401
from helpers import build_tokenizer, close, tiny_llama
from test_emdpo_parts import CASES
from trainers import DPOConfig, DPOTrainer
from trainers.emdpo.m_step import TypePolicyTrainer, m_step_rows
from trainers.forward.run import Forward

# With Adam an entry whose gradient is 0 but for rounding would move as far as any other.
SGD = {"optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 2}


def dpo(folder, start, rows, peft=False):
    """The weights that DPO alone gives, with the options of an EM run."""
    names = (
        "output_dir", "use_cpu", "report_to", "per_device_train_batch_size", "logging_steps", "save_strategy", "seed",
        "lr_scheduler_type", "disable_tqdm", "max_grad_norm",
    )  # fmt: skip
    args = DPOConfig(**{name: getattr(em_config(folder), name) for name in names}, **SGD)
    adapter = LoraConfig(**LORA) if peft else None
    trainer = DPOTrainer(str(start), args=args, train_dataset=Dataset.from_list(rows), peft_config=adapter,
                         processing_class=build_tokenizer())  # fmt: skip
    trainer.train()
    trainer.save_model()
    return weights(folder)


@pytest.mark.parametrize("peft", [False, True])
def test_one_type_is_dpo(tmp_path, start, peft):
    rows = opposed_rows(k=2)
    trainer = trained(tmp_path / "em", start, rows, peft=peft, num_types=1, rounds=4, **SGD)
    assert len(list((tmp_path / "em/restart-0").iterdir())) == 2  # the start and one round
    assert (trainer.posterior == 1).all()
    expected, before = dpo(tmp_path / "dpo", start, rows, peft), {} if peft else weights(start)
    same(weights(trainer.policies[0]), expected, rtol=1e-4, atol=2e-6)
    assert max(float((value - before.get(name, 0)).abs().max()) for name, value in expected.items()) > 0.01


def test_one_hot_posteriors_are_dpo_on_each_cluster(tmp_path, start):
    """With normalize='posterior' the rows of the others are left out, so even the batches are the same."""
    rows, clusters = opposed_rows(k=2), {"a0": 0, "a1": 1, "a2": 1, "a3": 0, "a4": 1, "a5": 0}
    given = {name: [1.0 - k, float(k)] for name, k in clusters.items()}
    trainer = trained(tmp_path / "em", start, rows, rounds=1, initial_posterior=given, normalize="posterior", **SGD)
    for k in (0, 1):
        own = [row for row in rows if clusters[row["annotator"]] == k]
        same(weights(trainer.policies[k]), dpo(tmp_path / f"dpo{k}", start, own), rtol=1e-4, atol=2e-6)


def test_types_are_exchangeable_to_the_last_bit(tmp_path, start):
    random = np.random.default_rng(0)
    first = random.dirichlet(np.ones(3), 6)
    order, runs = [2, 0, 1], []
    for name, table in (("a", first), ("b", first[:, order])):
        given = {f"a{i}": row.tolist() for i, row in enumerate(table)}
        runs.append(trained(tmp_path / name, start, num_types=3, initial_posterior=given))
    np.testing.assert_array_equal(runs[1].posterior, runs[0].posterior[:, order])
    for k in range(3):
        same(weights(runs[1].policies[k]), weights(runs[0].policies[order[k]]))


@pytest.mark.parametrize("name", ["W_batch", "W_posterior"])
def test_normalisation_of_the_weighted_loss(tmp_path, start, name):
    case = CASES[name]
    items, gamma = case["inputs"]["items"], np.array(case["inputs"]["posterior"])
    width = max(len(item["ranking"]) for item in items)
    logps, reference, scores = (torch.zeros(len(items), width, dtype=torch.float64) for _ in range(3))
    mask = torch.zeros(len(items), width).bool()
    for b, item in enumerate(items):
        k = len(item["ranking"])
        logps[b, :k], reference[b, :k] = torch.tensor(item["seq_logps"]), torch.tensor(item["ref_seq_logps"])
        mask[b, :k] = True
        for place, response in enumerate(item["ranking"]):  # ranks that are not counted become ties for the last place
            scores[b, response] = -min(place, item["stages"])
    owners = np.array([item["owner"] for item in items])
    normalize = case["options"]["normalize"]
    rows = [row | {"annotator": "abc"[owner]} for row, owner in zip(opposed_rows()[: len(items)], owners, strict=True)]
    trainer = em(tmp_path, start, rows, normalize=normalize)
    made = m_step_rows(trainer.judged.rows, gamma[owners], np.ones(len(rows)), [[0.0] * 3 for _ in rows], normalize)
    column = {n: torch.tensor(made[n], dtype=torch.float64) for n in ("posterior", "weight") if n in made.column_names}
    assert list(column) == (["posterior"] if normalize == "batch" else ["weight"])
    logps.requires_grad_()
    batch = {"scores": scores, "mask": mask, "ref_logps": reference, **column}
    losses, _ = TypePolicyTrainer.loss(trainer, batch, Forward(logps.unsqueeze(-1)), None)
    weight = trainer._weights(batch, trainer.signal(batch)).double()
    loss = (losses * weight).sum() / weight.sum()
    close(loss, case["expected"]["loss"], "float32" if normalize == "posterior" else "float64")
    loss.backward()
    for gradient, want in zip(logps.grad, case["expected"]["grads_seq_logps"], strict=True):
        close(gradient[: len(want)], want, "float32")


@pytest.mark.parametrize("peft", [False, True])
def test_one_policy_is_in_memory_at_a_time(tmp_path, start, peft):
    alive = []

    class Count(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            gc.collect()
            alive.append(sum(isinstance(thing, LlamaForCausalLM) for thing in gc.get_objects()))

    trainer = em(tmp_path, start, peft=peft, callbacks=[Count()], rounds=2, score_on="heldout_half", max_steps=2)
    gc.collect()  # what other tests left
    before = {id(thing) for thing in gc.get_objects() if isinstance(thing, LlamaForCausalLM)}
    assert len(before) == 1
    trainer.train()
    assert alive == [1] * 12  # two rounds and the training on all rows, of two types with two steps each


def test_a_loaded_model_is_saved_once_and_gives_the_same_run(tmp_path, start):
    tokenizer = build_tokenizer()
    runs = [em(tmp_path / "a", start), em(tmp_path / "b", tiny_llama(len(tokenizer)))]
    for trainer in runs:
        trainer.train()
    np.testing.assert_array_equal(runs[0].posterior, runs[1].posterior)
    assert not (tmp_path / "a/start").exists()
    same(weights(tmp_path / "b/start"), weights(start))
    em(tmp_path / "b", tiny_llama(len(tokenizer))).train()
    with pytest.raises(ValueError, match="model files"):
        em(tmp_path / "b", tiny_llama(len(tokenizer), seed=1)).train()


def test_the_previous_policy_is_a_start_and_the_reference_stays(tmp_path, start):
    trainer = trained(tmp_path, start, start_from="previous", peft=True, learning_rate=0.01)
    fresh = trained(tmp_path / "fresh", start, peft=True, learning_rate=0.01)
    one, other = ((round_folder(t, 0) / "annotators.csv").read_text() for t in (trainer, fresh))
    assert one == other
    assert not np.allclose(trainer.posterior, fresh.posterior, atol=1e-12)
    logs = json.loads((trainer.policies[0] / "trainer_state.json").read_text())["log_history"]
    assert abs(logs[0]["rewards/margins"]) > 0.05  # against the reference, which is not where this round began
    logs = json.loads((fresh.policies[0] / "trainer_state.json").read_text())["log_history"]
    assert abs(logs[0]["rewards/margins"]) < abs(0.5)
