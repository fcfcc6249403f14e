"""What a batch must hold, and the check of a collator that is not ours."""

from collections.abc import Callable, Mapping

import torch
from datasets import Dataset
from torch import Tensor

from .collator import PreferenceCollator

TRIED = 8  # rows of each data set that a collator is tried on
# B prompts, the longest of P tokens, of K responses each at most, the longest of R tokens.
DIMENSIONS = {
    "prompt_ids": "BP", "prompt_mask": "BP", "response_ids": "BKR", "response_mask": "BKR", "mask": "BK",
    "scores": "BK",
}  # fmt: skip


def check_collator(collate: Callable, like: PreferenceCollator, datasets: list[Dataset]) -> None:
    """Compare what `collate` makes of the first rows of tokenised data sets with what `like` makes of them.

    A batch must have every tensor that `like` gives, with the same dtype and number of dimensions. P, K, R and all
    values may be others. Further tensors may be there, such as `weight` (B,); each begins with the dimension of the
    prompts.

    Raises:
        ValueError: it does not; the message names the tensor, and what it should be.
    """
    for rows in datasets:
        first = [rows[i] for i in range(min(len(rows), TRIED))]
        wrong = _wrong(collate(first), like(first)) if first else None
        if wrong:
            raise ValueError(
                f"data_collator: {wrong}. A subclass of trainers.data.PreferenceCollator that changes what "
                "super().__call__(rows) gives has all that a batch must hold."
            )


def _wrong(batch: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> str | None:
    """What is wrong with a batch."""
    if not isinstance(batch, Mapping):
        return f"it gives a {type(batch).__name__}, not a dict of tensors"
    if missing := [name for name in like if name not in batch]:
        return f"its batch has no {', '.join(missing)}"
    size, sizes = len(like["scores"]), {"B": len(like["scores"])}
    like = {"weight": torch.ones(size), **like}
    for name, value in batch.items():
        if not isinstance(value, Tensor) or not value.dim() or len(value) != size:
            found = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            return f"{name} is {found} for {size} rows, not a tensor that begins with that dimension"
        if name in like and (value.dtype != like[name].dtype or value.dim() != like[name].dim()):
            wanted = f"{like[name].dtype} with {like[name].dim()} dimensions"
            return f"{name} is {value.dtype} {tuple(value.shape)}, not {wanted}"
    for name, dimensions in DIMENSIONS.items():
        for letter, length in zip(dimensions, batch[name].shape, strict=True):
            if sizes.setdefault(letter, length) != length:
                return f"{name} is {tuple(batch[name].shape)} where other tensors have {letter} = {sizes[letter]}"
    prompts, responses, mask = batch["prompt_mask"], batch["response_mask"], batch["mask"]
    if (prompts[:, 1:] & ~prompts[:, :-1]).any() or not prompts[:, 0].all():
        return "prompt_mask must be true from the first token of each prompt on to its last: padding is on the right"
    if not torch.equal(responses.any(-1), mask) or not mask.any(-1).all():
        return "mask must be true where response_mask has a token, and for a response of each prompt"
    if not batch["scores"][mask].isfinite().all():
        return "scores are not finite where mask is true"
    if "weight" in batch and not (batch["weight"].isfinite() & (batch["weight"] >= 0)).all():
        return "weight must be finite and not negative"
    return None
