"""All losses on hand-worked vectors, and what they have in common."""

import itertools
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from helpers import close
from trainers import Forward, LIRETrainer, SWEPOTrainer
from trainers.dpo import dpo_loss, score_pairs
from trainers.infonca import infonca_loss, nca_loss
from trainers.likelihood import ranking_logps, sft_loss
from trainers.lire import lire_loss
from trainers.plackett_luce import plackett_luce_loss
from trainers.rrhf import rrhf_loss
from trainers.swepo import swepo_loss

VECTORS = {
    name: json.loads((Path(__file__).parent / f"vectors/{name}.json").read_text()) for name in ("lire", "swepo")
}
CASES = {
    f"{case['id']} {case['function']}": case
    for vectors in VECTORS.values()
    for case in vectors["cases"]
    if "offset" not in case["options"]  # DPO with an offset is SWEPO with signed weights, which has the same vectors
}
RENAMED = {"m": "top_m"}


def swepo_options(case):
    return {"alpha": 0.0, **{RENAMED.get(k, k): v for k, v in case["options"].items()}}


def loss_of(case, logps, inputs):
    """The losses of a vector case; `logps` are the sums that the expected gradient is with respect to."""
    options, function = dict(case["options"]), case["function"]
    reduction = options.pop("reduction", None)
    logratios = logps - inputs["ref_seq_logps"] if "ref_seq_logps" in inputs else logps
    # The DPO pair of the LIRE vectors comes without scores, winner first.
    scores = inputs.get("scores", -torch.arange(logps.size(-1), dtype=logps.dtype).unsqueeze(0))
    mask = inputs.get("mask", torch.ones_like(logps)).bool()
    match function:
        case "swepo":
            return swepo_loss(logratios, scores, mask, **swepo_options(case))
        case "lire":
            return lire_loss(logps, scores, mask, lengths=inputs.get("lengths"), **options)
        case "dpo" | "dpo_best_worst" | "dpo_best_rest":
            return dpo_loss(logratios, scores, mask, pairs=function[4:] or "best_worst", **options)
        case "dpo_all_pairs":
            number = score_pairs(scores, mask, "all").sum() if reduction == "sum" else 1
            return dpo_loss(logratios, scores, mask, pairs="all", **options) * number
        case "listmle_dpo_pl":
            return plackett_luce_loss(logratios, scores, mask, reduction=reduction, **options)
        case "listmle_length_averaged":
            return plackett_luce_loss(logps / inputs["lengths"], scores, mask, beta=1)
        case "infonca":
            return infonca_loss(logratios, scores, mask, **options)
        case "nca":
            return nca_loss(logratios, scores, mask, **options)
        case "rrhf":
            return rrhf_loss(logps, scores, mask, inputs["lengths"], sft_weight={"none": 0, "sum": 1}[options["sft"]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_vector(name, dtype):
    case = CASES[name]
    inputs = {k: torch.tensor([v], dtype=dtype) for k, v in case["inputs"].items()}
    if "logratios" in inputs:
        inputs = {k: inputs[k] for k in ("logratios", "scores")}
    key = "logratios" if "logratios" in inputs else "seq_logps"
    variable = inputs[key].requires_grad_()
    loss = loss_of(case, variable, inputs)
    loss.sum().backward()
    close(loss[0], case["expected"]["loss"], dtype)
    close(variable.grad[0], case["expected"]["grad_" + key], dtype)


@pytest.mark.parametrize("name", VECTORS)
def test_a_padded_batch(name):
    """Padded slots hold garbage; SWEPO's mean is over the prompts with a signal, LIRE's over all."""
    for case in VECTORS[name]["batch_cases"]:
        inputs = {k: torch.tensor(v, dtype=torch.float64) for k, v in case["inputs"].items()}
        key = "logratios" if "logratios" in inputs else "seq_logps"
        losses = loss_of(case, inputs[key].requires_grad_(), inputs)
        close(losses, case["expected"]["losses"])
        mean = losses.sum() / sum(case["expected"].get("used", [1] * len(losses)))
        close(mean, case["expected"]["loss"])
        mean.backward()
        close(inputs[key].grad, case["expected"][f"grad_{key}_of_loss"])


@pytest.mark.parametrize("cls", [LIRETrainer, SWEPOTrainer])
def test_trainers_sum_over_tokens_and_do_not_average(tmp_path, cls):
    for case in VECTORS[cls.method.lower()]["token_cases"]:
        inputs = {k: torch.tensor(v, dtype=torch.float64) for k, v in case["inputs"].items()}
        logps, tokens = inputs["logps"].requires_grad_(), inputs["completion_mask"].bool()
        options = case["options"] if cls is LIRETrainer else swepo_options(case)
        trainer = cls.__new__(cls)
        trainer.args = cls.config_class(output_dir=str(tmp_path), use_cpu=True, **options)
        batch = {"scores": inputs["scores"], "mask": tokens.any(-1), "response_mask": tokens}
        reference = Forward(inputs.get("ref_logps", torch.zeros_like(logps)) * tokens)
        losses, _ = trainer.loss(batch, Forward(logps * tokens), reference)
        losses.sum().backward()
        close(losses[0], case["expected"]["loss"])
        close(logps.grad, case["expected"]["grad_logps"])
        assert abs(losses.item() - case["not_expected"]["loss_if_token_mean_were_used"]) > 1e-3


# What all losses share. x stands for log-ratios or, for the methods without a reference, log-probabilities.

LENGTHS = torch.tensor([[4, 9, 1, 6, 3], [2, 5, 8, 1, 7], [3, 3, 6, 2, 9]])
SWEPO = (
    {}, {"weighting": "none"}, {"weighting": "signed"}, {"weighting": "signed", "power": 2}, {"power": 0},
    {"positives": "best"}, {"positives": "top_m"}, {"positives": "top_m", "mean_over": "all"}, {"gamma": 2.5},
    {"alpha_inside_beta": True},
)  # fmt: skip
LOSSES = {
    **{f"swepo {o}": lambda x, s, m, n, o=o: swepo_loss(x, s, m, **{"beta": 0.3, "alpha": 0.4} | o) for o in SWEPO},
    "lire": lambda x, s, m, n: lire_loss(x, s, m),
    "lire none": lambda x, s, m, n: lire_loss(x, s, m, score_transform="none"),
    "lire zscore": lambda x, s, m, n: lire_loss(x, s, m, score_transform="zscore", temperature=0.7),
    "lire per token": lambda x, s, m, n: lire_loss(x, s, m, length_average=True, lengths=n, temperature=0.5),
    "lire sft": lambda x, s, m, n: lire_loss(x, s, m, sft_alpha=0.2, lengths=n),
    "dpo": lambda x, s, m, n: dpo_loss(x, s, m, beta=0.3),
    "dpo best_rest": lambda x, s, m, n: dpo_loss(x, s, m, beta=0.3, pairs="best_rest"),
    "dpo all": lambda x, s, m, n: dpo_loss(x, s, m, beta=0.3, pairs="all", label_smoothing=0.1),
    "plackett_luce": lambda x, s, m, n: plackett_luce_loss(x, s, m, beta=0.3),
    "plackett_luce mean": lambda x, s, m, n: plackett_luce_loss(x, s, m, beta=0.3, reduction="mean"),
    "ranking": lambda x, s, m, n: -ranking_logps(0.3 * x, s, m),
    "ranking top 1": lambda x, s, m, n: -ranking_logps(0.3 * x, s, m, top=1),
    "infonca": lambda x, s, m, n: infonca_loss(x, s, m, beta=0.3, alpha=0.7),
    "nca": lambda x, s, m, n: nca_loss(x, s, m, beta=0.3, alpha=0.7),
    "rrhf": lambda x, s, m, n: rrhf_loss(x, s, m, n, sft_weight=0.5),
    "rrhf hinge": lambda x, s, m, n: rrhf_loss(x, s, m, n, sft_weight=0),
}
# Losses that only compare responses do not change when all of a prompt's x move by the same amount.
ABSOLUTE = {"lire sft", "nca", "rrhf"}
PER_TOKEN = {"lire per token", "rrhf hinge"}
# The SFT term is about the first of several best responses.
FIRST_BEST = {"lire sft", "rrhf", "swepo {'positives': 'best'}"}


def example():
    """Three prompts with 5, 4 and 3 responses."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    scores = torch.randn(3, 5, generator=generator, dtype=torch.float64) * 2
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [0, 1, 1, 1, 0]]).bool()
    return x, scores, mask


def gradient(loss, x, *arguments):
    return torch.autograd.grad(loss(x, *arguments).sum(), x)[0]


@pytest.fixture(params=LOSSES)
def name(request):
    return request.param


def test_gradients_agree_with_finite_differences_and_none_passes_through_the_scores(name):
    x, scores, mask = example()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, scores, mask, LENGTHS), x)
    LOSSES[name](x, scores.requires_grad_(), mask, LENGTHS).sum().backward()
    assert scores.grad is None or not scores.grad.any()


def test_permuted_responses_permute_the_gradient(name):
    x, scores, mask = example()
    order = torch.tensor([3, 0, 4, 2, 1])
    moved = x.detach()[:, order].requires_grad_()
    arguments = scores[:, order], mask[:, order], LENGTHS[:, order]
    expected = gradient(LOSSES[name], x, scores, mask, LENGTHS)
    assert expected[mask].abs().max() > 1e-3
    torch.testing.assert_close(LOSSES[name](moved, *arguments), LOSSES[name](x, scores, mask, LENGTHS))
    torch.testing.assert_close(gradient(LOSSES[name], moved, *arguments), expected[:, order])


def test_the_order_of_tied_responses_changes_nothing(name):
    if "top_m" in name:  # which of two tied responses is left out depends on the order
        return
    x, _, mask = example()
    scores = torch.tensor([[2.0, 3, 3, 1, 1], [4, 9, 4, 4, 1], [9, 0, 0, 5, 9]], dtype=torch.float64)
    order = torch.tensor([4, 2, 0, 1, 3])
    moved = LOSSES[name](x[:, order], scores[:, order], mask[:, order], LENGTHS[:, order])
    plain = LOSSES[name](x, scores, mask, LENGTHS)
    single_best = torch.tensor([False, False, True])
    keep = single_best if name in FIRST_BEST else torch.ones(3, dtype=torch.bool)
    torch.testing.assert_close(moved[keep], plain[keep])


def test_padded_slots_do_not_matter_whatever_they_hold(name):
    x, scores, mask = example()
    expected, slope = LOSSES[name](x, scores, mask, LENGTHS), gradient(LOSSES[name], x, scores, mask, LENGTHS)
    assert not slope[~mask].any()
    for garbage in (math.nan, math.inf, -math.inf, 1e30):
        dirty = x.detach().masked_fill(~mask, garbage).requires_grad_()
        arguments = scores.masked_fill(~mask, garbage), mask, LENGTHS.masked_fill(~mask, 0)
        torch.testing.assert_close(LOSSES[name](dirty, *arguments), expected, rtol=0, atol=1e-12)
        found = gradient(LOSSES[name], dirty, *arguments)
        torch.testing.assert_close(found[mask], slope[mask], rtol=0, atol=1e-12)
        assert not found[~mask].nan_to_num(0).any()
    alone = [LOSSES[name](x[i : i + 1, m], scores[i : i + 1, m], mask[i : i + 1, m], LENGTHS[i : i + 1, m])
             for i, m in enumerate(mask)]  # fmt: skip
    torch.testing.assert_close(torch.cat(alone), expected, rtol=0, atol=1e-12)


def test_shifts(name):
    x, scores, mask = example()
    slope = gradient(LOSSES[name], x, scores, mask, LENGTHS)
    torch.testing.assert_close(gradient(LOSSES[name], x, scores - 1000, mask, LENGTHS), slope)
    if name in ABSOLUTE:
        return
    shift = 7.0 * LENGTHS if name in PER_TOKEN else 7.0
    torch.testing.assert_close(LOSSES[name](x + shift, scores, mask, LENGTHS), LOSSES[name](x, scores, mask, LENGTHS))
    total = (slope * LENGTHS if name in PER_TOKEN else slope).sum(-1)
    torch.testing.assert_close(total, torch.zeros(3).double(), rtol=0, atol=1e-12)


def test_prompts_without_a_signal_give_no_gradient(name):
    x, scores, mask = example()
    expected, slope = LOSSES[name](x, scores, mask, LENGTHS), gradient(LOSSES[name], x, scores, mask, LENGTHS)
    scores[1], scores[2], mask[2] = 0.7, 0.0, torch.tensor([False, True, False, False, False])
    empty = torch.zeros(1, 5)
    x = torch.cat([x.detach(), empty]).requires_grad_()
    arguments = torch.cat([scores, empty]), torch.cat([mask, empty.bool()]), torch.cat([LENGTHS, empty.long() + 1])
    losses, found = LOSSES[name](x, *arguments), gradient(LOSSES[name], x, *arguments)
    torch.testing.assert_close(losses[0], expected[0])
    torch.testing.assert_close(found[0], slope[0])
    assert not found[1:].any()
    constants = {**dict.fromkeys(("lire", "lire sft", "lire per token"), [-1 / 4, -1]), "lire none": [-0.7, 0]}
    assert losses[1:].tolist() == pytest.approx(
        [*constants.get(name, [0, 0]), 0], abs=1e-12 if name in constants else 0
    )


def test_a_step_raises_the_best_and_lowers_the_worst(name):
    x, scores, mask = example()
    wrong = (-scores).requires_grad_()  # the worse the likelier
    slope = gradient(LOSSES[name], wrong, scores, mask, torch.full_like(LENGTHS, 3))
    best, worst = scores.masked_fill(~mask, -99).argmax(-1), scores.masked_fill(~mask, 99).argmin(-1)
    assert (slope.gather(-1, best[:, None]) < 0).all() and (slope.gather(-1, worst[:, None]) > 0).all()


def test_extreme_values_stay_finite(name):
    x = torch.tensor([[-6000.0, -10000, -8000, -12000], [3000, -9000, 0, 500]], requires_grad=True)
    scores = torch.tensor([[300.0, -300, 0, 900], [1e-3, 0, 2e-3, -1e-3]])
    losses = LOSSES[name](x, scores, torch.ones(2, 4).bool(), torch.full((2, 4), 50))
    assert losses.isfinite().all() and torch.autograd.grad(losses.sum(), x)[0].isfinite().all()


# What single losses are.


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_sft_term_is_by_hand_and_only_the_preferred_responses_count(reduction):
    lengths, weights = [[2, 5, 1], [3, 0, 4]], torch.tensor([[0.5, 0, 0.5], [0, 0, 0.25]], dtype=torch.float64)
    tokens = torch.arange(5) < torch.tensor(lengths).unsqueeze(-1)
    logps = -torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logps[0, 1] = -math.inf  # a response that is not preferred
    logps = logps.masked_fill(~tokens, math.nan).requires_grad_()
    losses = sft_loss(logps, tokens, weights, reduction=reduction)
    losses.sum().backward()
    divisors = lengths if reduction == "mean" else [[1] * 3] * 2
    for b in range(2):
        terms = [
            float(weights[b, k]) * -logps[b, k, : lengths[b][k]].sum().item() / divisors[b][k]
            for k in range(3) if weights[b, k]
        ]  # fmt: skip
        assert losses[b].item() == pytest.approx(sum(terms), abs=1e-12)
        for k in range(3):
            slope = -float(weights[b, k]) / divisors[b][k] if weights[b, k] else 0.0
            assert logps.grad[b, k].tolist() == pytest.approx([slope * bool(real) for real in tokens[b, k]])


def test_two_responses_make_one_pair_for_every_method_that_contrasts_pairs():
    x = torch.tensor([[1.3, -0.4], [-2.0, 0.5]], dtype=torch.float64)
    scores, mask = torch.tensor([[6.0, 4.0], [0.0, 1.0]]).double(), torch.ones(2, 2).bool()
    expected = -torch.nn.functional.logsigmoid(0.1 * torch.tensor([1.7, 2.5], dtype=torch.float64))
    for loss in (
        *(dpo_loss(x, scores, mask, beta=0.1, pairs=pairs) for pairs in ("best_worst", "best_rest", "all")),
        plackett_luce_loss(x, scores, mask, beta=0.1),
        infonca_loss(x, scores, mask, beta=0.1, alpha=1e4),
        swepo_loss(x, scores, mask, beta=0.1, alpha=3.0, weighting="none"),
        swepo_loss(x, scores, mask, beta=0.1, alpha=0.5, power=2),
        *(swepo_loss(x, scores, mask, beta=0.1, alpha=0.2, positives=p) for p in ("above_mean", "best", "top_m")),
    ):
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)


def test_pairs_with_ties():
    scores, mask = torch.tensor([[5.0, 5, 3, 1, 9]]), torch.tensor([[1, 1, 1, 1, 0]]).bool()
    expected = {
        "best_worst": {(0, 3), (1, 3)},
        "best_rest": {(0, 2), (0, 3), (1, 2), (1, 3)},
        "all": {(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)},
    }
    for pairs, members in expected.items():
        found = score_pairs(scores, mask, pairs)[0].nonzero().tolist()
        assert {tuple(pair) for pair in found} == members and len(found) == len(members)


def test_plackett_luce_probabilities_of_all_rankings_sum_to_one():
    x = torch.tensor([[0.3, -1.2, 2.0, 0.7]], dtype=torch.float64)
    likelihoods = [
        (-plackett_luce_loss(x, torch.tensor([ranking]).double(), torch.ones(1, 4).bool(), beta=0.5)).exp()
        for ranking in itertools.permutations(range(4))
    ]
    torch.testing.assert_close(sum(likelihoods), torch.ones(1).double())


def test_plackett_luce_never_compares_tied_responses():
    r = [0.3, -1.2, 2.0, 0.7]
    scores = torch.tensor([[4.0, 2, 2, 1]]).double()
    found = plackett_luce_loss(torch.tensor([r], dtype=torch.float64), scores, torch.ones(1, 4).bool(), beta=1)

    def choice(chosen, *others):
        return math.log(sum(math.exp(r[i]) for i in (chosen, *others))) - r[chosen]

    assert found.item() == pytest.approx(choice(0, 1, 2, 3) + choice(1, 3) + choice(2, 3), abs=1e-12)


def test_infonca_is_least_where_the_rewards_are_alpha_times_the_scores():
    _, scores, mask = example()
    x = (0.7 / 0.3 * scores + 5).requires_grad_()
    assert gradient(LOSSES["infonca"], x, scores, mask, LENGTHS).abs().max() < 1e-12


@pytest.mark.parametrize("loss", [infonca_loss, nca_loss])
def test_a_large_common_offset_of_the_scores_costs_no_precision(loss):
    x, scores, mask = torch.tensor([[0.5, -1.0, 0.3]]), torch.tensor([[3.0, 1.0, 2.0]]), torch.ones(1, 3).bool()
    torch.testing.assert_close(loss(x, scores + 1e6, mask, alpha=0.7), loss(x, scores, mask, alpha=0.7))


@pytest.mark.parametrize("loss, option", [
    (dpo_loss, "pairs"), (plackett_luce_loss, "reduction"), (lire_loss, "score_transform"), (lire_loss, "reduction"),
    (partial(swepo_loss, beta=0.1, alpha=0.1), "weighting"), (partial(swepo_loss, beta=0.1, alpha=0.1), "positives"),
])  # fmt: skip
def test_a_misspelt_choice_is_no_other_choice(loss, option):
    x, scores, mask = example()
    with pytest.raises(ValueError, match=f"{option}='bestworst' is unknown"):
        loss(x, scores, mask, **{option: "bestworst"})
