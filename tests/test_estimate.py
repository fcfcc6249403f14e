"""The memory estimate against measured steps, real layouts and numbers worked out by hand."""

import json

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig

from batches import RAGGED, make_batch
from trainers.estimate import Fed, Plan, Run, fed, memory, plan_from_environment, read_plan, shape_of, total
from trainers.forward import head, layout
from trainers.forward.head import CPU_CHUNK_ELEMENTS
from trainers.forward.layout import rows_layout, shared_layout
from trainers.forward.policy import add_adapter, base_model
from trainers.forward.run import prepare_forward, run

LORA = {"task_type": "CAUSAL_LM", "r": 16, "target_modules": "all-linear"}
WIDE = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8, "num_key_value_heads": 4}
# For measured steps in bfloat16, which some CPUs multiply a hundred times slower than float32.
SMALL = {"hidden_size": 96, "intermediate_size": 768, "num_attention_heads": 6, "num_key_value_heads": 2}
TALL = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 6, "num_key_value_heads": 2}


def build(widths, *, layers=2, dtype=torch.float32, lora=False, recompute=False, device="cpu", vocabulary=1500):
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, max_position_embeddings=2048, **widths)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        model = add_adapter(model, LoraConfig(**LORA), zero3=False) if lora else model
    if recompute:
        base_model(model).gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def states(model, **kwargs):
    """Items of the estimate by name, for a micro-batch of 100 tokens."""
    batch = Fed(100, 60, 100, 120, 500)
    items = memory(shape_of(model), batch, kwargs.pop("plan", Plan()), Run(**kwargs))
    return {item.name: item.size for item in items}


