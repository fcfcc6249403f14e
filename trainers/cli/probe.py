"""A few real steps of a run, on its longest rows and on typical ones: what it needs and how long it takes (`--probe`).

Everything is as in the run that it stands for: data, model, engine, processes, precision, accumulation. Only the rows
are chosen, and nothing is written: the trainer works in a folder that is deleted.
"""

import copy
import os
import random
import tempfile
import time
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import psutil
import torch
from accelerate.utils import gather_object
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .. import PreferenceConfig, PreferenceTrainer
from ..data.budget import Lengths, batch_loader, packed_tokens, token_lengths
from ..estimate import fed, read_plan
from ..runs.processes import peak_rss
from .dry_run import Batches, build_model, estimate_of, plan_batches, read_splits

# Steps. The first warms up; the second has the optimizer's states beside the longest rows, and so the peak of memory.
LONGEST, TYPICAL = 2, 4
FULL, GIB = 0.9, 2**30  # share of the memory that advice fills


class Measured(NamedTuple):
    """What the steps showed. Memory is in bytes, of the process that came nearest to its limit.

    On CPUs it is the process's resident set, loading included, of its share of the machine's memory.
    """

    seconds: list[float]  # of every step
    tokens: list[int]  # of every step, all processes together, as they are fed: in padded rows with their padding
    peak: int
    reserved: int  # by CUDA's allocator; on CPUs the peak again
    resting: int  # between two steps; on CPUs before the first, because freed memory may stay with the process
    limit: int
    layout: str  # of the batches, as the model allows it

    def extrapolate(self, tokens: float) -> tuple[float, float, float]:
        """Seconds of training on so many tokens at the speed of the typical steps, of the fastest and the slowest.

        The longest rows say nothing of the speed: attention makes their tokens dearer.
        """
        seconds, counts = self.seconds[LONGEST:], self.tokens[LONGEST:]
        rates = [sum(seconds) / sum(counts), *sorted(s / t for s, t in zip(seconds, counts, strict=True))]
        return rates[0] * tokens, rates[1] * tokens, rates[-1] * tokens


def probe(trainer_class: type[PreferenceTrainer], data, args: PreferenceConfig, model_args) -> str:
    """Makes the steps and gives the report; every process of a run calls it, with the launcher's arguments."""
    tokenizer, splits, reports, notes = read_splits(trainer_class, data, args, model_args, ("train",))
    lengths = token_lengths(rows := splits["train"])
    batches = plan_batches(lengths, args, args.world_size)
    steps = choose_batches(batches, args.world_size * args.gradient_accumulation_steps)
    measured = measure(trainer_class, args, model_args, tokenizer, rows, steps)
    advice = advise(measured, trainer_class, args, model_args, lengths, steps[0][0])

    trainings, scorings = args.demands.trainings, args.demands.scorings
    # An epoch in random order stands for all.
    order, size = random.Random(0).sample(batches.units, len(batches.units)), batches.size
    epoch = [sum(order[i : i + size], []) for i in range(0, len(order), size)]
    tokens = fed_tokens(lengths, epoch, measured.layout) / batches.per_epoch * batches.in_all * trainings
    total, fastest, slowest = (timedelta(seconds=round(time)) for time in measured.extrapolate(tokens))
    parts = {
        "loading": True, "evaluation": True, "saving": True, "sampling": args.self_enhance is not None,
        "the reference's scores of all rows": trainer_class.needs_reference and args.precompute_ref_logps,
        f"{scorings} scorings of all rows": scorings > 0,
    }  # fmt: skip
    left_out = ", ".join(name for name, left in parts.items() if left)
    each = f" in each of {trainings:g} trainings" if trainings != 1 else ""
    first, *times = (f"{seconds:.3g} s" for seconds in measured.seconds)
    long, typical = ", ".join(times[: LONGEST - 1]), ", ".join(times[LONGEST - 1 :])
    peak, reserved, resting, limit = (f"{size / GIB:.2f}" for size in measured[2:6])
    return "\n  ".join([
        f"probe of {trainer_class.method} ({trainer_class.__name__}), {args.world_size} process(es) on {args.device}",
        f"longest batches, {measured.tokens[0]:,} tokens per step: {long} (after {first})",
        f"typical batches, {sum(measured.tokens[LONGEST:]) / TYPICAL:,.0f} tokens per step: {typical}",
        f"memory: {peak} GiB at the peak ({reserved} reserved), {resting} between steps, of {limit}",
        f"{batches.in_all:,} steps{each}: {total} ({fastest} to {slowest}), which is the run's tokens at the speed of "
        f"the typical steps (of the fastest and of the slowest). Not in it: {left_out}.",
        *reports, *notes, *(f"advice: {text}" for text in advice),
    ])  # fmt: skip


def choose_batches(batches: Batches, window: int) -> list[list[list[int]]]:
    """The rows of each micro-batch of each step: the longest rows, from the largest on, again and then typical ones.

    Typical rows are spread evenly over the lengths of all rows, and dealt to the `window` micro-batches at random.
    """
    units, size = batches.units, batches.size
    count = size * window
    chosen = [[units[-1 - i % len(units)] for i in range(count)]] * LONGEST
    for k in range(TYPICAL):
        places = [(i + (k + 1) / (TYPICAL + 1)) / count for i in range(count)]
        chosen.append(random.Random(k).sample([units[int(place * len(units))] for place in places], count))
    return [[sum(step[i : i + size], []) for i in range(0, count, size)] for step in chosen]


