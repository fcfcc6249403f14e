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
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainingArguments

from ..config import PreferenceConfig
from ..forward.reference import REFERENCE
from .files import read_json
from .settings import refuse_other_settings

STATE, SETTINGS, CARD = "trainer_state.json", "run_settings.json", "README.md"
EARLY_STOPPING = "EarlyStopping"  # the callback whose count a checkpoint keeps
ADAPTER = "adapter_model.safetensors"
DEFAULT = "default"  # PEFT's name for an adapter without one, whose weights lie in a checkpoint's own folder


# Which are whole.


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest of the trainer's checkpoints in `folder` that was saved to its end."""
    whole = [path for path in Path(folder).glob("checkpoint-*") if is_complete(path)]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def remove_incomplete_checkpoints(folder: str | Path) -> None:
    """The trainer counts these folders when it limits their number, and would delete a good one in their favour.

    So go those of `save_only_model`, from which no training goes on.
    """
    for path in Path(folder).glob("checkpoint-*"):
        if not is_complete(path) or not any(path.glob("rng_state*.pth")):
            shutil.rmtree(path)


def is_complete(checkpoint: str | Path) -> bool:
    """The main process writes the trainer's state last; other processes may still be writing their random state.

    A copy of the folder may also lack weights of the reference, or hold a part of a file of weights.
    """
    checkpoint = Path(checkpoint)
    try:
        if "global_step" not in json.loads((checkpoint / STATE).read_text()):
            return False
        saved = _saved(checkpoint)
    except (OSError, ValueError):
        return False
    reference = checkpoint / REFERENCE
    moved = reference.parent.is_dir() or saved.get("settings", {}).get("sync_ref_model")
    if moved and not reference.is_file() or not all(map(_is_whole, checkpoint.rglob("*.safetensors"))):
        return False
    states = list(checkpoint.glob("rng_state_*.pth"))
    return not states or len(states) >= saved.get("processes", 1) and all(map(zipfile.is_zipfile, states))


