"""A tiny model and rows for tests of SGPO's stages, and the command line that runs them."""

import json
from functools import cache

import torch
from datasets import Dataset
from safetensors.torch import load_file

from helpers import family_tokenizer, flags, tiny_llama
from trainers.cli import train
from trainers.runs.files import read_rows

PROMPTS = [
    "what is the capital", "say something", "how was the day", "where is the dog", "the quick", "a friend said",
    "it is", "over the fox", "bad day today", "of course", "jumps", "who had a",
]  # fmt: skip
ANSWERS = ["the dog sleeps", "a lazy day", "it is Paris, of course", "jumps over", "it rains"]
SAMPLING = {"max_new_tokens": 24, "temperature": 1.0, "top_p": 1.0, "batch_size": 3}
# Options of the whole run, as a recipe and from Python.
OPTIONS = {
    "as_chat": True, "sampling": SAMPLING, "reviser_analysis": False, "max_length": 2000, "learning_rate": 0.01,
    "improver": {"learning_rate": 0.01, "num_train_epochs": 2}, "num_train_epochs": 2,
    "per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2,
    "logging_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 3,
    "scorer": "sgpo_rows.vowels",
}  # fmt: skip


def write_inputs(folder):
    """A model that ends its answers after some ten tokens, and rows of prompt and answer."""
    tokenizer = family_tokenizer("llama3")
    tokenizer.save_pretrained(folder / "model")
    model = tiny_llama(len(tokenizer), max_position_embeddings=2048)
    model.generation_config.eos_token_id = list(range(2, 70))  # any of these ends an answer
    model.save_pretrained(folder / "model")
    rows = [{"prompt": prompt, "chosen": ANSWERS[i % 5]} for i, prompt in enumerate(PROMPTS)]
    Dataset.from_list(rows).to_json(folder / "rows.jsonl")
    return folder


def vowels(prompts, completions, *, reference, **columns):
    texts = [completion[0]["content"] for completion in completions]
    return [sum(c in "aeiou" for c in text) / (len(text) + 1) for text in texts]


def command(inputs, output, **changes):
    """Flags of a whole run; None leaves one out."""
    options = OPTIONS | {
        "trainer": "SGPOTrainer", "model_name_or_path": inputs / "model", "dataset_name": inputs / "rows.jsonl",
        "dataset_train_split": "train[:5]", "preference_split": "train[5:10]", "dataset_test_split": "train[10:]",
        "output_dir": output, "sft": {"dataset_name": str(inputs / "rows.jsonl"), "dataset_split": "train[:5]"},
    } | changes  # fmt: skip
    texts = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in options.items()}
    return flags(**{name: value for name, value in texts.items() if value is not None})


@cache
def finished_run(temporary):
    """(inputs, output) of one whole run, made once for all test files."""
    parent = temporary / "sgpo"
    parent.mkdir()
    inputs = write_inputs(parent)
    train.main(command(inputs, parent / "finished"))
    return inputs, parent / "finished"


def rows(folder, stage, name="rows.jsonl.gz"):
    return read_rows(folder / "round-00" / stage / name)


def counts(folder, stage):
    return json.loads((folder / "round-00" / stage / "manifest.json").read_text())["counts"]


def weights(folder):
    # Copies, as the file is mapped and may be replaced.
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def history(folder, stage):
    return json.loads((folder / f"round-00/{stage}/model/trainer_state.json").read_text())["log_history"]
