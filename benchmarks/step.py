"""One measurement of benchmarks.run in a process of its own: python -m benchmarks.step '<job as JSON>'

Prints one JSON line. A job is measured inside the real `Trainer.train()`, so that a step holds everything a user pays
for: collating, layout, reference, forward, backward, clipping, optimizer, metrics and logging.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)
from trl import DPOConfig, DPOTrainer

from trainers import SWEPOConfig, SWEPOTrainer
from trainers.forward.layout import rows_layout, to_responses
from trainers.forward.policy import base_model
from trainers.forward.run import Forward
from trainers.runs.processes import peak_rss

# A randomly initialised Llama, made on the device: no download, and speed does not depend on what the weights are.
RANDOM = "random-7b"
SIZES = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}  # fmt: skip
PARTS = ("reference", "forward", "backward", "optimizer")


def expand_pairs(row: dict, which: str) -> list[dict]:
    """A tokenised row as TRL pairs: "all_pairs" with different scores, or the "best_rest": best against each worse."""
    scores, ids = row["scores"], row["response_ids"]
    best = max(range(len(scores)), key=scores.__getitem__)
    chosen = range(len(scores)) if which == "all_pairs" else [best]
    return [
        {"prompt_ids": row["prompt_ids"], "chosen_ids": ids[i], "rejected_ids": ids[j]}
        for i in chosen
        for j in range(len(scores))
        if scores[i] > scores[j]
    ]


class FullLogits(SWEPOTrainer):
    """What a plain implementation does: padded rows, all logits, a softmax over every position."""

    def forward(self, model, batch):
        inputs = rows_layout(batch)
        logps = model(input_ids=inputs.input_ids, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
        logps = logps[inputs.positions, inputs.targets]
        return Forward(to_responses(logps, batch["response_mask"]))


def build(job: dict, rows: list[dict], folder: str):
    """The trainer of a variant, on a model of its own."""
    variant = job["variant"]
    default = variant.endswith("_default")  # TRL as it comes: float32 weights, bf16 autocast, checkpointing
    settings = {
        "output_dir": folder, "use_cpu": job["device"] == "cpu", "dataloader_pin_memory": job["device"] != "cpu",
        "max_steps": len(rows) // job["prompts"], "learning_rate": 1e-6, "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential", "max_length": None, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    if not default:
        settings |= {"gradient_checkpointing": job["checkpointing"], "bf16": False}
    dtype = "float32" if default else job["dtype"]
    if job["model"] == RANDOM:
        model, tokenizer = random_model(dtype, job["device"])
    else:
        model, tokenizer = job["model"], AutoTokenizer.from_pretrained(job["model"])
        settings["model_init_kwargs"] = {"dtype": dtype}
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    common = {"processing_class": tokenizer, "peft_config": lora if job["lora"] else None}
    micro = job["micro_trl"] if variant.startswith("trl_") else job["micro"]
    settings["gradient_accumulation_steps"] = job["prompts"] // micro
    if variant.startswith("trl_"):
        rows = short_warm_up(rows, job["warm_up"] * job["prompts"], micro)
        return trl_trainer(model, settings, rows, micro, variant, common)
    layout = "shared" if variant == "shared" else "rows"
    trainer_class = FullLogits if variant == "rows_full_logits" else SWEPOTrainer
    args = SWEPOConfig(layout=layout, per_device_train_batch_size=micro, **settings)
    return trainer_class(model, args=args, train_dataset=Dataset.from_list(rows), **common)


def short_warm_up(rows: list[dict], count: int, micro: int) -> list[dict]:
    """Rows of which the first `count`, the warm-up, are cut short but for the `micro` longest of them.

    A micro-batch of the longest prompts warms as much memory as a whole step of them.
    """
    by_length = sorted(range(count), key=lambda i: -max(map(len, rows[i]["response_ids"])))
    short = set(by_length[micro:])
    return [
        {**row, "response_ids": [ids[:8] for ids in row["response_ids"]]} if i in short else row
        for i, row in enumerate(rows)
    ]


def trl_trainer(model, settings: dict, rows: list[dict], micro: int, variant: str, common: dict) -> DPOTrainer:
    """TRL's DPOTrainer on the pairs of `micro` prompts at a time.

    Raises:
        ValueError: the prompts give different numbers of pairs, so that micro-batches would not end with a prompt.
    """
    pairs = [expand_pairs(row, variant.removeprefix("trl_").removesuffix("_default")) for row in rows]
    counts = {len(p) for p in pairs}
    if len(counts) > 1:
        raise ValueError(f"The prompts give {sorted(counts)} pairs; take prompts that all give the same number.")
    args = DPOConfig(per_device_train_batch_size=counts.pop() * micro, **settings)
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = DPOTrainer(model, args=args, train_dataset=text, **common)
    # TRL tokenises text in its constructor; token ids given afterwards are exactly those the other variants train on.
    trainer.train_dataset = Dataset.from_list([pair for group in pairs for pair in group])
    return trainer


def random_model(dtype: str, device: str) -> tuple:
    """A Llama with random weights, the same in every process on one kind of device, and a tokenizer to pad with."""
    set_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=getattr(torch, dtype))
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


class Clock(TrainerCallback):
    """Seconds per part of each step of a trainer; on CUDA every part waits for the device."""

    def __init__(self, trainer, *, cuda: bool):
        self.cuda, self.steps, self.begin, self.optimizer = cuda, [], None, None
        self.parts = dict.fromkeys(PARTS, 0.0)
        trainer.add_callback(self)
        own, begins = trainer.ref_model if isinstance(trainer, DPOTrainer) else trainer.reference.model, []
        for model in filter(None, (trainer.model, own)):
            model.register_forward_pre_hook(lambda *_: begins.append(self.now()))
            # Without gradients a forward is the reference's.
            model.register_forward_hook(
                lambda *_: self.add("forward" if torch.is_grad_enabled() else "reference", begins.pop())
            )
        backward = trainer.accelerator.backward

        def timed_backward(*args, **kwargs):
            begin = self.now()
            backward(*args, **kwargs)
            self.add("backward", begin)

        trainer.accelerator.backward = timed_backward

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def add(self, part: str, begin: float) -> None:
        self.parts[part] += self.now() - begin

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer = self.now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.add("optimizer", self.optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        """From the end of one step to the end of the next; the first has no begin and warms up."""
        now = self.now()
        self.steps.append({"seconds": now - (self.begin or now), **self.parts})
        self.parts, self.begin = dict.fromkeys(PARTS, 0.0), now


def measure(job: dict) -> dict:
    """Train on the rows of a job; the first `warm_up` steps are not timed."""
    rows = json.loads(Path(job["rows"]).read_text())
    cuda = job["device"] == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(job, rows, folder)
        clock = Clock(trainer, cuda=cuda)
        before = torch.cuda.memory_allocated() if cuda else psutil.Process().memory_info().rss
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    used = rows[job["warm_up"] * job["prompts"] :]
    return {
        "steps": clock.steps[job["warm_up"] :],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "lengths": [[len(r["prompt_ids"]), [len(ids) for ids in r["response_ids"]]] for r in used],
        "best": [max(range(len(r["scores"])), key=r["scores"].__getitem__) for r in used],
        "pairs": len(trainer.train_dataset) // len(rows) if job["variant"].startswith("trl_") else None,
        # The peak that the kernel reports lags a little behind.
        "peak": torch.cuda.max_memory_allocated() if cuda else max(peak_rss(), before),
        "before": before,
        "shape": shape(trainer.model),
    }


def shape(model) -> dict:
    """The sizes that decide the cost of a token; `parameters` are those outside the embeddings and the LM head."""
    base = base_model(model)
    config = base.config.get_text_config()
    tables = {id(m.weight) for m in (base.get_input_embeddings(), base.get_output_embeddings())}
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    weights = [p for name, p in base.named_parameters() if id(p) not in tables and "lora_" not in name]
    return {
        "parameters": sum(p.numel() for p in weights),
        "layers": config.num_hidden_layers,
        "attention": heads * head_size,
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
    }


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(measure(job)), flush=True)
