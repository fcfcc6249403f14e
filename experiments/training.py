"""Trainings of the experiments, on the CPU in float32, with a curve of what is measured of the policy."""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from .frame import Point

# What all trainings here share, in the words of `TrainingArguments`.
SHARED = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
          "lr_scheduler_type": "constant", "dataloader_pin_memory": False}  # fmt: skip


class Curve(TrainerCallback):
    """Measures the policy before the first step, and after every `every` steps and the last one."""

    def __init__(self, measure: Callable, every: int, start: Point | None, watch: Callable | None):
        self.measure, self.every, self.watch, self.trainer = measure, every, watch, None
        self.points = [] if start is None else [{"step": 0, **start}]
        self.seconds, self.since = 0.0, 0.0  # of training alone

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not self.points:
            self._add(model, state.global_step)
        self.since = time.monotonic()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.seconds += time.monotonic() - self.since
            self._add(model, state.global_step)
            self.since = time.monotonic()

    def _add(self, model, step: int) -> None:
        model.eval()
        with torch.no_grad():
            point = {"step": step, "seconds": round(self.seconds, 2), **self.measure(model)}
        self.points.append(point | ({} if self.watch is None else self.watch(self.trainer)))
        model.train()


def train(trainer_class, options: dict, model, rows: list[dict], tokenizer, measure, *, every: int,
          start: Point | None = None, watch: Callable | None = None) -> list[Point]:  # fmt: skip
    """Trains `model` in place on the CPU in float32 and returns its curve.

    Args:
        options: of the trainer's config, beside those that all trainings here share.
        measure: policy -> what is measured of it.
        start: what `measure` says before training, where it is known.
        watch: trainer -> what is measured beside it.
    """
    curve = Curve(measure, every, start, watch)
    with tempfile.TemporaryDirectory() as scratch:
        args = trainer_class.config_class(output_dir=scratch, **SHARED | options)
        trainer = trainer_class(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                                callbacks=[curve])  # fmt: skip
        curve.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return curve.points


@contextlib.contextmanager
def quiet():
    """Without the rounds' own progress, which would drown that of the seeds."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
