"""How much memory a training step needs on one GPU: arithmetic on widths and lengths, without weights or a GPU."""

from .batches import Batches, count_steps, plan_batches
from .memory import Item, Run, memory, total
from .plan import Plan, plan_from_environment, read_plan
from .shape import Fed, ModelShape, fed, shape_of

__all__ = [
    "Batches",
    "Fed",
    "Item",
    "ModelShape",
    "Plan",
    "Run",
    "count_steps",
    "fed",
    "memory",
    "plan_batches",
    "plan_from_environment",
    "read_plan",
    "shape_of",
    "total",
]
