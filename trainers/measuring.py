"""How metrics of batches reach the log: averages over prompts, whatever a batch or a process holds of them."""

import logging

import torch
from torch import Tensor

from .inputs import REPEATED, Batch
from .metrics import MetricMeter
from .running import RunningTrainer

logger = logging.getLogger(__name__)


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
        columns = {"loss": losses.detach() * weights, "weight": weights, **metrics}
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
