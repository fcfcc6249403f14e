"""What users of TRL bring along: data, models, callbacks, reports, their scripts and files."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trl import LogCompletionsCallback, RichProgressCallback

from helpers import family_tokenizer, save_start, tiny_llama
from test_trainer import LORA, config, logged, rows, trainer
from trainers import SWEPOConfig, SWEPOTrainer
from trainers.cli import train
from trainers.config import COMPILES

ROOT = Path(__file__).resolve().parents[1]


def pairs(n=8):
    return [{"prompt": r["prompt"], "chosen": r["responses"][0], "rejected": r["responses"][1]} for r in rows(n)]


def chat_pairs(n=8):
    """As in trl-lib/ultrafeedback_binarized: the prompt is the beginning of both sides."""

    def turns(user, assistant):
        return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]

    return [
        {"chosen": turns(r["prompt"], r["chosen"]), "rejected": turns(r["prompt"], r["rejected"]),
         "score_chosen": 8.0, "score_rejected": 3.5}
        for r in pairs(n)
    ]  # fmt: skip


# Data, models, callbacks.


@pytest.mark.parametrize("data", [pairs, chat_pairs])
def test_trl_pairs_a_peft_model_trl_callbacks_and_tensorboard(data, tmp_path, capsys):
    tokenizer = family_tokenizer("llama3")
    logs = {"report_to": "tensorboard", "disable_tqdm": False, "eval_strategy": "steps", "eval_steps": 1}
    t = SWEPOTrainer(
        get_peft_model(tiny_llama(len(tokenizer)), LoraConfig(**LORA)),
        args=config(tmp_path, max_steps=2, learning_rate=0.1, **logs),
        train_dataset=Dataset.from_list(data()), eval_dataset=Dataset.from_list(data(4)),
        processing_class=tokenizer, callbacks=[RichProgressCallback()],
    )  # fmt: skip
    completions = LogCompletionsCallback(t, num_prompts=3, freq=1)
    t.add_callback(completions)
    t.train()
    steps, prompts, texts = zip(*completions.table, strict=True)
    assert steps == ("1",) * 3 + ("2",) * 3 and all(isinstance(text, str) for text in texts)
    assert all(row["prompt"].strip() in prompt for row, prompt in zip(pairs(3) * 2, prompts, strict=True))
    assert logged(t)[1] != pytest.approx(logged(t)[0], abs=1e-6)
    assert "100%" in capsys.readouterr().out  # of the progress bar
    [events] = tmp_path.rglob("events.out.tfevents*")
    found = EventAccumulator(str(events)).Reload()
    assert [e.value for e in found.Scalars("train/loss")] == pytest.approx(logged(t))
    assert len(found.Scalars("eval/rewards/margins")) == 2


# Scripts and files.


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model with its tokenizer, TRL pairs and scored rows, as files."""
    folder = tmp_path_factory.mktemp("inputs")
    save_start(folder / "model", "llama3")
    Dataset.from_list(chat_pairs()).to_json(folder / "pairs.jsonl")
    completions = [{"instruction": row["prompt"], "source": "s", "completions": [
        {"response": text, "overall_score": score, "annotations": {"honesty": {"Rating": "3"}}, "model": "m"}
        for text, score in zip(row["responses"], row["scores"], strict=True)
    ]} for row in rows()]  # fmt: skip
    (folder / "ultrafeedback.jsonl").write_text("\n".join(map(json.dumps, completions)))
    return folder


TRL_SCRIPT = """from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")
args = DPOConfig(output_dir="runs/mine", learning_rate=0.05, beta=0.1)
trainer = DPOTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", args=args, train_dataset=dataset)
trainer.train()
"""


