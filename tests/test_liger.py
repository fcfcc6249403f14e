"""`use_liger_kernel`: kernels for norms, rotary positions and MLPs, never for the LM head."""

import math
from types import MethodType

import pytest
import torch
import transformers.trainer
from transformers.models.llama import modeling_llama

import trainers.forward.policy
from helpers import tiny_llama
from test_trainer import logged, signal_rows, trainer
from trainers import DPOConfig, DPOTrainer


@pytest.mark.parametrize("loss", ["fused_linear_cross_entropy", "cross_entropy"])
def test_a_kernel_in_the_place_of_the_lm_head_is_refused_by_name(loss):
    with pytest.raises(ValueError, match=f"^liger_kernel_config: {loss} would replace"):
        DPOConfig(output_dir="unused", use_cpu=True, use_liger_kernel=True, liger_kernel_config={loss: True})


def test_the_losses_are_off_and_the_other_kernels_as_the_user_has_them():
    options = {"output_dir": "unused", "use_cpu": True, "liger_kernel_config": {"rope": False, "cross_entropy": False}}
    off = {"fused_linear_cross_entropy": False, "cross_entropy": False}
    assert DPOConfig(use_liger_kernel=True, **options).liger_kernel_config == {"rope": False} | off
    assert DPOConfig(**options).liger_kernel_config == options["liger_kernel_config"]


@pytest.mark.parametrize("given", [False, True])
def test_policy_and_reference_get_the_kernels_before_anything_is_scored(tmp_path, tokenizer, monkeypatch, given):
    """A kernel that halves the norms, in the place of the package: the log-ratios are 0 if both models have it."""
    patched = []

    def halve(self, states):
        return type(self).forward(self, states) / 2

    def kernels(model, config):
        assert config == {"fused_linear_cross_entropy": False, "cross_entropy": False}
        patched.append(model)
        for module in model.modules():
            if isinstance(module, modeling_llama.LlamaRMSNorm):
                module.forward = MethodType(halve, module)

    monkeypatch.setattr(trainers.forward.policy, "apply_liger_kernel", kernels)
    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", kernels)  # the package cannot be had everywhere
    ref_model = {"ref_model": tiny_llama(len(tokenizer))} if given else {}
    t = trainer(tmp_path, tokenizer, data=signal_rows(), cls=DPOTrainer, use_liger_kernel=True, **ref_model)
    assert [model is t.model for model in patched] == [True, False] and patched[1] is t.reference.model
    t.train()
    plain = trainer(tmp_path, tokenizer, data=signal_rows(), cls=DPOTrainer)
    plain.train()
    assert logged(t)[0] == pytest.approx(math.log(2), abs=1e-6)
    # The halved norms are in the numbers.
    assert abs(logged(t, "logps/chosen")[0] - logged(plain, "logps/chosen")[0]) > 1


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["rows", "shared"])
def test_the_numbers_are_those_without_the_kernels(tmp_path, tokenizer, monkeypatch, layout):
    pytest.importorskip("liger_kernel.transformers")
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # Liger replaces them for the whole process
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    runs = []
    for on in (False, True):
        options = {"layout": layout, "use_liger_kernel": on, "use_cpu": not torch.cuda.is_available()}
        t = trainer(tmp_path, tokenizer, data=signal_rows(), cls=DPOTrainer, beta=1.0, **options)
        t.train()
        runs.append(t)
    plain, kernels = runs
    assert "Liger" in str(kernels.model) and "Liger" in str(kernels.reference.model)
    assert "Liger" not in str(plain.model)
    assert kernels.runner.layout == layout
    assert logged(kernels)[0] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("loss", "grad_norm", "logps/chosen", "rewards/margins"):
        assert logged(kernels, name) == pytest.approx(logged(plain, name), rel=1e-5, abs=1e-5), name
