"""One section of benchmarks.gpu in a process of its own: python -m benchmarks.gpu_parts '<job as JSON>'

Prints one JSON line: figures by name, and limits of those that have one.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, set_seed

from benchmarks import machine, ratios, step
from benchmarks.run import write_synthetic
from trainers import SWEPOTrainer
from trainers.cli.arguments import ModelArguments
from trainers.cli.dry_run import estimate_of, part_of
from trainers.estimate import Plan, fed
from trainers.forward.attention import FLEX
from trainers.forward.layout import lay_out
from trainers.forward.policy import load_policy
from trainers.forward.run import prepare_forward, run
from trainers.swepo import swepo_loss

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))  # for its batches and the distributed table

from batches import make_batch  # noqa: E402

PROMPT, RESPONSE = 256, 256  # tokens
TINY = {"vocab_size": 500, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}  # fmt: skip
RAGGED = [(40, [30, 9, 51, 22]), (1, [60, 3]), (150, [70, 20, 33])]  # tokens of prompts and responses
# Mean difference per token in log-probability, and the relative one of the gradient. A Llama's angles are float32.
LIMITS = {"float64": (1e-5, 1e-4), "float32": (2e-3, 2e-3), "bfloat16": (0.1, 0.2)}
QUICK = ("SWEPO", "EMDPO")
ACROSS_DEVICES = 1e-3  # of what five steps of Adam log, relative


def product(job: dict) -> tuple[dict, dict]:
    """The speed of a large matrix product, in TFLOP/s."""
    cuda = job["device"] == "cuda"
    name = torch.cuda.get_device_name() if cuda else "CPU"
    return {"device": name} | {f"{d}, TFLOP/s": product_speed(d, job) for d in ("bfloat16", "float32")[not cuda :]}, {}


def product_speed(dtype: str, job: dict) -> float:
    size = 1024 if job["device"] == "cpu" else 8192
    return machine.product_speed(size, size, size, getattr(torch, dtype), job["device"]) / 1e12


def seconds(function, job: dict, count: int) -> float:
    """Of one call, the mean of `count` after three that warm up."""
    wait = torch.cuda.synchronize if job["device"] == "cuda" else lambda: None
    for turn in range(3 + count):
        if turn == 3:
            wait()
            begin = time.perf_counter()
        function()
    wait()
    return (time.perf_counter() - begin) / count


def layouts(job: dict) -> tuple[dict, dict]:
    """Log-probabilities and gradients of both layouts on the device against padded rows in float64 on the CPU."""
    expected = logps_and_gradient("float64", "cpu", shared=False)
    figures, limits = {}, {}
    for dtype, both in LIMITS.items():
        for shared in (False, True):
            found = logps_and_gradient(dtype, job["device"], shared=shared)
            name = f"{dtype}, {'shared' if shared else 'rows'}"
            figures |= differences(name, found, expected)
            limits |= dict(zip((f"{name}, logps", f"{name}, gradient"), both, strict=True))
    return figures, limits


def flex(job: dict) -> tuple[dict, dict]:
    """FlexAttention's values and backward, and its time against SDPA by branch in two layers of the 7B shape."""
    expected = logps_and_gradient("float64", "cpu", shared=False)
    found = logps_and_gradient("float32", job["device"], shared=True, attention=FLEX)
    figures = differences("float32", found, expected)
    limits = dict(zip(figures, LIMITS["float32"], strict=True))
    sizes = step.SIZES | {"num_hidden_layers": 2, "vocab_size": 1000}
    for k in (4, 16):
        for attention in ("sdpa", FLEX):
            model, batch = model_and_batch("bfloat16", job["device"], attention, sizes, [(256, [256] * k)])
            figures[f"K = {k}, {attention}, ms"] = 1000 * seconds(lambda: backward(model, batch, True), job, 5)  # noqa: B023
    return figures, limits


def model_and_batch(dtype: str, device: str, attention: str, sizes: dict, lengths: list):
    """A random Llama with the same weights in every dtype, and a batch of random tokens."""
    set_seed(0)
    weights = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.float32).state_dict()
    # Not `model.to(dtype)`, which would round the angles too.
    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=kind, attn_implementation=attention)
    model.load_state_dict(weights)
    batch = make_batch(lengths, sizes["vocab_size"])
    return model.to(device), {name: value.to(device) for name, value in batch.items()}


def backward(model, batch: dict, shared: bool) -> torch.Tensor:
    """The log-probabilities (B,K,R); the gradient is that of a sum with fixed weights."""
    reason = prepare_forward(model, share=shared)
    assert reason is None, reason
    inputs = lay_out(batch, "shared" if shared else "rows")
    logps = run(model, batch, inputs, flex=model.config._attn_implementation == FLEX).logps
    (logps * torch.linspace(-1, 1, logps.size(-1)).to(logps)).sum().backward()
    return logps.detach()


def logps_and_gradient(dtype: str, device: str, *, shared: bool, attention: str = "sdpa"):
    model, batch = model_and_batch(dtype, device, attention, TINY, RAGGED)
    logps = backward(model, batch, shared)[batch["response_mask"]]
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return logps.double().cpu(), gradient.double().cpu()


