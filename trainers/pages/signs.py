"""Warning signs in the log of a training: rules with their numbers, which are our choice, and a sentence for each.

Two signs (`judged`) go by evaluations, which see the same rows each time, where there are three or more of them with
the metric, and else by the training logs. `logps` are compared per token, because the lengths in a batch would hide
any change of the sums.
"""

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

FEWEST = 5  # logs that a sign of the training needs
EVALUATIONS = 3
SURE = 2.0  # standard errors
FALL = 0.02  # nats per token
LONGER = 1.2
EXPLAINED, PAIRED = 0.6, 10  # correlation, and the logs that it needs
CHANCE = 0.55
SPIKE = 5.0
SILENT = 0.5
TURNED = 0.02

Points = tuple[np.ndarray, np.ndarray]  # steps and values of a metric, finite ones only


class Sign(NamedTuple):
    """A warning sign: `found` says what was seen, "" is nothing, and None that it cannot be told."""

    name: str
    rule: str
    found: str | None
    advice: str


def points(history: list[dict], name: str) -> Points:
    """Steps and values of a metric in a log."""
    seen = [(log["step"], log[name]) for log in history if math.isfinite(log.get(name, math.nan))]
    steps, values = zip(*seen, strict=True) if seen else ((), ())
    return np.array(steps, float), np.array(values, float)


def evaluations(history: list[dict]) -> list[str]:
    """The prefixes of evaluations in a log: eval, or eval_NAME of several data sets."""
    ends = "_runtime"
    names = dict.fromkeys(name for log in history for name in log)
    return [n.removesuffix(ends) for n in names if n.startswith("eval") and n.endswith(ends)]


def signs(history: list[dict]) -> list[Sign]:
    """Every sign of a training, whether it holds or not."""
    return [Sign(name, rule, judge(history), advice) for name, rule, judge, advice in SIGNS]


# What is judged.


def likelihoods_fall(history: list[dict]) -> str | None:
    changes = []
    for side in ("chosen", "rejected"):
        where, (steps, logps) = judged(history, f"logps/{side}")
        prefix = "" if where == "training" else f"{where}_"
        lengths = points(history, f"{prefix}length/{side}")[1]
        if len(logps) < FEWEST and where == "training" or len(lengths) != len(logps):
            return None
        changes.append(trend(steps, logps / np.maximum(lengths, 1)))
    if any(change > -FALL or change > -SURE * error for change, error in changes):
        return ""
    chosen, rejected = (change for change, _ in changes)
    return f"In the {where} logs chosen changed by {chosen:+.2g} nats per token, and rejected by {rejected:+.2g}."


def chosen_longer(history: list[dict]) -> str | None:
    (_, chosen), (_, rejected) = (points(history, f"length/{side}") for side in ("chosen", "rejected"))
    if not len(chosen) or not len(rejected):
        return None
    ratio = chosen.mean() / max(rejected.mean(), 1)
    if ratio <= LONGER:
        return ""
    return f"Chosen responses have {chosen.mean():.0f} tokens, rejected ones {rejected.mean():.0f}: {ratio:.2f} times."


def length_explains(history: list[dict]) -> str | None:
    logs = [log for log in history if {"rewards/margins", "length/chosen", "length/rejected"} <= log.keys()]
    if len(logs) < PAIRED:
        return None
    margins, lead = (
        np.array(values, float)
        for values in zip(
            *((log["rewards/margins"], log["length/chosen"] - log["length/rejected"]) for log in logs), strict=True
        )
    )
    left = [values - fitted(np.arange(len(logs)), values) for values in (margins, lead)]
    if any(np.ptp(values) < 1e-9 for values in left):
        return ""
    found = float(np.corrcoef(*left)[0, 1])
    return f"Their correlation is {found:.2f} over {len(logs)} logs." if found > EXPLAINED else ""


def nothing_learned(history: list[dict]) -> str | None:
    where, (_, accuracy) = judged(history, "ranking/pairwise_accuracy")
    prefix = "" if where == "training" else f"{where}_"
    steps, margins = points(history, f"{prefix}rewards/margins")
    if len(accuracy) < (FEWEST if where == "training" else EVALUATIONS) or len(margins) != len(accuracy):
        return None
    last, (change, error) = last_third(accuracy), trend(steps, margins)
    if last >= CHANCE or change > SURE * error:
        return ""
    return f"In the {where} logs the ranking accuracy ends at {last:.2f}, and the margin changed by {change:+.2g}."


def loss_breaks(history: list[dict]) -> str | None:
    logs = [log for log in history if "loss" in log]
    for name in ("loss", "grad_norm"):
        bad = [log for log in logs if not math.isfinite(log.get(name, 0))]
        if bad:
            return f"{name} is {bad[0][name]} at step {bad[0]['step']}, and not finite in {len(bad)} logs."
    if len(logs) < FEWEST:
        return None
    losses = [log["loss"] for log in logs]
    usual = statistics.median(abs(b - a) for a, b in zip(losses, losses[1:], strict=False))
    for log, before, loss in zip(logs[2:], losses[1:], losses[2:], strict=False):
        if loss - max(before, statistics.median(losses)) > max(SPIKE * usual, 0.2 * abs(statistics.median(losses))):
            return f"At step {log['step']} it jumped from {before:.3g} to {loss:.3g}."
    return ""


