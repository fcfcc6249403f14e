"""How metrics of batches reach the log: averages over prompts, whatever a batch or a process holds of them."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from polypo.recipes import nearest

from .inputs import REPEATED, Batch
from .metrics import MetricMeter
from .running import RunningTrainer

logger = logging.getLogger(__name__)
_wanted: ContextVar[str | None] = ContextVar("metric", default=None)  # which a sweep compares its runs by
TIMES = ("runtime", "samples_per_second", "steps_per_second")  # of the Trainer's evaluation


class UnknownMetric(ValueError):
    """An option names a metric that an evaluation does not have."""

    @classmethod
    def refuse(cls, option: str, metric: str, known: Iterable[str]) -> None:
        known = sorted(known)
        if metric not in known:
            near = nearest(metric, known, f"it has {', '.join(known)}.")
            raise cls(f"{option}: the evaluation has no {metric}: {near}")


@contextmanager
def metric_wanted(metric: str) -> Iterator[None]:
    """Trainings in this block end before their first step where their evaluation would lack `metric`."""
    token = _wanted.set(metric)
    try:
        yield
    finally:
        _wanted.reset(token)


class MeasuringTrainer(RunningTrainer):
    """Averages metrics over the prompts of all processes, while it trains and while it evaluates."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self._meters = {"train": MetricMeter(), "eval": MetricMeter()}

    def _record(self, batch: Batch, losses: Tensor, weights: Tensor, metrics: dict[str, Tensor]) -> None:
        if self.model.training:
            repeated = batch.get(REPEATED, torch.zeros_like(losses, dtype=torch.bool))
            own = {n: v.masked_fill(repeated, torch.nan) if torch.is_tensor(v) and v.dim() else v
                   for n, v in metrics.items()}  # fmt: skip
            self._meters["train"].update(own)
            return
        # Per-prompt values are gathered so that accelerate can remove the rows it repeats to fill the last batch.
        size = len(losses)
        weighted = (losses.detach() * weights).masked_fill(weights == 0, 0)
        lost = weighted.isnan()  # unlike another metric's, a NaN is not left out of the mean: inf / inf is one too
        parts = {"loss": weighted, "weight": weights}
        columns = {name: value.masked_fill(lost, torch.inf) for name, value in parts.items()} | metrics
        table = torch.stack([torch.as_tensor(v).to(losses).expand(size) for v in columns.values()], 1)
        table = self.accelerator.gather_for_metrics(table)
        self._meters["eval"].update(dict(zip(columns, table.unbind(1), strict=True)))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        forwards = [f for f in (outputs["policy"], outputs["reference"]) if f is not None]
        sums = tuple(f.logps.sum(-1) for f in forwards)
        return loss, sums if len(sums) > 1 else sums[0], (inputs["scores"], inputs["mask"].long())

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """The Trainer's loop averages batch means, which depends on the number of processes; prompts do not."""
        self._meters["eval"].reset()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = self._meters["eval"].compute()
        weight = metrics.pop("weight", 0)
        if "loss" in metrics and weight:
            metrics["loss"] /= weight
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def metrics_wanted(self) -> dict[str, str]:
        """Option -> the metric that it names, with `eval_` before it."""
        named = {"metric_for_best_model": self.args.metric_for_best_model, "metric": _wanted.get()}
        return {option: "eval_" + name.removeprefix("eval_") for option, name in named.items() if name is not None}

    def _determine_best_metric(self, metrics, trial):
        """The Trainer's own error would be a KeyError."""
        if "metric_for_best_model" in (wanted := self.metrics_wanted()):
            UnknownMetric.refuse("metric_for_best_model", wanted["metric_for_best_model"], metrics)
        return super()._determine_best_metric(metrics, trial)

    def log(self, logs, start_time=None):
        # What training logs; the mode of the model does not tell, because a callback may leave it in another one.
        if "loss" in logs or "total_flos" in logs:
            metrics = self._meters["train"].compute(self.accelerator)
            self._meters["train"].reset()
            if metrics.get("prompts/without_signal") == 1:
                logger.warning(
                    "No prompt since the last log carries a signal, so nothing was learned: the scores of each prompt "
                    "are all equal, or the method's options leave no response to contrast."
                )
            logs = logs | {name: value for name, value in metrics.items() if value == value}
        super().log(logs, start_time)
