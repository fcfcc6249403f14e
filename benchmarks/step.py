"""Measurements of benchmarks.run, one after the other in one process: python -m benchmarks.step '<job as JSON>'

Prints one JSON line for each. All are made inside the real `Trainer.train()`, so that a step holds everything a user
pays for: collating, layout, reference, forward, backward, clipping, optimizer, metrics and logging.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)
from trl import DPOConfig, DPOTrainer

from benchmarks.machine import by_kind, product_speeds
from benchmarks.ratios import PARTS
from trainers import SWEPOConfig, SWEPOTrainer
from trainers.forward.layout import rows_layout, to_responses
from trainers.forward.policy import base_model
from trainers.forward.run import Forward
from trainers.runs.processes import free_memory, peak_rss

# A randomly initialised Llama, made on the device: no download, and speed does not depend on what the weights are.
RANDOM = "random-7b"
SIZES = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}  # fmt: skip
OURS: dict[str, dict] = {
    "shared": {"layout": "shared"},
    "parts": {"layout": "shared", "tokens_per_backward": 1024},
    "cached": {"layout": "shared", "precompute_ref_logps": True},
    "trunk": {"layout": "shared"},
    "rows": {"layout": "rows"},
    "rows_full_logits": {"layout": "rows"},
}


class FullLogits(SWEPOTrainer):
    """What a plain implementation does: padded rows, all logits, a softmax over every position."""

    def forward(self, model, batch):
        inputs = rows_layout(batch)
        logps = model(input_ids=inputs.input_ids, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
        logps = logps[inputs.positions, inputs.targets]
        return Forward(to_responses(logps, batch["response_mask"]))


class Pairs(DPOTrainer):
    """TRL's trainer on the token ids that the other variants train on; its own reads text."""

    filled = 0.0  # seconds of the reference before training

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def compute_ref_log_probs(self, model, inputs):
        begin = time.perf_counter()
        found = super().compute_ref_log_probs(model, inputs)
        self.filled += time.perf_counter() - begin
        return found


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


