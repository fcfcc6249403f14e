"""What the log of the DPO stage says of it, the same for every interval of logging."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from transformers import TrainerCallback

FIGURES = ("chosen_fall", "early_accuracy")  # what `limits` are compared with


class Watch(TrainerCallback):
    """Logs four more steps than are logged anyway: the first, the last, and where first and last tenth end and begin.

    So the log holds the windows that `dpo_health` looks at, also with few logs or none.
    """

    def on_step_end(self, args, state, control, **kwargs):
        part = tenth(state.max_steps)
        if state.global_step in (1, part, state.max_steps - part, state.max_steps):
            control.should_log = True
        return control


def tenth(steps: int) -> int:
    """A tenth of the steps, and at least one."""
    return max(1, math.ceil(steps / 10))


class _Window(NamedTuple):
    """Means over the steps from `first` to `last`, both included."""

    first: int
    last: int
    log: dict[str, float]


def dpo_health(state: dict, beta: float, *, starts_at_reference: bool) -> dict[str, float | list[str]]:
    """What a trainer's state says of the DPO stage; what its log cannot tell is left out and named in `not_judged`.

    `chosen_drift` and `rejected_drift` are how far the responses' log-probabilities are from where the stage began,
    in nats per response, on average over the last tenth of the steps. The implicit rewards are beta times the
    log-ratio to the reference. Where the policy starts at its reference (`ref: improved`, also with a separate
    improver) every log-ratio begins at 0, so rewards over beta are the drift, free of noise. With another reference
    (`ref: initial`) those of the first step, which are taken before any update, are subtracted: they are of other
    pairs, so this drift is as noisy as the mean over the pairs of one step.

    `chosen_fall` is minus the chosen drift where margins rose, else 0. `early_accuracy` is the mean over the first
    tenth of the steps but the first, before which all rewards may be 0. `margin`, `accuracy` and `last_loss` are means
    over the last tenth.

    Args:
        state: content of trainer_state.json. Entries without a loss, such as the closing one, are no steps.
        starts_at_reference: whether the policy was its own reference before the first step.
    """
    steps, windows = state["global_step"], _windows(state["log_history"])
    part = tenth(steps)
    first = next((w.log for w in windows if w.last == 1), None)
    early = _inside(windows, 2, part)
    late = _inside(windows, max(2, steps - part + 1), steps)
    found = {"steps": steps} | ({"first_loss": windows[0].log["loss"]} if windows else {})
    if late:
        names = {"last_loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
        found |= {name: _mean(late, logged) for name, logged in names.items()}
    if late and (starts_at_reference or first):
        chosen, rejected = (
            (_mean(late, name) - (0.0 if starts_at_reference else first[name])) / beta
            for name in ("rewards/chosen", "rewards/rejected")
        )
        fall = max(0.0, -chosen) if chosen > rejected else 0.0
        found |= {"chosen_drift": chosen, "rejected_drift": rejected, "chosen_fall": fall}
    if early:
        found["early_accuracy"] = _mean(early, "rewards/accuracies")
    missing = [name for name in FIGURES if name not in found]
    return found | ({"not_judged": missing} if missing else {})


def _windows(history: list[dict]) -> list[_Window]:
    logs = [log for log in history if "loss" in log and "rewards/chosen" in log]
    starts = [0, *(log["step"] for log in logs)]
    return [_Window(start + 1, log["step"], log) for start, log in zip(starts, logs, strict=False)]


def _inside(windows: Sequence[_Window], first: int, last: int) -> list[_Window]:
    return [window for window in windows if first <= window.first and window.last <= last]


def _mean(windows: Sequence[_Window], name: str) -> float:
    """Over the steps of the windows."""
    lengths = [window.last - window.first + 1 for window in windows]
    total = math.fsum(n * window.log[name] for n, window in zip(lengths, windows, strict=True))
    return total / sum(lengths)
