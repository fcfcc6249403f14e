"""Runs that are killed with signal 9 and go on end with the weights and the logs of a run that was left alone."""

import json
import os
import random
import shutil
import signal
import sys
import traceback

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerState, trainer_utils
from transformers.trainer_callback import CallbackHandler

import processes
import trainers
from helpers import build_tokenizer, tiny_llama
from test_trainer import LORA, rows, trainer
from trainers.runs.checkpoints import is_complete, last_checkpoint

MASKS = {"mask_init": "dense", "mask_init_std": 0.5, "mask_learning_rate": 0.02}
TRAINERS = {"SWEPO": {}, "LIRE": {}, "DPO": {}, "PlackettLuce": {}, "InfoNCA": {}, "NCA": {}, "RRHF": {},
            "SparsePO": MASKS}  # fmt: skip
TUNINGS = ("full", "lora", "pretrained")
MORE = {
    "SWEPO pretrained budget": {"max_tokens_per_batch": 120},
    "SWEPO full cache": {"precompute_ref_logps": True},
    "SWEPO pretrained cache": {"precompute_ref_logps": True},
    "SparsePO full random": {"mask": "random"},  # draws random numbers at every step
    "DPO full sync": {"sync_ref_model": True, "ref_model_sync_steps": 3},
    "DPO lora sync": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.1},
    "SWEPO lora accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}
CASES = {f"{name} {tuning}": fields for name, fields in TRAINERS.items() for tuning in TUNINGS} | MORE
ALWAYS = ("SWEPO pretrained budget", "SparsePO full random", "RRHF lora")
# Three steps make an epoch; a checkpoint and an evaluation come after every second one. Evaluation comes first.
MOMENTS = [("weights", 2), ("step", 3), ("evaluation", 4), ("state", 4), ("step", 5), ("rotation", 6)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tokenizer):
    """The folder of an adapter that has been trained before."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(7)
    model = get_peft_model(tiny_llama(len(tokenizer)), LoraConfig(**LORA, init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def make(tmp_path, tokenizer, adapter):
    """`make(case, **changes)`: the trainer of a case, with its output in tmp_path / "out"."""

    def build(case="SWEPO full", *, data=None, peft=LORA, name="default", model=None, **changes):
        method, tuning, *_ = case.split()
        model = tiny_llama(len(tokenizer)) if model is None else model
        if tuning == "pretrained":
            model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True, adapter_name=name)
        if tuning == "lora":
            changes["peft_config"] = LoraConfig(**peft)
        fields = dict(
            learning_rate=0.01, lr_scheduler_type="linear", max_grad_norm=1.0, optim="adamw_torch", max_steps=8,
            per_device_eval_batch_size=2, save_steps=2, eval_steps=2, save_strategy="steps", eval_strategy="steps",
            save_total_limit=2, seed=3, dataloader_pin_memory=False, ref_cache_dir=str(tmp_path / "cache"),
        ) | CASES.get(case, {}) | changes  # fmt: skip
        cls = getattr(trainers, f"{method}Trainer")
        return trainer(tmp_path / "out", tokenizer, model, data or rows(11), rows(5, seed=2), cls=cls, **fields)

    return build


def die_at(moment, step):
    """Let this process die at this moment of the step."""

    def now(trainer, *_):
        return trainer.state.global_step == step

    def after(owner, name, count=1, when=now):
        setattr(owner, name, processes.die_after(getattr(owner, name), count, when))

    def half_a_state(state, path):
        save_state(state, path)
        if state.global_step == step:
            os.truncate(path, os.path.getsize(path) - 20)
            os.kill(os.getpid(), signal.SIGKILL)

    def half_a_rotation(trainer, *arguments):
        if now(trainer):
            trainer_utils.shutil.rmtree = processes.die_after(lambda path, **_: os.unlink(f"{path}/optimizer.pt"), 1)
        save_checkpoint(trainer, *arguments)

    save_state, save_checkpoint = TrainerState.save_to_json, Trainer._save_checkpoint
    match moment:
        case "step":
            after(CallbackHandler, "on_step_end", when=lambda handler, args, state, control: state.global_step == step)
        case "weights":  # the optimizer is not saved yet
            after(Trainer, "save_model")
        case "evaluation":
            after(trainers.PreferenceTrainer, "prediction_step", 2)
        case "state":
            TrainerState.save_to_json = half_a_state
        case "rotation":
            Trainer._save_checkpoint = half_a_rotation


def in_child(work):
    """Runs `work()` in a process of its own that has everything imported; returns its exit code, -9 when killed."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(120)
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish(trainer, path, resume):
    trainer.train(resume_from_checkpoint=resume)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    save_file(weights, f"{path}.safetensors")
    # `train_loss` is the Trainer's sum over the steps since the last start, divided by all steps.
    left_out = ("runtime", "per_second", "train_loss")
    history = [{k: v for k, v in log.items() if not any(part in k for part in left_out)}
               for log in trainer.state.log_history]  # fmt: skip
    path.write_text(json.dumps(history, sort_keys=True))


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in ALWAYS else pytest.mark.slow) for c in CASES])
def test_a_killed_run_ends_like_one_that_was_left_alone(case, make, tmp_path):
    whole, again, out = tmp_path / "whole", tmp_path / "again", tmp_path / "out"
    assert in_child(lambda: finish(make(case), whole, None)) == 0
    shutil.rmtree(out)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    chosen = random.Random(case)
    moments = [("step", chosen.randint(1, 2)), *MOMENTS, ("step", chosen.randint(7, 8))]
    if case in ALWAYS:  # each of them another part
        moments = moments[ALWAYS.index(case) :: 3]
    for moment, step in moments:
        resume = last_checkpoint(out) is not None

        def work(moment=moment, step=step, resume=resume):
            die_at(moment, step)
            make(case).train(resume_from_checkpoint=resume)

        assert in_child(work) == -signal.SIGKILL, (moment, step)
        if moment in ("weights", "state"):
            assert not is_complete(out / f"checkpoint-{step}")
        if moment == "rotation":
            assert last_checkpoint(out) == str(out / f"checkpoint-{step}")
    resume = last_checkpoint(out) is not None
    assert in_child(lambda: finish(make(case), again, resume)) == 0
    found, expected = (load_file(f"{path}.safetensors") for path in (again, whole))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    assert again.read_text() == whole.read_text()
    assert len([log for log in json.loads(again.read_text()) if "loss" in log]) == 8


