"""How a trainer holds its policy against a reference: asked batch by batch, cached before training, or following."""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from trl import SyncRefModelCallback

from .data import PreferenceCollator
from .forward import policy as policies
from .forward.cache import LogpsCache
from .forward.reference import Reference
from .forward.run import Forward, Runner, without_dropout
from .inputs import Batch, parts
from .measuring import MeasuringTrainer

logger = logging.getLogger(__name__)


class ReferringTrainer(MeasuringTrainer):
    """A subclass sets `runner`, `collate`, `reference` (None where the method needs none) and `table` (its cache)."""

    runner: Runner
    collate: PreferenceCollator
    reference: Reference | None
    table: LogpsCache | None

    def forward(self, model: nn.Module, batch: Batch) -> Forward:
        """Per-token log-probabilities (B,K,R) of every response under `model`."""
        return self.runner(model, batch)

    def _reference_forward(self, model: nn.Module, batch: Batch) -> Forward:
        cached = None if self.table is None else self.table.lookup(batch)
        return self._ask_reference(model, batch) if cached is None else Forward(cached)

    def _ask_reference(self, model: nn.Module, batch: Batch) -> Forward:
        assert self.reference is not None
        unwrapped = self.accelerator.unwrap_model(model)
        with torch.no_grad(), self.accelerator.autocast(), self.reference.active(model, unwrapped) as reference:
            return self.forward(reference, batch)

    def begin(self, checkpoint: str | None) -> None:
        """The policy is inside its engine only when training begins, so the reference cache is filled then."""
        if self.table is not None:
            self.precompute_reference()
        if checkpoint is not None:
            self._restore_reference(checkpoint)

    def release(self) -> None:
        if self.reference is not None:
            self.reference.release()
        super().release()

    def precompute_reference(self) -> None:
        """Score the rows that the cache lacks, check some that it has, and let go of the reference if it is a copy.

        Raises:
            ValueError: rows are missing, and neither the reference nor the policy as it was given is left.
            StaleCacheError: a cached value is not what the reference says.
        """
        table, reference = self.table, self.reference
        assert table is not None and reference is not None
        stands_in = self.untouched and not reference.given  # the policy for its reference

        def score(rows: list[dict]) -> Tensor:
            batch = self._prepare_inputs(self.collate(rows))
            self.runner.check(self.model_wrapped, batch, self.accelerator)
            if reference.in_memory or not stands_in:
                return self._ask_reference(self.model_wrapped, batch).logps
            with torch.no_grad(), self.accelerator.autocast():
                return self.forward(self.model_wrapped, batch).logps

        rows = parts(self.train_dataset, self.eval_dataset)
        with without_dropout(self.model_wrapped):  # a draw would be that of all epochs and later runs
            scored = table.fill(rows, score, self.accelerator, budget=self.args.ref_tokens_per_batch)
            logger.info("Reference cache %s: %d responses scored now.", table.path, scored)
            if reference.in_memory or stands_in:
                table.verify(rows, score, self.accelerator, dtype=self.compute_dtype, seed=self.args.seed)
        if reference.own:
            reference.model = None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that a forward pass computes in."""
        args = self.args
        return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else policies.base_model(self.model).dtype

    # A reference that follows the policy.

    def save_beside(self, checkpoint: Path) -> None:
        super().save_beside(checkpoint)
        if (reference := self._moving_reference) is not None:
            reference.save(self.model, checkpoint, write=self.args.should_save)

    def _restore_reference(self, checkpoint: str) -> None:
        if (reference := self._moving_reference) is not None:
            reference.load(self.model, Path(checkpoint))

    def _load_best_model(self):
        super()._load_best_model()
        self._restore_reference(self.state.best_model_checkpoint)

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference's own model, as TRL's callbacks want it; None where it is an adapter, or cached numbers."""
        return None if self.reference is None else self.reference.model

    @property
    def _moving_reference(self) -> Reference | None:
        """The reference if it does not stay as it was at the start, so that checkpoints must hold it."""
        by_trl = any(isinstance(callback, SyncRefModelCallback) for callback in self.callback_handler.callbacks)
        return self.reference if self.args.sync_ref_model or by_trl and self.ref_model is not None else None
