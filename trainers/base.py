"""The one trainer that every method builds on.

A method adds a config, a pure loss and `loss(batch, policy, reference)`. Everything between the data row and the loss
is here and in the packages `data` and `forward`.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from .config import PreferenceConfig
from .data import PreferenceCollator
from .data.prepare import prepare_dataset
from .forward import policy as policies
from .forward.reference import make_reference
from .forward.run import (
    Forward,
    LayoutError,
    agreement,
    cheaper_shared,
    check_first_batch,
    prepare_forward,
    run,
    sliding_window,
)
from .metrics import MetricMeter, best_and_worst, ranking_metrics

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]


class PreferenceTrainer(Trainer):
    """Fine-tunes a causal language model on prompts with K scored responses.

    Args:
        model: path or hub id, model, or PeftModel. A PeftModel goes on training its adapter.
        ref_model: the reference policy; by default the policy as it is now (a frozen copy, or the adapter off).
        args: the method's config (`config_class`).
        train_dataset, eval_dataset: canonical rows, TRL pairs or tokenised rows; `eval_dataset` may be a dict.
        processing_class: tokenizer; by default the one beside the model.
        peft_config, quantization_config: train a fresh adapter, on a quantised base if both are given.
        compute_metrics: called with predictions (policy logps, reference logps), each (prompts,K) sums over tokens,
            and label_ids (scores, mask); a slot holds a response where mask is 1, all else in it is padding.

    Raises:
        ValueError: an option or a row that cannot be used; the message names it and the fix.
    """

    config_class: type[PreferenceConfig] = PreferenceConfig
    method: str = "preference optimisation"
    paper: tuple[str, str] | None = None  # title, arXiv number
    needs_reference: bool = True

    # `compute_loss` divides by the prompts of the whole accumulation window itself.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: PreferenceConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        quantization_config=None,
        peft_config: PeftConfig | None = None,
    ):
        args = self.config_class(output_dir="runs/" + self.method.lower()) if args is None else args
        if not isinstance(args, self.config_class):
            raise ValueError(
                f"args is a {type(args).__name__}: {type(self).__name__} needs a {self.config_class.__name__}."
            )
        if ref_model is not None and not self.needs_reference:
            raise ValueError(f"ref_model has no effect: {self.method} needs no reference.")
        set_seed(args.seed)  # before the adapter draws its weights
        model = policies.load_policy(
            model, init_kwargs=args.model_init_kwargs, quantization_config=quantization_config
        )
        if processing_class is None:
            processing_class = policies.load_tokenizer(model, args.pad_token)
        else:
            policies.set_pad_token(processing_class, args.pad_token)
        zero3 = is_deepspeed_zero3_enabled()
        if peft_config is not None:
            model = policies.add_adapter(model, peft_config, zero3=zero3)
        if isinstance(model, PeftModel) and args.gradient_checkpointing:
            _fit_checkpointing_to_adapter(model, args, zero3=zero3)
        if args.disable_dropout:
            policies.disable_dropout(model)

        self.reference = None
        if self.needs_reference:
            self.reference = make_reference(model, ref_model, fresh_adapter=peft_config is not None)
        self._prepare_layout(model, args)
        datasets = (self._prepare_rows(d, processing_class, args) for d in (train_dataset, eval_dataset))
        train_dataset, eval_dataset = datasets

        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=PreferenceCollator(processing_class.pad_token_id, args.pad_to_multiple_of),
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.args.n_gpu > 1:
            raise ValueError("Several GPUs in one process are not supported: start with `accelerate launch`.")
        # The Trainer would otherwise look for labels and rescale the loss by their number.
        self.model_accepts_loss_kwargs = False
        if self.reference is not None:
            self.reference.prepare(self.accelerator)
        self._meters = {"train": MetricMeter(), "eval": MetricMeter()}
        self._first_batch = True

    # What a method writes or overrides.

    def loss(self, batch: Batch, policy: Forward, reference: Forward | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of the prompts (B,), never averaged, and metrics {name: (B,) with NaN where undefined, or scalar}."""
        raise NotImplementedError(f"{type(self).__name__} must write loss(batch, policy, reference).")

    def signal(self, batch: Batch) -> Tensor:
        """(B,) bool: which prompts carry a signal. By default all but all-tied ones; the rest is left out."""
        scores, mask = batch["scores"], batch["mask"]
        return scores.masked_fill(~mask, -torch.inf).amax(-1) > scores.masked_fill(~mask, torch.inf).amin(-1)

    def forward(self, model: nn.Module, batch: Batch) -> Forward:
        """Per-token log-probabilities (B,K,R) of every response under `model`."""
        return run(model, batch, shared=self._shared(batch))

    def ranking_metrics(self, batch: Batch, rewards: Tensor) -> dict[str, Tensor]:
        """Metrics of the implicit rewards (B,K) against the scores, under TRL's names where TRL has one."""
        return ranking_metrics(rewards, batch["scores"], batch["mask"])

    # From a batch to its loss.

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the prompts with a signal of the accumulation window and of all processes.

        `num_items_in_batch` is the weight of that window (`get_batch_samples`). Every process returns its own share
        times the number of processes, because DDP, DeepSpeed and FSDP average gradients.
        """
        if self._first_batch:
            self._check_layout(model, inputs)
        losses, weights, policy, reference = self._losses(model, inputs)
        total = weights.sum() if num_items_in_batch is None else num_items_in_batch
        processes = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss = (losses * weights).sum() * processes / total.clamp(min=torch.finfo(weights.dtype).tiny)
        return (loss, {"policy": policy, "reference": reference}) if return_outputs else loss

    def _losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Forward, Forward | None]:
        reference = self._reference_forward(model, batch) if self.reference is not None else None
        policy = self.forward(model, batch)
        losses, metrics = self.loss(batch, policy, reference)
        assert losses.shape == batch["scores"].shape[:1], f"loss must return (B,), got {tuple(losses.shape)}"
        weights = self._weights(batch)
        self._record(batch, losses, weights, metrics | self._common_metrics(batch, policy))
        return losses, weights, policy, reference

    def _reference_forward(self, model: nn.Module, batch: Batch) -> Forward:
        unwrapped = self.accelerator.unwrap_model(model)
        with torch.no_grad(), self.accelerator.autocast(), self.reference.active(model, unwrapped) as reference:
            return self.forward(reference, batch)

    def _weights(self, batch: Batch) -> Tensor:
        """(B,) weight of each prompt in the average: its `weight` column (1 without), 0 without a signal."""
        signal = self.signal(batch).float()
        return signal * batch["weight"] if "weight" in batch else signal

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Collect an accumulation window and the weight of its prompts over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        weight = sum((self._weights(batch).sum() for batch in batches), torch.zeros(()))
        return batches, self.accelerator.reduce(weight.to(device), reduction="sum")

    # Which layout.

    def _prepare_layout(self, model: PreTrainedModel | PeftModel, args: PreferenceConfig) -> None:
        models = [policies.base_model(model)]
        if self.reference is not None and self.reference.model is not None:
            models.append(policies.base_model(self.reference.model))
        reasons = [prepare_forward(m, share=args.layout != "rows") for m in models]
        self._windows = [w for w in map(sliding_window, models) if w is not None]
        reason = next(filter(None, reasons), None)
        if reason and args.layout == "shared":
            raise ValueError(
                f"layout='shared' is not possible with this model: {reason}. Use layout='auto' or 'rows'."
            )
        if reason:
            logger.warning("Prompts are not shared between responses: %s. Training goes on with padded rows.", reason)
        self._can_share = args.layout != "rows" and reason is None

    def _shared(self, batch: Batch) -> bool:
        if not self._can_share or self.args.layout == "shared":
            return self._can_share
        return cheaper_shared(batch, min(self._windows, default=None))

    @torch.no_grad()
    def _check_layout(self, model: nn.Module, batch: Batch) -> None:
        """Compare with the model's own logits on a small group, once a run: a silent mistake costs a whole run."""
        self._first_batch = False
        with self.accelerator.autocast():
            limit = agreement(model)
            difference = check_first_batch(model, batch, shared=self._can_share)
        difference = float(self.accelerator.gather(torch.tensor([difference], device=self.args.device)).max())
        if difference <= limit:
            return
        found = (
            f"log-probabilities differ from the model's own logits by {difference:.2g} per token (limit {limit:.2g})"
        )
        if not self._can_share or self.args.layout == "shared":
            raise LayoutError(f"The {found}: this model computes its logits in a way that is not supported.")
        logger.warning("The shared layout's %s. Training goes on with padded rows.", found)
        self._can_share = False
        self._check_layout(model, batch)

    # Data.

    def _prepare_rows(self, dataset, tokenizer, args: PreferenceConfig):
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {name: self._prepare_rows(d, tokenizer, args) for name, d in dataset.items()}
        if isinstance(dataset, IterableDataset):
            raise ValueError("Streaming data sets are not supported yet: load the data set without streaming.")
        with args.main_process_first(desc="preparing the data set"):
            return prepare_dataset(
                dataset,
                tokenizer,
                max_length=args.max_length,
                invalid=args.invalid_rows,
                as_chat=args.as_chat,
                num_proc=args.dataset_num_proc,
                chat_template_kwargs=args.chat_template_kwargs,
            )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Like `Trainer.evaluate`; a data set given here is prepared like those given to the constructor."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare_rows(eval_dataset, self.processing_class, self.args)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """Like `Trainer.predict`: predictions are (policy logps, reference logps), each (prompts,K)."""
        test_dataset = self._prepare_rows(test_dataset, self.processing_class, self.args)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    # Metrics and evaluation.

    def _common_metrics(self, batch: Batch, policy: Forward) -> dict[str, Tensor]:
        logps, lengths = policy.logps.detach().sum(-1), batch["response_mask"].sum(-1).float()
        best, worst = best_and_worst(batch["scores"], batch["mask"])
        metrics = {"prompts/without_signal": 1 - self.signal(batch).float()}
        for name, values in (("logps", logps), ("length", lengths)):
            for side, index in (("chosen", best), ("rejected", worst)):
                metrics[f"{name}/{side}"] = values.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        return metrics

    def _record(self, batch: Batch, losses: Tensor, weights: Tensor, metrics: dict[str, Tensor]) -> None:
        if self.model.training:
            self._meters["train"].update(metrics)
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
        if self.model.training:
            metrics = self._meters["train"].compute(self.accelerator)
            self._meters["train"].reset()
            logs = logs | {name: value for name, value in metrics.items() if value == value}
        super().log(logs, start_time)

    # Saving.

    def create_model_card(self, **kwargs):
        """The Trainer's card, tagged and headed with the method, its paper and the data."""
        tags = kwargs.pop("tags", None) or []
        kwargs["tags"] = [*([tags] if isinstance(tags, str) else tags), "polypo", self.method.lower()]
        super().create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / "README.md"
        card = ModelCard.load(path)
        paper = f"\nPaper: [{self.paper[0]}](https://arxiv.org/abs/{self.paper[1]})\n" if self.paper else ""
        data = kwargs.get("dataset") or kwargs.get("dataset_args")
        data = f"\nData: {data if isinstance(data, str) else ', '.join(data)}\n" if data else ""
        card.text = f"\nTrained with **{self.method}** by PolyPO's `{type(self).__name__}`.\n{paper}{data}{card.text}"
        card.save(path)


def _fit_checkpointing_to_adapter(model: PeftModel, args: PreferenceConfig, *, zero3: bool) -> None:
    """Gradient checkpointing under an adapter needs gradients at the input of the frozen base."""
    model.enable_input_require_grads()
    if zero3:  # DeepSpeed partitions adapters in the recomputed forward unless checkpointing is reentrant (#8130).
        args.gradient_checkpointing_kwargs = {**(args.gradient_checkpointing_kwargs or {}), "use_reentrant": True}