# What would not be gone on from as it was.


@pytest.fixture
def saved(make, tmp_path):
    """`saved(case)`: the checkpoint after step 2 of 2."""

    def run(case, **changes):
        make(case, max_steps=2, eval_strategy="no", **changes).train()
        return tmp_path / "out" / "checkpoint-2"

    return run


@pytest.mark.parametrize("case", ["SWEPO lora", "SWEPO pretrained"])
def test_an_adapter_whose_weights_have_other_names_never_starts_afresh(case, saved, make):
    path = saved(case) / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "query"): value for name, value in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="of another adapter.*q_proj"):
        make(case).train(resume_from_checkpoint=True)


def test_an_adapter_is_gone_on_from_under_its_own_name_only(saved, make):
    checkpoint = saved("LIRE pretrained", name="policy")
    assert (checkpoint / "policy" / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match="no adapter_model.safetensors"):
        make("LIRE pretrained").train(resume_from_checkpoint=True)
    again = make("LIRE pretrained", name="policy", max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3


def test_a_model_that_lacks_weights_is_refused(saved, make):
    checkpoint = saved("SWEPO full")
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="of another model.*up_proj"):
        make("SWEPO full").train(resume_from_checkpoint=True)


def test_a_half_written_checkpoint_is_never_taken(saved, make):
    checkpoint = saved("SWEPO full")
    state, weights = (checkpoint / name for name in ("trainer_state.json", "model.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-9])
    assert not is_complete(checkpoint)
    weights.write_bytes(content)
    assert is_complete(checkpoint)
    state.write_text('{"global_step": 4, "log_hist')
    for resume, told in (
        (str(checkpoint), "checkpoint-2 is not a whole"),
        (f"{checkpoint}1", "there is no folder .*checkpoint-21"),
        (True, "no whole checkpoint in output_dir"),
    ):
        with pytest.raises(ValueError, match=told):
            make().train(resume_from_checkpoint=resume)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "adapter_model.safetensors"])
