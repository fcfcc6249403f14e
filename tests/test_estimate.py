"""The estimate of memory against measured steps of each trainer, real layouts and numbers worked out by hand."""

import itertools
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig
from trl import ModelConfig

import trainers
from batches import RAGGED, make_batch
from helpers import build_tokenizer, tiny_gemma3
from trainers.cli.dry_run import estimate_of
from trainers.data.budget import token_lengths
from trainers.emdpo.m_step import POSTERIOR, REFERENCE, TypePolicyTrainer
from trainers.estimate import Estimate, Fed, Plan, Training, fed, read_plan
from trainers.forward import divergence, tree
from trainers.forward.head import CPU_CHUNK_ELEMENTS
from trainers.forward.layout import lay_out
from trainers.forward.policy import add_adapter, base_model
from trainers.forward.run import prepare_forward, run

WIDE = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8, "num_key_value_heads": 4}
# For measured steps in bfloat16, which some CPUs multiply a hundred times slower than float32.
SMALL = {"hidden_size": 96, "intermediate_size": 768, "num_attention_heads": 6, "num_key_value_heads": 2}
TALL = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 6, "num_key_value_heads": 2}
ONE, TWO = [(30, [50, 40, 60, 45])], [(100, [75, 45]), (20, [30, 60, 15])]
GROUPS = [(40, [100, 80, 120, 90]), (60, [70, 110, 50, 100])]
STATES = ("weights", "gradients", "optimizer", "reference")
F32, BF16 = torch.float32, torch.bfloat16


def build(widths, *, layers=2, dtype=F32, lora=False, device="cpu", vocabulary=1500):
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, max_position_embeddings=2048, **widths)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        adapter = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
        return add_adapter(model, adapter, zero3=False) if lora else model


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("widths", "lengths", "dtype", "autocast"),
    [(WIDE, ONE, F32, False), (TALL, TWO, BF16, False), (WIDE, TWO, F32, True)],
)
def test_activations_are_what_autograd_saves(widths, lengths, dtype, autocast, shared, recompute, lora):
    model, batch = build(widths, dtype=dtype, lora=lora), make_batch(lengths, vocab=1000)
    if recompute:
        base_model(model).gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    prepare_forward(base_model(model), share=shared)
    model.train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        if (pointer := tensor.untyped_storage().data_ptr()) not in own:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", BF16, enabled=autocast):
            logps = run(model, batch, lay_out(batch, "shared" if shared else "rows")).logps
    assert logps.requires_grad
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    size = fed(lengths, "shared" if shared else "rows")
    facts = Training(autocast, recompute, frozen_copy=False, chunk_elements=CPU_CHUNK_ELEMENTS)
    # The mask is in memory all the time, and so not saved once more.
    expected = Estimate(model, Plan(), facts).step(size)["activations"] - size.mask
    # In `rows` without a copy of its output, attention may or may not save it twice.
    assert expected == pytest.approx(saved, rel=0.02 if shared else 0.04)


def check_peak(cls, model, groups, folder, *, rel, lora=False, **options):
    """The estimate against the most bytes that a step of a trainer allocates above what was there before."""
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(1, 1000, (count,), generator=generator).tolist()

    rows = [
        {"prompt_ids": ids(p), "response_ids": [ids(r) for r in rs], "scores": [float(k) for k in range(len(rs))],
         REFERENCE: [-700.0] * len(rs), POSTERIOR: 0.7}
        for p, rs in groups
    ]  # fmt: skip
    args = cls.config_class(output_dir=str(folder), use_cpu=True, report_to="none", **options)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear") if lora else None
    trainer = cls(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=build_tokenizer(),
                  peft_config=adapter)  # fmt: skip
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))]))
    trainer.model.train()
    if args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.compute_loss(trainer.model, batch).backward()  # so that gradients are there, and the batch is checked
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.compute_loss(trainer.model, batch).backward()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    peak = max(itertools.accumulate(e["args"]["Bytes"] for e in events))
    estimate = estimate_of(type(trainer), trainer.args, ModelConfig(), trainer.model, Plan())
    estimate.run = estimate.run._replace(chunk_elements=CPU_CHUNK_ELEMENTS)
    batch = fed(token_lengths(trainer.train_dataset), "rows" if trainer.runner.layout == "rows" else "shared")
    assert sum(estimate.step(batch).values()) == pytest.approx(peak, rel=rel)
    there = sum(estimate.states()[name] for name in STATES)
    reference = trainer.reference and trainer.reference.model
    own = sum(p.nbytes for m in (trainer.model, reference) if m is not None for p in m.parameters())
    trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    assert there == pytest.approx(own + 3 * trained, rel=0.001)  # gradients and two moments