def measure(trainer_class, args: PreferenceConfig, model_args, tokenizer, rows, steps) -> Measured:
    """Trains on the chosen rows of the tokenised `rows`, in a folder that is deleted."""
    cls, args, rows = trainer_class.probed(copy.copy(args), rows)
    lengths = token_lengths(rows)
    flat = [batch for step in steps for batch in step]
    rows, starts = rows.select(sum(flat, [])), np.cumsum([0, *map(len, flat)])

    class Probing(cls):  # type: ignore[misc,valid-type]
        """The trainer, on these batches in this order."""

        def get_train_dataloader(self):
            batches = [list(range(*bounds)) for bounds in zip(starts[:-1], starts[1:], strict=True)]
            return batch_loader(self.train_dataset, batches, self.data_collator, self.args)

    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = args.ref_cache_dir = folder
        args.max_steps, args.report_to, args.disable_tqdm, args.do_eval = len(steps), [], True, False
        args.save_strategy, args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
        args.logging_strategy, args.logging_first_step = IntervalStrategy.NO, False
        args.push_to_hub = args.load_best_model_at_end = args.eval_on_start = False
        args.self_enhance = args.early_stopping_patience = None
        clock = Clock(args.device)
        trainer = Probing(
            model_args.model_name_or_path, args=args, train_dataset=rows, processing_class=tokenizer,
            callbacks=[clock], **model_args.of_trainer,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    tokens = [fed_tokens(lengths, step, trainer.runner.layout) for step in steps]
    peak, reserved, resting, limit = max(gather_object([clock.memory()]), key=lambda memory: memory[0] / memory[-1])
    seconds = np.diff(clock.ends).tolist()
    return Measured(seconds, tokens, peak, reserved, resting, limit, trainer.runner.layout)


def fed_tokens(lengths: list[Lengths], batches: list[list[int]], layout: str) -> int:
    """Tokens that the model is fed for micro-batches of rows of these lengths."""
    return sum(fed([lengths[i] for i in batch], layout).tokens for batch in batches)


class Clock(TrainerCallback):
    """The ends of all steps, and memory."""

    def __init__(self, device: torch.device):
        self.device, self.resting = device, 0
        self.ends: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def on_step_begin(self, args, state, control, **kwargs):
        if self.device.type == "cuda":
            self.resting = torch.cuda.memory_allocated(self.device)
        elif state.global_step == 0:
            self.resting = psutil.Process().memory_info().rss

    def on_step_end(self, args, state, control, **kwargs):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter())

    def memory(self) -> tuple[int, int, int, int]:
        """Peak, reserved, between steps, and there at all."""
        if self.device.type == "cuda":
            peak, reserved = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
            return peak, reserved, self.resting, torch.cuda.mem_get_info(self.device)[1]
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return peak_rss(), peak_rss(), self.resting, psutil.virtual_memory().total // local


def advise(measured: Measured, trainer_class, args, model_args, lengths: list[Lengths], batch: list[int]) -> list[str]:
    """What else would fit: what the largest `batch` adds to the memory between steps is scaled."""
    room, added = FULL * measured.limit - measured.resting, measured.peak - measured.resting
    size = "per_device_train_batch_size" if args.max_tokens_per_batch is None else "max_tokens_per_batch"
    window, lines = args.gradient_accumulation_steps, []

    def needs(factor: float) -> str:
        return f"needs about {(measured.resting + added * factor) / GIB:.2f} of {measured.limit / GIB:.2f} GiB"

    factor: float = max(n for n in range(1, window + 1) if n == 1 or window % n == 0 and n * added <= room)
    if added > room:
        lines.append(f"memory is nearly full: half of {size}, with twice the accumulation, {needs(0.5)}.")
    elif factor > 1:
        larger = f"{size}: {getattr(args, size) * factor}, gradient_accumulation_steps: {window // factor}"
        lines.append(f"{larger} keeps the prompts per step and {needs(factor)}.")
    rows = [lengths[i] for i in batch]
    if args.gradient_checkpointing:
        plan = read_plan()
        estimate = estimate_of(trainer_class, args, model_args, build_model(model_args, args, plan), plan)
        largest = fed(rows, args.layout)
        recomputed = sum(estimate.step(largest).values())
        estimate.run = estimate.run._replace(recompute=False)
        factor = sum(estimate.step(largest).values()) / recomputed
        if factor * added <= room:
            saves = "gradient_checkpointing: false saves a forward pass per step and"
            lines.append(f"{saves} {needs(factor)}; the factor {factor:.2g} on what a step adds is the estimate's.")
    shorter = int(np.percentile([p + max(r) for p, r in lengths], 99, method="lower"))
    cut = sum(p + r > shorter for p, responses in lengths for r in responses)
    kept = sum(packed_tokens((p, [min(r, max(1, shorter - p)) for r in responses])) for p, responses in rows)
    factor = kept / sum(map(packed_tokens, rows))
    if cut and (1 - factor) * added > 0.1 * measured.peak:
        lines.append(f"max_length: {shorter} would cut {cut:,} responses and {needs(factor)}.")
    return lines
