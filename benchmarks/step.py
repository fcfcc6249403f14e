"""One measurement of benchmarks/run.py in a process of its own: python benchmarks/step.py '<job as JSON>'

Prints one JSON line. A job is measured inside the real `Trainer.train()`, so that a step holds everything a user pays
for: collating, layout, reference, forward, backward, clipping, optimizer, metrics and logging.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from accelerate.utils import send_to_device
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
from trainers.forward.run import Forward, agreement, run

# Randomly initialised Llamas, made on the device: no download, and speed does not depend on what the weights are.
RANDOM_MODELS = {
    "random-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "random-tiny": {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


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


# Trainers.


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
    settings = training_arguments(job, len(rows) // job["prompts"], folder)
    if not default:
        settings |= {"gradient_checkpointing": job["checkpointing"], "bf16": False}
    dtype = "float32" if default else job["dtype"]
    if job["model"] in RANDOM_MODELS:
        model, tokenizer = random_model(job["model"], dtype, job["device"]), word_tokenizer()
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


def training_arguments(job: dict, steps: int, folder: str) -> dict:
    """What all trainers are given alike."""
    return {
        "output_dir": folder,
        "use_cpu": job["device"] == "cpu",
        "max_steps": steps,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": job["device"] != "cpu",
        "max_length": None,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


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


def random_model(name: str, dtype: str, device: str):
    """A Llama with random weights, the same ones in every process on one kind of device."""
    set_seed(0)
    config = LlamaConfig(max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, **RANDOM_MODELS[name])
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Stands in where rows are token ids already and only the pad token is asked for."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), pad_token="<pad>", eos_token="</s>"
    )


# Measuring.


class Clock:
    """Time per part of a step. On CUDA through events, which do not wait for the device."""

    def __init__(self, cuda: bool):
        self.cuda = cuda
        self.spans: list[list[tuple]] = [[]]  # of each step: (part, begin, end)
        self.ends = []

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin, end) -> float:
        return begin.elapsed_time(end) / 1000 if self.cuda else end - begin

    def add(self, part: str, begin) -> None:
        self.spans[-1].append((part, begin, self.now()))

    def end_step(self) -> None:
        self.ends.append(self.now())
        self.spans.append([])

    def steps(self, warm_up: int) -> list[dict[str, float]]:
        """Seconds of each step after the warm-up, in all and per part."""
        if self.cuda:
            torch.cuda.synchronize()
        out = []
        for i in range(warm_up, len(self.ends)):
            parts = dict.fromkeys(("reference", "forward", "backward", "optimizer"), 0.0)
            for part, begin, end in self.spans[i]:
                parts[part] += self.between(begin, end)
            out.append({"seconds": self.between(self.ends[i - 1], self.ends[i]), **parts})
        return out


class Watch(TrainerCallback):
    """Marks the ends of steps and the optimizer, which the Trainer announces."""

    def __init__(self, clock: Clock):
        self.clock, self.begin = clock, None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.begin = self.clock.now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.clock.add("optimizer", self.begin)

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.end_step()


def watch(trainer, clock: Clock) -> None:
    """Time the trainer's models (without gradients a call is the reference's), the backward and the optimizer."""
    trainer.add_callback(Watch(clock))
    begins = []

    def before(*_):
        begins.append(clock.now())

    def after(*_):
        clock.add("forward" if torch.is_grad_enabled() else "reference", begins.pop())

    own = trainer.ref_model if isinstance(trainer, DPOTrainer) else trainer.reference.model
    for model in filter(None, (trainer.model, own)):
        model.register_forward_pre_hook(before)
        model.register_forward_hook(after)
    backward = trainer.accelerator.backward

    def timed_backward(*args, **kwargs):
        begin = clock.now()
        backward(*args, **kwargs)
        clock.add("backward", begin)

    trainer.accelerator.backward = timed_backward


def measure(job: dict) -> dict:
    """Train on the rows of a job; the first `warm_up` steps are not timed."""
    rows = json.loads(Path(job["rows"]).read_text())
    cuda = job["device"] == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(job, rows, folder)
        clock = Clock(cuda)
        watch(trainer, clock)
        before = torch.cuda.memory_allocated() if cuda else psutil.Process().memory_info().rss
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    used = rows[job["warm_up"] * job["prompts"] :]
    return {
        "steps": clock.steps(job["warm_up"]),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "lengths": [[len(r["prompt_ids"]), [len(ids) for ids in r["response_ids"]]] for r in used],
        "best": [max(range(len(r["scores"])), key=r["scores"].__getitem__) for r in used],
        "pairs": len(trainer.train_dataset) // len(rows) if job["variant"].startswith("trl_") else None,
        # The peak that the kernel reports lags a little behind.
        "peak": torch.cuda.max_memory_allocated() if cuda else max(peak_rss(), before),
        "before": before,
        "shape": shape(trainer.model),
    }


def peak_rss() -> int:
    """Most bytes that this process ever held in memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def shape(model) -> dict:
    """The sizes that decide the cost of a token; `parameters` are those outside the embeddings and the LM head."""
    base = base_model(model)
    config = base.config.get_text_config()
    tables = {id(m.weight) for m in (base.get_input_embeddings(), base.get_output_embeddings())}
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    named = [(name, p) for name, p in base.named_parameters() if id(p) not in tables and "lora_" not in name]
    return {
        "parameters": sum(p.numel() for _, p in named),
        "layers": config.num_hidden_layers,
        "attention": heads * head_size,
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
    }


