"""Rows of annotators with opposed tastes, runs of EM-DPO on tiny models, and what tests read of them."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers import build_tokenizer
from trainers import EMDPOConfig, EMDPOTrainer

WORDS = "the cat sat on a mat and saw the sun rise over an old green hill by the sea".split()
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
OPTIONS = {
    "use_cpu": True, "report_to": "none", "learning_rate": 5e-3, "num_types": 2, "rounds": 2, "logging_steps": 2,
    "per_device_train_batch_size": 4, "save_strategy": "no", "seed": 3, "lr_scheduler_type": "constant",
    "disable_tqdm": True, "init": "dirichlet", "max_grad_norm": 100.0, "dataloader_pin_memory": False,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """EM collects garbage between policies; what was imported before need not be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def opposed_rows(annotators=6, items=5, k=3, *, seed=0):
    """Even annotators rank short responses first, odd ones long ones; the rows of an annotator lie scattered."""
    generator = torch.Generator().manual_seed(seed)

    def text(count):
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator))

    rows = []
    for item in range(items):
        prompt = text(4) + " "
        responses = [text(2 + 3 * j) for j in torch.randperm(k, generator=generator).tolist()]
        for annotator in range(annotators):
            sign = 1 if annotator % 2 else -1
            scores = [sign * float(len(r.split())) for r in responses]
            rows.append({"prompt": prompt, "responses": responses, "scores": scores,
                         "annotator": f"a{annotator}", "item": item})  # fmt: skip
    order = torch.randperm(len(rows), generator=generator).tolist()
    return [rows[i] for i in order]


def em_config(folder, **kwargs):
    init = {"init": "given"} if "initial_posterior" in kwargs else {}
    return EMDPOConfig(output_dir=str(folder), **OPTIONS | init | kwargs)


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
