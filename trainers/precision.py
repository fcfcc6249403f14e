"""Which dtype the machine at hand computes fast in.

A CPU without 16-bit instructions emulates bfloat16 and float16, up to 500 times slower than float32, and no library
says so (pytorch/pytorch#146508). Whether it does is measured: what the CPU reports is not what the libraries use.
"""

import logging
import timeit
from functools import cache, partial

import torch

logger = logging.getLogger(__name__)

FAST = "fast"  # a dtype by this name is settled by `settle_dtype`
EMULATED = 2.0  # times the seconds of float32: native instructions stay below 1, emulation starts at about 4
SIZE, TURNS = 256, 5  # smaller ones say little about large ones


@cache
def slowdown(dtype: torch.dtype) -> float:
    """Seconds of a matrix product on this CPU in `dtype`, divided by those in float32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads would wait for each other where other processes are busy
    try:
        factors = {kind: torch.ones(SIZE, SIZE, dtype=kind) for kind in (torch.float32, dtype)}
        seconds = {kind: min(timeit.repeat(partial(torch.mm, factor, factor), number=1, repeat=TURNS))
                   for kind, factor in factors.items()}  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    return seconds[dtype] / seconds[torch.float32]


def settle_dtype(dtype: str | None, device: torch.device) -> tuple[str | None, str]:
    """The dtype to compute in on `device`, and why: "fast" becomes bfloat16 or float32, all others stay."""
    if dtype != FAST:
        return dtype, "as asked for"
    if device.type != "cpu":
        native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bfloat16", "the GPU computes in it") if native else ("float32", "the GPU has no bfloat16")
    ratio = slowdown(torch.bfloat16)
    why = f"a bfloat16 matrix product takes {ratio:.2g} times as long as a float32 one on this CPU ({instructions()})"
    return "bfloat16" if ratio < 1 else "float32", why


def instructions() -> str:
    """The widest instruction set of this CPU that torch uses, such as AVX2."""
    return torch.backends.cpu.get_cpu_capability()


def warn_if_emulated(dtype: torch.dtype, device: torch.device) -> None:
    """One warning per process where a run on a CPU computes in a 16-bit dtype that the CPU emulates."""
    if device.type == "cpu" and dtype.itemsize < 4 and slowdown(dtype) > EMULATED:
        _warn(str(dtype).removeprefix("torch."), slowdown(dtype))


@cache
def _warn(name: str, ratio: float) -> None:
    logger.warning(
        "This CPU (%s) has no instructions for %s: a matrix product takes %.0f times as long as in float32, and so "
        "will training. Use --dtype float32 (in Python model_init_kwargs={'dtype': 'float32'}), and neither bf16 nor "
        "fp16.",
        instructions(), name, ratio,
    )  # fmt: skip
