"""Masks from a real forward: hidden states, activations that all fire, and the head's start, saving and grouping."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import HfDeepSpeedConfig
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from batches import RAGGED, make_batch
from test_forward import CONFIGS, VOCAB, build
from trainers.forward.divergence import frozen_head
from trainers.forward.layout import lay_out
from trainers.forward.run import prepare_forward, run
from trainers.sparsepo import MaskHeads, ReadReference, find_sites
from trainers.sparsepo.activations import recorded
from trainers.sparsepo.learned import check_engine, regroup, split_state

NEOX = GPTNeoXConfig(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox", "gpt_neox_sequential"]

COMMON = ["common"]


def model_of(name):
    if not name.startswith("gpt_neox"):
        return build(name)
    config = copy.deepcopy(NEOX)
    config.use_parallel_residual = name == "gpt_neox"
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def read(model, batch, shared, **what):
    prepare_forward(model, share=shared)
    reading = ReadReference(frozen_head(model, torch.device("cpu")), **what)
    with torch.no_grad():
        return run(model, batch, lay_out(batch, "shared" if shared else "rows"), reading=reading).values


def responses(batch):
    for i, j in batch["mask"].nonzero().tolist():
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i]]
        yield prompt, batch["response_ids"][i, j][batch["response_mask"][i, j]]


@pytest.mark.parametrize("shared", [False, True], ids=["rows", "shared"])
@pytest.mark.parametrize("name", FAMILIES)
def test_states_are_those_of_all_blocks_where_each_token_is_predicted(name, shared):
    batch, model = make_batch(RAGGED, VOCAB), model_of(name)
    expected = []
    for prompt, response in responses(batch):
        states = model(input_ids=torch.cat([prompt, response])[None], output_hidden_states=True).hidden_states
        assert len(states) == 3  # the embedding and two blocks
        expected.append(torch.stack(states[1:])[:, 0, len(prompt) - 1 : -1])
    values = read(model, batch, shared, layers=True)
    torch.testing.assert_close(values["layers"], torch.cat(expected, 1), rtol=0, atol=1e-9)
    assert torch.equal(values["layers"][-1], values["hidden"])  # after the final norm


def by_hand(model, ids, name):
    """Queries, keys and values of the first block, from its weights."""
    base = model.base_model
    states = model(input_ids=ids, output_hidden_states=True).hidden_states[0]
    if name == "gpt2":
        return base.h[0].attn.c_attn(base.h[0].ln_1(states)).split(32, -1)
    block = base.layers[0]
    x = block.input_layernorm(states)
    if name.startswith("gpt_neox"):
        qkv = block.attention.query_key_value(x)
        return tuple(part.flatten(-2) for part in qkv.view(*qkv.shape[:2], 4, 24).chunk(3, -1))
    return block.self_attn.q_proj(x), block.self_attn.k_proj(x), block.self_attn.v_proj(x)


@pytest.mark.parametrize("shared", [False, True], ids=["rows", "shared"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_activation_fires_once_per_layer_in_both_layouts(name, shared):
    batch, model = make_batch(RAGGED, VOCAB), model_of(name)
    values = read(model, batch, shared, activations=True)
    tokens = int(batch["response_mask"].sum())
    parallel = name == "gpt_neox"
    counts = {"mlp": 2, "attention": 8, "residual": 2 + 2 * (5 if parallel else 6), "logits": 1}
    assert {k: v.shape for k, v in values.items() if "/" in k} == {
        f"activations/{kind}": (count, tokens) for kind, count in counts.items()
    }
    assert all(v.isfinite().all() and v.std() > 0 for v in values.values())
    hand, logits = [], []
    with torch.no_grad():
        for prompt, response in responses(batch):
            ids, kept = torch.cat([prompt, response])[None], slice(len(prompt) - 1, -1)
            hand.append(torch.stack([x[0, kept].mean(-1) for x in by_hand(model, ids, name)]))
            logits.append(model(input_ids=ids).logits[0, kept].mean(-1))
    torch.testing.assert_close(values["activations/attention"][:3], torch.cat(hand, 1), rtol=0, atol=1e-9)
    torch.testing.assert_close(values["activations/logits"][0], torch.cat(logits), rtol=0, atol=1e-9)


def test_activations_are_read_with_the_adapter_off_and_under_checkpointing():
    batch, plain = make_batch(RAGGED, VOCAB), model_of("llama")
    expected = read(plain, batch, True, activations=True)
    torch.manual_seed(0)
    policy = get_peft_model(model_of("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    base = policy.get_base_model()
    prepare_forward(base, share=True)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    reading = ReadReference(frozen_head(base, torch.device("cpu")), activations=True)
    with torch.no_grad(), policy.disable_adapter():
        found = run(policy, batch, lay_out(batch, "shared"), reading=reading).values
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["phi", "gemma2"])
def test_models_with_other_blocks_are_refused(name):
    with pytest.raises(ValueError, match="learned"):
        find_sites(AutoModelForCausalLM.from_config(CONFIGS[name]))


def test_a_module_that_does_not_fire_once_is_an_error():
    model = model_of("llama")
    sites = find_sites(model)
    model.base_model.layers[1].mlp.forward = lambda x: x  # as a fused kernel would, it passes no activation
    with pytest.raises(RuntimeError, match="act_fn"), recorded(sites, lambda x: x.flatten(0, 1)):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))


@torch.no_grad()
def test_starts_of_the_head():
    states = torch.randn(36, 500, 64, generator=torch.Generator().manual_seed(0))
    means = [MaskHeads(COMMON, 36, 64, eps=1e-5, seed=s)(states)["common"].mean().item() for s in range(12)]
    assert 0 < min(means) and max(means) < 0.05  # the effective beta is far below the nominal one
    short = [bool(MaskHeads(COMMON, 2, 64, eps=1e-5, seed=s)(states[:2])["common"].any()) for s in range(12)]
    assert 0 < sum(short) < 12  # a mixer that is negative throughout is dead from the start
    dense = [MaskHeads(COMMON, 36, 64, eps=1e-5, seed=seed, start="dense")(states)["common"] for seed in range(12)]
    assert all((mask > 0.4).all() and (mask < 0.8).all() for mask in dense)
    one, again, wide = (
        MaskHeads(COMMON, 36, 64, eps=1e-5, seed=4, std=std)(states)["common"] for std in (0.02, 0.02, 0.2)
    )
    assert torch.equal(one, again) and wide.mean() == pytest.approx(100 * one.mean().item(), rel=1e-3)


def test_heads_are_saved_loaded_and_refused_by_other_heads(tmp_path):
    heads = MaskHeads(["reward", "kl"], 3, 8, eps=1e-6, std=0.5)
    model = torch.nn.Module()
    model.inner, model.mask_heads = torch.nn.Linear(2, 2), heads
    rest, own = split_state(model.state_dict())
    assert set(rest) == {"inner.weight", "inner.bias"} and set(own) == set(heads.state_dict())
    heads.save(tmp_path, own)
    states, loaded = torch.randn(3, 5, 8), MaskHeads.load(tmp_path)
    for name, mask in heads(states).items():
        assert torch.equal(loaded(states)[name], mask)
    with pytest.raises(ValueError, match="independent"):
        MaskHeads(COMMON, 3, 8, eps=1e-6).restore(tmp_path)


def test_heads_have_groups_of_their_own():
    model = torch.nn.Module()
    model.inner, model.mask_heads = torch.nn.Linear(2, 2), MaskHeads(COMMON, 3, 8, eps=1e-6)
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "weight_decay": 0.0}], lr=1e-3)
    regroup(optimizer, model, learning_rate=0.5, weight_decay=0.25)
    names = {id(p): n for n, p in model.named_parameters()}
    found = [({names[id(p)] for p in g["params"]}, g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    prefix = "mask_heads.heads.common."
    assert found == [
        ({"inner.weight", "inner.bias"}, 1e-3, 0.0),
        ({prefix + "weight", prefix + "mixer"}, 0.5, 0.25),
        ({prefix + "bias", prefix + "scale", prefix + "shift"}, 0.5, 0.0),
    ]


@pytest.mark.parametrize("deepspeed, fsdp, word", [
    ({"optimizer": {"type": "AdamW"}}, None, "optimizer"),
    ({"zero_optimization": {"stage": 3}}, None, "zero3_save_16bit_model"),
    (None, "StateDictType.SHARDED_STATE_DICT", "FULL_STATE_DICT"),
])  # fmt: skip
def test_engines_that_would_not_train_or_save_the_heads_are_refused(deepspeed, fsdp, word):
    plugins = {"deepspeed_plugin": deepspeed and SimpleNamespace(hf_ds_config=HfDeepSpeedConfig(deepspeed)),
               "fsdp_plugin": fsdp and SimpleNamespace(state_dict_type=fsdp)}  # fmt: skip
    with pytest.raises(ValueError, match=word):
        check_engine(SimpleNamespace(state=SimpleNamespace(**plugins)), None)