SWEPO, LIRE, EM, SPARSEPO = trainers.SWEPOTrainer, trainers.LIRETrainer, TypePolicyTrainer, trainers.SparsePOTrainer
TWO_MASKS = {"independent": True}


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
    model = build(WIDE, vocabulary=vocabulary, layers=4)
    check_peak(cls, model, GROUPS, tmp_path, lora=lora, rel=0.15, gradient_checkpointing=recompute, **options)


@pytest.mark.parametrize("lora", [False, True])
def test_peak_of_a_kl_through_a_head_that_is_not_plain(lora, tmp_path, monkeypatch):
    monkeypatch.setattr(divergence, "is_plain", lambda head, rule: False)  # FSDP and quantisation make such heads
    monkeypatch.setattr("trainers.estimate.logit_rule", lambda config: None)
    model, options = build(WIDE, vocabulary=12000, layers=4), {"gradient_checkpointing": True, "mask": "ones"}
    check_peak(SPARSEPO, model, GROUPS, tmp_path, lora=lora, rel=0.15, **options)


# Vocabularies that leave the peak to a layer, or to the LM head. bfloat16 is left out where the head's weight is
# trained: CPUs copy a 16-bit gradient before they add it to a float32 one, GPUs do not.
@pytest.mark.parametrize(
    ("widths", "groups", "kind", "recompute", "dtype", "bf16", "lora", "vocabulary", "plain"),
    [
        (WIDE, ONE, "shared", False, F32, False, False, 8000, True),
        (WIDE, ONE, "shared", True, F32, False, False, 8000, True),
        (WIDE, ONE, "shared", True, F32, False, False, 8000, False),
        (WIDE, ONE, "shared", True, F32, False, False, 1100, True),
        (SMALL, TWO, "shared", True, BF16, False, False, 1100, True),
        (SMALL, TWO, "shared", True, BF16, True, True, 1100, True),
        (SMALL, TWO, "rows", False, BF16, False, True, 8000, True),
        (SMALL, TWO, "rows", True, F32, True, True, 1100, True),
    ],
)
def test_peak_in_each_precision_and_layout(
    widths, groups, kind, recompute, dtype, bf16, lora, vocabulary, plain, tmp_path
):
    model = build(widths, dtype=dtype, vocabulary=vocabulary)
    if not plain:
        model.lm_head.__class__ = type("Head", (torch.nn.Linear,), {})
    options = {"gradient_checkpointing": recompute, "bf16": bf16, "layout": kind}
    check_peak(LIRE, model, groups, tmp_path, lora=lora, rel=0.1, **options)


@pytest.mark.parametrize("piece", [2, 256])
def test_fed_counts_what_the_layouts_feed(piece, monkeypatch):
    monkeypatch.setattr(tree, "PIECE", piece)
    batch = make_batch(RAGGED, vocab=10**6)  # no two responses begin alike
    shared, rows = lay_out(batch, "shared"), lay_out(batch, "rows")
    branches = shared.branches
    assert fed(RAGGED, "shared") == Fed(
        tokens=shared.input_ids.numel(),
        predicted=shared.targets.numel(),
        queries=branches.token.numel(),
        keys=sum(call.keys.numel() for call in branches.calls),
        mask=sum(mask.numel() for call in branches.calls for mask in call.masks if mask is not None),
    )
    size, packed = rows.input_ids.numel(), shared.input_ids.numel()
    assert fed(RAGGED, "rows") == Fed(size, rows.targets.numel(), size, size, 0)
    assert fed(RAGGED, "shared", flex=True) == Fed(packed, shared.targets.numel(), packed, packed, 0)


@pytest.mark.parametrize("lora", [False, True])
def test_the_meta_device_gives_the_same_estimate(lora):
    there, meta = (Estimate(build(WIDE, lora=lora, device=device), Plan(), Training()) for device in ("cpu", "meta"))
    assert there.memory(fed(TWO, "shared")) == meta.memory(fed(TWO, "shared"))


def test_the_layers_are_those_of_the_text_beside_a_deeper_tower_for_images():
    assert Estimate(tiny_gemma3(100, depth=3), Plan(), Training()).layers == 2


