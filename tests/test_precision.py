"""Which dtype is fast here, on this CPU and on one without 16-bit instructions."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from helpers import build_tokenizer, tiny_llama
from trainers import SWEPOConfig, SWEPOTrainer, precision
from trainers.cli import train

CPU = torch.device("cpu")
# These two make torch and its matrix library leave out what is newer than AVX2, so bfloat16 is emulated.
OLD_CPU = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

ON_AN_OLD_CPU = """
import logging, torch
from trainers import precision
logging.basicConfig(format="%(message)s")
cpu = torch.device("cpu")
print(precision.settle_dtype("fast", cpu)[0], precision.settle_dtype("bfloat16", cpu)[0], precision.instructions())
print(precision.slowdown(torch.bfloat16) > precision.EMULATED)
for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
    precision.warn_if_emulated(dtype, cpu)
precision.warn_if_emulated(torch.float16, torch.device("cuda"))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the limits of the instruction set are those of x86")
def test_a_cpu_that_emulates_bfloat16_trains_in_float32_and_says_so_once():
    done = subprocess.run(
        [sys.executable, "-c", ON_AN_OLD_CPU], env=os.environ | OLD_CPU, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-2:] == ["float32 bfloat16 AVX2", "True"]
    warnings = [line for line in done.stderr.splitlines() if "has no instructions for" in line]
    assert len(warnings) == 1
    assert "bfloat16" in warnings[0] and "(AVX2)" in warnings[0] and "--dtype float32" in warnings[0]


def test_fast_is_bfloat16_where_a_product_takes_less_time_in_it():
    dtype, why = precision.settle_dtype("fast", CPU)
    assert dtype == ("bfloat16" if precision.slowdown(torch.bfloat16) < 1 else "float32")
    assert f"{precision.slowdown(torch.bfloat16):.2g} times" in why and precision.instructions() in why
    assert precision.slowdown(torch.float32) == 1


def test_a_trainer_warns_of_the_dtype_that_it_computes_in(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("trainers.base.warn_if_emulated", lambda dtype, device: asked.append((dtype, device.type)))
    tokenizer = build_tokenizer()
    for options, dtype in (({"bf16": True}, torch.float32), ({}, torch.bfloat16), ({}, torch.float32)):
        args = SWEPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
        SWEPOTrainer(tiny_llama(len(tokenizer)).to(dtype), args=args, processing_class=tokenizer)
    assert asked == [(torch.bfloat16, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "cpu")]


@pytest.mark.parametrize("how", ["flag", "file"])
def test_the_launcher_settles_a_fast_dtype(tmp_path, how):
    (tmp_path / "recipe.yaml").write_text("dtype: fast\n")
    given = ["--dtype", "fast"] if how == "flag" else ["--config", str(tmp_path / "recipe.yaml")]
    _, _, args, model = train.parse([*given, "--output_dir", str(tmp_path), "--use_cpu", "true"])
    assert model.dtype == args.model_init_kwargs["dtype"] == precision.settle_dtype("fast", CPU)[0]
