"""Masks and KL on one process and on two, under every engine: what a head outside the wrapped forward would break."""

from functools import cache

import pytest

from test_distributed import flat, launch

SPARSEPO = {
    "trainer": "SparsePOTrainer",
    "settings": {"mask_init": "dense", "mask_init_std": 0.5, "reward_l1": 0.01, "mask_learning_rate": 0.02},
}
OPTIONS = {
    "full": {"settings": {"independent": True}},
    "lora": {"peft": True},
    "checkpointing": {"checkpointing": True, "layout": "rows"},
    "activations": {"settings": {"mask": "activations", "reward_l1": 0.0, "mask_learning_rate": None}},
    "lora head": {"peft": ["q_proj", "lm_head"], "settings": {"ranking": "plackett_luce"}},
}
ALWAYS = [("ddp", "full"), ("zero3", "lora"), ("fsdp2", "full")]


def options(name):
    own = OPTIONS[name]
    return {**SPARSEPO, **own, "settings": {**SPARSEPO["settings"], **own.get("settings", {})}}


@pytest.fixture(scope="module")
def single_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("single")


@cache
def alone(name, folder):
    return launch("single", options(name), folder)


def case(engine, name):
    return pytest.param(engine, name, marks=() if (engine, name) in ALWAYS else pytest.mark.slow)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "engine, name", [case(engine, name) for engine in ("ddp", "zero2", "zero3", "fsdp2") for name in OPTIONS]
)
def test_two_processes_give_the_masks_and_losses_of_one(engine, name, tmp_path, single_folder):
    expected, found = alone(name, single_folder), launch(engine, options(name), tmp_path)
    assert len(found["masks"]) == len(expected["masks"]) == 8
    assert found["losses"][0] != pytest.approx(found["losses"][-1], rel=0.01)
    assert flat(found) == pytest.approx(flat(expected), rel=1e-4, abs=1e-5)
    assert found["masks"] == pytest.approx(expected["masks"], rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["full", "lora"])
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_a_cut_run_goes_on_with_its_masks(engine, name, tmp_path):
    saving = options(name)
    saving["settings"] |= {"save_strategy": "steps", "save_steps": 2}
    whole = launch(engine, saving, tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "out" / "checkpoint-2"
    assert (checkpoint / "mask_heads.safetensors").is_file()
    again = launch(engine, options(name) | {"resume": str(checkpoint)}, tmp_path / "again")
    assert len(again["losses"]) == 5 and len(again["norms"]) == 3  # of which two losses are read from the checkpoint
    assert again["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    assert again["norms"] == pytest.approx(whole["norms"][2:], rel=1e-5)
    assert again["masks"] == pytest.approx(whole["masks"], rel=1e-6)
