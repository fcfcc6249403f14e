"""The warning signs of a page: each lights up on a history that has it, and stays dark on one that has not."""

import math

import numpy as np
import pytest

from trainers.pages.signs import SIGNS, evaluations, points, signs

STEPS = 12
NOISE = np.random.default_rng(0).normal(0, 1, (STEPS, 4))


def history(**changes):
    """A healthy run of 12 logs: loss falls, margin and accuracy rise, lengths are equal; `changes` map i to values."""
    logs = []
    for i in range(STEPS):
        noise = NOISE[i]
        log = {
            "step": 10 * (i + 1), "loss": 0.69 - 0.02 * i + 0.01 * noise[0], "grad_norm": 1.0,
            "rewards/margins": 0.1 * i + 0.02 * noise[1], "ranking/pairwise_accuracy": 0.5 + 0.02 * i,
            "length/chosen": 50 + noise[2], "length/rejected": 50 + noise[3], "prompts/without_signal": 0.1,
        }  # fmt: skip
        log |= {
            "logps/chosen": -2.0 * log["length/chosen"],
            "logps/rejected": -(2 + 0.02 * i) * log["length/rejected"],
        }
        logs.append(log | {name.replace("__", "/"): of(i) for name, of in changes.items() if of(i) is not None})
    return logs


def evaluated(logs, **values):
    """With evaluations at steps 40, 80 and 120, of `values` by metric."""
    ends = [
        {"step": 40 * (i + 1), "eval_runtime": 1.0} | {f"eval_{n.replace('__', '/')}": v[i] for n, v in values.items()}
        for i in range(3)
    ]
    return [*logs, *ends]


def found(logs):
    return {sign.name: sign.found for sign in signs(logs)}


def lit(logs):
    return {name for name, text in found(logs).items() if text}


FALLING = {f"logps__{side}": lambda i: -100.0 - 3 * i for side in ("chosen", "rejected")}
LEAD = {"length__chosen": lambda i: 55 + (5 if i % 2 else -5), "length__rejected": lambda i: 50.0}
CASES = {  # name of the sign: a history that has it, and one that is close and has it not
    "Both log-probabilities fall": (history(**FALLING), history(logps__rejected=FALLING["logps__rejected"])),
    "Chosen responses are longer": (history(length__chosen=lambda i: 61.0), history(length__chosen=lambda i: 59.0)),
    "Length explains the margins": (
        history(**LEAD, rewards__margins=lambda i: 0.1 * i + (0.3 if i % 2 else -0.3)),
        history(**LEAD, rewards__margins=lambda i: 0.1 * i + (0.3 if i // 2 % 2 else -0.3)),
    ),
    "Nothing is learned": (
        history(ranking__pairwise_accuracy=lambda i: 0.5, rewards__margins=lambda i: 0.01 * (-1) ** i),
        history(ranking__pairwise_accuracy=lambda i: 0.5),  # whose margin rises
    ),
    "The loss breaks or jumps": (
        history(loss=lambda i: 2.0 if i == 7 else None),
        history(loss=lambda i: 0.7 + 0.1 * NOISE[i][0]),
    ),
    "Most prompts carry no signal": (
        history(prompts__without_signal=lambda i: 0.51),
        history(prompts__without_signal=lambda i: 0.49),
    ),
    "Evaluation turns up": (
        evaluated(history(), loss=[0.6, 0.55, 0.57]),
        evaluated(history(), loss=[0.6, 0.55, 0.56]),  # up by less than 2 %
    ),
}


def test_there_is_a_case_for_every_sign_and_a_healthy_run_has_none():
    assert list(CASES) == [name for name, *_ in SIGNS]
    better = {"rewards/margins": [0.1, 0.2, 0.3], "ranking/pairwise_accuracy": [0.5, 0.6, 0.7]}
    healthy = evaluated(history(), loss=[0.6, 0.55, 0.5], **better)
    assert lit(healthy) == set() and None not in found(healthy).values()
    assert {*found([]).values()} == {None}  # nothing can be told yet


@pytest.mark.parametrize("name", CASES)
def test_a_sign_lights_up_where_it_holds_and_nowhere_else(name):
    has, lacks = CASES[name]
    assert lit(has) == {name} and name not in lit(lacks)
    assert all(sign.rule and sign.advice for sign in signs(has))


def test_evaluations_decide_where_there_are_enough():
    falling = {"logps__chosen": [-100, -110, -120], "logps__rejected": [-100, -120, -140], "length__chosen": [50] * 3}
    logs = evaluated(history(), **falling, length__rejected=[50] * 3)
    assert "In the eval logs chosen changed by -0.4 nats per token" in found(logs)["Both log-probabilities fall"]
    two = [log for log in logs if not (log["step"] == 120 and "eval_runtime" in log)]
    assert not found(two)["Both log-probabilities fall"]
    # An evaluation that turns while the training loss turns too is no sign of rows that are learned by heart.
    worse = evaluated(history(loss=lambda i: 0.5 + 0.05 * i), loss=[0.6, 0.55, 0.7])
    assert "Evaluation turns up" not in lit(worse)


def test_what_is_not_finite_is_named_with_its_step():
    told = found(history(loss=lambda i: math.nan if i == 4 else None))["The loss breaks or jumps"]
    assert told == "loss is nan at step 50, and not finite in 1 logs."
    assert "grad_norm is inf at step 120" in found(history(grad_norm=lambda i: math.inf if i == 11 else None))[
        "The loss breaks or jumps"
    ]  # fmt: skip


def test_where_runs_were_evaluated_and_what_counts_as_a_point():
    logs = [{"step": 1, "loss": math.inf}, {"step": 2}, {"step": 3, "loss": 0.25}]
    assert [values.tolist() for values in points(logs, "loss")] == [[3], [0.25]]
    assert evaluations([{"eval_runtime": 1}, {"eval_b_runtime": 1, "train_runtime": 3}]) == ["eval", "eval_b"]


def test_made_up_runs_without_a_fault_are_left_alone_and_a_fall_amid_noise_is_seen():
    def noisy(fall, generator):
        logs = history()
        for i, log in enumerate(logs):
            z = generator.normal(0, 1, 6)
            log |= {"loss": log["loss"] + 0.05 * z[0], "rewards/margins": log["rewards/margins"] + 0.1 * z[1]}
            for side, shift, noise in (("chosen", z[2], z[3]), ("rejected", z[4], z[5])):
                length = 55 + 5 * shift
                logps = -(1.6 + fall * i / STEPS + 0.05 * noise) * length
                log |= {f"length/{side}": length, f"logps/{side}": logps}
        return logs

    generator = np.random.default_rng(1)
    assert sum(bool(lit(noisy(0, generator))) for _ in range(100)) <= 10
    seen = sum("Both log-probabilities fall" in lit(noisy(0.2, generator)) for _ in range(100))
    assert seen >= 70
