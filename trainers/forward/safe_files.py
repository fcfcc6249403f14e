"""Nothing that is read may run code: weights are safetensors, and a checkpoint's other tensors are checked pickles.

`torch.load` opens the files of a checkpoint with `weights_only=True`, which refuses a payload; the check here comes
first and says which file it is. DeepSpeed opens its own shards without that protection, so a DeepSpeed checkpoint is
to be trusted like a program.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch.serialization import get_unsafe_globals_in_checkpoint

# Keywords of every `from_pretrained`. A run may set them otherwise in its `model_init_kwargs`.
SAFE = {"use_safetensors": True, "trust_remote_code": False}

PICKLED = {"pytorch_model.bin": "model*.safetensors", "pytorch_model-*-of-*.bin": "model*.safetensors",
           "adapter_model.bin": "adapter_model.safetensors"}  # fmt: skip
STATES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth")
# The random state of numpy, which the Trainer lets torch rebuild.
HARMLESS = {"numpy.dtype", "numpy.ndarray", "numpy.dtypes.UInt32DType", "numpy._core.multiarray._reconstruct",
            "numpy.core.multiarray._reconstruct"}  # fmt: skip


def refuse_pickled_weights(path: str | Path) -> None:
    """A local folder of a model or an adapter may not have its weights in pickles alone.

    Raises:
        ValueError: it does; the message names the file.
    """
    folder = Path(path)
    for pattern, better in PICKLED.items():
        if not any(folder.glob(better)):
            for found in sorted(folder.glob(pattern)):
                raise ValueError(
                    f"{found} is a pickle, which can run code when it is opened: convert the weights to safetensors, "
                    "for example with save_pretrained where you trust them."
                )


def refuse_cut_weights(path: str | Path, files: str = "*.safetensors") -> None:
    """The safetensors of a local folder must be whole; only their headers are read.

    Raises:
        ValueError: one is not; the message names the file.
    """
    for file in sorted(Path(path).glob(files)):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"The weights of {file} cannot be read ({error}): copy the file anew.") from error


def refuse_pickled_code(checkpoint: str | Path) -> None:
    """The files of a trainer's checkpoint may hold tensors, numbers and texts only.

    Raises:
        ValueError: one holds more, or was not written by `torch.save`; the message names it.
    """
    refuse_pickled_weights(checkpoint)
    for path in sorted(found for pattern in STATES for found in Path(checkpoint).glob(pattern)):
        try:
            unsafe = sorted(set(get_unsafe_globals_in_checkpoint(str(path))) - HARMLESS)
        except Exception as error:  # whatever a broken file makes the reader raise
            raise ValueError(f"{path} was not written to its end by torch.save ({error}): take another.") from error
        if unsafe:
            raise ValueError(
                f"{path} would call {', '.join(unsafe)} when it is opened: do not resume from this checkpoint."
            )
