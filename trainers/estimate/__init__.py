"""Memory of a step on one GPU and time of a run: arithmetic on widths and lengths, without weights or a GPU."""

from .batches import Batches, count_steps, fed_in_all, plan_batches
from .flops import Work, forward, hours, work
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
    "Work",
    "count_steps",
    "fed",
    "fed_in_all",
    "forward",
    "hours",
    "memory",
    "plan_batches",
    "plan_from_environment",
    "read_plan",
    "shape_of",
    "total",
    "work",
]
