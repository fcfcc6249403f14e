"""The reference cache: same numbers as online, and recomputed exactly when something that matters changed."""

import os

import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

import processes
from helpers import leave_processes, tiny_llama
from test_trainer import LORA, logged, rows, trainer
from trainers import SWEPOTrainer
from trainers.forward import cache as module
from trainers.forward.cache import LogpsCache, StaleCacheError, response_keys
from trainers.inputs import prepare_rows


class CountingTrainer(SWEPOTrainer):
    """Counts responses that the reference scores, in the pass and online."""

    scored = 0

    def precompute_reference(self):
        before = dict(self.table.entries)
        super().precompute_reference()
        self.scored = len(set(self.table.entries) - set(before))


def make(tmp_path, tokenizer, model=None, data=None, eval_data=None, **kwargs):
    options = {"precompute_ref_logps": True, "ref_cache_dir": str(tmp_path / "cache"), "ref_tokens_per_batch": 60}
    return trainer(tmp_path / "out", tokenizer, model, data, eval_data, cls=CountingTrainer, **options | kwargs)


def total(data):
    return sum(len(row["responses"]) for row in data)


@pytest.mark.parametrize("kind", ["full", "lora", "pretrained", "explicit"])
def test_cached_reference_gives_the_same_training_as_online(tmp_path, tokenizer, kind):
    losses = []
    for precompute in (False, True):
        model, kwargs = tiny_llama(len(tokenizer)), {}
        if kind == "lora":
            kwargs["peft_config"] = LoraConfig(**LORA)
        if kind == "pretrained":
            torch.manual_seed(5)
            model = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))
        if kind == "explicit":
            kwargs["ref_model"] = tiny_llama(len(tokenizer), seed=9)
        t = make(tmp_path, tokenizer, model=model, eval_data=rows(5, seed=4), precompute_ref_logps=precompute,
                 max_steps=3, learning_rate=0.3, **kwargs)  # fmt: skip
        assert (t.table is not None) == precompute
        t.train()
        if precompute and kind in ("full", "explicit"):
            assert t.reference.model is None  # its memory is free for training
        history = logged(t)
        losses.append([*history, t.evaluate()["eval_loss"]])
    assert losses[0][0] != pytest.approx(losses[0][2], abs=1e-4)
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=1e-6)


def test_what_does_not_change_the_reference_reuses_the_cache(tmp_path, tokenizer):
    first = make(tmp_path, tokenizer)
    first.train()
    assert first.scored == total(rows())
    moved = [row | {"scores": [-s for s in row["scores"]]} for row in reversed(rows())]
    options = {"learning_rate": 0.5, "output_dir": str(tmp_path / "elsewhere"), "per_device_train_batch_size": 2,
               "beta": 0.7, "weighting": "signed", "layout": "rows", "seed": 7}  # fmt: skip
    second = make(tmp_path, tokenizer, data=moved, **options)
    assert second.reference.model is None  # nothing to score: no copy was made
    second.train()
    lora = make(tmp_path, tokenizer, peft_config=LoraConfig(**LORA))
    lora.train()
    assert second.scored == lora.scored == 0


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_policy_that_keeps_its_dropout_stands_in_for_its_reference_without(tmp_path, tokenizer, kind):
    adapter = {"peft_config": LoraConfig(**LORA)} if kind == "lora" else {}
    options = adapter | {"disable_dropout": False, "layout": "rows"}

    def cached(name):
        model = tiny_llama(len(tokenizer), attention_dropout=0.5)
        t = make(tmp_path, tokenizer, model=model, ref_cache_dir=str(tmp_path / name), **options)
        t.train()
        return dict(t.table.entries)

    entries = cached("one")
    assert cached("one") == entries and cached("other") == pytest.approx(entries, rel=1e-5)


def test_only_new_responses_are_scored(tmp_path, tokenizer):
    make(tmp_path, tokenizer).train()
    data = rows()
    data[2]["responses"][1] = "a new mat by the sea"
    data.append({"prompt": "the hill ", "responses": ["rise", "over", "sea"], "scores": [1.0, 2.0, 3.0]})
    t = make(tmp_path, tokenizer, data=data, eval_data=rows()[:4])
    t.train()
    assert t.scored == 1 + 3


def changed_model(tokenizer):
    model = tiny_llama(len(tokenizer))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] += 1e-3
    return model


def pretrained(tokenizer, **kwargs):
    torch.manual_seed(5)
    return get_peft_model(tiny_llama(len(tokenizer)), LoraConfig(**LORA | kwargs, init_lora_weights=False))


def test_adapters_of_the_same_weights_and_another_scaling_share_no_cache(tmp_path, tokenizer):
    for alpha in (8, 9):
        t = make(tmp_path, tokenizer, model=pretrained(tokenizer, lora_alpha=alpha))
        t.train()
        assert t.scored == total(rows())


@pytest.mark.parametrize("change", [
    lambda t: {"model": changed_model(t)},
    lambda t: {"model": tiny_llama(len(t), rms_norm_eps=1e-3)},
    lambda t: {"model": pretrained(t)},
    lambda t: {"ref_model": tiny_llama(len(t), seed=9)},
    lambda t: {"model": tiny_llama(len(t)).to(torch.bfloat16)},
    lambda t: {"bf16": True},
], ids=["weights", "config", "adapter", "ref_model", "dtype", "autocast"])  # fmt: skip
def test_a_change_of_the_reference_recomputes_everything(tmp_path, tokenizer, change):
    make(tmp_path, tokenizer).train()
    t = make(tmp_path, tokenizer, **change(tokenizer))
    t.train()
    assert t.scored == total(rows())