def check(job: dict) -> dict:
    """Compare `shared` with `rows` on one prompt: log-probabilities and gradients.

    Rounding alone is seen from `rows` with every response in a forward of its own.
    """
    rows = json.loads(Path(job["rows"]).read_text())
    with tempfile.TemporaryDirectory() as folder:
        trainer = build({**job, "variant": "shared"}, rows, folder)
    batch = trainer.data_collator([trainer.train_dataset[job["warm_up"] * job["prompts"]]])
    batch = send_to_device(batch, trainer.accelerator.device)
    count = batch["mask"].size(1)
    single = [{**batch, **{key: batch[key][:, [k]] for key in ("response_ids", "response_mask", "mask")}}
              for k in range(count)]  # fmt: skip
    model = trainer.model.train()
    weights = torch.randn(count, generator=torch.Generator().manual_seed(0)).tolist()
    found = {
        "rows": _logps_and_gradients(model, [(batch, weights)], shared=False),
        "shared": _logps_and_gradients(model, [(batch, weights)], shared=True),
        "one by one": _logps_and_gradients(model, [(b, [w]) for b, w in zip(single, weights, strict=True)], False),
    }
    result = {"limit": agreement(model), "dtype": job["dtype"], "tokens": int(batch["response_mask"].sum())}
    logps, gradients = found["rows"]
    for name in ("shared", "one by one"):
        difference = sum(
            (g.float() - h.float()).square().sum() for g, h in zip(gradients, found[name][1], strict=True)
        )
        size = sum(g.float().square().sum() for g in gradients)
        result[name] = {
            "logps": float((logps - found[name][0]).abs().mean()),
            "gradients": float((difference / size).sqrt()),
        }
    return result


def _logps_and_gradients(model, parts: list[tuple[dict, list[float]]], shared: bool):
    """Log-probabilities of all response tokens, and the gradients of their weighted sum."""
    model.zero_grad()
    logps = []
    for batch, weights in parts:
        out = run(model, batch, shared=shared).logps
        (out.sum(-1) * torch.tensor(weights, device=out.device)).sum().backward()
        logps.append(out.detach()[batch["response_mask"]])
    return torch.cat(logps), [p.grad.clone() for p in model.parameters() if p.grad is not None]


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(check(job) if job["variant"] == "check" else measure(job)), flush=True)
