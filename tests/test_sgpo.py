"""The loss, the filters, the texts and the metrics of SGPO on hand-worked vectors, and their properties."""

import math
import random
from functools import cache, partial
from itertools import permutations

import numpy as np
import pytest
import torch

from helpers import cases_of, close
from trainers.sgpo import filters, sgpo_loss
from trainers.sgpo.filters import fault, filter_statistic, iqr_fences, iqr_keep, meta_text
from trainers.sgpo.monitor import distinct_n, edit_distance, edit_metrics, round_metrics
from trainers.sgpo.text import BLOCKS, MARKER, free_marker, improver_prompt, parse_revision, reviser_prompt

cases = partial(cases_of, "sgpo")


# The loss.


def pairs(case, dtype=torch.float64):
    """(logps, reference, scores, mask, lengths) of a DPO case, chosen first."""
    sides = [[case["inputs"][f"{p}{side}_seq_logps"] for side in ("chosen", "rejected")] for p in ("", "ref_")]
    logps, reference = (torch.tensor(side, dtype=dtype).T.contiguous() for side in sides)
    lengths = torch.tensor(case["inputs"].get("chosen_lengths", [1] * len(logps)))
    lengths = torch.stack([lengths, torch.full_like(lengths, 7)], 1)
    scores = torch.tensor([[1.0, 0.0]], dtype=dtype).expand_as(logps)
    return logps.requires_grad_(), reference, scores, torch.ones_like(logps, dtype=torch.bool), lengths


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@cases("dpo")
def test_loss_and_gradient(case, dtype):
    logps, reference, scores, mask, lengths = pairs(case, dtype)
    expected = case["expected"]
    losses = sgpo_loss(logps - reference, scores, mask, logps=logps, lengths=lengths, **case["options"])
    losses.mean().backward()
    close(losses.detach(), expected["losses"], dtype)
    close(losses.mean().detach(), expected["loss"], dtype)
    flipped = (x.flip(1) for x in (logps - reference, scores, mask))
    again = sgpo_loss(*flipped, logps=logps.flip(1), lengths=lengths.flip(1), **case["options"])
    torch.testing.assert_close(again, losses)  # whichever side comes first
    close(logps.grad[:, 0], expected["grad_chosen_seq_logps"], dtype)
    close(logps.grad[:, 1], expected["grad_rejected_seq_logps"], dtype)
    rewards = case["options"]["beta"] * (logps - reference).detach()
    close(rewards[:, 0], expected["rewards_chosen"], dtype)
    close(rewards[:, 0] - rewards[:, 1], expected["margins"], dtype)
    assert float((rewards[:, 0] > rewards[:, 1]).double().mean()) == pytest.approx(expected["accuracy"])


def test_gradcheck():
    logps = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(3, 2, dtype=torch.float64)
    scores = torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64)
    arguments = (scores, torch.ones(3, 2, dtype=torch.bool))
    lengths = torch.tensor([[3, 4]] * 3)
    assert torch.autograd.gradcheck(
        lambda x: sgpo_loss(x - reference, *arguments, logps=x, lengths=lengths, sft_weight=0.5), (logps,)
    )


# Filters.


@cases("iqr_keep")
def test_iqr_keep(case):
    options = {k: v for k, v in case["options"].items() if k != "min_examples"}
    assert case["options"]["min_examples"] == filters.FEWEST
    values, expected = case["inputs"]["values"], case["expected"]
    fences = iqr_fences(values, **options)
    assert fences.applied == expected["applied"] and fences.reason == expected.get("reason")
    for name, found in (("q1", fences.q1), ("q3", fences.q3), ("lower_fence", fences.lower),
                        ("upper_fence", fences.upper)):  # fmt: skip
        if name in expected and math.isfinite(found):
            close(found, expected[name])
    assert iqr_keep(values, **options).tolist() == expected["keep"]


def test_iqr_keep_on_random_values():
    """Order, a positive affine map and numbers that are not finite change nothing about the others."""
    for values in np.random.default_rng(0).standard_t(2, size=(20, 15)):
        kept, order = iqr_keep(values), np.random.default_rng(1).permutation(len(values))
        assert (iqr_keep(values[order]) == kept[order]).all() and (iqr_keep(3.7 * values - 11) == kept).all()
        assert iqr_keep([math.nan, *values, math.inf, -math.inf]).tolist() == [False, *kept, False, False]


@cases("filter_statistic")
def test_filter_statistic(case):
    close(filter_statistic("logp_gain", **case["inputs"]), case["expected"]["logp_gain"])


@pytest.mark.parametrize(
    "text, options, reason",
    [
        (None, {}, "no room for sampling.max_new_tokens in the model's context"),
        (" \n", {}, filters.EMPTY),
        ("A fine answer.", {"truncated": True, "option": "revision"}, "cut at revision.max_new_tokens"),
        ("a  b\n c", {"before": "a b c"}, filters.COPY),
        ("Sky is blue. <<REVISED>>", {}, filters.META),
        ("The sky is blue.", {"before": "The sky is blue!"}, None),
    ],
)
def test_hygiene_gives_its_reason(text, options, reason):
    assert fault(text, **options) == reason