def mostly_silent(history: list[dict]) -> str | None:
    _, shares = points(history, "prompts/without_signal")
    if not len(shares):
        return None
    return f"{shares.mean():.0%} of the prompts had none." if shares.mean() > SILENT else ""


def evaluation_turns(history: list[dict]) -> str | None:
    steps, losses = points(history, "loss")
    told = None
    for prefix in evaluations(history):
        at, values = points(history, f"{prefix}_loss")
        if len(values) < EVALUATIONS:
            continue
        told = told or ""
        best = int(values.argmin())
        before, after = losses[steps <= at[best]], losses[steps > at[best]]
        if not len(before) or not len(after) or last_third(after) >= last_third(before):
            continue
        if values[-1] > values[best] + TURNED * abs(values[best]):
            told = (
                f"{prefix}_loss was lowest at step {at[best]:.0f} ({values[best]:.4g}) and is {values[-1]:.4g} at "
                f"step {at[-1]:.0f}, while the training loss went on to fall."
            )
    return told


SIGNS: tuple[tuple[str, str, Callable[[list[dict]], str | None], str], ...] = (
    (
        "Both log-probabilities fall",
        f"The line through logps / length falls by more than {FALL} nats per token over the run, and by more than "
        f"{SURE:.0f} of its standard errors, for chosen and for rejected.",
        likelihoods_fall,
        "The policy gets better at telling the two apart and worse at writing either. Some fall is usual; if it goes "
        "on, answers break: raise beta, lower learning_rate, or set sft_weight.",
    ),
    (
        "Chosen responses are longer",
        f"The mean length/chosen is above {LONGER} times the mean length/rejected.",
        chosen_longer,
        "The policy may learn to write longer, and nothing else: compare the lengths of samples (--samples), and "
        "accuracy with that of a ranking by length (polypo compare).",
    ),
    (
        "Length explains the margins",
        "Once the trend of both is taken away, rewards/margins and the lead in length of the same logs correlate by "
        f"more than {EXPLAINED}; with {PAIRED} logs or more.",
        length_explains,
        "Where chosen is much longer, the margin is larger: part of what is learned is length. Cut rows to equal "
        "lengths, or take a method that divides by length.",
    ),
    (
        "Nothing is learned",
        f"ranking/pairwise_accuracy is below {CHANCE} in the last third, where 0.5 is chance, and the line through "
        f"rewards/margins does not rise by more than {SURE:.0f} of its standard errors.",
        nothing_learned,
        "Raise learning_rate or train for longer; look whether scores say anything about the responses.",
    ),
    (
        "The loss breaks or jumps",
        f"A logged loss or grad_norm is not finite; or a loss is above both the one before and the median by "
        f"more than {SPIKE:.0f} times the usual change from log to log, and by more than 20 % of the median.",
        loss_breaks,
        "Lower learning_rate, set max_grad_norm or a warm-up, and look at the rows of that step.",
    ),
    (
        "Most prompts carry no signal",
        f"The mean prompts/without_signal is above {SILENT}.",
        mostly_silent,
        "Their scores are equal, or the method's options leave nothing to contrast: a larger part of the data trains "
        "nothing than trains something.",
    ),
    (
        "Evaluation turns up",
        f"An evaluation loss ends more than {TURNED:.0%} above its lowest value, while the training loss of the steps "
        "after that is lower than before.",
        evaluation_turns,
        "The run learns its rows by heart: stop at the lowest point (load_best_model_at_end), or train for less long.",
    ),
)


# Figures.


def judged(history: list[dict], name: str) -> tuple[str, Points]:
    """Where a metric is judged, the prefix of an evaluation or "training", and its points there."""
    for prefix in evaluations(history):
        found = points(history, f"{prefix}_{name}")
        if len(found[0]) >= EVALUATIONS:
            return prefix, found
    return "training", points(history, name)


def fitted(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The least-squares line through the values."""
    centred = steps - steps.mean()
    return values.mean() + centred * (centred @ values) / max(centred @ centred, 1e-12)


def trend(steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Change of the least-squares line from first to last step, and the standard error of that change."""
    line, centred = fitted(steps, values), steps - steps.mean()
    noise = math.sqrt(float(((values - line) ** 2).sum()) / max(len(values) - 2, 1))
    return float(line[-1] - line[0]), noise * float(np.ptp(steps)) / math.sqrt(max(centred @ centred, 1e-12))


def last_third(values: np.ndarray) -> float:
    return float(values[-max(len(values) // 3, 1) :].mean())
