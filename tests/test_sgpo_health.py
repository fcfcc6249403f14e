"""What is read from the log of the DPO stage: the same figures for every interval of logging."""

import json

import pytest
import torch

from test_sgpo_trainer import dpo_trainer
from trainers.sgpo.health import Watch, dpo_health, tenth
from trainers.sgpo.monitor import Limits, alarms

NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
CLOSING = {"train_loss": 0.4, "train_runtime": 3.0, "rewards/chosen": -0.3, "rewards/accuracies": 1.0}


def state(rows, steps=100, closing=True):
    """A trainer's state from rows of (step, loss, chosen, rejected, margin, accuracy)."""
    logs = [{"step": step, **dict(zip(NAMES, values, strict=True))} for step, *values in rows]
    return {"global_step": steps, "log_history": logs + [CLOSING | {"step": steps}] * closing}


ROWS = [(1, 0.69, 0.0, 0.0, 0.0, 0.0), (10, 0.5, -0.2, -0.7, 0.5, 0.8), (90, 0.4, -0.2, -0.9, 0.7, 0.9),
        (95, 0.3, -0.1, -2.1, 2.0, 1.0), (100, 0.2, -0.3, -2.3, 2.0, 1.0)]  # fmt: skip


def test_the_drift_is_that_of_the_last_tenth_since_the_start():
    found = dpo_health(state(ROWS), 0.1, starts_at_reference=True)
    assert found["chosen_drift"] == pytest.approx(-2) and found["chosen_fall"] == pytest.approx(2)
    assert found["rejected_drift"] == pytest.approx(-22) and found["last_loss"] == pytest.approx(0.25)
    assert found["early_accuracy"] == 0.8 and found["steps"] == 100 and "not_judged" not in found
    assert dpo_health(state(ROWS, closing=False), 0.1, starts_at_reference=True) == found


def test_another_reference_is_subtracted_as_it_was_at_the_first_step():
    rows = [(step, loss, chosen + 0.4, rejected - 0.2, *rest) for step, loss, chosen, rejected, *rest in ROWS]
    found = dpo_health(state(rows), 0.1, starts_at_reference=False)
    assert (found["chosen_drift"], found["rejected_drift"]) == pytest.approx((-2, -22))
    found = dpo_health(state(rows[1:]), 0.1, starts_at_reference=False)  # and where it is not known:
    assert "chosen_drift" not in found and found["not_judged"] == ["chosen_fall", "early_accuracy"]


def test_windows_of_unlike_length_count_by_their_steps():
    rows = [*ROWS[:3], (98, 0.3, -0.1, -2.1, 2.0, 1.0), (100, 0.2, -0.6, -2.1, 1.5, 1.0)]
    assert dpo_health(state(rows), 0.1, starts_at_reference=True)["chosen_drift"] == pytest.approx(-2)


@pytest.mark.parametrize("rows", [[], [(50, 0.6, -0.1, -0.2, 0.1, 0.7)], [(100, 0.6, -0.1, -0.2, 0.1, 0.7)]])
def test_a_log_that_cannot_tell_gives_no_figures(rows):
    """The closing entry has no loss, and a window over most of the training is not its end."""
    found = dpo_health(state(rows), 0.1, starts_at_reference=True)
    assert found == {"steps": 100, "not_judged": ["chosen_fall", "early_accuracy"]} | (
        {"first_loss": 0.6} if rows else {}
    )
    assert alarms({f"dpo/{name}": value for name, value in found.items()}, Limits()) == []


def test_a_training_of_one_step_has_not_moved():
    found = dpo_health(state(ROWS[:1], steps=1), 0.1, starts_at_reference=True)
    assert "chosen_drift" not in found and found["first_loss"] == 0.69


@pytest.mark.parametrize("options", [{"logging_steps": 7}, {"logging_steps": 1000}, {"logging_strategy": "no"}])
def test_the_figures_do_not_depend_on_the_interval_of_logging(tmp_path, options):
    found = []
    for name, own in (("fine", {"logging_steps": 1}), ("coarse", options)):
        trainer = dpo_trainer(tmp_path / name, max_steps=23, per_device_train_batch_size=1, callbacks=[Watch()], **own)
        trainer.train()
        trainer.save_state()
        saved = json.loads((tmp_path / name / "trainer_state.json").read_text())
        found.append(dpo_health(saved, 0.1, starts_at_reference=True))
    assert found[0].keys() == found[1].keys() and "not_judged" not in found[0]
    assert all(found[1][name] == pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in found[0].items())
    # The drift against the log-probabilities themselves, which at the start were those of the reference.
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) <= 4 + 23 // 7 and logs[0]["step"] == 1 and logs[-1]["step"] == 23
    assert found[1]["chosen_drift"] == pytest.approx(sum(_drifts(tmp_path, trainer)) / 3, abs=1e-3)


def _drifts(folder, trainer):
    """Drift of the chosen responses at the last three steps of the same training, without any log."""
    seen = []
    again = dpo_trainer(folder / "again", max_steps=23, per_device_train_batch_size=1, logging_strategy="no")
    loss = again.loss

    def spy(batch, policy, reference):
        moved = (policy.logps.sum(-1) - reference.logps.sum(-1)).detach()
        seen.append(float(moved.gather(-1, batch["scores"].argmax(-1, keepdim=True)).mean()))
        return loss(batch, policy, reference)

    again.loss = spy
    again.train()
    assert len(seen) == 23 and seen[0] == 0 and torch.isfinite(torch.tensor(seen)).all()
    return seen[-tenth(23) :]
