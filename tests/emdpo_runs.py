"""Runs of EM-DPO on tiny models, and what tests read of them."""

import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from emdpo_rows import em_config, opposed_rows
from helpers import build_tokenizer
from trainers import EMDPOTrainer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def em(folder, start, rows=None, eval_rows=None, peft=False, callbacks=None, **kwargs):
    return EMDPOTrainer(
        str(start) if isinstance(start, Path) else start,
        args=em_config(folder, **kwargs),
        train_dataset=Dataset.from_list(opposed_rows() if rows is None else rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=build_tokenizer(),
        peft_config=LoraConfig(**LORA) if peft else None,
        callbacks=callbacks,
    )


def trained(*args, **kwargs):
    """`em` after its rounds."""
    trainer = em(*args, **kwargs)
    trainer.train()
    return trainer


def round_folder(trainer, index):
    return Path(trainer.args.output_dir) / "restart-0" / f"round-{index:02d}"


def groups(names):
    return np.array([int(str(name)[-1]) % 2 for name in names])


def weights(folder):
    return load_file(next(Path(folder).glob("*model.safetensors")))


def same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance or {"rtol": 0, "atol": 0})


def types_alone(run, start):
    """The policies of a run read one by one, without MixturePolicy."""
    for path in json.loads((run / "mixture.json").read_text())["policies"]:
        if (run / path / "adapter_config.json").exists():
            yield PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), run / path).eval()
        else:
            yield AutoModelForCausalLM.from_pretrained(run / path).eval()