def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "WRITE_EVERY", 1)
    calls = []
    original = module.LogpsCache._score

    def stop(self, rows, score):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(rows))
        return original(self, rows, score)

    monkeypatch.setattr(module.LogpsCache, "_score", stop)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, tokenizer).train()
    monkeypatch.setattr(module.LogpsCache, "_score", original)
    t = make(tmp_path, tokenizer)
    done = len(t.table.entries)
    assert 0 < done < total(rows())
    moved = tmp_path / "moved"  # all that was done lies in this folder
    t.table.path.parent.rename(moved)
    t = make(tmp_path, tokenizer, ref_cache_dir=str(moved))
    t.train()
    assert t.scored == total(rows()) - done
    assert not t.table.parts.exists()


def test_wrong_numbers_in_the_cache_are_found_at_start(tmp_path, tokenizer):
    t = make(tmp_path, tokenizer)
    t.train()
    path = t.table.path
    table = pq.read_table(path)
    broken = table.set_column(1, "logps", [[v + 5.0 for v in table["logps"].to_pylist()]])
    pq.write_table(broken, path)
    with pytest.raises(StaleCacheError, match=str(path)):
        make(tmp_path, tokenizer).train()


def prepared(t, n, seed):
    """Further rows for a trainer that is there already."""
    return prepare_rows(Dataset.from_list(rows(n, seed=seed)), t.processing_class, t.args)


def test_a_second_training_keeps_the_cached_reference(tmp_path, tokenizer):
    """The policy is at step 0 again, but is not its reference any more."""
    t = make(tmp_path, tokenizer, learning_rate=0.5)
    t.train()
    cached = dict(t.table.entries)
    first = logged(t)
    t.train()
    second = logged(t)
    online = make(tmp_path, tokenizer, learning_rate=0.5, precompute_ref_logps=False)
    for losses in (first, second):
        online.train()
        assert losses == pytest.approx(logged(online), rel=1e-4)
    assert t.table.entries == cached and second[0] != pytest.approx(first[0], abs=1e-3)
    t.train_dataset = prepared(t, 5, seed=9)
    with pytest.raises(ValueError, match="train_dataset or eval_dataset at the start"):
        t.train()
    assert t.table.entries == cached


def test_rows_of_a_second_training_are_scored_with_the_reference_that_is_left(tmp_path, tokenizer):
    t = make(tmp_path, tokenizer, learning_rate=0.5, peft_config=LoraConfig(**LORA))
    t.train()
    t.train_dataset = prepared(t, 5, seed=9)
    t.train()
    fresh = make(tmp_path, tokenizer, data=rows(5, seed=9), ref_cache_dir=str(tmp_path / "fresh"))
    fresh.train()
    expected = fresh.table.entries
    assert t.scored == len(expected) and expected.items() != t.table.entries.items()
    assert {key: t.table.entries[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_a_training_that_was_cut_before_its_first_step_can_be_called_again(tmp_path, tokenizer):
    class Cut(TrainerCallback):
        calls = 0

        def on_step_begin(self, args, state, control, **kwargs):
            self.calls += 1
            if self.calls == 1:
                raise KeyboardInterrupt

    t = make(tmp_path, tokenizer, ref_model=tiny_llama(len(tokenizer), seed=9), callbacks=[Cut()])
    with pytest.raises(KeyboardInterrupt):
        t.train()
    t.train()  # the policy is untouched, and not the reference that was given
    assert t.state.global_step == 2


def test_per_token_values_are_the_tokens_of_the_reference(tmp_path, tokenizer):
    seen = {}

    class Grab(CountingTrainer):
        reference_per_token = True

        def loss(self, batch, policy, reference):
            seen["difference"] = (policy.logps - reference.logps).abs().max()
            seen["shape"] = reference.logps.shape == policy.logps.shape
            return super().loss(batch, policy, reference)

    options = {"precompute_ref_logps": True, "max_steps": 1, "ref_cache_dir": str(tmp_path / "cache")}
    trainer(tmp_path, tokenizer, cls=Grab, **options).train()
    assert seen["shape"] and seen["difference"] < 1e-5


def test_keys_depend_on_prompt_response_and_their_boundary():
    keys = response_keys([1, 2], [[3, 4], [3], [3, 4]])
    assert keys[0] == keys[2] != keys[1]
    assert response_keys([1, 2, 3], [[4]])[0] != keys[0]
    assert len(set(keys)) == 2


def check_nodes(folder):
    PartialState(cpu=True)
    for name in ("same", os.environ["RANK"]):
        try:
            LogpsCache(folder / name)
            print("OK", flush=True)
        except ValueError as error:
            print("ERROR", error, flush=True)
    leave_processes()


@pytest.mark.distributed
def test_nodes_that_share_no_folder_are_told(tmp_path):
    for folder, keys in {"same": ["a"], "0": ["a"], "1": ["b"]}.items():
        cache = LogpsCache(tmp_path / folder)
        cache.add(dict.fromkeys(keys, -1.0), write=True)
        cache.finish()
    _, output = processes.run(check_nodes, tmp_path, count=2)
    assert output.count("OK") == 2, output
    assert output.count("holds different entries on different processes (1, 1)") == 2