def test_two_lines_of_a_trl_script_make_it_swepo(inputs, tmp_path):
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)[1].splitlines()
    ours = dict(zip(*([line[1:] for line in diff if line[:1] == sign] for sign in "-+"), strict=True))
    after = "\n".join(ours.pop(line, line) for line in TRL_SCRIPT.splitlines())
    assert len(diff) == 5 and not ours
    local = {
        '"HuggingFaceTB/SmolLM2-135M-Instruct"': repr(str(inputs / "model")),
        '"trl-lib/ultrafeedback_binarized", split="train"':
            f'"json", data_files={str(inputs / "pairs.jsonl")!r}, split="train"',
        '"openbmb/UltraFeedback"': repr(str(inputs / "ultrafeedback.jsonl")),
        'output_dir="runs/': "max_steps=2, logging_steps=1, report_to='none', use_cpu=True, bf16=False, "
            f'save_strategy="no", output_dir="{tmp_path}/',
    }  # fmt: skip
    found = []
    for script in (TRL_SCRIPT, after):
        for name, here in local.items():
            script = script.replace(name, here)
        scope = {}
        exec(compile(script, "script.py", "exec"), scope)
        found.append(scope["trainer"])
    assert [type(t).__module__.split(".")[0] for t in found] == ["trl", "trainers"]
    assert isinstance(found[1], SWEPOTrainer) and isinstance(found[1].args, SWEPOConfig)
    assert [t.state.global_step for t in found] == [2, 2]
    assert max(len(row) for row in found[1].train_dataset["scores"]) > 2
    for t in found:
        assert logged(t)[0] != pytest.approx(logged(t)[1], abs=1e-6)


TRL_FILE = {
    # As TRL's own examples write it, old names included.
    "learning_rate": 5.0e-2, "num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True, "logging_steps": 1, "beta": 0.2, "max_length": 256, "use_peft": True, "lora_r": 4,
    "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"], "eval_strategy": "steps", "eval_steps": 1,
    "report_to": "none", "save_strategy": "no", "dtype": "float32",
}  # fmt: skip


def test_a_trl_file_is_read_as_it_is(inputs, tmp_path):
    files = {"model_name_or_path": str(inputs / "model"), "dataset_name": str(inputs / "pairs.jsonl")}
    more = {"dataset_test_split": "train[:4]", "output_dir": str(tmp_path / "out"), "use_cpu": True}
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump({**TRL_FILE, **files, **more}))
    train.main(["--trainer", "DPOTrainer", "--config", str(tmp_path / "trl.yaml")])
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in history if "loss" in log] == [1, 2]
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


# Fields of TrainingArguments.


WORKERS = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 3}


@pytest.mark.parametrize(
    "options, common",
    [(WORKERS, {}), (WORKERS, {"max_tokens_per_batch": 120}), ({"gradient_checkpointing": True}, {}),
     ({"use_cache": True}, {}), ({"auto_find_batch_size": True}, {}), ({"torch_empty_cache_steps": 1}, {}),
     ({"torch_compile": True, "torch_compile_backend": "eager"}, {})],
)  # fmt: skip
def test_fields_that_must_change_no_number(options, common, tmp_path, tokenizer):
    if "torch_compile" in options and Version(torch.__version__) < COMPILES:
        with pytest.raises(ValueError, match="torch_compile=True gives other losses"):
            trainer(tmp_path, tokenizer, **options)
        return
    seen = []
    for changes in ({}, options):
        t = trainer(tmp_path, tokenizer, **common, **changes)
        t.train()
        seen.append(logged(t))
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)


@pytest.mark.parametrize(
    "options", [{"eval_accumulation_steps": 1}, {"eval_use_gather_object": True}, {"include_for_metrics": ["loss"]}]
)
def test_evaluation_options_change_no_number(options, tmp_path, tokenizer):
    seen = []

    def metrics(prediction):
        seen.append([prediction.predictions[0].tolist(), prediction.label_ids[0].tolist()])
        return {}

    reports = [
        trainer(tmp_path, tokenizer, eval_data=rows(5), compute_metrics=metrics, per_device_eval_batch_size=2,
                **changes).evaluate()
        for changes in ({}, options)
    ]  # fmt: skip
    assert seen[0] == seen[1] and reports[0]["eval_loss"] == reports[1]["eval_loss"]