def _is_whole(weights: Path) -> bool:
    try:
        with safe_open(weights, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def adapter_folder(checkpoint: str | Path, adapter: str) -> Path:
    """Where a checkpoint holds the weights of an adapter."""
    return Path(checkpoint) / ("" if adapter == DEFAULT else adapter)


def _saved(checkpoint: Path) -> dict:
    path = checkpoint / SETTINGS
    return json.loads(path.read_text()) if path.is_file() else {}


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """What `args.resume_from_checkpoint` names; true is the last whole checkpoint of `output_dir`, if there is one.

    Every process asks before it makes its trainer, and so before any of them writes a checkpoint of this run.

    Raises:
        ValueError: it names none, and there is one, which a run from the start would replace or be mixed with.
    """
    wanted = str(args.resume_from_checkpoint)
    assert args.output_dir is not None  # set by TrainingArguments
    last = last_checkpoint(args.output_dir)
    if wanted.lower() in ("none", "false", ""):
        if last is not None:
            raise ValueError(
                f"output_dir={args.output_dir} holds checkpoints of a run, the newest {Path(last).name}: set "
                "resume_from_checkpoint to true to go on with it. To begin a new run choose another output_dir, or "
                "delete them."
            )
        return None
    if wanted.lower() not in ("true", "last"):
        return wanted
    if last is None and args.process_index == 0:
        print(f"There is no checkpoint in output_dir={args.output_dir}: training begins at step 0.")
    return last


def has_ended(args: PreferenceConfig, checkpoint: str) -> bool:
    """Whether a run was written to its end, the model card last, and nothing is to be trained from `checkpoint` on.

    With the last checkpoint the run's own state tells: the one of its last step may not have been kept.
    """
    assert args.output_dir is not None
    folder, saved = Path(args.output_dir), Path(checkpoint) / STATE
    card, own = folder / CARD, folder / STATE
    # An older card is that of a run that was prolonged.
    if not is_complete(checkpoint) or not card.is_file() or card.stat().st_mtime < saved.stat().st_mtime:
        return False
    state = read_json(own if own.is_file() and checkpoint == last_checkpoint(folder) else saved)
    if args.max_steps > 0:
        trained = state["global_step"] >= args.max_steps
    else:
        trained = state["global_step"] >= state["max_steps"] and state["num_train_epochs"] >= args.num_train_epochs
    early, patience = state.get("stateful_callbacks", {}).get(EARLY_STOPPING), args.early_stopping_patience
    if early and patience is not None:
        trained |= early["attributes"]["early_stopping_patience_counter"] >= patience
    return trained


def remove_outcome(folder: str | Path) -> None:
    """Removes what an earlier training left in `folder`: to its figures and the tags of its card those of the next one
    would be added, and whole weights beside its adapter would be passed over."""
    for name in ("all_results.json", "train_results.json", "eval_results.json", CARD, ADAPTER, "adapter_config.json"):
        (Path(folder) / name).unlink(missing_ok=True)


# What is in them.


def begin_checkpoint(folder: Path, settings: dict, args: TrainingArguments) -> None:
    """Write what the run depends on. An older checkpoint there is no longer whole, until this one is."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if args.save_on_each_node else args.world_size
    (folder / STATE).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps({"processes": processes, "settings": settings}, indent=1))


# Whether one fits.


def check_checkpoint(checkpoint: str | Path, model: nn.Module, settings: dict, *, engine: str | None) -> None:
    """Refuse a checkpoint that would not be gone on from as it was.

    Args:
        model: the policy as it is before an engine wraps it.
        settings: of this run, from `run_settings`.
        engine: "deepspeed" or "fsdp", which keep weights in files of their own, or None.

    Raises:
        ValueError: the folder is not a whole checkpoint, belongs to a run with other settings, holds another adapter,
            or lacks the adapter or the state of optimizer, learning rate or random numbers.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(f"resume_from_checkpoint: there is no folder {folder}. Give another, or true: the last.")
    if not is_complete(folder):
        raise ValueError(
            f"resume_from_checkpoint: {folder} is not a whole checkpoint (a kill may have cut it short). Name another "
            "one, or true for the last whole one."
        )
    refuse_other_run(folder, settings)
    needed = {"optimizer*": "the optimizer", "scheduler.pt": "the learning rate", "rng_state*.pth": "random numbers"}
    if engine == "deepspeed":  # keeps the first two in files of its own
        needed = {"latest": "the optimizer", "rng_state*.pth": "random numbers"}
    adapter = None
    if isinstance(model, PeftModel) and engine is None:
        adapter = str(adapter_folder("", model.active_adapter) / ADAPTER)
        needed[adapter] = f"the adapter {model.active_adapter!r}"
    for pattern, state in needed.items():
        if not any(folder.glob(pattern)):
            raise ValueError(
                f"resume_from_checkpoint: {folder} has no {pattern}, so {state} would start anew (save_only_model "
                "leaves it out): put the file back, go on under the same engine, or take another checkpoint."
            )
    if adapter is not None:
        assert isinstance(model, PeftModel)
        _check_names(folder / adapter, model)


def _check_names(path: Path, model: PeftModel) -> None:
    """PEFT would warn of weights that are missing or left over, and go on with fresh ones."""
    with safe_open(path, "pt") as file:
        saved = {*file.keys()}
    own = {*get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)}
    if wrong := sorted(own - saved) or sorted(name for name in saved - own if ".lora_" in name):
        raise ValueError(
            f"resume_from_checkpoint: {path} is of another adapter: {len(wrong)} weights differ by name, such as "
            f"{wrong[0]}. Pass the same peft_config as in the saved run."
        )


def refuse_other_run(checkpoint: str | Path, settings: dict) -> None:
    """Raises ValueError naming what differs where the checkpoint was written for other settings."""
    refuse_other_settings(
        f"resume_from_checkpoint: {checkpoint}", _saved(Path(checkpoint)).get("settings", {}), settings,
        ways_out="start a new run with this folder as the model and another output_dir",
    )  # fmt: skip


def lost_weights(model: nn.Module, missing: list[str]) -> list[str]:
    """Those of the `missing` names that no loaded weight is tied to."""
    weights, lost = model.state_dict(keep_vars=True), set(missing)
    loaded = {id(weight) for name, weight in weights.items() if name not in lost}
    return sorted(name for name in lost if id(weights.get(name)) not in loaded)
