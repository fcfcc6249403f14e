"""sparsepo_loss, the mask head and MaPO's mask on hand-worked vectors, their limits and their invariances."""

import math

import pytest
import torch
from torch.nn.functional import softplus

from helpers import TOLERANCE, vectors
from trainers.sparsepo import MaskHead, SparsePOConfig, activation_mask, mask_statistics, sparsepo_loss, tdpo2_loss

CASES = vectors("sparsepo")
PAIR_SCORES = torch.tensor([[1.0, 0.0]])
BOTH = torch.ones(1, 2, dtype=torch.bool)


def close(found, expected, dtype=torch.float64):
    tolerance, expected = TOLERANCE[str(dtype).removeprefix("torch.")], torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.detach().double(), expected, rtol=0, atol=tolerance)


def token_terms(logits, ref_logits, labels):
    """Log-ratios and KLs (R,) of one response from logits (R,V)."""
    logps, ref_logps = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    kls = (ref_logps.exp() * (ref_logps - logps)).sum(-1)
    picked = labels.unsqueeze(-1)
    return (logps.gather(-1, picked) - ref_logps.gather(-1, picked)).squeeze(-1), kls


class Pair:
    """The inputs of a vector as leaves, and the (1,2,R) tensors that the loss takes."""

    def __init__(self, case, dtype=torch.float64, cut=None):
        inputs, self.leaves, sides = case["inputs"], {}, []
        for side in "wl":
            length = slice(0, cut if side == "w" else None)
            labels = torch.tensor(inputs[f"labels_{side}"])[length]

            def leaf(name, side=side, length=length):
                values = inputs.get(f"{name}_{side}", [1.0] * len(inputs[f"labels_{side}"]))
                self.leaves[f"{name}_{side}"] = torch.tensor(values, dtype=dtype)[length].requires_grad_()
                return self.leaves[f"{name}_{side}"]

            ref_logits = torch.tensor(inputs[f"ref_logits_{side}"], dtype=dtype)[length]
            common = f"common_mask_{side}" in inputs
            masks = [leaf("common_mask")] * 2 if common else [leaf("reward_mask"), leaf("kl_mask")]
            sides.append((*token_terms(leaf("logits"), ref_logits, labels), *masks))
        lengths = torch.tensor([len(terms[0]) for terms in sides])
        longest = int(lengths.max())
        padded = [[torch.nn.functional.pad(x, (0, longest - len(x)), value=9.0) for x in terms] for terms in sides]
        self.logratios, self.kls, self.reward_mask, self.kl_mask = (
            torch.stack(pair).unsqueeze(0) for pair in zip(*padded, strict=True)
        )
        self.tokens = (torch.arange(longest) < lengths.unsqueeze(-1)).unsqueeze(0)

    def loss(self, **options):
        return sparsepo_loss(
            self.logratios, self.kls, self.reward_mask, self.kl_mask, self.tokens, PAIR_SCORES, BOTH, **options
        )


def halved(case):
    """The options of a common mask: each of its two penalties pays half."""
    factor = 0.5 if case["function"] == "sparsepo_common" else 1.0
    options = case["options"]
    return {"beta": options["beta"], **{k: factor * options[k] for k in ("reward_l1", "kl_l1") if k in options}}


