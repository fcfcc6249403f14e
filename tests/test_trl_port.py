"""docs/trl.md: both sides of its script give the same losses, and its tables miss no name and no default of TRL's."""

import copy
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from helpers import build_tokenizer, tiny_llama, write_rows
from test_trainer import LORA
from trainers import DPOConfig, DPOTrainer, NCATrainer, SWEPOTrainer
from trainers.cli.config_files import OF_TRL

PAGE = (Path(__file__).parents[1] / "docs/trl.md").read_text()
SCRIPT = re.search(r"```diff\n(.*?)```", PAGE, flags=re.S).group(1).splitlines()
ADDED = [line[1:].strip() for line in SCRIPT if line.startswith("+    ")]
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['tool_calls'] or [] %}{{ c['function'] | tojson }}{% endfor %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, an adapter that was trained before, and the row of the page with other answers of the tool."""
    folder = tmp_path_factory.mktemp("port")
    tokenizer = build_tokenizer(TEMPLATE, bos=None, eos="<|im_end|>", special=["<|im_start|>"])
    tokenizer.save_pretrained(folder / "base")
    model = tiny_llama(len(tokenizer), max_position_embeddings=1024)
    model.save_pretrained(folder / "base")
    torch.manual_seed(5)
    get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False)).save_pretrained(folder / "sft")
    row = re.search(r"```json\n(.*?)```", PAGE, flags=re.S).group(1)
    assert len(json.loads(row)["prompt"]) == 3 and '"tool_calls"' in row and '"tools"' in row
    cities = (
        "Lima",
        "the quick fox",
        "Paris",
        "a lazy dog",
        "Rome",
        "someone kind",
        "Bern",
        "Bonn, of course",
        "Oslo",
    )
    write_rows(folder / "tools.jsonl", [json.loads(row.replace("Lima", city)) for city in cities])
    return folder


def losses(folder, lines, output):
    code = "\n".join(line[1:] for line in lines)
    for named, local in (("Qwen/Qwen2.5-0.5B-Instruct", "base"), ("runs/sft", "sft"), ("tools.jsonl", "tools.jsonl")):
        assert code.count(named) == 1
        code = code.replace(named, str(folder / local))
    local = f'output_dir="{output}", use_cpu=True, report_to="none", disable_tqdm=True'
    made = {}
    exec(code.replace('output_dir="runs/dpo"', local), made)
    assert type(made["trainer"]).__module__.split(".")[0] == ("trl" if "from trl" in code else "trainers")
    assert (output / "adapter_model.safetensors").is_file()
    return [log["loss"] for log in made["trainer"].state.log_history if "loss" in log]


def test_a_script_of_trl_and_its_port_have_the_same_loss_at_each_step(folder, tmp_path):
    theirs = losses(folder, [line for line in SCRIPT if not line.startswith("+")], tmp_path / "trl")
    ported = [line for line in SCRIPT if not line.startswith("-")]
    assert len(theirs) == 4 and max(theirs) - min(theirs) > 1e-2
    assert losses(folder, ported, tmp_path / "port") == pytest.approx(theirs, abs=2e-5)
    assert len(ADDED) == 2
    for needed in ADDED:
        without = [line for line in ported if needed not in line]
        assert losses(folder, without, tmp_path / "without") != pytest.approx(theirs, abs=1e-3)


def fields(cls):
    """Name -> default."""
    made = {f.name: f.default_factory() for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    return {f.name: made.get(f.name, f.default) for f in dataclasses.fields(cls)}


def test_the_page_has_all_names_and_defaults_that_differ():
    theirs, ours = fields(trl.DPOConfig), fields(DPOConfig)
    differ = {name for name, default in theirs.items() if name in ours and ours[name] != default}
    assert {"bf16", "gradient_checkpointing"} <= differ and not {"beta", "max_length", "learning_rate"} & differ
    missing = theirs.keys() - ours.keys()
    assert {"loss_type", "precompute_ref_log_probs"} <= missing <= OF_TRL.keys()
    assert not [name for name in {*missing, *differ, *OF_TRL} if f"`{name}`" not in PAGE]
    assert not [name for name in OF_TRL if name in ours]


def test_a_model_by_its_path_has_the_dtype_that_the_page_says(tmp_path):
    tiny_llama(330, max_position_embeddings=1024).bfloat16().save_pretrained(tmp_path / "model")
    rows = Dataset.from_list([{"prompt": "say", "chosen": " the dog", "rejected": " a fox"}])
    common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "bf16": False}
    found, tokenizer = [], build_tokenizer()
    for method, args in (
        (trl.DPOTrainer, trl.DPOConfig(**common)), (DPOTrainer, DPOConfig(**common)),
        (DPOTrainer, DPOConfig(**common, model_init_kwargs={"dtype": "float32"})),
    ):  # fmt: skip
        t = method(str(tmp_path / "model"), args=args, train_dataset=rows, processing_class=tokenizer)
        found.append(t.model.dtype)
    assert found == [torch.float32, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("theirs, cls, ours, count", [
    ({}, DPOTrainer, {}, 5),
    ({}, SWEPOTrainer, {}, 5),
    ({"loss_type": "nca_pair"}, NCATrainer, {"alpha": 1e4}, 4),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, DPOTrainer, {"sft_weight": 0.5}, 1),
    ({"loss_type": "robust", "label_smoothing": 0.2}, DPOTrainer, {"label_smoothing": 0.2}, 5),
    ({"label_smoothing": 0.2}, DPOTrainer, {}, 4),
])  # fmt: skip
def test_the_losses_that_the_page_calls_equal_are(tmp_path, tokenizer, theirs, cls, ours, count):
    words = " the quick fox jumps over a lazy dog and so on".split(" ")
    rows = [{"prompt": " ".join(words[: i + 2]), "chosen": " " + " ".join(words[i + 1 : i + 4]),
             "rejected": " " + words[i + 5]} for i in range(count)]  # fmt: skip
    common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "bf16": False, "beta": 0.3,
              "gradient_checkpointing": False}  # fmt: skip
    policy, reference, found = tiny_llama(len(tokenizer)), tiny_llama(len(tokenizer), seed=9), []
    for method, args in (
        (trl.DPOTrainer, trl.DPOConfig(**common, **theirs)),
        (cls, cls.config_class(**common, **ours)),
    ):
        t = method(copy.deepcopy(policy), ref_model=copy.deepcopy(reference), args=args,
                   train_dataset=Dataset.from_list(rows), processing_class=tokenizer)  # fmt: skip
        loss = t.compute_loss(t.model.train(), t.data_collator(list(t.train_dataset)))
        loss.backward()
        found.append((loss.item(), {name: weight.grad for name, weight in t.model.named_parameters()}))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5)  # the sums of log-probabilities are float32
    assert abs(found[0][0] - math.log(2)) > 1e-3
    for name, expected in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], expected, rtol=1e-4, atol=1e-6, msg=name)
