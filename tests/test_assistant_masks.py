"""Rows of which some tokens are not trained on, through methods, layouts, parts and the reference cache."""

import json

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid

import processes
import trainers
from batches import own_logps
from helpers import build_tokenizer, leave_processes
from test_parts import METHODS, tiny
from test_trainer import logged, rows, signal_rows, trainer
from trainers import DPOTrainer, SparsePOTrainer, SWEPOTrainer
from trainers.cli.masks import row_parts
from trainers.data import tokenize_dataset
from trainers.forward.cache import LogpsCache, response_keys
from trainers.runs.settings import rows_digest

METHOD_OPTIONS = {**{method: {} for method in METHODS}, "SparsePO": {"mask_init": "dense", "mask_init_std": 0.5}}


def masked_rows(tokenizer, data, shift=0):
    """Tokenised rows where every third token is not trained on, from another one on in each response."""
    tokens = tokenize_dataset(Dataset.from_list(data), tokenizer)[0].to_list()
    for row in tokens:
        row["assistant_masks"] = [
            [(i + k + shift) % 3 > 0 for i in range(len(ids))] for k, ids in enumerate(row["response_ids"])
        ]
    return tokens


def make(tmp_path, tokenizer, data, cls, **kwargs):
    """In float64, with another model as reference."""
    reference = {"ref_model": tiny(tokenizer, "shared", seed=9)} if cls.needs_reference else {}
    return trainer(tmp_path, tokenizer, tiny(tokenizer, "shared"), data, cls=cls, **reference, **kwargs)


def loss_of(t):
    batch = t.data_collator(list(t.train_dataset))
    return batch, t.compute_loss(t.model, batch)


def gradients(*args, **kwargs):
    t = make(*args, **kwargs)
    loss = loss_of(t)[1]
    loss.backward()
    return loss.item(), {name: p.grad for name, p in t.model.named_parameters() if p.grad is not None}


def same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-9) and found[1].keys() == expected[1].keys()
    assert max(float(gradient.abs().max()) for gradient in expected[1].values()) > 1e-4
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("method", list(METHOD_OPTIONS))
def test_both_layouts_give_the_same_gradients_which_depend_on_the_mask(tmp_path, tokenizer, method):
    cls, data = getattr(trainers, f"{method}Trainer"), masked_rows(tokenizer, signal_rows(5))
    options = METHOD_OPTIONS[method] | {"sft_weight": 0.2}
    expected = gradients(tmp_path, tokenizer, data, cls, layout="rows", **options)
    same(gradients(tmp_path, tokenizer, data, cls, layout="shared", **options), expected)
    everything = [row | {"assistant_masks": None} for row in data]
    whole = gradients(tmp_path, tokenizer, everything, cls, layout="rows", **options)[0]
    assert whole != pytest.approx(expected[0], rel=1e-3)


@pytest.mark.parametrize("layout", ["rows", "shared"])
def test_dpo_sums_over_the_trained_tokens_behind_their_whole_context(tmp_path, tokenizer, layout):
    data = [row | {name: row[name][:2] for name in ("responses", "scores")} for row in signal_rows(2)]
    t = make(tmp_path, tokenizer, masked_rows(tokenizer, data), DPOTrainer, layout=layout, beta=0.3)
    losses, lengths = [], []
    for row in t.train_dataset:
        logratios = []
        for ids, mask in zip(row["response_ids"], row["assistant_masks"], strict=True):
            logps, ref_logps = (own_logps(m, row["prompt_ids"], ids) for m in (t.model, t.reference.model))
            logratios.append(((logps - ref_logps) * torch.tensor(mask)).sum())
        best = row["scores"].index(max(row["scores"]))
        losses.append(-logsigmoid(0.3 * (logratios[best] - logratios[1 - best])))
        lengths.append(sum(row["assistant_masks"][best]))
    assert loss_of(t)[1].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-9)
    assert t._meters["train"].compute(t.accelerator)["length/chosen"] == sum(lengths) / len(lengths)


def test_parts_of_a_group_have_its_gradients(tmp_path, tokenizer):
    data = masked_rows(tokenizer, signal_rows(5))
    expected = gradients(tmp_path, tokenizer, data, SWEPOTrainer)
    t = make(tmp_path, tokenizer, data, SWEPOTrainer, tokens_per_backward=60)
    loss = loss_of(t)[1]
    loss.backward()
    same((loss.item(), {name: p.grad for name, p in t.model.named_parameters()}), expected)


KINDS = {"common": {}, "independent": {"independent": True}, "activations": {"mask": "activations"},
         "tdpo2": {"mask": "ones", "kl_term": "tdpo2"}}  # fmt: skip


