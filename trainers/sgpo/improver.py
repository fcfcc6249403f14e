"""Training of the improver, and of the model before all rounds, with TRL's SFTTrainer: loss on the answer only.

Rows are tokenised by the suite, so that the tokens of a target are the same here, in the filter and in the DPO stage.
TRL averages the loss over the answer tokens of a batch, where the method sums over the tokens of an example.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from ..data.tokenization import tokenize_dataset
from ..generation.rewards import as_completion
from ..generation.sampler import Prompt
from ..runs.checkpoints import last_checkpoint
from ..runs.processes import refuse_partial_weights, share_engine
from .text import improver_prompt

POLICY = "policy_"  # prefix of the columns with the plain prompt and the reference

Example = tuple[Prompt, str]


def sft_config(args: TrainingArguments, options: dict, folder: Path, seed: int) -> SFTConfig:
    """The run's training arguments with what `options` say instead; the tokenizer has its pad token already.

    Raises:
        ValueError: an option that belongs to the run and not to one of its stages.
    """
    known = {f.name for f in dataclasses.fields(SFTConfig) if f.init}
    shared = {f.name for f in dataclasses.fields(TrainingArguments) if f.init} & known - {"deepspeed_plugin"}
    own = {
        "output_dir": str(folder), "seed": seed, "completion_only_loss": True, "remove_unused_columns": False,
        "eval_strategy": "no", "do_eval": False, "push_to_hub": False, "pad_token": None, "packing": False,
        "padding_free": False, "model_init_kwargs": None,
    }  # fmt: skip
    if taken := own.keys() & options.keys():
        raise ValueError(f"{', '.join(sorted(taken))} cannot be set for one stage alone: leave it out.")
    options = {name: _number(value) for name, value in options.items()}
    return SFTConfig(**{name: getattr(args, name) for name in shared} | {"max_length": None} | options | own)


def improvement(row: dict) -> Example:
    """What the improver learns of a row: m(x, y) and the target."""
    return improver_prompt(row["prompt"], row["current"]), row["target"]


def tokenize_texts(tokenizer, prompts: list[Prompt], responses: list[list[str]]) -> Dataset:
    """Tokenised rows of prompts and the texts that answer each of them, 2 or more.

    Raises:
        ValueError: a prompt or a response without tokens.
    """
    rows = [
        {"prompt": p, "responses": [as_completion(p, text) for text in texts], "scores": [0.0] * len(texts)}
        for p, texts in zip(prompts, responses, strict=True)
    ]
    return tokenize_dataset(Dataset.from_list(rows), tokenizer, invalid="error")[0]


def sft_rows(examples: Sequence[Example], tokenizer, *, prefix: str = "") -> dict[str, list[list[int]]]:
    """Columns `input_ids` and `labels` for TRL: the tokens of the answer are learned, those of the prompt are not."""
    prompts, answers = [prompt for prompt, _ in examples], [[answer] * 2 for _, answer in examples]
    # A row has two responses or more.
    rows = [(row["prompt_ids"], row["response_ids"][0]) for row in tokenize_texts(tokenizer, prompts, answers)]
    return {
        f"{prefix}input_ids": [prompt + answer for prompt, answer in rows],
        f"{prefix}labels": [[-100] * len(prompt) + answer for prompt, answer in rows],
    }


def fits(examples: list[Example], tokenizer, limit: int | None) -> list[bool]:
    """Which examples are at most `limit` tokens long; the others are left out and never cut."""
    rows = sft_rows(examples, tokenizer)["input_ids"] if examples else []
    return [limit is None or len(ids) <= limit for ids in rows]


class ImproverTrainer(SFTTrainer):
    """SFTTrainer whose rows hold a second example, the policy's, which counts `policy_weight` times."""

    def __init__(self, *args, policy_weight: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.policy_weight, self._collate = policy_weight, self.data_collator
        self.data_collator = self._collate_both
        self._policy_items: Tensor | None = None

    def _collate_both(self, rows: list[dict]) -> dict:
        own, policy = (self._collate(list(part)) for part in zip(*map(_split, rows), strict=True))
        return own | {POLICY + name: value for name, value in policy.items()}

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Counts the answer tokens of the second examples as the Trainer does those of the first: of all batches of a
        step, in all processes, so that no token weighs more for where it is."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [(batch[POLICY + "labels"][..., 1:] != -100).sum().to(device) for batch in batches]
        total = torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.long, device=device)
        everywhere = self.args.average_tokens_across_devices
        self._policy_items = self.accelerator.gather(total).sum() if everywhere else total
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        own, policy = _split(inputs)
        loss = super().compute_loss(model, own, num_items_in_batch=num_items_in_batch)
        items = None if num_items_in_batch is None else self._policy_items
        return loss + self.policy_weight * super().compute_loss(model, policy, num_items_in_batch=items)


def train_sft(model, tokenizer, config: SFTConfig, examples: list[Example], *, peft_config=None,
              policy_examples: Sequence[Example] = (), policy_weight: float = 0.0) -> None:  # fmt: skip
    """Trains on (prompt, answer), from the last checkpoint of the folder if there is one, and saves the model."""
    columns, more = sft_rows(examples, tokenizer), dict[str, Any]()
    trainer_class: type[SFTTrainer] = SFTTrainer
    if policy_weight:
        columns |= sft_rows(policy_examples, tokenizer, prefix=POLICY)
        trainer_class, more = ImproverTrainer, {"policy_weight": policy_weight}
    trainer = trainer_class(
        model, args=share_engine(config), train_dataset=Dataset.from_dict(columns), processing_class=tokenizer,
        peft_config=peft_config, **more,
    )  # fmt: skip
    refuse_partial_weights(trainer.accelerator, "the next stage")
    result = trainer.train(resume_from_checkpoint=last_checkpoint(str(config.output_dir)))
    trainer.save_metrics("train", result.metrics)
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.free_memory()  # ends the engine


def _split(values: dict) -> tuple[dict, dict]:
    """What belongs to the improver's example, and what to the policy's."""
    own = {name: value for name, value in values.items() if not name.startswith(POLICY)}
    return own, {name.removeprefix(POLICY): value for name, value in values.items() if name.startswith(POLICY)}


def _number(value):
    """YAML reads 1e-5, without a point, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
