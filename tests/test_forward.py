"""Log-probabilities without logits, in both layouts, against the model's own logits: values and gradients."""

import copy
import shutil
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from batches import RAGGED, make_alike, make_batch, own_logps, real_responses, with_holes
from trainers.forward import attention, head, tree
from trainers.forward.attention import flex_mask
from trainers.forward.layout import count_tokens, lay_out
from trainers.forward.run import Runner, check_first_batch, prepare_forward, run, sliding_window

VOCAB = 61
compiles = pytest.mark.skipif(shutil.which("c++") is None, reason="compiles a kernel, and there is no C++ compiler")
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "mistral": MistralConfig(**SMALL, sliding_window=20),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4),
    "cohere": CohereConfig(**SMALL, logit_scale=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "phi": PhiConfig(**SMALL),
    "gemma": GemmaConfig(**SMALL, head_dim=8),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0, sliding_window=64),
}
BATCHES = {"ragged": make_batch(RAGGED, VOCAB), "alike": make_alike(VOCAB), "holes": with_holes(make_alike(VOCAB))}
# Cohere rounds to float32 inside its rotary embedding, so its gradients can only be compared in one layout.
SHARING = ["llama", "qwen2", "qwen3", "mistral", "gpt2", "phi", "gemma"]


@pytest.fixture(autouse=True)
def shared_from_the_first_token_on(monkeypatch):
    """Small batches: every token that two sequences begin with is shared, and every node has a call of its own."""
    monkeypatch.setattr(tree, "SAVED", 1)
    monkeypatch.setattr(tree, "CALL", 0)


def build(name, dtype=torch.float64, **kwargs):
    torch.manual_seed(3)
    config = copy.deepcopy(CONFIGS[name])
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, key, 0.0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs)
    _norms_in_full_precision(model)
    for parameter in model.parameters():  # biases and norms start at 0 and 1, where a mistake in them would not show
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _norms_in_full_precision(model):
    """transformers' norms round to float32 inside, which would hide a real mistake behind 1e-6 of noise."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            offset = type(module).__name__.startswith("Gemma")
            eps = getattr(module, "variance_epsilon", None) or module.eps
            module.forward = partial(_rms_norm, module.weight, eps=eps, offset=offset)
        elif type(module).__name__ == "CohereLayerNorm":
            module.forward = partial(_layer_norm, module.weight, eps=module.variance_epsilon)


def _rms_norm(weight, x, *, eps, offset):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + offset)


def _layer_norm(weight, x, *, eps):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps) * weight


def reference_logps(model, batch):
    """(B,K,R) from the model's logits, one unpadded response at a time."""
    out = torch.zeros(batch["response_mask"].shape, dtype=torch.float64)
    for i, j, prompt, response in real_responses(batch):
        out[i, j, : len(response)] = own_logps(model, prompt, response)
    return out * batch["response_mask"]


def logps_in(layout, model, batch):
    return run(model, batch, lay_out(batch, layout)).logps


