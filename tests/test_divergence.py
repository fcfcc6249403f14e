"""KL per token from two LM heads in chunks: against the logits of both models, and without ever holding them."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batches import RAGGED, make_batch, own_log_softmax, real_responses
from test_forward import VOCAB, build
from trainers.forward.divergence import FrozenHead, frozen_head, logps_and_kl
from trainers.forward.head import LogitRule, Pass, add_logps_head
from trainers.forward.layout import lay_out, to_responses
from trainers.forward.run import prepare_forward, run


def read_hidden(this):
    hidden = this.select(this.body().last_hidden_state)
    return {"logps": this.logps(hidden), "hidden": hidden}


def read_kl(this, frozen, hidden):
    logps, kls = logps_and_kl(this, this.select(this.body().last_hidden_state), frozen, hidden)
    return {"logps": logps, "kls": kls}


def naive(policy, reference, batch):
    """Log-probabilities and KLs (B,K,R) from both models' logits, one response at a time."""
    logps, kls = (torch.zeros(batch["response_mask"].shape, dtype=torch.float64) for _ in range(2))
    for i, j, prompt, response in real_responses(batch):
        ours = own_log_softmax(policy, prompt, response)
        with torch.no_grad():
            theirs = own_log_softmax(reference, prompt, response)
        logps[i, j, : len(response)] = ours.gather(-1, response[:, None])[:, 0]
        kls[i, j, : len(response)] = (theirs.exp() * (theirs - ours)).sum(-1)
    return logps, kls


def chunked(policy, reference, batch, layout):
    inputs = lay_out(batch, layout)
    with torch.no_grad():
        hidden = run(reference, batch, inputs, reading=read_hidden).values["hidden"]
    frozen = frozen_head(reference, torch.device("cpu"))
    found = run(policy, batch, inputs, reading=partial(read_kl, frozen=frozen, hidden=hidden))
    return found.logps, to_responses(found.values["kls"], batch["response_mask"])


def gradients(model, logps, kls):
    weights = torch.linspace(-1, 2, logps.numel(), dtype=torch.float64).view(logps.shape)
    model.zero_grad()
    (logps * weights + kls * weights.flip(0) * 3).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def pair(name, lora):
    """A policy and a reference of one architecture with different weights."""
    policy = build(name)
    reference = copy.deepcopy(policy)
    if lora:
        torch.manual_seed(0)
        targets = ["q_proj", "up_proj", *(["lm_head"] if lora == "head" else [])]
        policy = get_peft_model(policy, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    else:
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return policy, reference


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("layout", ["rows", "shared"])
@pytest.mark.parametrize(
    "name, lora",
    [("llama", None), ("gpt2", None), ("phi", None), ("cohere", None), ("gemma2", None), ("llama", "body"),
     ("qwen2", "head")],
)  # fmt: skip
def test_values_and_gradients_equal_those_from_logits(name, lora, layout):
    if layout == "shared" and name in ("cohere", "gemma2"):
        pytest.skip("this model cannot share prompts")
    batch, (policy, reference) = make_batch(RAGGED, VOCAB), pair(name, lora)
    expected = naive(policy, reference, batch)
    expected_gradients = gradients(policy, *expected)
    base = policy.get_base_model() if lora else policy
    for model in (base, reference):
        assert prepare_forward(model, share=layout == "shared") is None
        add_logps_head(model, chunk_elements=14 * VOCAB)  # 7 tokens of two models
    found = chunked(policy, reference, batch, layout)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert found[1].max() > 0.01 and found[1].min() >= -1e-12
    for key, value in gradients(policy, *found).items():
        torch.testing.assert_close(value, expected_gradients[key], rtol=1e-8, atol=1e-8)


def test_the_reference_of_an_adapter_is_the_base_models_head():
    policy, reference = pair("qwen2", "head")
    torch.testing.assert_close(
        frozen_head(policy.get_base_model(), torch.device("cpu")).weight, reference.lm_head.weight
    )


def head_alone(layer, targets, rule, chunk=None):
    """A pass of a model that is nothing but a head."""
    return Pass(SimpleNamespace(get_output_embeddings=lambda: layer), None, None, targets, None, rule, chunk)


@pytest.mark.parametrize("plain", [True, False], ids=["fused", "any head"])
def test_gradcheck(plain):
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 7, dtype=torch.float64)
    frozen = FrozenHead(torch.randn(7, 4).double(), None, LogitRule() if plain else LogitRule(0.7, 3.0))
    targets, theirs = torch.randint(7, (5,)), torch.randn(5, 4).double()
    rule = LogitRule() if plain else LogitRule(1.5)
    this = head_alone(layer, targets, rule, 4 * 7)

    def of_hidden(hidden):
        return logps_and_kl(this, hidden, frozen, theirs)

    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of_hidden, hidden)
    logps = rule(torch.nn.functional.linear(hidden, layer.weight, layer.bias)).log_softmax(-1)
    reference = frozen.logits(theirs).log_softmax(-1)
    kls = (reference.exp() * (reference - logps)).sum(-1)
    expected = torch.autograd.grad(
        (logps.gather(-1, targets[:, None])[:, 0] * 2 + kls).sum(), list(layer.parameters())
    )
    found = logps_and_kl(this, hidden, frozen, theirs)
    got = torch.autograd.grad((found[0] * 2 + found[1]).sum(), list(layer.parameters()))
    torch.testing.assert_close(got, expected)