ABOUT_THE_TASK = [
    "Here is the improved response: blue.", "Here's a slightly revised version of it:\nBlue.",
    "**Improved response:** Blue.", "The original response was too short. Blue.", "text " * 80 + "[[/response 2]]",
]  # fmt: skip
PLAIN = [
    "The new process improved response times in the city.", "Write a draft, then revise it.",
    "Her version of the answer was short.", "Here is a list of colours: red, blue.",
]  # fmt: skip


@pytest.mark.parametrize("text, found", [(t, True) for t in ABOUT_THE_TASK] + [(t, False) for t in PLAIN])
def test_text_about_the_task_is_found(text, found):
    assert meta_text(text) == found


# Texts.


@cases("parse_revision")
def test_parse_revision(case):
    assert [parse_revision(o, case["inputs"]["marker"]) for o in case["inputs"]["outputs"]] == case["expected"]
    assert case["inputs"]["marker"] == MARKER


def test_what_improver_and_reviser_see():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name {a} colour."}]
    [turn] = improver_prompt(chat[1:], "Red {x}.")
    assert turn["role"] == "user" and "reference" not in turn["content"]
    assert "[[prompt]]\nName {a} colour.\n[[/prompt]]\n\n[[response]]\nRed {x}.\n[[/response]]" in turn["content"]
    text = improver_prompt("Name a colour.", "Red.")
    assert isinstance(text, str) and text.endswith("\n\nResponse:\n")
    [turn], [direct] = (reviser_prompt(chat, "Red.", "Green.", analysis=analysis) for analysis in (True, False))
    for block in ("[[system]]\nBe brief.\n[[/system]]", "[[draft]]\nRed.", "[[reference]]\nGreen."):
        assert block in turn["content"] and block in direct["content"]
    assert turn["content"].count(MARKER) == 1 and MARKER not in direct["content"]
    with pytest.raises(ValueError, match="role 'user' has no text"):
        improver_prompt([{"role": "user", "content": [{"type": "image"}]}], "Red.")


def test_no_text_can_end_its_own_block():
    """Delimiters and markers of any number inside the texts: what stands between the real ones is the text whole."""
    generator = random.Random(0)
    pieces = [f"[[{s}{name}{n}]]" for name in BLOCKS for s in ("", "/") for n in ("", " 2", " 3")] + ["Red.", "\n"]
    for _ in range(60):
        prompt, draft, reference = ("x" + "".join(generator.choices(pieces, k=6)) + "x" for _ in range(3))
        [turn] = reviser_prompt([{"role": "user", "content": prompt}], draft, reference)
        content = turn["content"]
        texts = prompt + draft + reference
        taken = lambda n: any(f"{s}{b}{n}]]" in texts for b in BLOCKS for s in ("[[", "[[/"))  # noqa: B023, E731
        number = next(n for n in ("", " 2", " 3", " 4") if not taken(n))
        for name, text in (("prompt", prompt), ("draft", draft), ("reference", reference)):
            first, last = f"[[{name}{number}]]", f"[[/{name}{number}]]"
            assert content.count(first) == content.count(last) == 1
            assert content.split(first)[1].split(last)[0] == f"\n{text}\n"
    texts = [MARKER, "<<REVISED 2>>"]
    marker = free_marker(texts)
    assert marker == "<<REVISED 3>>" and parse_revision(f"{MARKER} {marker} Red.", marker) == "Red."


# Metrics.


@cases("edit_metrics")
def test_edit_metrics(case):
    for (before, after), expected in zip(case["inputs"]["pairs"], case["expected"], strict=True):
        found = edit_metrics(before, after)
        assert (found.distance, found.is_copy) == (expected["edit_distance"], expected["is_copy"])
        close([found.ratio, found.word_ratio], [expected["edit_ratio"], expected["word_ratio"]])


def test_edit_distance_is_a_distance_and_equals_the_textbook_recursion():
    @cache
    def recursion(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(recursion(a[1:], b) + 1, recursion(a, b[1:]) + 1, recursion(a[1:], b[1:]) + (a[0] != b[0]))

    texts = [p[:n] for p in permutations("abca") for n in (0, 2, 3, 4)][:40]
    assert all(edit_distance(a, b) == edit_distance(b, a) == recursion(a, b) for a in texts for b in texts)


@cases("round_metrics")
def test_round_metrics(case):
    found, expected = round_metrics(case["inputs"]["rejected"], case["inputs"]["chosen"]), case["expected"]
    for name in ("copy_rate", "median_edit_ratio", "mean_word_ratio"):
        close(found[name], expected[name])
    assert distinct_n(["a b c", "a b d"]) == 0.75  # ab twice, bc, bd
    assert math.isnan(distinct_n(["a", ""]))