def gradients(model, batch, logps_of):
    weights = torch.linspace(-1, 2, batch["response_mask"].numel(), dtype=torch.float64)
    model.zero_grad()
    (logps_of(model, batch) * weights.view(batch["response_mask"].shape)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("kind", list(BATCHES))
@pytest.mark.parametrize("layout", ["rows", "shared"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_values_and_gradients_equal_the_models_own_logits(name, layout, kind):
    if layout == "shared" and name not in SHARING:
        pytest.skip("this model cannot share prompts")
    model, batch = build(name), BATCHES[kind]
    expected = reference_logps(model, batch)
    expected_gradients = gradients(model, batch, reference_logps)
    assert prepare_forward(model, share=layout == "shared") is None
    head.add_logps_head(model, chunk_elements=7 * VOCAB)  # 7 positions in a chunk
    logps = logps_in(layout, model, batch)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-10)
    assert not logps[~batch["response_mask"]].any()
    same(gradients(model, batch, partial(logps_in, layout)), expected_gradients)


@pytest.mark.parametrize("call", [0, 2**14])
@pytest.mark.parametrize("piece", [1, 2, 5])
@pytest.mark.parametrize("kind", list(BATCHES))
def test_cutting_long_nodes_and_joining_calls_changes_nothing(kind, piece, call, monkeypatch):
    batch, whole = BATCHES[kind], build("llama")
    expected = reference_logps(whole, batch)
    expected_gradients = gradients(whole, batch, reference_logps)
    monkeypatch.setattr(tree, "PIECE", piece)
    monkeypatch.setattr(tree, "CALL", call)
    model = build("llama")
    prepare_forward(model, share=True)
    calls = lay_out(batch, "shared").branches.calls
    masks = [mask for c in calls for mask in c.masks if mask is not None]
    longest = max(p.end for c in calls for p in c.pieces if c.masks[0] is not None)
    assert max(mask.size(2) for mask in masks) == min(piece, longest)
    assert len(calls) == 2 if call else len(calls) > 5
    torch.testing.assert_close(logps_in("shared", model, batch), expected, rtol=0, atol=1e-10)
    same(gradients(model, batch, partial(logps_in, "shared")), expected_gradients)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_shared_equals_rows_with_checkpointing_and_lora(lora, reentrant):
    batch, results = BATCHES["alike"], []
    for layout in ("rows", "shared"):
        model = build("llama")
        if lora:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        base = model.get_base_model() if lora else model
        prepare_forward(base, share=layout == "shared")
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        base.enable_input_require_grads()
        model.train()
        results.append(gradients(model, batch, partial(logps_in, layout)))
    same(*results)
    assert all("lora" in key for key in results[0]) == lora
    assert max(v.abs().max() for v in results[0].values()) > 0.1


@pytest.mark.parametrize("layout", ["rows", "shared"])
def test_bfloat16_is_as_near_to_float64_as_the_models_own_bfloat16_logits(layout):
    batch, model = make_batch(RAGGED, VOCAB), build("llama", dtype=torch.bfloat16)
    exact = reference_logps(build("llama"), batch)
    theirs = (reference_logps(model, batch) - exact).abs()[batch["response_mask"]].mean()
    prepare_forward(model, share=layout == "shared")
    logps = logps_in(layout, model, batch)
    assert logps.dtype == torch.float32
    assert (logps.double() - exact).abs()[batch["response_mask"]].mean() < 1.5 * theirs


@pytest.mark.slow
@compiles
def test_flex_attention_gives_the_same_values():
    model = build("llama", dtype=torch.float32)
    batch = BATCHES["alike"]
    expected = reference_logps(model, batch)
    flexible = build("llama", dtype=torch.float32, attn_implementation="flex_attention").eval()
    assert prepare_forward(flexible, share=True) is None
    with torch.no_grad():
        found = run(flexible, batch, lay_out(batch, "shared"), flex=True).logps
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)


@pytest.mark.slow
@compiles
def test_flex_attention_is_not_compiled_again_for_each_new_length():
    model = build("llama", dtype=torch.float32, attn_implementation="flex_attention").eval()
    prepare_forward(model, share=True)
    torch.compiler.reset()
    before, graphs = counters["stats"]["unique_graphs"], []
    for lengths in ([30, 100, 70], [130, 200, 71], [330, 200, 171], [40, 500, 90], [21, 333, 222, 111]):
        batch = make_batch([(9, lengths)], VOCAB)
        with torch.no_grad():
            run(model, batch, lay_out(batch, "shared"), flex=True)
        graphs.append(counters["stats"]["unique_graphs"] - before)
    # once for the first length, once for all others
    assert graphs == [1, 2, 2, 2, 2]


def test_the_flex_mask_shows_a_token_its_own_sequence():
    batch = make_batch([(3, [3, 2, 4]), (1, [2, 3])], VOCAB)
    batch["prompt_ids"][0], batch["prompt_ids"][1] = torch.tensor([5, 6, 7]), 8
    for slot, ids in enumerate(([10, 11, 1], [20, 1], [10, 12, 13, 1])):
        batch["response_ids"][0, slot, : len(ids)] = torch.tensor(ids)
    batch["response_ids"][1, 0, :2], batch["response_ids"][1, 1, :3] = torch.tensor([9, 1]), torch.tensor([14, 15, 1])
    inputs = lay_out(batch, "shared")
    assert inputs.input_ids.tolist() == [[5, 6, 7, 10, 11, 12, 13, 20, 8, 9, 14, 15]]
    assert inputs.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 5, 3, 0, 1, 1, 2]]
    rule = flex_mask(inputs.branches.ends).mask_mod  # its blocks are too coarse
    t = torch.arange(inputs.input_ids.size(1))
    seen = [[bool(rule(0, 0, q, k)) for k in t] for q in t]
    rows = ["x", "xx", "xxx", "xxxx", "xxxxx", "xxxx.x", "xxxx.xx", "xxx....x", "........x", "........xx",
            "........x.x", "........x.xx"]  # fmt: skip
    assert [[c == "x" for c in row.ljust(12, ".")] for row in rows] == seen