def test_a_lost_part_of_the_state_is_an_error(name, saved, make):
    (saved("SWEPO lora") / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name.partition('.')[0]}.*would start anew"):
        make("SWEPO lora").train(resume_from_checkpoint=True)


def test_all_processes_must_have_written_their_part(saved):
    checkpoint = saved("SWEPO full")
    settings = json.loads((checkpoint / "run_settings.json").read_text())
    (checkpoint / "run_settings.json").write_text(json.dumps({**settings, "processes": 2}))
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    assert not is_complete(checkpoint)
    content = (checkpoint / "rng_state_0.pth").read_bytes()
    (checkpoint / "rng_state_1.pth").write_bytes(content[:-30])
    assert not is_complete(checkpoint)
    (checkpoint / "rng_state_1.pth").write_bytes(content)
    assert is_complete(checkpoint)


# What a run starts from. `other` is a model of other weights, `merged` one that an adapter was added to.


def other(**config):
    return tiny_llama(len(build_tokenizer()), seed=9, **config)


def merged():
    torch.manual_seed(4)
    model = get_peft_model(tiny_llama(len(build_tokenizer())), LoraConfig(r=1, init_lora_weights=False))
    return model.merge_and_unload().requires_grad_(True)


# name: the case that was saved, the one that goes on, what it changes, what is told
START = {
    "another method": ("SWEPO full", "NCA full", {}, "trainer was 'SWEPOTrainer' and is 'NCATrainer'"),
    "another precision": ("SWEPO full", "SWEPO full", {"bf16": True}, "mixed_precision was 'no' and is 'bf16'"),
    "a start that was trained": ("SWEPO full", "SWEPO full", {"model": merged}, "reference weights are others"),
    "a reference under an adapter": ("SWEPO lora", "SWEPO lora", {"ref_model": other}, "reference weights are others"),
    "another base": ("SWEPO lora", "SWEPO lora", {"model": other}, "base weights are others; reference weights are"),
    "an adapter, then none": ("SWEPO lora", "SWEPO full", {}, "peft_config was 'LORA' and is None"),
    "rate": ("SWEPO full", "SWEPO full", {"learning_rate": 0.02}, "learning_rate was 0.01 and is 0.02"),
    "beta": ("SWEPO full", "SWEPO full", {"beta": 0.5}, "beta was"),
    "batch": ("SWEPO full", "SWEPO full", {"per_device_train_batch_size": 2}, "batch size x acc"),
    "rows": ("SWEPO full", "SWEPO full", {"data": rows(11)[::-1]}, "training rows are others"),
}  # fmt: skip


@pytest.mark.parametrize("name", START)
def test_another_start_or_other_settings_are_refused(name, saved, make):
    before, after, changes, told = START[name]
    saved(before)
    changes = {key: value() if callable(value) else value for key, value in changes.items()}
    with pytest.raises(ValueError, match=told):
        make(after, **changes).train(resume_from_checkpoint=True)


def test_the_same_weights_may_lie_elsewhere(saved, make, tmp_path):
    """Also the same reference given and not given, and a start that nothing depends on."""
    saved("SWEPO lora")
    model = make("SWEPO full").model
    model.save_pretrained(tmp_path / "moved")
    again = make("SWEPO lora", model=str(tmp_path / "moved"), ref_model=str(tmp_path / "moved"), max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    shutil.rmtree(tmp_path / "out")
    checkpoint = saved("LIRE full")
    again = make("LIRE full", model=str(checkpoint), max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3


def test_a_checkpoint_that_says_less_is_taken_as_it_is(saved, make, caplog):
    path = saved("SWEPO full") / "run_settings.json"
    found = json.loads(path.read_text())
    for name in ("trainer", "mixed_precision", "dtype", "reference weights"):
        del found["settings"][name]
    path.write_text(json.dumps(found))
    again = make("SWEPO full", max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert "does not say with what dtype, mixed_precision, reference weights, trainer it was written" in caplog.text


def test_settings_that_change_no_weight_may_change(saved, make):
    saved("SWEPO full")
    again = make(max_steps=4, layout="rows", precompute_ref_logps=True, logging_steps=2, save_steps=3,
                 per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=5)  # fmt: skip
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