def spread_out(pairs: list[dict], count: int) -> list[dict]:
    """`count` of the pairs, or all: those in the middle of as many equal parts of them, ordered by length."""
    ordered = sorted(pairs, key=lambda pair: len(pair["chosen_ids"]) + len(pair["rejected_ids"]))
    count = min(count, len(pairs))
    return [ordered[(2 * i + 1) * len(pairs) // (2 * count)] for i in range(count)]


def shortened(row: dict) -> dict:
    """A row for a step that makes no more than the optimizer's states and the check of the first batch."""
    return {**row, "prompt_ids": row["prompt_ids"][:32], "response_ids": [ids[:8] for ids in row["response_ids"]]}


def build(job: dict, rows: list[dict], folder: str) -> SWEPOTrainer | Pairs:
    """The trainer of a variant, on a model of its own."""
    variant, micro = job["variant"], job["micro"]
    settings = {
        "output_dir": folder, "use_cpu": job["device"] == "cpu", "dataloader_pin_memory": job["device"] != "cpu",
        "max_steps": len(rows) // job["prompts"], "learning_rate": 1e-6, "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential", "max_length": None, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": job["checkpointing"], "bf16": False,
    }  # fmt: skip
    if job["model"] == RANDOM:
        model, tokenizer = random_model(job["dtype"], job["device"])
    else:
        model, tokenizer = job["model"], AutoTokenizer.from_pretrained(job["model"])
        settings["model_init_kwargs"] = {"dtype": job["dtype"]}
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    common = {"processing_class": tokenizer, "peft_config": lora if job["lora"] else None}
    if variant.startswith("trl_"):
        return trl_trainer(model, job, settings, rows, common)
    settings |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": job["prompts"] // micro}
    options = {**OURS[variant], "ref_cache_dir": folder, **job.get("options", {})}
    trainer_class = FullLogits if variant == "rows_full_logits" else SWEPOTrainer
    args = SWEPOConfig(**options, **settings)
    return trainer_class(model, args=args, train_dataset=Dataset.from_list(rows), **common)


def trl_trainer(model, job: dict, settings: dict, rows: list[dict], common: dict) -> Pairs:
    """TRL's trainer on the pairs of the rows, or on "pairs" of each; "pairs_at_once", or those of "micro_trl" rows.

    Raises:
        ValueError: the prompts give different numbers of pairs, so that steps would not end with a prompt.
    """
    which = job["variant"].removeprefix("trl_").removesuffix("_cached")
    groups = [expand_pairs(row, which) for row in rows]
    groups = [spread_out(pairs, job.get("pairs", len(pairs))) for pairs in groups]
    counts = {len(pairs) for pairs in groups}
    if len(counts) > 1:
        raise ValueError(f"The prompts give {sorted(counts)} pairs; take prompts that all give the same number.")
    [count] = counts
    size = job.get("pairs_at_once") or count * job["micro_trl"]
    args = DPOConfig(
        per_device_train_batch_size=size, gradient_accumulation_steps=count * job["prompts"] // size,
        precompute_ref_log_probs=job["variant"].endswith("_cached"), **settings,
    )  # fmt: skip
    return Pairs(model, args=args, train_dataset=Dataset.from_list([p for pairs in groups for p in pairs]), **common)


def random_model(dtype: str, device: str) -> tuple:
    """A Llama with random weights, the same in every process on one kind of device, and a tokenizer to pad with."""
    set_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=getattr(torch, dtype))
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


class Clock(TrainerCallback):
    """Seconds per part of each step of a trainer, and the tokens its policy was fed in passes with a gradient.

    On CUDA every part waits for the device.
    """

    def __init__(self, trainer: SWEPOTrainer | Pairs, *, cuda: bool):
        self.cuda, self.begin, self.optimizer, self.filling = cuda, 0.0, 0.0, 0.0
        self.steps: list[dict[str, float]] = []
        self.parts = dict.fromkeys((*PARTS, "filling", "fed"), 0.0)
        trainer.add_callback(self)
        if isinstance(trainer, DPOTrainer):
            reference = trainer.ref_model
        else:
            reference = trainer.reference.model
            trainer.precompute_reference = self.timed("filling", trainer.precompute_reference)
        self.alone = reference is None  # then the policy without gradients is the reference: its adapter is off
        for part, model in (("forward", trainer.model), ("reference", reference)):
            if model is not None:
                model.forward = self.timed(part, model.forward)
        trainer.accelerator.backward = self.timed("backward", trainer.accelerator.backward)

    def timed(self, part: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            graph, begin = torch.is_grad_enabled(), self.now()
            if part == "forward" and graph:
                self.parts["fed"] += kwargs["input_ids"].numel()
            name = "reference" if part == "forward" and self.alone and not graph else part
            with record_function(name):
                found = function(*args, **kwargs)
            self.parts[name] += self.now() - begin
            return found

        return run

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.filling += self.parts["filling"]  # before the first step
        self.parts = dict.fromkeys(self.parts, 0.0)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer = self.now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.parts["optimizer"] += self.now() - self.optimizer

    def on_step_end(self, args, state, control, **kwargs):
        """From the end of one step to the end of the next; the first, which has no begin, warms up."""
        now = self.now()
        self.steps.append({"seconds": now - self.begin, **self.parts})
        self.begin = now


class Profiler(TrainerCallback):
    """Profiles the last step."""

    def __init__(self):
        self.profile = profile(activities=[ProfilerActivity.CPU])

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:
            self.profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.profile.stop()


def measure(job: dict) -> tuple[dict, SWEPOTrainer | Pairs]:
    """Train on the rows of a job: figures and the trainer. The first `warm_up` steps are not timed, nor a last one
    that is profiled."""
    rows = json.loads(Path(job["rows"]).read_text())
    if job["variant"] == "trunk":  # no response begins as the one before it
        for row in rows:
            row["response_ids"] = [[i % 2 + ids[0] - 1, *ids[1:]] for i, ids in enumerate(row["response_ids"])]
    cuda, prompts, warm_up = job["device"] == "cuda", job["prompts"], job["warm_up"]
    used = rows[warm_up * prompts :]
    if job.get("short"):
        rows[: warm_up * prompts] = map(shortened, used[-prompts:])
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(job, rows + (used[-prompts:] if job.get("profiled") else []), folder)
        clock, profiler = Clock(trainer, cuda=cuda), Profiler()
        if job.get("profiled"):
            trainer.add_callback(profiler)
        before = torch.cuda.memory_allocated() if cuda else psutil.Process().memory_info().rss
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    is_trl = isinstance(trainer, Pairs)
    pairs = len(expand_pairs(used[0], job["variant"].removeprefix("trl_").removesuffix("_cached"))) if is_trl else 1
    figures = {
        "steps": clock.steps[warm_up : len(rows) // prompts],
        "filling": trainer.filled if is_trl else clock.filling,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "lengths": [[len(row["prompt_ids"]), [len(ids) for ids in row["response_ids"]]] for row in used],
        "pairs": pairs,
        "fed_pairs": min(pairs, job.get("pairs", pairs)),
        # The peak that the kernel reports lags a little behind.
        "peak": torch.cuda.max_memory_allocated() if cuda else max(peak_rss(), before),
        "before": before,
        "shape": shape(trainer.model),
        "kinds": by_kind(profiler.profile.events(), PARTS) if job.get("profiled") else None,
    }
    return figures, trainer


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


def main(job: dict) -> None:
    """The measurements of a job; with "tokens" also the speed of products, before and after them."""

    def products() -> None:
        if "tokens" in job:
            speeds = product_speeds(config, job["tokens"], getattr(torch, job["dtype"]), job["device"])
            print(json.dumps({"products": speeds}), flush=True)

    config = AutoConfig.from_pretrained(job["model"])
    products()
    for wanted in job["measurements"]:
        begin = time.perf_counter()
        found = measure({**job, **wanted})[0]  # the trainer goes
        free_memory()
        told = {name: wanted[name] for name in ("setting", "variant")}
        print(json.dumps({**told, **found, "whole": time.perf_counter() - begin}), flush=True)
    products()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
