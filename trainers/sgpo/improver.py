"""Training of the improver, and of the model before all rounds, with TRL's SFTTrainer: loss on the answer only.

Rows are tokenised by the suite, so that the tokens of a target are the same here, in the filter and in the DPO stage.
TRL averages the loss over the answer tokens of a batch, where the method sums over the tokens of an example.
"""

import dataclasses
from pathlib import Path

from datasets import Dataset
from torch import Tensor
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from ..data.tokenization import tokenize_dataset
from ..generation.sampler import Prompt
from ..runs.checkpoints import last_checkpoint
from .filters import TOO_LONG, fits

POLICY = "policy_"  # prefix of the columns with the plain prompt and the reference

Example = tuple[Prompt, str]


def improver_loss(improver_nll: Tensor, policy_nll: Tensor | float = 0.0, policy_weight: float = 0.0) -> Tensor:
    """NLL of the targets under m(x, y), plus `policy_weight` times that of the references under x."""
    return improver_nll + policy_weight * policy_nll


def completion_nll(logps: Tensor, completion_mask: Tensor) -> Tensor:
    """(B,T) log-probability and mask of each token -> (B,) negative log-likelihood of the completions."""
    return -logps.masked_fill(~completion_mask.bool(), 0).sum(-1)


def sft_config(args: TrainingArguments, options: dict, folder: Path, seed: int) -> SFTConfig:
    """The run's training arguments with what `options` say instead; the tokenizer has its pad token already."""
    known = {f.name for f in dataclasses.fields(SFTConfig) if f.init}
    shared = {f.name for f in dataclasses.fields(TrainingArguments) if f.init} & known
    values = {name: getattr(args, name) for name in shared if name != "deepspeed_plugin"}
    own = {
        "output_dir": str(folder), "seed": seed, "max_length": None, "completion_only_loss": True,
        "remove_unused_columns": False, "eval_strategy": "no", "do_eval": False, "push_to_hub": False,
        "pad_token": None, "packing": False, "padding_free": False, "model_init_kwargs": None,
    }  # fmt: skip
    return SFTConfig(**values | own | {name: _number(value) for name, value in options.items()})


def tokenise(examples: list[Example], tokenizer) -> list[dict]:
    """`prompt_ids` and `response_ids` of (prompt, answer), as the rest of the suite has them."""
    rows = [
        {"prompt": p, "responses": [a, a] if isinstance(p, str) else [[{"role": "assistant", "content": a}]] * 2,
         "scores": [0.0, 0.0]} for p, a in examples
    ]  # fmt: skip
    tokens, _ = tokenize_dataset(Dataset.from_list(rows), tokenizer, invalid="error")
    return [{"prompt_ids": row["prompt_ids"], "response_ids": row["response_ids"][0]} for row in tokens]


def length_faults(examples: list[Example], tokenizer, limit: int | None) -> list[str | None]:
    """Which examples are longer than `limit` tokens; they are left out and never cut."""
    if not examples:
        return []
    return [
        None if fits(len(row["prompt_ids"]), len(row["response_ids"]), limit) else TOO_LONG
        for row in tokenise(examples, tokenizer)
    ]


def sft_rows(examples: list[Example], tokenizer, *, prefix: str = "") -> dict[str, list]:
    """Columns `input_ids` and `completion_mask` for TRL: 1 on the tokens of the answer."""
    rows = tokenise(examples, tokenizer)
    return {
        f"{prefix}input_ids": [row["prompt_ids"] + row["response_ids"] for row in rows],
        f"{prefix}completion_mask": [[0] * len(row["prompt_ids"]) + [1] * len(row["response_ids"]) for row in rows],
    }


class ImproverTrainer(SFTTrainer):
    """SFTTrainer whose rows may hold a second example, the policy's, which counts `policy_weight` times."""

    def __init__(self, *args, policy_weight: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.policy_weight, self._collate = policy_weight, self.data_collator
        self.data_collator = self._collate_both

    def _collate_both(self, rows: list[dict]) -> dict:
        own, policy = zip(*map(_split, rows), strict=True)
        guard = self._collate([_labelled(row) for row in policy])
        return self._collate(list(own)) | {POLICY + name: value for name, value in guard.items()}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        own, policy = _split(inputs)
        loss = super().compute_loss(model, own, return_outputs, num_items_in_batch)
        loss, outputs = loss if return_outputs else (loss, None)
        # Without a number of tokens it is the mean of this batch, which the window of accumulation averages.
        windows = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        guard = super().compute_loss(model, policy, False, None) / windows
        loss = improver_loss(loss, guard, self.policy_weight)
        return (loss, outputs) if return_outputs else loss


def train_sft(model, tokenizer, config: SFTConfig, examples: list[Example], *, peft_config=None,
              policy_examples: list[Example] | None = None, policy_weight: float = 0.0) -> None:  # fmt: skip
    """Trains on (prompt, answer), from the last checkpoint of the folder if there is one, and saves the model."""
    columns = sft_rows(examples, tokenizer)
    own, more = SFTTrainer, {}
    if policy_weight:
        columns |= sft_rows(policy_examples, tokenizer, prefix=POLICY)
        own, more = ImproverTrainer, {"policy_weight": policy_weight}
    trainer = own(
        model, args=config, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer,
        peft_config=peft_config, **more,
    )  # fmt: skip
    result = trainer.train(resume_from_checkpoint=last_checkpoint(Path(config.output_dir)))
    trainer.save_metrics("train", result.metrics)
    trainer.save_model()
    trainer.save_state()


def _split(values: dict) -> tuple[dict, dict]:
    """What belongs to the improver's example, and what to the policy's."""
    own = {name: value for name, value in values.items() if not name.startswith(POLICY)}
    return own, {name.removeprefix(POLICY): value for name, value in values.items() if name.startswith(POLICY)}


def _labelled(row: dict) -> dict:
    labels = [t if m else -100 for t, m in zip(row["input_ids"], row["completion_mask"], strict=True)]
    return {"input_ids": row["input_ids"], "labels": labels}


def _number(value):
    """YAML reads 1e-5, without a point, as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
