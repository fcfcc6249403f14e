"""The processes of a loop over several trainers, and the memory between two of them."""

import copy
import gc
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import is_initialized
from accelerate.utils import GradientAccumulationPlugin, gather
from transformers import TrainingArguments
from transformers.integrations import (
    HfDeepSpeedConfig,
    deepspeed_config,
    unset_hf_deepspeed_config,
)


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


def join_launcher() -> Accelerator:
    """Joins the processes of a launcher, also where its file leaves accumulation to a trainer, as "auto"."""
    return Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))


def share_engine(args: TrainingArguments) -> TrainingArguments:
    """Arguments of a trainer that may not be the first in its process, whose Accelerator has DeepSpeed's plugin."""
    if is_initialized():
        args.deepspeed_plugin = None
    return args


def stage_arguments(args, folder: str | Path, seed: int, **changes):
    """A run's arguments with `changes`, for one training of several whose policy is loaded already."""
    own = copy.copy(args)
    vars(own).update({"output_dir": str(folder), "seed": seed, "model_init_kwargs": None} | changes)
    return share_engine(own)


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


def refuse_partial_weights(accelerator: Accelerator, what: str) -> None:
    """Raises ValueError under an engine that would leave no whole weights on disk, which `what` needs."""
    deepspeed, fsdp = accelerator.state.deepspeed_plugin, getattr(accelerator.state, "fsdp_plugin", None)
    gathers = "stage3_gather_16bit_weights_on_model_save"
    if deepspeed is not None and deepspeed.hf_ds_config.is_zero3():
        if not deepspeed.hf_ds_config.is_true(f"zero_optimization.{gathers}"):
            raise ValueError(
                f"Under ZeRO-3 {what} needs whole weights on disk: set zero3_save_16bit_model (in the DeepSpeed file "
                f"{gathers}) to true."
            )
    if fsdp is not None and "FULL" not in str(fsdp.state_dict_type):
        raise ValueError(
            f"Under FSDP {what} needs whole weights on disk: set fsdp_state_dict_type to FULL_STATE_DICT (in "
            "fsdp_config of a recipe state_dict_type)."
        )


def free_memory() -> None:
    """Lets go of a trainer's model, which its callbacks refer to in circles, so that the next one has its memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_rss() -> int:
    """Most bytes that this process ever held in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