def saved_bytes(model, batch, shared, autocast):
    """Bytes of all tensors that autograd keeps for the backward pass, weights aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logps = run(model, batch, shared=shared).logps
    assert logps.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def measured_peak(model, batch, shared, autocast, path):
    """Most bytes that a step allocates above weights, gradients and optimizer states."""

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = run(model, batch, shared=shared).logps.sum()
        loss.backward()

    step()  # so that gradients are there
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    profile.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    used = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        used += event["args"]["Bytes"]
        peak = max(peak, used)
    return peak


def estimate(model, lengths, shared, autocast, recompute):
    """Items by name, for a single process and no reference."""
    shape = shape_of(model)
    facts = Run(autocast, shape.layers * recompute, frozen_copy=False, chunk_elements=CPU_CHUNK_ELEMENTS)
    return {item.name: item for item in memory(shape, fed(lengths, shared=shared), Plan(), facts)}


ONE = [(30, [50, 40, 60, 45])]
TWO = [(100, [75, 45]), (20, [30, 60, 15])]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("widths", "lengths", "dtype", "autocast"),
    [(WIDE, ONE, torch.float32, False), (TALL, TWO, torch.bfloat16, False), (WIDE, TWO, torch.float32, True)],
)
def test_activations_are_what_autograd_saves(widths, lengths, dtype, autocast, shared, recompute, lora):
    model = build(widths, dtype=dtype, lora=lora, recompute=recompute)
    prepare_forward(base_model(model), share=shared)
    model.train()
    saved = saved_bytes(model, make_batch(lengths, vocab=1000), shared, autocast)
    mask = fed(lengths, shared=shared).mask  # in memory all the time, and so not saved once more
    expected = estimate(model, lengths, shared, autocast, recompute)["activations"].size - mask
    # In `rows` without a copy of its output, attention may or may not save it twice.
    assert expected == pytest.approx(saved, rel=0.02 if shared else 0.04)


# Vocabularies that leave the peak to a layer, or to the LM head. bfloat16 is left out where the head's weight is
# trained: CPUs copy a 16-bit gradient before they add it to a float32 one, GPUs do not.
@pytest.mark.parametrize(
    ("widths", "lengths", "shared", "recompute", "dtype", "autocast", "lora", "vocabulary", "scale"),
    [
        (WIDE, ONE, True, False, torch.float32, False, False, 8000, 1.0),
        (WIDE, ONE, True, True, torch.float32, False, False, 8000, 1.0),
        (WIDE, ONE, True, True, torch.float32, False, False, 8000, 0.5),
        (WIDE, ONE, True, True, torch.float32, False, False, 1100, 1.0),
        (SMALL, TWO, True, True, torch.bfloat16, False, False, 1100, 1.0),
        (SMALL, TWO, True, True, torch.bfloat16, True, True, 1100, 1.0),
        (SMALL, TWO, False, False, torch.bfloat16, False, True, 8000, 1.0),
        (SMALL, TWO, False, True, torch.float32, True, True, 1100, 1.0),
    ],
)
def test_peak_of_a_step(widths, lengths, shared, recompute, dtype, autocast, lora, vocabulary, scale, tmp_path):
    model = build(widths, dtype=dtype, lora=lora, recompute=recompute, vocabulary=vocabulary)
    model.config.logit_scale = scale  # other than 1: a head that is not plain
    prepare_forward(base_model(model), share=shared)
    model.train()
    peak = measured_peak(model, make_batch(lengths, vocab=1000), shared, autocast, tmp_path / "trace.json")
    items = estimate(model, lengths, shared, autocast, recompute)
    states = sum(items[name].size for name in ("weights", "gradients", "optimizer"))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert states == pytest.approx(sum(p.nbytes for p in model.parameters()) + 3 * trained)
    # What a backward pass holds for a moment is only roughly known, what a forward pass keeps almost exactly.
    assert total(items.values()) - states == pytest.approx(peak, rel=0.1)


def test_the_peak_of_a_step_does_not_grow_with_the_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(head, "CPU_CHUNK_ELEMENTS", 2**18)
    peaks, batch = [], make_batch(ONE, vocab=1000)
    for vocabulary in (2000, 4000, 16000):
        model = build(WIDE, lora=True, recompute=True, vocabulary=vocabulary)
        prepare_forward(base_model(model), share=True)
        model.train()
        peaks.append(measured_peak(model, batch, True, False, tmp_path / "trace.json"))
    logits = int(batch["response_mask"].sum()) * 16000 * 4
    assert max(peaks) - min(peaks) < 0.02 * logits
    assert max(peaks) < logits  # so they were never there at once


@pytest.mark.parametrize("piece", [2, 256])
def test_fed_counts_what_the_layouts_feed(piece, monkeypatch):
    monkeypatch.setattr(layout, "PIECE", piece)
    batch = make_batch(RAGGED, vocab=50)
    shared, rows = shared_layout(batch), rows_layout(batch)
    branches = shared.branches
    trunks, keys = branches.trunk[0] * branches.trunk[1], branches.branch[0] * (branches.trunk[1] + branches.branch[1])
    assert fed(RAGGED, shared=True) == Fed(
        tokens=shared.input_ids.numel(),
        predicted=shared.targets.numel(),
        queries=branches.queries.token.numel(),
        keys=trunks + keys,
        mask=sum(mask.numel() for mask in branches.masks),
        pairs=trunks * branches.trunk[1] + sum(mask.numel() for mask in branches.masks),
    )
    size = rows.input_ids.numel()
    assert fed(RAGGED, shared=False) == Fed(size, rows.targets.numel(), size, size, 0, size * rows.input_ids.size(1))
    packed = shared.input_ids.numel()
    assert fed(RAGGED, shared=True, flex=True) == Fed(
        packed, shared.targets.numel(), packed, packed, 0, fed(RAGGED, shared=True).pairs
    )


@pytest.mark.parametrize("lora", [False, True])
def test_the_meta_device_gives_the_same_shape(lora):
    assert shape_of(build(WIDE, lora=lora, device="meta")) == shape_of(build(WIDE, lora=lora))


def test_shape_of_grouped_heads_and_an_adapter():
    shape = shape_of(build(TALL, layers=3, dtype=torch.bfloat16, lora=True))
    assert (shape.layers, shape.attention, shape.key_values, shape.gated) == (3, 192, 64, True)
    assert shape.norms == 2 * 192
    assert sorted(shape.inputs) == [192] * 6 + [768]
    assert (shape.ranks, shape.stream, shape.adapter_bytes) == (7 * 16, 2, 4)
    assert shape.layer_linears == 192 * (2 * 192 + 2 * 64) + 3 * 192 * 768


# bytes of weights, gradients, optimizer and reference per parameter, with 8 processes
BY_HAND = [
    (Plan(processes=8), (2, 2, 4, 2)),
    (Plan(processes=8, engine="deepspeed", stage=0), (2, 2, 12, 2)),
    (Plan(processes=8, engine="deepspeed", stage=1), (2, 2, 12 / 8, 2)),
    (Plan(processes=8, engine="deepspeed", stage=2), (2, 2 / 8, 12 / 8, 2)),
    (Plan(processes=8, engine="deepspeed", stage=3), (2 / 8, 2 / 8, 12 / 8, 2 / 8)),
    (Plan(processes=8, engine="fsdp", stage=3), (4 / 8, 4 / 8, 8 / 8, 2 / 8)),
    (Plan(processes=8, engine="deepspeed", stage=2, offload_optimizer=True), (2, 2 / 8, 0, 2)),
    (Plan(processes=8, engine="fsdp", stage=3, offload_weights=True), (0, 0, 0, 2 / 8)),
]


@pytest.mark.parametrize(("plan", "expected"), BY_HAND)
def test_states_of_full_fine_tuning_in_bf16(plan, expected):
    model = build(TALL, dtype=torch.bfloat16, device="meta")
    parameters = sum(p.numel() for p in model.parameters())
    sizes = states(model, plan=plan, half=True)
    found = [sizes[name] for name in ("weights", "gradients", "optimizer", "reference")]
    assert found == pytest.approx([share * parameters for share in expected])


def test_states_of_an_adapter():
    model = build(TALL, dtype=torch.bfloat16, lora=True, device="meta")
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    sizes = states(model, half=True, frozen_copy=False)
    assert sizes["weights"] == pytest.approx(4 * adapter + 2 * frozen)
    assert sizes["gradients"] == pytest.approx(4 * adapter)
    assert sizes["optimizer"] == pytest.approx(8 * adapter)
    assert sizes["reference"] == 0


def test_quantised_weights_are_whole_on_every_gpu():
    model = build(TALL, dtype=torch.bfloat16, lora=True, device="meta")
    shape = shape_of(model, bits=4.5)
    linears = shape.layers * shape.layer_linears
    adapter, frozen = shape.trainable, shape.parameters - shape.trainable
    plan = Plan(processes=8, engine="deepspeed", stage=3)
    weights = memory(shape, Fed(100, 60, 100, 120, 500), plan, Run(half=True, frozen_copy=False))[0]
    assert weights.size == pytest.approx(linears * 4.5 / 8 + 2 * (frozen - linears + adapter) / 8)


def test_fsdp_that_accumulates_without_synchronising_keeps_whole_gradients():
    model = build(TALL, dtype=torch.bfloat16, device="meta")
    parameters, plan = sum(p.numel() for p in model.parameters()), Plan(processes=4, engine="fsdp", stage=3)
    grows = states(model, plan=plan, half=True, whole_gradients=True)["gradients"]
    assert grows - states(model, plan=plan, half=True)["gradients"] == pytest.approx(2 * parameters)


def test_one_forward_of_an_fsdp_reference_can_be_the_peak():
    model = build(TALL, dtype=torch.bfloat16, device="meta", vocabulary=200000)
    shape, plan = shape_of(model), Plan(processes=4, engine="fsdp", stage=3)
    items = {item.name: item for item in memory(shape, Fed(20, 10, 20, 30, 100), plan, Run(half=True))}
    assert items["reference forward"].size == 2 * shape.parameters
    assert items["reference forward"].counted
    assert not any(items[name].counted for name in ("activations", "LM head chunk", "one layer"))
    items = memory(shape, Fed(20, 10, 20, 30, 100), plan, Run(half=True, frozen_copy=False))
    assert "reference forward" not in {item.name for item in items}


def test_recomputing_fewer_layers_keeps_more():
    model = build(TALL, layers=8, dtype=torch.bfloat16, device="meta")
    sizes = [states(model, half=True, checkpointed=n)["activations"] for n in (8, 4, 0)]
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[1] == pytest.approx((sizes[0] + sizes[2]) / 2)
    offloaded = states(model, half=True, checkpointed=8, offload_checkpoints=True)["activations"]
    assert sizes[0] - offloaded == pytest.approx(8 * 2 * 100 * 192)


def test_plans_are_read_from_accelerate_files(tmp_path):
    def plan(text):
        (tmp_path / "file.yaml").write_text(text)
        return read_plan(str(tmp_path / "file.yaml"))

    zero = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    pointing = f"distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {{deepspeed_config_file: {tmp_path}/"
    assert plan('distributed_type: "NO"') == Plan()
    assert plan("distributed_type: MULTI_GPU\nnum_processes: 4\nmixed_precision: bf16") == Plan(
        "DDP", 4, mixed_precision="bf16"
    )
    assert plan(pointing + "zero.json}") == Plan("DeepSpeed ZeRO-1", 2, "deepspeed", 1, offload_optimizer=True)
    assert plan(
        "distributed_type: FSDP\nnum_processes: 4\nfsdp_config: {fsdp_version: 2, fsdp_offload_params: true, "
        "fsdp_reshard_after_forward: false, fsdp_activation_checkpointing: true}"
    ) == Plan("FSDP2", 4, "fsdp", 3, offload_weights=True, reshard=False, recompute=True)
    with pytest.raises(ValueError, match="MEGATRON_LM is not estimated"):
        plan("distributed_type: MEGATRON_LM")
    with pytest.raises(ValueError, match="does not exist"):
        read_plan(str(tmp_path / "none.yaml"))


def test_plans_are_read_from_what_accelerate_launch_sets():
    world = {"WORLD_SIZE": "8", "ACCELERATE_MIXED_PRECISION": "bf16"}
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    assert plan_from_environment({}) == Plan()
    assert plan_from_environment(world) == Plan("DDP", 8, mixed_precision="bf16")
    assert plan_from_environment(world | zero) == Plan("DeepSpeed ZeRO-3", 8, "deepspeed", 3, "bf16")
    assert plan_from_environment(world | fsdp) == Plan("FSDP2", 8, "fsdp", 3, "bf16")
