"""The processes of a loop over several trainers, and the memory between two of them."""

import gc
import os
import resource
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import is_initialized
from accelerate.utils import gather
from transformers import TrainingArguments
from transformers.integrations import (
    HfDeepSpeedConfig,
    deepspeed_config,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

SHARDING = {"zero3": "ZeRO-3", "fsdp": "FSDP"}  # engines of which no process holds a whole policy


class Processes:
    """The processes of the launcher, and what scoring asks of an accelerator for a policy that each holds whole."""

    gather = staticmethod(gather)
    autocast = staticmethod(nullcontext)  # the policy computes in the dtype that it was loaded in

    def __init__(self):
        state = PartialState()
        self.num_processes, self.process_index = state.num_processes, state.process_index
        self.is_main_process, self.wait_for_everyone = state.is_main_process, state.wait_for_everyone
        self.is_local_main_process, self.device = state.is_local_main_process, state.device
        self.first_of_node = state.process_index - state.local_process_index

    def say(self, text: str) -> None:
        if self.is_main_process:
            print(text, flush=True)

    def main(self, action: Callable[[], Any]) -> None:
        """Runs `action` in the main process, while the others wait."""
        if self.is_main_process:
            action()
        self.wait_for_everyone()


def refuse_engines(args: TrainingArguments, method: str, unsupported: Collection[str]) -> None:
    """Raises ValueError for a run under an engine, of those in SHARDING, that `method` cannot work with."""
    fsdp = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"  # of the launcher
    engine = "zero3" if is_deepspeed_zero3_enabled() else "fsdp" if fsdp else ""
    if engine in unsupported:
        others = ", ".join(["DDP", "ZeRO-2", *(name for key, name in SHARDING.items() if key not in unsupported)])
        raise ValueError(
            f"{method} does not run under {SHARDING[engine]} (docs/distributed.md says why): use one process, or "
            f"one of {others}."
        )


def share_engine(args: TrainingArguments) -> TrainingArguments:
    """Arguments of a trainer that may not be the first in its process, whose Accelerator has DeepSpeed's plugin."""
    if is_initialized():
        args.deepspeed_plugin = None
    return args


_deepspeed: HfDeepSpeedConfig | None = None  # which transformers refers to weakly


@contextmanager
def whole_weights() -> Iterator[None]:
    """Models that are loaded inside are whole in this process, also where ZeRO-3 or FSDP shards those that train."""
    global _deepspeed
    name, config = "FSDP_CPU_RAM_EFFICIENT_LOADING", deepspeed_config()
    before = os.environ.get(name)
    unset_hf_deepspeed_config()
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
        if config is not None:
            _deepspeed = HfDeepSpeedConfig(config)


def free_memory() -> None:
    """Lets go of a trainer's model, which its callbacks refer to in circles, so that the next one has its memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_rss() -> int:
    """Most bytes that this process ever held in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