class Largest(TorchDispatchMode):
    """The numbers in the largest tensor that any operation makes, weights apart."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.most = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and self.vocabulary in leaf.shape:
                rows = leaf.numel() // self.vocabulary
                self.most = max(self.most, rows)
        return out


@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(0.5)], ids=["fused", "any head"])
def test_no_logits_of_more_than_one_chunk_exist_in_forward_or_backward(rule):
    tokens, width, chunk = 400, 8, 1 << 17
    peaks = []
    for vocabulary in (997, 3989):
        torch.manual_seed(0)
        layer = torch.nn.Linear(width, vocabulary, bias=False)
        frozen = FrozenHead(torch.randn(vocabulary, width), None, rule)
        this = head_alone(layer, torch.randint(vocabulary, (tokens,)), rule, chunk)
        hidden = torch.randn(tokens, width, requires_grad=True)
        with Largest(vocabulary) as seen:
            logps, kls = logps_and_kl(this, hidden, frozen, torch.randn(tokens, width))
            (logps.sum() + kls.sum()).backward()
        assert hidden.grad.abs().sum() > 0 and width < seen.most < tokens
        peaks.append(seen.most * vocabulary)
    # One chunk of one model's logits, whatever the vocabulary; all of them would be tokens x vocabulary.
    assert max(peaks) <= chunk // 2 and peaks[1] < 1.1 * peaks[0]


def test_underflowing_probabilities_count_zero():
    hidden = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    layer = torch.nn.Linear(3, 3, bias=False)
    layer.weight.data = torch.eye(3)
    this, frozen = head_alone(layer, torch.tensor([0]), LogitRule()), FrozenHead(torch.eye(3), None, LogitRule())
    _, kls = logps_and_kl(this, hidden, frozen, torch.tensor([[0.0, 200.0, -800.0]]))
    kls.sum().backward()
    assert kls.item() == pytest.approx(200.0) and hidden.grad.isfinite().all()


@pytest.mark.parametrize("layout", ["rows", "shared"])
def test_policy_equal_to_reference_has_no_divergence_in_bfloat16(layout):
    batch, model = make_batch(RAGGED, VOCAB), build("llama", dtype=torch.bfloat16)
    prepare_forward(model, share=layout == "shared")
    logps, kls = chunked(model, model, batch, layout)
    assert logps.dtype == kls.dtype == torch.float32 and kls.abs().max() < 1e-6


def test_mean_logits_is_the_mean_of_the_logits():
    hidden = torch.randn(9, 4)
    for rule in (LogitRule(), LogitRule(0.3), LogitRule(1.0, 2.0)):
        frozen = FrozenHead(torch.randn(11, 4), torch.randn(11), rule)
        torch.testing.assert_close(frozen.mean_logits(hidden), frozen.logits(hidden).mean(-1))


def test_a_quantised_head_is_refused():
    model = build("llama", dtype=torch.float32)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="quantisation"):
        frozen_head(model, torch.device("cpu"))
