"""Arithmetic of the floating-point operations of training, and of the time that they take.

A product of (m,k) and (k,n) counts 2mkn; what is not a matrix product is left out. Symbols as in memory.py, with W the
weights of all linear layers inside the decoder layers and S the pairs of a query and a key that attention works on.
"""

from typing import NamedTuple

from .memory import Run
from .shape import Fed, ModelShape


class Work(NamedTuple):
    """Operations of one pass over some rows, by part."""

    policy: float  # forward pass
    backward: float
    recomputed: float  # activation checkpointing
    reference: float  # forward pass of the reference in the training step

    @property
    def total(self) -> float:
        return sum(self)


def work(shape: ModelShape, batch: Fed, run: Run, *, reference: bool) -> Work:
    """Operations of training once on `batch`.

    Forward: 2 T W in linear layers, 2 T per weight of an adapter, 4 A S in attention, 2 N H V in the LM head.
    Backward: once the forward for the gradients of the inputs and once more for those of trained weights; attention
    computes its scores again, 2.5 times its forward; the LM head computes its logits again.
    A KL from two LM heads adds the frozen one in the forward pass and again in the backward pass.
    """
    linears = 2 * batch.tokens * shape.layers * shape.layer_linears
    adapters = 0 if shape.full else 2 * batch.tokens * shape.trainable
    attention = shape.layers * 4 * shape.attention * batch.pairs
    head = 2 * batch.predicted * shape.hidden * shape.vocabulary
    layers = linears + adapters + attention
    return Work(
        policy=layers + head * (1 + run.kl),
        backward=linears * (1 + shape.full) + 2 * adapters + 2.5 * attention + head * (2 + shape.full + run.kl),
        recomputed=layers * run.checkpointed / shape.layers,
        reference=forward(shape, batch) if reference else 0,
    )


def forward(shape: ModelShape, batch: Fed) -> float:
    """Operations of one forward pass without adapters."""
    linears = 2 * batch.tokens * shape.layers * shape.layer_linears
    attention = shape.layers * 4 * shape.attention * batch.pairs
    return linears + attention + 2 * batch.predicted * shape.hidden * shape.vocabulary


def hours(operations: float, *, tflops: float, utilisation: float, processes: int = 1) -> float:
    """Time of so many operations on `processes` GPUs that reach a share `utilisation` of `tflops` each."""
    return operations / (processes * tflops * 1e12 * utilisation) / 3600
