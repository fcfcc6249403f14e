"""Rows of annotators with opposed tastes on made-up text, and the arguments of a small EM run."""

import gc

import pytest
import torch

from trainers import EMDPOConfig

WORDS = "the cat sat on a mat and saw the sun rise over an old green hill by the sea".split()


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
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "learning_rate": 5e-3, "num_types": 2,
        "rounds": 2, "per_device_train_batch_size": 4, "logging_steps": 2, "save_strategy": "no", "seed": 3,
        "lr_scheduler_type": "constant", "disable_tqdm": True, "init": "dirichlet", "max_grad_norm": 100.0,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    if "initial_posterior" in kwargs:
        defaults["init"] = "given"
    return EMDPOConfig(**{**defaults, **kwargs})
