"""What the result of a loop depends on, as flat settings that can be compared by name."""

import hashlib
import json

# Training arguments that say where results go and how they are reported, and change no weight.
UNCOMPARED = (
    "output_dir", "run_name", "self_enhance", "resume_from_checkpoint", "push_to_hub", "disable_tqdm", "do_eval",
    "dataset_num_proc", "ref_cache_dir", "ref_tokens_per_batch", "project", "prediction_loss_only", "local_rank",
)  # fmt: skip
UNCOMPARED_PREFIXES = ("log", "save_", "eval_", "hub_", "report_", "trackio", "ddp_", "per_device_eval",
                       "dataloader_num", "dataloader_pin", "dataloader_per", "dataloader_pre")  # fmt: skip


def training_settings(args, *, ignore: tuple[str, ...] = ()) -> dict:
    """The training arguments that change a weight, without those named in `ignore`."""
    return {
        name: value
        for name, value in args.to_dict().items()
        if name not in UNCOMPARED and name not in ignore and not name.startswith(UNCOMPARED_PREFIXES)
    }


def digest(content: list) -> str:
    """sha256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