def test_a_flex_mask_is_made_once_for_policy_and_reference(monkeypatch):
    masks, given = [], []
    monkeypatch.setattr(attention, "create_block_mask", lambda *_, **__: masks.append(object()) or masks[-1])

    def model(attention_mask, targets, **_):
        given.append(attention_mask)
        return {"logps": torch.zeros(len(targets))}

    runner = Runner([build("llama", attn_implementation="flex_attention")], "shared")
    for name in ("alike", "alike", "ragged", "ragged", "alike"):
        runner(model, BATCHES[name])
    assert len(masks) == 3 and given == [masks[i] for i in (0, 0, 1, 1, 2)]


@pytest.mark.parametrize("name", ["llama", "cohere"])  # the fused head, and the one for heads of any kind
def test_only_response_positions_reach_the_head_and_chunks_bound_the_logits(name, monkeypatch):
    batch, model, rows = make_batch(RAGGED, VOCAB), build(name), []

    def count(original):
        def counted(hidden, *args, **kwargs):
            rows.append(hidden.numel() // hidden.size(-1))
            return original(hidden, *args, **kwargs)

        return counted

    monkeypatch.setattr(head, "linear", count(head.linear))
    if name == "cohere":
        model.lm_head.forward = count(model.lm_head.forward)
    head.add_logps_head(model, chunk_elements=10 * VOCAB)
    with torch.no_grad():
        logps_in("rows", model, batch)
    assert sum(rows) == batch["response_mask"].sum() and max(rows) <= 10


def test_what_sequences_begin_with_is_fed_once_and_nothing_is_padded():
    batch = make_batch(RAGGED, 10**6)  # no two responses begin alike
    prompts, responses = int(batch["prompt_mask"].sum()), int(batch["response_mask"].sum())
    shared, rows = lay_out(batch, "shared"), lay_out(batch, "rows")
    assert shared.input_ids.shape == (1, prompts + responses - int(batch["mask"].sum()))
    assert rows.input_ids.shape == (12, 13)
    alike = BATCHES["alike"]
    beginnings = {
        (*prompt.tolist(), *response.tolist())[:n]
        for _, _, prompt, response in real_responses(alike)
        for n in range(1, len(prompt) + len(response))
    }
    assert lay_out(alike, "shared").input_ids.numel() == len(beginnings)


@pytest.mark.parametrize("kind", list(BATCHES))
def test_a_position_reaches_the_head_once_for_each_of_its_targets(kind, monkeypatch):
    batch, model, rows = BATCHES[kind], build("llama"), []
    prepare_forward(model, share=True)
    linear = head.linear
    monkeypatch.setattr(head, "linear", lambda hidden, *more: rows.append(len(hidden)) or linear(hidden, *more))
    with torch.no_grad():
        logps_in("shared", model, batch)
    beginnings = {
        (*prompt.tolist(), *response.tolist())[: len(prompt) + n + 1]
        for i, j, prompt, response in real_responses(batch)
        for n in batch["response_mask"][i, j].nonzero().flatten().tolist()
    }
    assert sum(rows) == len(beginnings)


def test_what_follows_the_last_token_that_is_trained_on_is_not_fed():
    batch = make_batch([(3, [6, 2])], 10**6)
    batch["response_mask"][0, 0] = torch.tensor([False, True, False, True, False, False])
    prompt, (long, short) = batch["prompt_ids"][0].tolist(), batch["response_ids"][0].tolist()
    rows, shared = lay_out(batch, "rows"), lay_out(batch, "shared")
    assert rows.input_ids.tolist() == [[*prompt, *long[:3]], [*prompt, short[0], 0, 0]]
    assert shared.input_ids.numel() == 3 + 3 + 1
    for inputs in (rows, shared):
        assert inputs.input_ids.flatten()[inputs.positions].tolist() == [long[0], long[2], prompt[2], short[0]]
        assert inputs.targets.tolist() == [long[1], long[3], *short[:2]]


def test_the_first_batch_is_checked_where_it_begins_with_a_turn_that_is_not_trained_on():
    batch, model = make_batch([(3, [90, 80])], VOCAB), build("llama")
    batch["response_mask"][0, :, :70] = False
    prepare_forward(model, share=True)
    assert check_first_batch(model, batch, "shared") < 1e-9  # not NaN


def test_generation_is_untouched_by_the_head_and_the_attention():
    plain, ready = build("llama", torch.float32), build("llama", torch.float32)
    prepare_forward(ready, share=True)
    ids = torch.randint(1, VOCAB, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding as in batched generation
    keywords = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(**keywords), ready.generate(**keywords))


@pytest.mark.parametrize(
    "config, word",
    [
        (LlamaConfig(**SMALL, attn_implementation="eager"), "attn_implementation"),
        (LlamaConfig(**SMALL, attention_dropout=0.1), "dropout"),
        (BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4), "bias"),
        (Qwen3NextConfig(**SMALL, head_dim=8, layer_types=["linear_attention", "full_attention"], num_experts=2),
         "linear_attention"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_models_that_cannot_share_say_why(config, word):
    assert word in prepare_forward(AutoModelForCausalLM.from_config(config), share=True)


@pytest.mark.parametrize("layout", ["auto", "shared"])
def test_rows_that_outgrow_the_window_get_the_models_own_values(layout):
    model, batch = build("mistral"), make_batch([(30, [5, 9, 3])], VOCAB)
    expected = reference_logps(model, batch)
    torch.testing.assert_close(Runner([model], layout)(model, batch).logps, expected, rtol=0, atol=1e-6)


def test_auto_shares_when_tokens_are_saved_and_never_beyond_the_window(monkeypatch):
    monkeypatch.setattr(tree, "SAVED", 16)
    long_prompt = make_batch([(30, [5, 5, 5, 5])], VOCAB)
    no_prompt = make_batch([(1, [6, 6])], VOCAB)
    for batch, window, shares in (
        (long_prompt, None, True), (long_prompt, 35, True), (long_prompt, 34, False), (no_prompt, None, False)
    ):  # fmt: skip
        inputs = lay_out(batch, "auto", window)
        assert (inputs.branches is not None) == shares
        assert count_tokens(batch, "auto", window) == inputs.input_ids.numel()
    assert sliding_window(build("mistral")) == 20 and sliding_window(build("qwen2")) is None


def test_a_batch_is_laid_out_once_for_policy_and_reference_and_anew_where_it_differs():
    model, batch = build("llama"), BATCHES["alike"]
    runner, other = Runner([model], "auto"), batch | {"response_mask": BATCHES["holes"]["response_mask"]}
    first = runner.inputs(batch)
    assert runner.inputs(dict(batch)) is first
    for given in (other, batch):
        expected = logps_in("shared", model, given)
        torch.testing.assert_close(runner(model, given).logps, expected, rtol=0, atol=0)
    runner.layout = "rows"  # as after a check that failed
    assert runner.inputs(batch).branches is None


def test_first_batch_check_sees_a_wrong_head_and_a_wrong_layout(monkeypatch):
    batch = make_batch(RAGGED, VOCAB)
    model = build("cohere")
    prepare_forward(model, share=True)
    assert check_first_batch(model, batch, "shared") < 1e-9
    blind = build("cohere")
    scale, blind.config.logit_scale = blind.config.logit_scale, None
    prepare_forward(blind, share=True)
    blind.config.logit_scale = scale
    assert check_first_batch(blind, batch, "shared") > 0.1

    def shifted(batch, layout):
        inputs = lay_out(batch, layout)
        return inputs._replace(position_ids=torch.arange(inputs.input_ids.size(1))[None])

    monkeypatch.setattr("trainers.forward.run.lay_out", shifted)
    assert check_first_batch(model, batch, "shared") > 1e-3
