"""A mixture that is served: who answers, and what it says of a response."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from emdpo_runs import LORA, em, quick_collection, types_alone  # noqa: F401
from helpers import build_tokenizer, close, tiny_llama
from test_emdpo_parts import CASES
from trainers import MixturePolicy
from trainers.emdpo.serve import mixture_logps

PROMPTS = ["the cat sat on", "a mat and saw", "over an old green hill"]


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request, tmp_path_factory, start):
    folder = tmp_path_factory.mktemp(request.param)
    em(folder, start, learning_rate=0.02, rounds=1, peft=request.param == "lora").train()
    return folder


def test_probability_of_a_response_under_the_mixture():
    case = CASES["M1"]
    logps = torch.tensor(case["inputs"]["seq_logps_per_policy"], dtype=torch.float64)
    weights = torch.tensor(case["inputs"]["weights"], dtype=torch.float64)
    close(mixture_logps(logps, weights), case["expected"]["mixture_logps"])
    assert mixture_logps(torch.tensor([[-3.0, -900.0]]), torch.tensor([1.0, 0.0])).item() == -3.0


def test_the_mixture_answers_with_one_policy_per_prompt_and_knows_its_probabilities(run, start):
    tokenizer = build_tokenizer()
    mixture = MixturePolicy.from_pretrained(run, weights=[0.3, 0.7])
    prompts = [tokenizer(p)["input_ids"] for p in PROMPTS]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    types = [1, 0, 1]
    found = mixture.generate(ids, seen, types=types, do_sample=False, max_new_tokens=5)
    alone = list(types_alone(run, start))
    for i, k in enumerate(types):
        expected = alone[k].generate(torch.tensor([prompts[i]]), do_sample=False, max_new_tokens=5, pad_token_id=0)
        new = expected[0, len(prompts[i]) :]
        assert found[i, width : width + len(new)].tolist() == new.tolist()
    responses = [[[5, 6, 2], [7, 2]], [[9, 8, 7, 6]], [[4, 2]]]
    logps = mixture.logps(prompts, responses)
    assert logps.shape == (3, 2) and not logps[1, 1]
    for i, prompt in enumerate(prompts):
        for j, response in enumerate(responses[i]):
            each = []
            for model in alone:
                rows = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                each.append(rows.gather(1, torch.tensor(response)[:, None]).sum().item())
            expected = np.logaddexp(math.log(0.3) + each[0], math.log(0.7) + each[1])
            assert float(logps[i, j]) == pytest.approx(expected, abs=1e-4)
    vocabulary = [[[token] for token in range(len(tokenizer))]]
    assert float(mixture.logps([[5, 6, 7]], vocabulary).exp().sum()) == pytest.approx(1, abs=1e-5)


def test_types_are_drawn_by_the_weights_and_adapters_lie_on_one_base(run, start):
    mixture = MixturePolicy.from_pretrained(run, weights=[0.2, 0.8], seed=1)
    assert mixture.draw(4000).mean() == pytest.approx(0.8, abs=0.03)
    out = mixture.generate(torch.tensor([[5, 6], [7, 8]]), max_new_tokens=3)
    assert out.shape[0] == 2 and out[:, :2].tolist() == [[5, 6], [7, 8]]
    with pytest.raises(ValueError, match="no mixture.json"):
        MixturePolicy.from_pretrained(run / "reference")
    if isinstance(mixture.models, list):
        return
    base = sum(p.numel() for p in tiny_llama(len(build_tokenizer())).parameters())
    adapters = [sum(p.numel() for n, p in mixture.models.named_parameters() if f".type-{k}." in n) for k in (0, 1)]
    assert sum(p.numel() for p in mixture.models.parameters()) == base + sum(adapters) and adapters[0] > 0


@pytest.fixture(scope="module")
def adapters():
    tokenizer = build_tokenizer()
    config = LoraConfig(**LORA, lora_dropout=0.3)
    model = get_peft_model(tiny_llama(len(tokenizer)), config, adapter_name="type-0")
    model.add_adapter("type-1", config)
    return MixturePolicy(model.eval(), [0.3, 0.7], tokenizer)


@pytest.mark.parametrize("weights", [[1.0], [0.2, 0.9], [math.nan, 1.0], [-0.5, 1.5]])
def test_weights_are_one_probability_per_policy(adapters, weights):
    with pytest.raises(ValueError, match="must be 2 probabilities that sum to 1"):
        MixturePolicy(adapters.models, weights, adapters.tokenizer)


def test_adapters_with_dropout_are_served_without_it_and_prompts_stay_shared(adapters):
    prompts, responses = [[5, 6, 7]], [[[8, 9], [10, 11, 2]]]
    first = adapters.logps(prompts, responses)
    assert adapters._runner.layout == "auto"
    adapters.models.train()
    torch.testing.assert_close(adapters.logps(prompts, responses), first)
    adapters.models.eval()
