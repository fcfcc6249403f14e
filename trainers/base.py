"""The one trainer that every method builds on.

A method adds a config, a pure loss and `loss(batch, policy, reference)`. Everything between the data row and the loss
is here and in the packages `data` and `forward`.
"""

import logging
from collections.abc import Callable
from functools import partial

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed

from .config import PreferenceConfig
from .data import PreferenceCollator
from .data.budget import budget_loader
from .data.contract import check_collator
from .data.drops import collected_reports
from .data.stream import TokenStream
from .forward import policy as policies
from .forward.cache import LogpsCache
from .forward.identity import reference_fingerprint, start_of_run
from .forward.parts import PartedPass
from .forward.reference import SyncReference, make_reference, named_reference, start_of_reference
from .forward.run import Forward, Runner, without_dropout
from .inputs import Batch, check_ranges, mark_repeated, parts, prepare_rows, prepare_training_rows
from .likelihood import sft_loss
from .measuring import TIMES, UnknownMetric
from .metrics import best_and_worst, ranking_metrics, scores_differ, take
from .precision import warn_if_emulated
from .referring import ReferringTrainer

logger = logging.getLogger(__name__)


class PreferenceTrainer(ReferringTrainer):
    """Fine-tunes a causal language model on prompts with K scored responses.

    Args:
        model: path or hub id of a model or of an adapter, model, or PeftModel. A PeftModel goes on training its
            adapter, and so does a path to one.
        ref_model: the reference policy: a path, a model, or the name of another adapter of the model that is trained;
            by default the policy as it is now (a frozen copy, or the adapter off), or the adapter called "reference"
            of a PeftModel that trains another.
        args: the method's config (`config_class`).
        train_dataset, eval_dataset: canonical rows, TRL pairs or tokenised rows; `eval_dataset` may be a dict, and
            `train_dataset` a stream (`datasets.IterableDataset`), with `max_steps`.
        processing_class: tokenizer, or processor whose tokenizer is taken; by default the one beside the model.
        peft_config, quantization_config: train a fresh adapter, on a quantised base if both are given.
        compute_metrics: called with predictions (policy logps, reference logps), each (prompts,K) sums over tokens,
            and label_ids (scores, mask); a slot holds a response where mask is 1, all else in it is padding.
        data_collator: makes a batch of a list of tokenised rows, in place of a `PreferenceCollator`, whose docstring
            says what a batch holds; it is tried on the first rows.

    Raises:
        ValueError: an option or a row that cannot be used; the message names it and the fix.
    """

    columns: tuple[str, ...] = ()  # further columns of numbers that `loss` reads from a batch
    needs_reference: bool = True
    reference_per_token: bool = False  # whether the reference cache must keep every token, or only sums

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: str | PreTrainedModel | PeftModel | None = None,
        args: PreferenceConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        quantization_config=None,
        peft_config: PeftConfig | None = None,
        data_collator: Callable | None = None,
    ):
        args = self.config_class(output_dir="runs/" + self.method.lower()) if args is None else args
        if not isinstance(args, self.config_class):
            raise ValueError(
                f"args is a {type(args).__name__}: {type(self).__name__} needs a {self.config_class.__name__}."
            )
        for name, given in (("ref_model", ref_model is not None), ("sync_ref_model", args.sync_ref_model)):
            if given and not self.needs_reference:
                raise ValueError(f"{name} has no effect: {self.method} needs no reference.")
        set_seed(args.seed)  # before the adapter draws its weights
        given_model, given_reference = model, ref_model
        model = policies.prepare_policy(model, args, quantization_config, peft_config)
        if isinstance(model, PeftModel) and peft_config is None:
            named = f"{model.active_adapter!r} of a PeftModel"
            self.start_adapter = given_model if isinstance(given_model, str) else named
        if isinstance(ref_model, str):
            ref_model = named_reference(model, ref_model, args.model_init_kwargs)
        if optimizers[0] is not None:
            policies.check_optimizer(optimizers[0], model)
        if processing_class is None:
            processing_class = policies.load_tokenizer(model, args.model_init_kwargs)
        processing_class = policies.text_tokenizer(processing_class)
        policies.set_pad_token(processing_class, args.pad_token)
        source, adapter = start_of_reference(model, ref_model, fresh=peft_config, follows=args.sync_ref_model)
        self.start = start_of_run(model, source if self.needs_reference else None, adapter)
        with collected_reports(of="training rows") as self.left_out:
            train_dataset = prepare_training_rows(train_dataset, processing_class, args, columns=self.columns)
        with collected_reports(self.left_out, of="held-out rows"):
            eval_dataset = prepare_rows(
                eval_dataset, processing_class, args, columns=self.columns, several=True, name="eval_dataset"
            )
        for part in parts(train_dataset):
            self.check_rows(part, args, training=True)
        for part in parts(eval_dataset):
            self.check_rows(part, args, training=False)
        rows = parts(train_dataset, eval_dataset)

        self.table = self.reference = None
        models = [policies.base_model(model)]
        if self.needs_reference and args.precompute_ref_logps:
            name = reference_fingerprint(source, args, adapter=adapter, per_token=self.reference_per_token)
            assert args.ref_cache_dir is not None  # its default is a path
            self.table = LogpsCache(args.ref_cache_dir, name, per_token=self.reference_per_token)
        if self.needs_reference:
            copied = self.table is None or bool(self.table.missing(rows))
            options = args.model_init_kwargs
            self.reference = make_reference(model, ref_model, adapter=adapter, copy_policy=copied, init_kwargs=options)
            self.reference_told = self.reference.told(given_reference)
            if args.sync_ref_model:
                self.reference.check_weights(model)
            models += [policies.base_model(self.reference.model)] if self.reference.model is not None else []
        policies.apply_kernels(models, args)
        self.runner = Runner(models, args.layout)
        check_ranges(rows, models)
        if isinstance(train_dataset, TokenStream):
            train_dataset.check = partial(self._check_streamed, args, models)

        # Its batches hold the rows as they are, whatever `data_collator` makes of them.
        self.collate = PreferenceCollator(processing_class.pad_token_id, args.pad_to_multiple_of, columns=self.columns)
        if data_collator is not None:
            check_collator(data_collator, self.collate, rows)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=self.collate if data_collator is None else data_collator,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.args.n_gpu > 1:
            raise ValueError("Several GPUs in one process are not supported: start with `accelerate launch`.")
        warn_if_emulated(self.compute_dtype, self.accelerator.device)
        # `compute_loss` divides by the prompts of the accumulation window; else the Trainer would divide by its steps.
        self.model_accepts_loss_kwargs = True
        if self.reference is not None:
            self.reference.prepare(self.accelerator)
            if args.sync_ref_model:
                self.add_callback(SyncReference(self.reference))

    # What a method writes or overrides.

    def loss(self, batch: Batch, policy: Forward, reference: Forward | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of the prompts (B,), never averaged, and metrics {name: (B,) with NaN where undefined, or scalar}."""
        raise NotImplementedError(f"{type(self).__name__} must write loss(batch, policy, reference).")

    def signal(self, batch: Batch) -> Tensor:
        """(B,) bool: which prompts carry a signal. By default all but all-tied ones; the rest is left out."""
        return scores_differ(batch["scores"], batch["mask"])

    def preferred(self, batch: Batch) -> Tensor:
        """(B,K) weights of the responses that `sft_weight` makes likelier; prompts without a signal never count.

        By default 1 for the best-scored response, the first on ties: the one of `logps/chosen`.
        """
        best, _ = best_and_worst(batch["scores"], batch["mask"])
        return one_hot(best, batch["scores"].size(-1)).float()

    @classmethod
    def check_rows(cls, rows: Dataset, args: PreferenceConfig, *, training: bool) -> None:
        """Raises ValueError for tokenised rows, to train on or to evaluate on, that this method cannot use.

        The constructor and `--dry_run` call it.
        """

    @classmethod
    def planned_rows(cls, args: PreferenceConfig, data) -> tuple[Dataset | None, list[str]]:
        """What `--dry_run` and `--probe` take for the training rows of a method that makes them itself, and what to
        know of them; None for those of the data set."""
        return None, []

    @classmethod
    def probed(cls, args: PreferenceConfig, rows: Dataset) -> tuple[type, PreferenceConfig, Dataset]:
        """The training that `--probe` makes steps of: its trainer, and arguments and tokenised rows of its own."""
        return cls, args, rows

    def policy_forward(self, model: nn.Module, batch: Batch, reference: Forward | None) -> Forward:
        """What the loss needs of the policy; `reference` is what the reference said about the same batch."""
        return self.forward(model, batch)

    def ranking_metrics(self, batch: Batch, rewards: Tensor) -> dict[str, Tensor]:
        """Metrics of the implicit rewards (B,K) against the scores, under TRL's names where TRL has one."""
        return ranking_metrics(rewards, batch["scores"], batch["mask"])

    # From a batch to its loss.

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the prompts with a signal of the accumulation window and of all processes.

        `num_items_in_batch` is the weight of that window (`get_batch_samples`). Every process returns its own share
        times the number of processes, because DDP, DeepSpeed and FSDP average gradients.
        """
        self.runner.check(model, inputs, self.accelerator)
        forwards = partial(self._forwards, model)
        parted = PartedPass.of(inputs, self.args.tokens_per_backward, model, self.accelerator)
        policy, reference = forwards(inputs) if parted is None else parted.score(inputs, forwards)
        losses, weights = self._losses(inputs, policy, reference)
        total = weights.sum() if num_items_in_batch is None else num_items_in_batch
        processes = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss = (losses * weights).sum() * processes / total.clamp(min=torch.finfo(weights.dtype).tiny)
        if self.model.training and not self.args.fp16:  # the loss scaler of float16 skips such a step
            self._check_finite(loss.detach(), losses.detach(), inputs)
        if parted is not None:
            loss = parted.backward(loss, policy, partial(self._policy, model))
        return (loss, {"policy": policy, "reference": reference}) if return_outputs else loss

    def _forwards(self, model: nn.Module, batch: Batch) -> tuple[Forward, Forward | None]:
        reference = self._reference_forward(model, batch) if self.reference is not None else None
        return self._policy(model, batch, reference), reference

    def _policy(self, model: nn.Module, batch: Batch, reference: Forward | None = None) -> Forward:
        with self.accelerator.autocast():  # as the reference, also where the engine has not wrapped the policy
            return self.policy_forward(model, batch, reference)

    def _losses(self, batch: Batch, policy: Forward, reference: Forward | None) -> tuple[Tensor, Tensor]:
        """Losses and weights of the prompts (B,); the metrics are recorded."""
        losses, metrics = self.loss(batch, policy, reference)
        assert losses.shape == batch["scores"].shape[:1], f"loss must return (B,), got {tuple(losses.shape)}"
        signal = self.signal(batch)
        if self.args.sft_weight:
            weights = self.preferred(batch).masked_fill(~signal.unsqueeze(-1), 0)
            term = sft_loss(policy.logps, batch["response_mask"], weights, reduction=self.args.sft_reduction)
            losses = losses + self.args.sft_weight * term
            metrics = metrics | {"sft_loss": term.detach().masked_fill(~signal, torch.nan)}
        if policy.aux_loss is not None:  # per prompt, so that batches of a window weigh as their prompts do
            assert self.runner.router is not None
            losses = losses + self.runner.router.coefficient * policy.aux_loss.to(losses)
            metrics = metrics | {"aux_loss": policy.aux_loss}
        metrics = metrics | {"prompts/without_signal": 1 - signal.float()}
        best, worst = best_and_worst(batch["scores"], batch["mask"])
        responses = {"logps": policy.logps.detach().sum(-1), "length": batch["response_mask"].sum(-1).float()}
        for name, values in responses.items():
            metrics |= {f"{name}/chosen": take(values, best), f"{name}/rejected": take(values, worst)}
        weights = self._weights(batch, signal)
        self._record(batch, losses, weights, metrics)
        return losses, weights

    def _check_streamed(self, args: PreferenceConfig, models: list[PreTrainedModel], rows: Dataset) -> None:
        """What is asked of all rows before the first step, of the next ones of a stream."""
        self.check_rows(rows, args, training=True)
        check_ranges([rows], models)

    def _weights(self, batch: Batch, signal: Tensor) -> Tensor:
        """(B,) weight of each prompt in the average: its `weight` column (1 without), 0 without a signal."""
        weight = batch.get("weight", torch.ones_like(signal))
        assert weight.shape == signal.shape, f"weight must be (B,), got {tuple(weight.shape)}"
        return signal.float() * weight

    def floating_point_ops(self, inputs: Batch) -> int:
        """As the Trainer reckons, for `total_flos`: 6 operations per weight and token that is fed to the policy."""
        return 6 * self.runner.tokens(inputs) * policies.base_model(self.model).num_parameters(exclude_embeddings=True)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Collect an accumulation window and the weight of its prompts over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self.accelerator.gradient_state.end_of_dataloader:
            mark_repeated(batches[-1], self.accelerator, self.callback_handler.train_dataloader)
        weight = sum((self._weights(batch, self.signal(batch)).sum() for batch in batches), torch.zeros(()))
        return batches, self.accelerator.reduce(weight.to(device), reduction="sum")

    # Data.

    def get_train_dataloader(self):
        """The Trainer's loader, or batches of `max_tokens_per_batch` tokens.

        Raises:
            ValueError: there is no batch, or nobody would ask a sampler of the subclass.
        """
        budget, streamed = self.args.max_tokens_per_batch, isinstance(self.train_dataset, TokenStream)
        if type(self)._get_train_sampler is not Trainer._get_train_sampler and (streamed or budget is not None):
            raise ValueError(
                f"{type(self).__name__}._get_train_sampler has no effect on "
                f"{'a stream' if streamed else 'max_tokens_per_batch'}: leave out one of the two, or override "
                "get_train_dataloader."
            )
        if budget is not None and self.train_dataset is not None:
            return budget_loader(self.train_dataset, self.data_collator, self.args, budget=budget)
        loader = super().get_train_dataloader()
        if not streamed and not len(loader):
            if not self.args.dataloader_drop_last:
                raise ValueError(f"{type(self).__name__}._get_train_sampler draws no row to train on.")
            raise ValueError(
                f"dataloader_drop_last leaves no batch of the {len(self.train_dataset)} rows to train on: set it to "
                "false, or lower per_device_train_batch_size."
            )
        return loader

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Like `Trainer.evaluate`; a data set given here is prepared like those given to the constructor."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepared(eval_dataset, several=True)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def begin(self, checkpoint):
        super().begin(checkpoint)
        self._check_metrics()

    def _check_metrics(self) -> None:
        """Raises UnknownMetric where the losses of a row show that an evaluation would lack a metric.

        What code of the user adds to the metrics is known after an evaluation only.
        """
        ours = (PreferenceTrainer.evaluate, PreferenceTrainer.evaluation_loop)
        own = self.compute_metrics is not None or (type(self).evaluate, type(self).evaluation_loop) != ours
        several = isinstance(self.eval_dataset, dict)  # each has a loss of its own, and there is none of all
        wanted = {option: name for option, name in self.metrics_wanted().items() if several or name != "eval_loss"}
        if own or not wanted or self.eval_dataset is None:
            return
        with torch.no_grad(), without_dropout(self.model_wrapped):
            batch = self._prepare_inputs(self.data_collator([parts(self.eval_dataset)[0][0]]))
            self._losses(batch, *self._forwards(self.model_wrapped, batch))
        meter = self._meters["eval"]
        names = {*meter.compute(), *TIMES} - {"weight"}
        meter.reset()
        sets = [f"{name}_" for name in self.eval_dataset] if several else [""]
        for option, name in wanted.items():
            UnknownMetric.refuse(option, name, [f"eval_{one}{metric}" for one in sets for metric in names])

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """Like `Trainer.predict`: predictions are (policy logps, reference logps), each (prompts,K)."""
        return super().predict(self._prepared(test_dataset), ignore_keys, metric_key_prefix)

    def _prepared(self, dataset, *, several: bool = False):
        """Rows that are given after the start, as those of the constructor are prepared."""
        rows = prepare_rows(dataset, self.processing_class, self.args, columns=self.columns, several=several)
        check_ranges(parts(rows), [policies.base_model(self.model)])
        return rows