def states(*, plan=Plan(), lora=False, bits=None, **facts):  # noqa: B008
    """States of a bfloat16 model, and the number of its weights: trained, frozen, in linear layers."""
    model = build(TALL, dtype=BF16, lora=lora, device="meta")
    estimate = Estimate(model, plan, Training(half=True, **facts), bits=bits)
    counts = estimate.trained, estimate.parameters - estimate.trained, estimate.layers * estimate.linears
    return estimate.states(), counts


@pytest.mark.parametrize(
    ("plan", "expected"),  # bytes of weights, gradients, optimizer and reference per parameter, with 8 processes
    [
        (Plan(processes=8), (2, 2, 4, 2)),
        (Plan(processes=8, engine="deepspeed", stage=0), (2, 2, 12, 2)),
        (Plan(processes=8, engine="deepspeed", stage=1), (2, 2, 12 / 8, 2)),
        (Plan(processes=8, engine="deepspeed", stage=2), (2, 2 / 8, 12 / 8, 2)),
        (Plan(processes=8, engine="deepspeed", stage=3), (2 / 8, 2 / 8, 12 / 8, 2 / 8)),
        (Plan(processes=8, engine="fsdp", stage=3), (4 / 8, 4 / 8, 8 / 8, 2 / 8)),
        (Plan(processes=8, engine="deepspeed", stage=2, offload_optimizer=True), (2, 2 / 8, 0, 2)),
        (Plan(processes=8, engine="fsdp", stage=3, offload_weights=True), (0, 0, 0, 2 / 8)),
    ],
)
def test_states_of_full_fine_tuning_in_bf16(plan, expected):
    sizes, (parameters, frozen, _) = states(plan=plan)
    assert frozen == 0
    assert [sizes[name] for name in STATES] == pytest.approx([share * parameters for share in expected])


def test_states_of_an_adapter_on_a_quantised_base():
    sizes, (adapter, frozen, linears) = states(lora=True, frozen_copy=False)
    found = [sizes[name] for name in STATES]
    assert found == pytest.approx([4 * adapter + 2 * frozen, 4 * adapter, 8 * adapter, 0])
    plan = Plan(processes=8, engine="deepspeed", stage=3)
    sizes, _ = states(plan=plan, lora=True, frozen_copy=False, bits=4.5)
    assert sizes["weights"] == pytest.approx(linears * 4.5 / 8 + 2 * (frozen - linears + adapter) / 8)


def test_fsdp_that_accumulates_without_synchronising_keeps_whole_gradients():
    plan = Plan(processes=4, engine="fsdp", stage=3)
    (whole, (parameters, *_)), (sharded, _) = states(plan=plan, whole_gradients=True), states(plan=plan)
    assert whole["gradients"] - sharded["gradients"] == pytest.approx(2 * parameters)


ZERO = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {deepspeed_config_file: %s}"
FSDP = "fsdp_offload_params: true, fsdp_reshard_after_forward: false, fsdp_activation_checkpointing: true"
FILES = {
    'distributed_type: "NO"': Plan(),
    "distributed_type: MULTI_GPU\nnum_processes: 4\nmixed_precision: bf16": Plan("DDP", 4, half=True),
    ZERO: Plan("DeepSpeed ZeRO-1", 2, "deepspeed", 1, offload_optimizer=True),
    f"distributed_type: FSDP\nnum_processes: 4\nfsdp_config: {{fsdp_version: 2, {FSDP}}}": Plan(
        "FSDP2", 4, "fsdp", 3, offload_weights=True, reshard=False, recompute=True
    ),
}


def test_plans_are_read_from_accelerate_files(tmp_path):
    zero, file = tmp_path / "zero.json", tmp_path / "file.yaml"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}))
    for text, plan in FILES.items():
        file.write_text(text % zero if text is ZERO else text)
        assert read_plan(str(file)) == plan
    file.write_text("distributed_type: MEGATRON_LM")
    with pytest.raises(ValueError, match="MEGATRON_LM is not estimated"):
        read_plan(str(file))


@pytest.mark.parametrize(
    ("environment", "plan"),
    [
        ({}, Plan("DDP", 8, half=True)),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
         Plan("DeepSpeed ZeRO-3", 8, "deepspeed", 3, True)),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"},
         Plan("FSDP2", 8, "fsdp", 3, True)),
    ],
)  # fmt: skip
def test_plans_are_read_from_what_accelerate_launch_sets(environment, plan, monkeypatch):
    for name, value in {"WORLD_SIZE": "8", "ACCELERATE_MIXED_PRECISION": "bf16", **environment}.items():
        monkeypatch.setenv(name, value)
    assert read_plan() == plan
