"""What the machine is (`python -m benchmarks.machine` prints it), how fast it multiplies matrices, and what it did."""

import importlib.metadata
import json
import platform
import time
from collections import Counter
from pathlib import Path

import psutil
import torch
from transformers import PretrainedConfig

from trainers.precision import FAST, instructions, settle_dtype

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets")
SQUARE, REPEATS = 4096, 4
ELEMENTWISE = {
    "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "neg", "pow", "exp", "exp_", "rsqrt", "sqrt", "silu",
    "silu_backward", "sum", "mean", "cos", "sin", "where", "masked_fill", "masked_fill_", "fill_", "zero_", "log_",
}  # fmt: skip
COPIES = {
    "copy_", "cat", "index_select", "index", "index_put_", "_index_put_impl_", "index_add_", "gather", "scatter_add_",
    "embedding", "embedding_dense_backward", "masked_scatter", "masked_select", "repeat", "nonzero", "bitwise_not",
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear"}


def machine() -> dict:
    """Name, cores, memory and versions, without host name or paths."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "cpu": names[0] if names else platform.machine(),
        "instructions": instructions(),
        "device": device,
        "fast": settle_dtype(FAST, torch.device(device)),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
    }


def product_speeds(config: PretrainedConfig, tokens: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Operations per second of matrix products on all threads of this process, the best of several repeats.

    One is a layer's as it goes forward with `tokens` rows, one is that of its weight's gradient, one is large.
    """
    text = config.get_text_config()
    hidden, wide = text.hidden_size, text.intermediate_size
    sizes = [(tokens, hidden, wide), (wide, tokens, hidden), (SQUARE, SQUARE, SQUARE)]
    return {" x ".join(map(str, size)): product_speed(*size, dtype, device) for size in sizes}


def product_speed(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str) -> float:
    """Operations per second of (rows, inner) times (inner, columns)."""
    left, right = (torch.ones(size, dtype=dtype, device=device) for size in ((rows, inner), (columns, inner)))
    begin, seconds = time.perf_counter(), []
    while len(seconds) < REPEATS or time.perf_counter() - begin < 0.2:
        started = time.perf_counter()
        left @ right.T
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * rows * inner * columns / min(seconds)


def by_kind(events, parts: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Seconds of profiled events by part of the step (a label around them) and by kind of operation."""
    seconds: dict[str, Counter] = {part: Counter() for part in parts}
    for event in events:
        names, above = [], event
        while above is not None:
            names.append(above.name)
            above = above.cpu_parent
        part = next((name for name in names if name in parts), None)
        if part is not None:
            seconds[part][_kind(names)] += event.self_cpu_time_total / 1e6
    return {part: dict(counts) for part, counts in seconds.items()}


def _kind(names: list[str]) -> str:
    """Of an operation with the names of what called it, itself first."""
    if any("LinearLogps" in name for name in names):
        return "LM head and softmax"
    if any("scaled_dot_product" in name or "ScaledDotProduct" in name for name in names):
        return "attention"
    own = names[0].removeprefix("aten::")
    if own in PRODUCTS or own.startswith("mkldnn"):
        return "matrix products"
    return "gathers and copies" if own in COPIES else "elementwise" if own in ELEMENTWISE else "other"


if __name__ == "__main__":
    print(json.dumps(machine()), flush=True)
