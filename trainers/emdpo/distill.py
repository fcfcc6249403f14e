"""One policy from a mixture: supervised fine-tuning on answers of the mixture. An extension; the paper may differ."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from ..data.json_rows import digest
from ..generation.sampler import Sample, encode_prompts
from ..generation.start import load_start
from ..runs.files import read_json, write_json
from ..runs.processes import join_launcher
from ..runs.stage import train_into
from .aggregate import Arena, Player

DISTILLED = "distilled"
SETTINGS = "distillation.json"  # what a distilled policy was trained with; lies in its folder


def mixture_samples(
    samples: list[list[list[Sample]]], prompt_ids: list[list[int]], weights: np.ndarray, *, seed: int = 0
) -> Dataset:
    """Answers of the mixture from answers of its policies: a type is drawn for each prompt and sample index.

    Args:
        samples: (T, prompts, samples) answers of each policy; each is used at most once.
        prompt_ids: of the prompts.
        weights: (T,) of the policies.

    Returns:
        rows of `input_ids` and `completion_mask`, token for token as they were sampled, the end token included.
    """
    random, weights = np.random.default_rng(seed), np.asarray(weights, dtype=np.float64)
    rows = []
    for i, prompt in enumerate(prompt_ids):
        for j in range(len(samples[0][i])):
            ids = samples[random.choice(len(weights), p=weights / weights.sum())][i][j].token_ids
            rows.append({"input_ids": [*prompt, *ids], "completion_mask": [0] * len(prompt) + [1] * len(ids)})
    return Dataset.from_list(rows)


def distilled(arena: Arena, weights: list[float], *, seed: int, **training) -> Player:
    """The mixture as one plain model that starts where the types started; an earlier one is kept if nothing changed.

    Args:
        weights: (T,) of the types.
        training: of `trl.SFTConfig`: learning_rate, num_train_epochs and, per process, per_device_train_batch_size.
    """
    target, processes = arena.folder / DISTILLED, arena.processes
    player = Player(DISTILLED, target)
    samples = [arena.samples(own) for own in arena.types]
    rows = mixture_samples(samples, encode_prompts(arena.tokenizer, arena.prompts), np.array(weights), seed=seed)
    settings = {
        "weights": [round(w, 6) for w in weights],
        "answers": digest(list(rows["input_ids"])),
        "base": arena.identity(arena.reference),
        "seed": seed,
        **training,
        "per_device_train_batch_size": training["per_device_train_batch_size"] * processes.num_processes,
    }
    path = target / SETTINGS
    kept = path.is_file() and read_json(path) == settings
    processes.wait_for_everyone()  # all have read it before one removes it
    if kept:
        return player
    for stale in (arena.samples_of(player), target):
        processes.main(partial(shutil.rmtree, stale, ignore_errors=True))

    def train(folder: Path) -> None:
        precision = join_launcher().mixed_precision  # of the launcher; bf16 is on in TRL unless it is said
        args = SFTConfig(
            output_dir=str(folder), completion_only_loss=True, max_length=None, report_to="none", save_strategy="no",
            bf16=precision == "bf16", fp16=precision == "fp16", seed=seed, use_cpu=processes.device.type == "cpu",
            **training,
        )  # fmt: skip
        model = load_start(arena.mixture["base"], None, init_kwargs=arena.mixture["model_init_kwargs"])
        trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=arena.tokenizer)
        trainer.train()
        trainer.save_model()
        trainer.accelerator.free_memory()  # ends the engine
        processes.main(lambda: write_json(folder / SETTINGS, settings))

    processes.say(f"{target} is trained on {len(rows)} answers of the mixture.")
    train_into(target, train)
    return player
