"""One policy from a mixture: supervised fine-tuning on answers of the mixture. An extension; the paper may differ."""

import shutil
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import PeftConfig, PeftModel
from trl import SFTConfig, SFTTrainer

from ..generation.sampler import Sample
from ..runs.files import write_json
from ..runs.processes import Processes

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


def distill(
    model, tokenizer, rows: Dataset, folder: Path, *, peft_config: PeftConfig | None = None,
    settings: dict | None = None, **kwargs,
) -> None:  # fmt: skip
    """Fine-tunes `model` on the answers and saves a plain Hugging Face model, adapters merged, with its tokenizer.

    Args:
        model: path or model to start from.
        rows: of `mixture_samples`.
        settings: written beside the model, for a later call to compare with.
        kwargs: of `trl.SFTConfig`, such as learning_rate, num_train_epochs, per_device_train_batch_size. Under DDP
            the last is per process.
    """
    # bf16 is on in TRL unless it is said: here the model keeps its own precision, as in the M-steps.
    options = {"report_to": "none", "save_strategy": "no", "bf16": False, **kwargs}
    args = SFTConfig(
        output_dir=str(folder.with_name(f"{folder.name}-training")), completion_only_loss=True, max_length=None,
        **options,
    )  # fmt: skip
    trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config)
    trainer.train()
    tuned = trainer.accelerator.unwrap_model(trainer.model)
    tuned = tuned.merge_and_unload() if isinstance(tuned, PeftModel) else tuned
    unfinished = folder.with_name(f"{folder.name}-unfinished")

    def save() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        tuned.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if settings is not None:
            write_json(unfinished / SETTINGS, settings)
        shutil.rmtree(args.output_dir, ignore_errors=True)
        unfinished.rename(folder)

    Processes().main(save)
