"""The processes of a loop over several trainers, and the memory between two of them."""

import gc
import os
import resource
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import TrainingArguments


class Processes:
    """The processes of the launcher, and what scoring asks of an accelerator for a policy that each holds whole."""

    gather = staticmethod(gather)
    autocast = staticmethod(nullcontext)  # the policy computes in the dtype that it was loaded in

    def __init__(self):
        state = PartialState()
        self.num_processes, self.process_index = state.num_processes, state.process_index
        self.is_main_process, self.wait_for_everyone = state.is_main_process, state.wait_for_everyone
        self.is_local_main_process, self.device = state.is_local_main_process, state.device

    def say(self, text: str) -> None:
        if self.is_main_process:
            print(text, flush=True)

    def main(self, action: Callable[[], Any]) -> None:
        """Runs `action` in the main process, while the others wait."""
        if self.is_main_process:
            action()
        self.wait_for_everyone()


def uses_fsdp(args: TrainingArguments) -> bool:
    """Whether weights will be sharded by FSDP, before a trainer is made. The launcher says so in the environment."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def free_memory() -> None:
    """Lets go of a trainer's model, which its callbacks refer to in circles, so that the next one has its memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_rss() -> int:
    """Most bytes that this process ever held in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