@pytest.mark.parametrize("layout", ["rows", "shared"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_masks_and_kls_of_sparsepo_are_those_of_the_same_tokens_and_zero_elsewhere(tmp_path, tokenizer, kind, layout):
    data = masked_rows(tokenizer, signal_rows(3))
    t = make(tmp_path, tokenizer, data, SparsePOTrainer, layout=layout, **METHOD_OPTIONS["SparsePO"], **KINDS[kind])
    found, whole = t.token_values(data), t.token_values([row | {"assistant_masks": None} for row in data])
    tokens = t.data_collator(data)["response_mask"]
    for name, value in found.items():
        assert not value[~tokens].any() and value[tokens].abs().max() > 0
        if not (kind == "activations" and name.endswith("mask")):  # relative to the tokens of their response
            torch.testing.assert_close(value, whole[name] * tokens, rtol=1e-9, atol=1e-12)
    if kind == "activations":
        counts = tokens.sum(-1, keepdim=True)
        assert (found["reward_mask"][tokens & (counts == 1)] == 1).all()
        assert not torch.allclose(found["reward_mask"], whole["reward_mask"] * tokens)


def test_the_page_of_masks_shows_the_tokens_that_are_trained_on(tmp_path, tokenizer):
    data = masked_rows(tokenizer, signal_rows(1))
    t = make(tmp_path, tokenizer, data, SparsePOTrainer, **METHOD_OPTIONS["SparsePO"])
    scores, masks = data[0]["scores"], data[0]["assistant_masks"]
    sides = [masks[scores.index(of(scores))] for of in (max, min)]
    _, *maps = row_parts(t, 0, data[0])
    assert [page.count("title=") for page in maps] == [sum(map(sum, sides))] * 4
    assert sum(map(sum, sides)) < sum(map(len, sides))


@pytest.mark.parametrize("per_token", [False, True])
def test_the_cache_knows_which_tokens_are_trained_on(tmp_path, tokenizer, per_token, monkeypatch):
    monkeypatch.setattr(DPOTrainer, "reference_per_token", per_token)
    first, second, plain = (masked_rows(tokenizer, rows(5), shift) for shift in (0, 1, 0))
    for row in plain:
        del row["assistant_masks"]
    cached = {"precompute_ref_logps": True, "ref_cache_dir": str(tmp_path / "cache"), "ref_tokens_per_batch": 60}
    for data in (first, second, plain, first):
        online = loss_of(make(tmp_path, tokenizer, data, DPOTrainer))[1]
        t = make(tmp_path, tokenizer, data, DPOTrainer, **cached)
        t.precompute_reference()
        assert t.table.lookup(t.data_collator(list(t.train_dataset))) is not None
        assert t.reference.model is None
        assert loss_of(t)[1].item() == pytest.approx(online.item(), rel=1e-6)  # the cache gives float32


def test_a_key_is_of_the_tokens_up_to_the_last_one_that_is_trained_on(tmp_path):
    row = {"prompt_ids": [1, 2], "response_ids": [[3, 4, 5], [3, 4, 6], [3, 4, 5]]}
    masks = [[True, True, False], [True, True, False], [True, False, True]]
    missing = LogpsCache(tmp_path).missing([Dataset.from_list([row | {"assistant_masks": masks}])])
    assert [(r["response_ids"], r["assistant_masks"]) for r in missing] == [
        ([[3, 4], [3, 4, 5]], [[True, True], [True, False, True]])
    ]
    assert response_keys([1, 2], [[3, 4]]) == response_keys([1, 2], [[3, 4]], [[True, True]])
    assert len({*response_keys([1, 2], [[3, 4, 5]] * 3, [[True] * 3, [False, True, True], [True, False, True]])}) == 3


def losses_with_a_cache(folder, count):
    tokenizer = build_tokenizer()
    options = {"precompute_ref_logps": True, "ref_cache_dir": str(folder / f"cache{count}"),
               "per_device_train_batch_size": 4 // count, "learning_rate": 0.3, "max_steps": 3}  # fmt: skip
    t = make(folder / f"out{count}", tokenizer, masked_rows(tokenizer, signal_rows(8)), DPOTrainer, **options)
    t.train()
    if t.is_world_process_zero():
        (folder / f"{count}.json").write_text(json.dumps([logged(t), logged(t, "length/chosen")]))
    leave_processes()


def test_a_run_with_other_marks_is_another_run(tokenizer):
    digests = [rows_digest(Dataset.from_list(masked_rows(tokenizer, rows(3), shift))) for shift in (0, 1, 0)]
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.distributed
def test_two_processes_train_like_one(tmp_path):
    for count in (1, 2):
        codes, log = processes.run(losses_with_a_cache, tmp_path, count, count=count)
        assert codes == [0] * count, log
    one, two = (json.loads((tmp_path / f"{count}.json").read_text()) for count in (1, 2))
    assert two[0] == pytest.approx(one[0], rel=1e-6) and two[1] == pytest.approx(one[1])
    assert len({*one[0]}) == 3
