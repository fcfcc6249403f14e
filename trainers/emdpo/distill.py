"""One policy from a mixture: supervised fine-tuning on answers of the mixture. An extension; the paper may differ."""

from pathlib import Path

import numpy as np
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from ..generation.sampler import Sample
from ..runs.files import write_json
from ..runs.processes import Processes
from ..runs.stage import train_into

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


def distill(model, tokenizer, rows: Dataset, folder: Path, *, settings: dict, **kwargs) -> None:
    """Fine-tunes `model` on the answers and leaves a plain Hugging Face model with its tokenizer in `folder`.

    Args:
        model: to start from.
        rows: of `mixture_samples`.
        settings: written beside the model, for a later call to compare with.
        kwargs: of `trl.SFTConfig`, such as learning_rate, num_train_epochs, per_device_train_batch_size. Under DDP
            the last is per process.
    """
    # bf16 is on in TRL unless it is said: here the model keeps its own precision, as in the M-steps.
    options = {"report_to": "none", "save_strategy": "no", "bf16": False, **kwargs}

    def train(training: Path) -> None:
        args = SFTConfig(output_dir=str(training), completion_only_loss=True, max_length=None, **options)
        trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        trainer.save_model()
        if trainer.is_world_process_zero():
            write_json(training / SETTINGS, settings)

    train_into(folder, train, Processes())
