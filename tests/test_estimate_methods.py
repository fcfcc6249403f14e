"""The estimate of memory and of operations against a step of each trainer, from its config to its backward pass."""

import dataclasses
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

import trainers
from helpers import build_tokenizer
from test_estimate import LORA, WIDE, build
from trainers.cli.dry_run import run_facts
from trainers.data.budget import token_lengths
from trainers.emdpo.m_step import POSTERIOR, REFERENCE, TypePolicyTrainer
from trainers.estimate import Plan, fed, memory, shape_of, total, work
from trainers.forward import divergence
from trainers.forward.head import CPU_CHUNK_ELEMENTS

STATES = ("weights", "gradients", "optimizer", "reference")
LENGTHS = [(40, [100, 80, 120, 90]), (60, [70, 110, 50, 100])]


def step_of(cls, widths, folder, *, lora, vocabulary=1500, layers=4, **options):
    """A trainer and a function that makes one step of it, backward pass included."""
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(1, 1000, (count,), generator=generator).tolist()

    rows = [
        {"prompt_ids": ids(p), "response_ids": [ids(r) for r in rs], "scores": [float(k) for k in range(len(rs))],
         REFERENCE: [-700.0] * len(rs), POSTERIOR: 0.7}
        for p, rs in LENGTHS
    ]  # fmt: skip
    args = cls.config_class(
        output_dir=str(folder), use_cpu=True, report_to="none", per_device_train_batch_size=2, **options
    )
    trainer = cls(
        build(widths, vocabulary=vocabulary, layers=layers), args=args, train_dataset=Dataset.from_list(rows),
        processing_class=build_tokenizer(), peft_config=LoraConfig(**LORA) if lora else None,
    )  # fmt: skip
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(2)]))
    trainer.model.train()
    if args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})

    def step():
        trainer.compute_loss(trainer.model, batch).backward()

    step()  # so that gradients are there, and the first batch is checked
    return trainer, step


def measured_peak(step, path):
    """Most bytes that a step allocates above what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    profile.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    used = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        used += event["args"]["Bytes"]
        peak = max(peak, used)
    return peak


def estimated(trainer):
    """Facts and shape as `--dry_run` finds them, and the batch as it is fed."""
    shape = shape_of(trainer.model)
    run = run_facts(type(trainer), trainer.args, shape, Plan())
    run = dataclasses.replace(run, chunk_elements=CPU_CHUNK_ELEMENTS)
    shared = trainer.runner.layout != "rows"
    return shape, fed(token_lengths(trainer.train_dataset), shared=shared), run


SWEPO, LIRE, EM, SPARSEPO = trainers.SWEPOTrainer, trainers.LIRETrainer, TypePolicyTrainer, trainers.SparsePOTrainer
ONES, TWO_MASKS = {"mask": "ones"}, {"independent": True}


@pytest.mark.parametrize(
    ("cls", "options", "lora", "recompute", "vocabulary"),
    [
        (SWEPO, {}, False, False, 1100),
        (SWEPO, {}, True, True, 12000),
        (trainers.DPOTrainer, {"pairs": "all"}, False, True, 1100),
        (LIRE, {}, False, True, 12000),
        (LIRE, {}, True, False, 1100),
        (EM, {}, False, False, 12000),
        (EM, {}, True, True, 1100),
        (SPARSEPO, {}, False, False, 1100),
        (SPARSEPO, {}, False, True, 12000),
        (SPARSEPO, {}, True, True, 1100),
        (SPARSEPO, TWO_MASKS, True, False, 1100),
        (SPARSEPO, TWO_MASKS, True, True, 12000),
        (SPARSEPO, {"mask": "activations"}, False, True, 12000),
    ],
)
def test_peak_of_a_step_of_each_method(cls, options, lora, recompute, vocabulary, tmp_path):
    options = {**options, "gradient_checkpointing": recompute}
    trainer, step = step_of(cls, WIDE, tmp_path, lora=lora, vocabulary=vocabulary, **options)
    shape, batch, run = estimated(trainer)
    items = memory(shape, batch, Plan(), run)
    there = sum(item.size for item in items if item.name in STATES)
    assert total(items) - there == pytest.approx(measured_peak(step, tmp_path / "trace.json"), rel=0.15)
    own = sum(p.nbytes for model in models(trainer) for p in model.parameters())
    trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    assert there == pytest.approx(own + 3 * trained, rel=0.001)  # gradients and two moments


def models(trainer):
    """The policy, and the reference if it is a model of its own."""
    reference = trainer.reference and trainer.reference.model
    return [trainer.model, *([reference] if reference is not None else [])]


@pytest.mark.parametrize("lora", [False, True])
def test_peak_of_a_kl_through_a_head_that_is_not_plain(lora, tmp_path, monkeypatch):
    monkeypatch.setattr(divergence, "is_plain", lambda head, rule: False)  # FSDP and quantisation make such heads
    trainer, step = step_of(SPARSEPO, WIDE, tmp_path, lora=lora, vocabulary=12000, gradient_checkpointing=True, **ONES)
    shape, batch, run = estimated(trainer)
    items = memory(dataclasses.replace(shape, plain_head=False), batch, Plan(), run)
    there = sum(item.size for item in items if item.name in STATES)
    assert total(items) - there == pytest.approx(measured_peak(step, tmp_path / "trace.json"), rel=0.15)


def attention_flops(query, key, *_, **__):
    """2 per number of Q K^T and of P V, from the shapes (batch, heads, length, size)."""
    batch, heads, length, size = query
    return 4 * batch * heads * length * key[-2] * size


# torch counts the attention kernels of GPUs only. A backward pass has five such products.
ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, *_, **__: 2.5 * attention_flops(query, key)
    ),
}


@pytest.mark.parametrize(
    ("cls", "options", "lora", "recompute", "layout"),
    [
        (SWEPO, {}, False, False, "shared"),
        (SWEPO, {}, True, True, "shared"),
        (SWEPO, {}, False, True, "rows"),
        (LIRE, {}, True, False, "rows"),
        (SPARSEPO, {}, False, True, "shared"),
        (SPARSEPO, ONES, True, False, "rows"),
    ],
)
def test_operations_are_those_that_torch_counts(cls, options, lora, recompute, layout, tmp_path):
    trainer, step = step_of(
        cls, WIDE, tmp_path, lora=lora, vocabulary=5000, gradient_checkpointing=recompute, layout=layout, **options
    )
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
        step()
    shape, batch, run = estimated(trainer)
    found = work(shape, batch, run, reference=trainer.needs_reference)
    assert found.total == pytest.approx(counter.get_total_flops(), rel=0.05)
