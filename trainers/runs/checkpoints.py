"""Checkpoints of a run: which of them are whole, and whether one fits the run that is to go on from it.

transformers takes the newest folder, however much of it was written, and goes on with a fresh adapter or a fresh
optimizer where the saved one is missing. Here such a checkpoint is not taken, or it is an error.
"""

import json
import os
import shutil
import zipfile
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import TrainingArguments

from .settings import plain, refuse_other_settings

STATE, SETTINGS = "trainer_state.json", "run_settings.json"
ADAPTER, FULL = "adapter_model.safetensors", ("model.safetensors", "model.safetensors.index.json")


# Which are whole.


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest of the trainer's checkpoints in `folder` that was saved to its end."""
    found = [path for path in Path(folder).glob("checkpoint-*") if is_complete(path)]
    return str(max(found, key=_step)) if found else None


def remove_incomplete_checkpoints(folder: str | Path) -> None:
    """The trainer counts these folders when it limits their number, and would delete a good one in their favour."""
    for path in Path(folder).glob("checkpoint-*"):
        if not is_complete(path):
            shutil.rmtree(path)


def is_complete(checkpoint: str | Path) -> bool:
    """The main process writes the trainer's state last; other processes may still be writing their random state."""
    checkpoint = Path(checkpoint)
    try:
        if "global_step" not in json.loads((checkpoint / STATE).read_text()):
            return False
    except (OSError, ValueError):
        return False
    states = list(checkpoint.glob("rng_state_*.pth"))
    return not states or len(states) >= _processes(checkpoint) and all(map(zipfile.is_zipfile, states))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _processes(checkpoint: Path) -> int:
    return (_saved(checkpoint) or {}).get("processes", 1)


def _saved(checkpoint: Path) -> dict | None:
    path = checkpoint / SETTINGS
    return json.loads(path.read_text()) if path.is_file() else None


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """What `args.resume_from_checkpoint` names; true is the last whole checkpoint of `output_dir`, if there is one."""
    wanted = str(args.resume_from_checkpoint)
    if wanted.lower() in ("none", "false", ""):
        return None
    if wanted.lower() not in ("true", "last"):
        return wanted
    last = last_checkpoint(args.output_dir)
    if last is None and args.process_index == 0:
        print(f"There is no checkpoint in output_dir={args.output_dir}: training begins at step 0.")
    return last


def has_ended(args: TrainingArguments, checkpoint: str) -> bool:
    """Whether a run was written to its end, the model card last, and `checkpoint` is that of its last step."""
    if not is_complete(checkpoint):
        return False
    state = json.loads((Path(checkpoint) / STATE).read_text())
    if args.max_steps > 0:
        trained = state["global_step"] >= args.max_steps
    else:
        trained = state["global_step"] >= state["max_steps"] and state["num_train_epochs"] >= args.num_train_epochs
    return trained and (Path(args.output_dir) / "README.md").is_file()


# What is in them.


def begin_checkpoint(folder: Path, settings: dict, args: TrainingArguments, *, model: str) -> None:
    """Write what the run depends on. An older checkpoint there is no longer whole, until this one is.

    The path of the `model` and how it was loaded are written down and not compared: `settings` know its weights.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if args.save_on_each_node else args.world_size
    (folder / STATE).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    loaded = {"model": model, "model_init_kwargs": plain(args.model_init_kwargs)}
    (folder / SETTINGS).write_text(json.dumps({"processes": processes, **loaded, "settings": settings}, indent=1))


# Whether one fits.


def check_checkpoint(checkpoint: str | Path, model: nn.Module, settings: dict, *, engine: str | None) -> None:
    """Refuse a checkpoint that would not be gone on from as it was.

    Args:
        model: the policy as it is before an engine wraps it.
        settings: of this run, from `run_settings`.
        engine: "deepspeed" or "fsdp", which keep weights in files of their own, or None.

    Raises:
        ValueError: the folder is not a whole checkpoint, holds weights of another kind, lacks the state of optimizer,
            learning rate or random numbers, or belongs to a run with other settings.
    """
    folder = Path(checkpoint)
    if not is_complete(folder):
        raise ValueError(
            f"resume_from_checkpoint: {folder} is not a whole checkpoint (a kill may have cut it short). Name another "
            "one, or true for the last whole one."
        )
    _check_weights(folder, model, whole=engine is None)
    if not list(folder.glob("latest" if engine == "deepspeed" else "optimizer*")):
        raise ValueError(
            f"resume_from_checkpoint: {folder} has no optimizer state for this run (save_only_model leaves it out, "
            "and DeepSpeed keeps its own): go on under the same engine, or start a new run with it as the model."
        )
    if engine != "deepspeed" and not (folder / "scheduler.pt").is_file():  # DeepSpeed may keep it in its own files
        raise ValueError(
            f"resume_from_checkpoint: {folder / 'scheduler.pt'} is missing, so the learning rate would start anew: "
            "put the file back, or take another checkpoint."
        )
    if not any(folder.glob("rng_state*.pth")):
        raise ValueError(
            f"resume_from_checkpoint: {folder} has no random state (rng_state*.pth), so dropout, masks and samples "
            "would be other ones: put the file back, or take another checkpoint."
        )
    refuse_other_run(folder, settings)


def refuse_other_run(checkpoint: str | Path, settings: dict) -> None:
    """Raises ValueError naming what differs where the checkpoint was written for other settings."""
    saved = (_saved(Path(checkpoint)) or {}).get("settings", {})
    refuse_other_settings(
        f"resume_from_checkpoint: {checkpoint}", saved, settings,
        ways_out="start a new run with this folder as the model and another output_dir",
    )  # fmt: skip


def _check_weights(folder: Path, model: nn.Module, *, whole: bool) -> None:
    """`whole` says that the weights lie in safetensors files, and not in those of an engine."""
    adapter = model.active_adapter if isinstance(model, PeftModel) else None
    has_full = any((folder / name).is_file() for name in FULL)
    if adapter is None:
        if not has_full and any(folder.glob("**/adapter_config.json")):
            raise ValueError(
                f"resume_from_checkpoint: {folder} holds an adapter, but this run trains the full model: pass the "
                "same peft_config (use_peft on the command line) as in the saved run."
            )
        return
    path = (folder if adapter == "default" else folder / adapter) / ADAPTER
    if has_full:
        raise ValueError(
            f"resume_from_checkpoint: {folder} holds a full model, but this run trains the adapter {adapter!r}: leave "
            "the adapter out as in the saved run."
        )
    if not whole:
        return
    if not path.is_file():
        raise ValueError(
            f"resume_from_checkpoint: {path} is missing, so the adapter {adapter!r} would start afresh: put the file "
            "back, give the adapter the name that it was saved under, or take another checkpoint."
        )
    with safe_open(path, "pt") as file:
        found = set(file.keys())
    wanted = set(get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False))
    if wrong := sorted(wanted - found) or sorted(name for name in found - wanted if ".lora_" in name):
        raise ValueError(
            f"resume_from_checkpoint: {path} is of another adapter: {len(wrong)} weights differ by name, such as "
            f"{wrong[0]}. Pass the same peft_config as in the saved run."
        )


def lost_weights(model: nn.Module, missing: list[str]) -> list[str]:
    """Those of the `missing` names that no loaded weight is tied to."""
    weights, missing = model.state_dict(keep_vars=True), set(missing)
    loaded = {id(weight) for name, weight in weights.items() if name not in missing}
    return sorted(name for name in missing if id(weights.get(name)) not in loaded)
