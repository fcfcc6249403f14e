"""Groups in parts: the gradients of the whole group, in less memory."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import trainers
from helpers import tiny_llama
from test_trainer import LORA, config, one_step, rows, trainer
from trainers import PreferenceCollator, SWEPOTrainer
from trainers.data.tokenization import tokenize_dataset
from trainers.forward.parts import PartedPass, split
from trainers.runs.settings import run_settings

METHODS = ("SWEPO", "LIRE", "DPO", "PlackettLuce", "InfoNCA", "NCA", "RRHF")


def tiny(tokenizer, layout, seed=0):
    """In float64, which a Llama's angles are not, so that packed rows differ by 1e-7; GPT-2 has none."""
    if layout == "rows":
        return tiny_llama(len(tokenizer), seed=seed).double()
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=4, pad_token_id=0,
                        initializer_range=0.2, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)  # fmt: skip
    return GPT2LMHeadModel(config).double()


def gradients(tmp_path, tokenizer, cls=SWEPOTrainer, **kwargs):
    """Of one step on eight rows with 2 to 5 responses, in float64, and what it logged."""
    options = {"layout": "shared", "sft_weight": 0.2} | kwargs
    if cls.needs_reference and "peft_config" not in kwargs:
        options["ref_model"] = tiny(tokenizer, options["layout"], seed=9)
    found, t = one_step(tmp_path, tokenizer, tiny(tokenizer, options["layout"]), cls=cls, **options)
    names = ("loss", "logps/chosen", "ranking/pairwise_accuracy", "sft_loss")
    return found, {name: t.state.log_history[0][name] for name in names}


def same(found, expected):
    assert found[1] == pytest.approx(expected[1], rel=1e-9) and found[0].keys() == expected[0].keys()
    assert max(float(g.abs().max()) for g in expected[0].values()) > 1e-4
    for name, gradient in expected[0].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["rows", "shared"])
def test_parts_give_the_gradients_of_the_whole_group(tmp_path, tokenizer, method, layout):
    cls = getattr(trainers, f"{method}Trainer")
    whole = gradients(tmp_path, tokenizer, cls, layout=layout)
    for budget in (1, 150):
        same(gradients(tmp_path, tokenizer, cls, layout=layout, tokens_per_backward=budget), whole)


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
        {"precompute_ref_logps": True},
        {"peft_config": LoraConfig(**LORA, init_lora_weights=False)},
    ],
    ids=["accumulation", "checkpointing", "cache", "lora"],
)
def test_parts_go_with_what_else_a_step_does(tmp_path, tokenizer, options):
    if options.get("precompute_ref_logps"):
        options = options | {"ref_cache_dir": str(tmp_path)}
    whole, parted = (gradients(tmp_path, tokenizer, **options, **more) for more in ({}, {"tokens_per_backward": 1}))
    same(parted, whole)


@pytest.fixture
def repeats(monkeypatch):
    """A process makes so many passes more, as another one has more parts."""

    def more(count):
        make = PartedPass.__init__
        longer = lambda self, parts, passes, *given: make(self, parts, passes + count, *given)  # noqa: E731
        monkeypatch.setattr(PartedPass, "__init__", longer)

    return more


def test_passes_for_the_parts_of_other_processes_change_nothing(tmp_path, tokenizer, repeats):
    whole = gradients(tmp_path, tokenizer)
    repeats(2)
    same(gradients(tmp_path, tokenizer, tokens_per_backward=1), whole)