def differences(name: str, found, expected) -> dict[str, float]:
    gradient = (found[1] - expected[1]).norm() / expected[1].norm()
    return {f"{name}, logps": float((found[0] - expected[0]).abs().mean()), f"{name}, gradient": float(gradient)}


def methods(job: dict) -> tuple[dict, dict]:
    """Five steps and an evaluation of each trainer on the device against the CPU: cells of the distributed table."""
    import distributed_matrix as matrix
    import distributed_steps as steps

    torch.set_num_threads(1)
    figures, methods = {}, QUICK if job["quick"] else job.get("methods", matrix.TRAINERS)
    for name, cell in matrix.all_cells().items():
        if name.split(", ")[0] not in methods or name.split(", ")[-1] != job["tuning"]:
            continue
        train = steps.em_rounds if cell["trainer"] == "EMDPOTrainer" else steps.steps
        found = []
        for use_cpu in (True, job["device"] == "cpu"):
            own = {**cell, "settings": {**cell.get("settings", {}), "use_cpu": use_cpu}}
            with tempfile.TemporaryDirectory() as folder:
                found.append(train(own, "single", Path(folder))["found"])
        figures[name] = matrix.difference(found[1], found[0])
    return figures, dict.fromkeys(figures, ACROSS_DEVICES)


def lora(job: dict) -> tuple[dict, dict]:
    """Steps of a random model of the 7B shape with LoRA: the first loss, speed, and memory against the estimate.

    `responses_per_part` go backward at once with each prompt; `arguments` are further training arguments; `bits` has
    two layers alone in 4 bits, as a whole model would have to be written to disk first.
    """
    k, prompts, cuda, arguments = job["k"], job["prompts"], job["device"] == "cuda", job.get("arguments", {})
    if "responses_per_part" in job:
        arguments = {"tokens_per_backward": prompts * (PROMPT + RESPONSE * job["responses_per_part"])}
    with tempfile.TemporaryDirectory() as folder:
        if "bits" in job:
            step.SIZES["num_hidden_layers"] = 2
            step.random_model = partial(quantised_model, folder, step.random_model)
        lengths = [(PROMPT, [RESPONSE] * k)] * prompts * 5
        rows = write_synthetic(Path(folder) / "rows.json", lengths, step.SIZES["vocab_size"])
        setting = {
            "variant": job.get("variant", "shared"), "device": job["device"], "model": step.RANDOM, "lora": True,
            "dtype": "bfloat16" if cuda else "float32", "checkpointing": job.get("checkpointing", False),
            "prompts": prompts, "micro": prompts, "micro_trl": 1, "warm_up": 2, "rows": rows,
            "options": arguments,
        }  # fmt: skip
        result, trainer = step.measure(setting)
    found = ratios.figures(setting | result)
    figures = {name: found[name] for name in ("s per step", "prompts/s", "TFLOP/s", "peak, GiB")}
    figures["tokens/s, each once"] = figures["prompts/s"] * (PROMPT + RESPONSE * k)
    figures["share of the matrix product, %"] = 100 * figures["TFLOP/s"] / product_speed(setting["dtype"], job)
    if peak := ratios.peak_flops(torch.cuda.get_device_name() if cuda else None):
        figures["share of the peak, %"] = 100 * figures["TFLOP/s"] / peak
    if setting["variant"] != "shared":
        return figures, {}
    scores, beta, alpha = torch.arange(k).float()[None], trainer.args.beta, trainer.args.alpha  # as the rows have them
    first = swepo_loss(torch.zeros(1, k), scores, torch.ones(1, k).bool(), beta=beta, alpha=alpha)
    figures["first loss, off by"] = abs(result["losses"][0] - float(first))
    if "bits" not in job:
        reckoned = estimate_of(SWEPOTrainer, trainer.args, ModelArguments(), trainer.model, Plan())
        largest = fed(part_of(lengths[:prompts], trainer.args.tokens_per_backward), "shared")
        figures["estimate, GiB"] = sum(reckoned.memory(largest).values()) / ratios.GIB
        if cuda:  # on a CPU the peak is that of the whole process
            figures["peak over estimate"] = figures["peak, GiB"] / figures["estimate, GiB"]
    return figures, {"first loss, off by": 1e-3}


def quantised_model(folder: str, random_model: Callable, dtype: str, device: str) -> tuple:
    model, tokenizer = random_model(dtype, device)
    model.save_pretrained(folder)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=getattr(torch, dtype))
    return load_policy(folder, init_kwargs={"dtype": dtype}, quantization_config=four_bits), tokenizer


def tests(job: dict) -> tuple[dict, dict]:
    """The tests that are marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return {"outcome": done.stdout.strip().splitlines()[-1]}, {}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    if job["quick"]:
        step.SIZES.update(TINY)
        PROMPT, RESPONSE = 16, 8
    functions = {function.__name__: function for function in (product, layouts, flex, methods, lora, tests)}
    print(json.dumps(functions[job["function"]](job)), flush=True)
