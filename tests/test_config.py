"""Options are stated once, in the fields of a config, and hold for Python and for the command line."""

import dataclasses
import math

import pytest
from transformers import TrainingArguments
from trl import TrlParser

import trainers
from trainers import DPOConfig, LIREConfig, PreferenceConfig, SWEPOConfig
from trainers.config import REFUSED, Range

CONFIGS = [getattr(trainers, name) for name in trainers.__all__ if name.endswith("Config")]
THEIRS = {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_with_choices_or_bounds_refuses_what_is_outside(config):
    """A reader sees the bounds in the help, so the default must be inside them."""
    default = config(output_dir="unused", use_cpu=True)
    for field in dataclasses.fields(config):
        allowed = field.metadata.get("choices")
        if allowed is None or field.name in THEIRS:
            continue
        assert field.default is None or getattr(default, field.name) in allowed, field.name
        for wrong in (math.nan, math.inf, -1e9) if isinstance(allowed, Range) else ("no such choice",):
            with pytest.raises(ValueError, match=f"^{field.name}="):
                config(output_dir="unused", use_cpu=True, **{field.name: wrong})


@pytest.mark.parametrize("config, wrong", [
    (PreferenceConfig, {"max_length": 1}),
    (PreferenceConfig, {"max_tokens_per_batch": "many"}),
    (PreferenceConfig, {"max_prompt_length": 2.5}),
    (PreferenceConfig, {"stream_buffer": 4.0}),
    (PreferenceConfig, {"sft_weight": True}),
    (PreferenceConfig, {"ref_model_sync_steps": 0}),
    (PreferenceConfig, {"ref_model_mixup_alpha": 0.0}),
    (PreferenceConfig, {"ref_model_mixup_alpha": 1.01}),
    (PreferenceConfig, {"early_stopping_patience": 0}),
    (SWEPOConfig, {"beta": 0}),
    (SWEPOConfig, {"weighting": None}),
    (LIREConfig, {"temperature": 0}),
    (DPOConfig, {"label_smoothing": 0.5}),
    *((PreferenceConfig, {field: 1}) for field in REFUSED),  # that would give other numbers
    (PreferenceConfig, {"gradient_accumulation_steps": -1}),  # that would train on nothing
    (PreferenceConfig, {"train_sampling_strategy": "sequential", "max_tokens_per_batch": 64}),
])  # fmt: skip
def test_what_is_refused_by_name(config, wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}="):
        config(output_dir="unused", use_cpu=True, **wrong)


def test_the_command_line_knows_the_bounds(capsys):
    [args] = TrlParser([SWEPOConfig]).parse_args_and_config(["--output_dir", "unused", "--beta", "1e-3", "--use_cpu"])
    assert args.beta == 1e-3 and args.max_tokens_per_batch is None
    assert SWEPOConfig(output_dir="unused", use_cpu=True, max_length=None).max_length is None
    with pytest.raises(ValueError, match="^max_length=512.5 must be a whole number, at least 2"):
        SWEPOConfig(output_dir="unused", use_cpu=True, max_length=512.5)
    with pytest.raises(SystemExit):
        TrlParser([DPOConfig]).parse_args_and_config(["--output_dir", "unused", "--label_smoothing", "0.5"])
    assert "at least 0 and below 0.5" in capsys.readouterr().err


def test_keywords_are_json_on_the_command_line():
    args = PreferenceConfig(output_dir="unused", use_cpu=True, model_init_kwargs='{"dtype": "float32"}')
    assert args.model_init_kwargs == {"dtype": "float32"}
    with pytest.raises(ValueError, match="chat_template_kwargs.*JSON"):
        PreferenceConfig(output_dir="unused", use_cpu=True, chat_template_kwargs="enable_thinking: false")