@pytest.mark.parametrize("more", [0, 2])
def test_dropout_is_the_same_in_both_passes_of_a_part(tmp_path, tokenizer, monkeypatch, repeats, more):
    """The gradient is that of the loss of the pass that gave its numbers: of finite differences with fixed dropout."""
    options = {"disable_dropout": False, "tokens_per_backward": 1, "layout": "rows", "weighting": "none",
               "train_sampling_strategy": "sequential", "per_device_train_batch_size": 8}  # fmt: skip
    seen, read, states = [], [], []
    policy_of, loss_of = SWEPOTrainer._policy, SWEPOTrainer.loss

    def spy(self, model, batch, reference=None):
        states.append(torch.get_rng_state())
        forward = policy_of(self, model, batch, reference)
        seen.append(forward.logps.detach().clone())
        return forward

    def reading(self, batch, policy, reference):
        read.append(policy.logps.detach().clone())
        return loss_of(self, batch, policy, reference)

    monkeypatch.setattr(SWEPOTrainer, "_policy", spy)
    monkeypatch.setattr(SWEPOTrainer, "loss", reading)
    repeats(more)
    model = tiny_llama(len(tokenizer), attention_dropout=0.5)
    trainer(tmp_path, tokenizer, model, data=rows(16), max_steps=2, **options).train()
    passes = 5 + more
    scored, again = seen[:passes], seen[passes : 2 * passes - 1]  # the last one keeps its graph
    assert len(seen) == 2 * (2 * passes - 1) and all(map(torch.equal, scored, again))
    assert not torch.equal(scored[0], scored[1])
    for slot, own in enumerate(scored[:5]):
        assert float(read[0][:, slot].sum()) == pytest.approx(float(own.sum()), rel=1e-5)
    # Nor has the next step the dropout of this one.
    assert not any(torch.equal(states[2 * passes - 1], state) for state in states[: 2 * passes - 1])


def test_parts_hold_every_response_once_and_keep_to_the_budget(tokenizer):
    data = tokenize_dataset(Dataset.from_list(rows()), tokenizer)[0]
    batch = PreferenceCollator(tokenizer.pad_token_id)([data[i] for i in range(8)])
    lengths, prompts = batch["response_mask"].sum(-1), batch["prompt_mask"].sum(-1)
    for budget in (1, 60, 120, 200, 10_000):
        parts, seen = split(batch, budget), torch.zeros_like(batch["mask"], dtype=torch.long)
        for part in parts:
            seen[part.rows, part.slots] += part.batch["mask"]
            size = int(lengths[part.rows, part.slots].sum() + prompts[part.rows].sum())
            assert size <= budget or part.slots.stop - part.slots.start == 1
            assert part.batch["mask"].any(-1).all()
        assert torch.equal(seen, batch["mask"].long())
        assert len(parts) == {1: 5, 10_000: 1}.get(budget, len(parts))


@pytest.mark.parametrize("layout", ["rows", "shared"])
def test_what_autograd_keeps_does_not_grow_with_the_group(tmp_path, tokenizer, monkeypatch, layout):
    kept, original = [], SWEPOTrainer._policy

    def counted(self, model, batch, reference=None):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            forward = original(self, model, batch, reference)
        kept.append(sum(sizes))
        return forward

    monkeypatch.setattr(SWEPOTrainer, "_policy", counted)
    peaks = []
    for count in (4, 16, 64):
        scores = [float(k) for k in range(count)]
        data = [{"prompt_ids": [7] * 24, "response_ids": [[9] * 16] * count, "scores": scores}]
        kept.clear()
        options = {"tokens_per_backward": 24 + 4 * 16, "layout": layout, "max_steps": 1}
        trainer(tmp_path, tokenizer, data=data, **options).train()
        peaks.append(max(kept))
        assert len(kept) == (1 if count == 4 else 2 * count / 4 - 1)
    assert max(peaks) <= 1.1 * min(peaks)


def test_what_parts_would_get_wrong_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="tokens_per_backward works on log-probabilities alone"):
        trainer(tmp_path, tokenizer, cls=trainers.SparsePOTrainer, tokens_per_backward=10).train()

    class Scaled(SWEPOTrainer):
        """A loss with a weight of its own."""

        def loss(self, batch, policy, reference):
            losses, metrics = super().loss(batch, policy, reference)
            return losses * self.model.scale, metrics

    model = tiny_llama(len(tokenizer))
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="the loss itself reads the weight scale"):
        trainer(tmp_path, tokenizer, model, cls=Scaled, tokens_per_backward=10).train()


def test_a_run_may_go_on_with_other_parts(tmp_path):
    one, other = (run_settings(config(tmp_path, tokens_per_backward=tokens)) for tokens in (None, 100))
    assert one == other