@pytest.mark.parametrize("ranking", ["best_worst", "plackett_luce"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["S1", "S2", "S3", "S4", "S5", "S6", "S7", "Z1", "Z2", "O1", "U1"])
def test_vector(name, dtype, ranking):
    case, pair = CASES[name], Pair(CASES[name], dtype)
    loss = pair.loss(**halved(case), ranking=ranking)
    loss.sum().backward()
    close(loss[0], case["expected"]["loss"], dtype)
    gradients = {k: v for k, v in case["expected"].items() if k.startswith("grad_")}
    assert len(gradients) >= 2
    for key, expected in gradients.items():
        close(pair.leaves[key.removeprefix("grad_")].grad, expected, dtype)
    for side in "wl":  # a shift of all logits of a token changes nothing
        sums = pair.leaves[f"logits_{side}"].grad.sum(-1)
        torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name, kl", [("P1", 0.0), ("P2", 1.0), ("P3", None)])
def test_dpo_and_tdpo1_are_limits_and_tdpo2(name, kl):
    case, pair = CASES[name], Pair(CASES[name])
    if kl is None:
        loss = tdpo2_loss(pair.logratios, pair.kls, pair.tokens, PAIR_SCORES, BOTH, **case["options"])
    else:
        pair.kl_mask = torch.full_like(pair.kl_mask, kl)
        loss = pair.loss(beta=case["options"]["beta"])
    loss.sum().backward()
    close(loss[0], case["expected"]["loss"])
    for side in "wl":
        close(pair.leaves[f"logits_{side}"].grad, case["expected"][f"grad_logits_{side}"])


def test_unshifted_sequences_with_garbage():
    case = CASES["X1"]
    inputs, sides = case["inputs"], []
    for side in "wl":
        labels = torch.tensor(inputs[f"labels_{side}"])[1:]
        logits, ref_logits = (torch.tensor(inputs[f"{k}_{side}"]).double()[:-1] for k in ("logits", "ref_logits"))
        tokens = labels != -100
        masks = [torch.tensor(inputs[f"{k}_{side}"]).double() for k in ("reward_mask", "kl_mask")]
        sides.append((*token_terms(logits, ref_logits, labels.clamp(min=0)), *masks, tokens))
    tensors = [torch.stack(values).unsqueeze(0) for values in zip(*sides, strict=True)]
    loss = sparsepo_loss(*tensors[:4], tensors[4], PAIR_SCORES, BOTH, **case["options"])
    close(loss[0], case["expected"]["loss"])
    for garbage in (math.nan, math.inf, -1e30):
        dirty = [x.masked_fill(~tensors[4], garbage).requires_grad_() for x in tensors[:4]]
        again = sparsepo_loss(*dirty, tensors[4], PAIR_SCORES, BOTH, **case["options"])
        again.sum().backward()
        close(again[0], case["expected"]["loss"])
        assert all(x.grad.isfinite().all() and not x.grad[~tensors[4]].any() for x in dirty)


def test_padded_batch_vector():
    case, pairs = CASES["X2"], [Pair(CASES["S2"]), Pair(CASES["S2"], cut=2)]
    assert not pairs[1].tokens.all()
    losses = torch.cat([pair.loss(**CASES["S2"]["options"]) for pair in pairs])
    close(losses, case["expected"]["losses"])
    close(losses.mean(), case["expected"]["loss"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_learned_head_vector(dtype):
    case = CASES["H1"]
    inputs, expected = case["inputs"], case["expected"]
    head = MaskHead(2, 4, eps=case["options"]["layernorm_eps"]).to(dtype)
    names = {"weight": "layer_weight", "bias": "layer_bias", "mixer": "mixer_weight", "scale": "layernorm_weight",
             "shift": "layernorm_bias"}  # fmt: skip
    with torch.no_grad():
        for name, key in names.items():
            getattr(head, name).copy_(torch.tensor(inputs[key], dtype=dtype))
    states = {side: torch.tensor(inputs[f"hidden_states_{side}"], dtype=dtype) for side in "wl"}
    masks = {side: head(states[side]) for side in "wl"}
    for side in "wl":
        close(masks[side], expected[f"common_mask_{side}"], dtype)
    pair = Pair(case, dtype)
    pair.reward_mask = pair.kl_mask = torch.stack([masks["w"], masks["l"]]).unsqueeze(0)
    loss = pair.loss(beta=case["options"]["beta"])
    loss.sum().backward()
    close(loss[0], expected["loss"], dtype)
    for name, key in names.items():
        close(getattr(head, name).grad, expected[f"grad_{key}"], dtype)
    for side in "wl":
        close(pair.leaves[f"logits_{side}"].grad, expected[f"grad_logits_{side}"], dtype)


def test_head_gradients_by_finite_differences():
    torch.manual_seed(1)
    head = MaskHead(3, 5, eps=1e-5, std=1.0, start="dense").double()
    states = torch.randn(3, 4, 5, dtype=torch.float64)
    parameters = dict(head.named_parameters())
    assert head(states).count_nonzero() >= 2

    def value(*values):
        return torch.func.functional_call(head, dict(zip(parameters, values, strict=True)), (states,))

    assert torch.autograd.gradcheck(value, tuple(p.detach().requires_grad_() for p in parameters.values()))


@pytest.mark.parametrize("name", ["M1", "M2", "M3", "M4"])
def test_activation_mask_vector(name):
    case = CASES[name]
    found = {
        kind: torch.stack([torch.tensor(a, dtype=torch.float64).mean(-1) for a in values])[:, None, None]
        for kind, values in case["inputs"]["activations"].items()
    }
    tokens = torch.ones_like(next(iter(found.values()))[0], dtype=torch.bool)
    close(activation_mask(found, tokens)[0, 0], case["expected"]["mask"])
    # Padding, another response, and any scale and offset of an activation change nothing.
    wide = {k: torch.nn.functional.pad(3 * v - 7, (1, 2, 0, 1), value=math.nan) for k, v in found.items()}
    tokens = torch.nn.functional.pad(tokens, (1, 2, 0, 1))
    mask = activation_mask(wide, tokens)
    close(mask[0, 0, 1:-2], case["expected"]["mask"])
    assert not mask[~tokens].any()


def test_statistics_vector():
    case = CASES["Y1"]
    values = torch.tensor(case["inputs"]["mask"], dtype=torch.float64)
    found = mask_statistics(values, torch.tensor(case["inputs"]["completion_mask"]).bool())
    close(found["sparsity"], case["expected"]["sparsity_percent"])
    close(found["mean"], case["expected"]["mean_mask_value"])
    dead = mask_statistics(torch.tensor([[0.0, 5.0], [5.0, 5.0]]), torch.tensor([[True, False], [False, False]]))
    assert dead["dead"][0] == 1 and dead["sparsity"][1].isnan()


def random_inputs(b=3, k=4, r=5, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(b, k, r, generator=generator, dtype=torch.float64)

    logratios, kls, reward_mask, kl_mask = draw(), draw().abs(), draw().abs(), draw().abs()
    mask = torch.ones(b, k, dtype=torch.bool)
    if k > 2:
        mask[0, 1], mask[2, 3] = False, False
    lengths = torch.randint(1, r + 1, (b, k), generator=generator)
    tokens = (torch.arange(r) < lengths.unsqueeze(-1)) & mask.unsqueeze(-1)
    scores = torch.randn(b, k, generator=generator, dtype=torch.float64)
    return [logratios, kls, reward_mask, kl_mask], tokens, scores, mask


@pytest.mark.parametrize("ranking", ["best_worst", "plackett_luce"])
def test_gradcheck_permutation_and_ragged_k(ranking):
    tensors, tokens, scores, mask = random_inputs()
    tensors = [x.requires_grad_() for x in tensors]
    options = {"beta": 0.3, "reward_l1": 0.02, "kl_l1": 0.03, "ranking": ranking}

    def loss(*x):
        return sparsepo_loss(*x, tokens, scores, mask, **options)

    assert torch.autograd.gradcheck(loss, tuple(tensors))
    expected, order = loss(*tensors), torch.tensor([2, 0, 3, 1])
    moved = sparsepo_loss(
        *(x[:, order] for x in tensors), tokens[:, order], scores[:, order], mask[:, order], **options
    )
    torch.testing.assert_close(moved, expected)
    gradients = torch.autograd.grad(expected.sum(), tensors)
    assert all(not g[~tokens].any() for g in gradients)
    tied = sparsepo_loss(*tensors, tokens, torch.ones_like(scores), mask, **options)
    assert not tied.any() and not any(g.any() for g in torch.autograd.grad(tied.sum(), tensors, allow_unused=False))


def test_more_responses_compare_best_with_worst_or_rank_all():
    tensors, tokens, scores, mask = random_inputs()
    f = ((tensors[2] * tensors[0] + tensors[3] * tensors[1]) * tokens).sum(-1)
    options = {"beta": 0.4, "reward_l1": 0.1}
    sizes = 0.1 * (tensors[2] * tokens).sum(-1)
    best, worst = scores.masked_fill(~mask, -9).argmax(-1), scores.masked_fill(~mask, 9).argmin(-1)
    rows = torch.arange(3)
    expected = softplus(-0.4 * (f[rows, best] - f[rows, worst])) + sizes[rows, best] + sizes[rows, worst]
    torch.testing.assert_close(sparsepo_loss(*tensors, tokens, scores, mask, **options), expected)
    ranked = []
    for i in range(3):
        order = [j for j in scores[i].argsort(descending=True).tolist() if mask[i, j]]
        stages = [torch.logsumexp(0.4 * f[i, order[n:]], 0) - 0.4 * f[i, order[n]] for n in range(len(order))]
        ranked.append(sum(stages) + sizes[i, order].sum())
    found = sparsepo_loss(*tensors, tokens, scores, mask, **options, ranking="plackett_luce")
    torch.testing.assert_close(found, torch.stack(ranked))


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"mask_reward": False, "kl_term": "none"}, "mask to ones"),
        ({"independent": True, "mask": "activations"}, "independent"),
        ({"mask_kl": False, "kl_l1": 0.1}, "kl_l1"),
        ({"mask": "ones", "mask_learning_rate": 0.1}, "mask_learning_rate"),
        ({"tdpo2_alpha": 0.1}, "tdpo2_alpha"),
        ({"kl_term": "tdpo2", "mask": "ones", "ranking": "plackett_luce"}, "tdpo2"),
        ({"precompute_ref_logps": True}, "precompute_ref_logps"),
    ],
    ids=str,
)
def test_wrong_options_name_themselves(tmp_path, wrong, word):
    with pytest.raises(ValueError, match=word):
        SparsePOConfig(output_dir=str(tmp_path), use_cpu=True, **wrong)


def test_which_masks_there_are_and_what_a_common_one_pays(tmp_path):
    def config(**options):
        return SparsePOConfig(output_dir=str(tmp_path), use_cpu=True, **options)

    common = config(reward_l1=0.5, kl_l1=0.5)
    assert common.head_names == ["common"] and common.penalties == {"reward_l1": 0.25, "kl_l1": 0.25}
    two = config(independent=True, reward_l1=0.5, kl_l1=0.1)
    assert two.head_names == ["reward", "kl"] and two.penalties == {"reward_l1": 0.5, "kl_l1": 0.1}
    one = config(mask_kl=False, reward_l1=0.5)
    assert one.masked == ("reward",) and one.penalties["reward_l1"] == 0.5
    dpo = config(mask="ones", kl_term="none", precompute_ref_logps=True)
    assert dpo.masked == () and not dpo.needs_states and dpo.head_names == []
