"""The only code that pads."""

from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .rows import TRAINED, Row, is_per_token

OWN = ("prompt_ids", "response_ids", "scores")


@dataclass
class PreferenceCollator:
    """Tokenised rows to one padded batch; dimension 0 is the number of prompts B in every tensor.

    Padding is on the right. K is the largest number of responses in the batch; `mask` says which of the K slots hold a
    response, `response_mask` which tokens are trained on: all of a response, or those that the row's column
    `assistant_masks` marks (K lists of bools as long as the responses). The prompt is stored once, not K times.

    | key | shape | dtype |
    |---|---|---|
    | `prompt_ids`, `prompt_mask` | (B, P) | int64, bool |
    | `response_ids`, `response_mask` | (B, K, R) | int64, bool |
    | `mask` | (B, K) | bool |
    | `scores` | (B, K) | float32, 0 in empty slots |
    | `weight`, where rows have it | (B,) | float32 |
    | a scalar column | (B,) | int64, bool or float32; None becomes NaN, in a float32 column |
    | a column with one number per response | (B, K) | float32, 0 in empty slots |
    | a column with one number per response token | (B, K, R) | float32, 0 where there is no token |

    Of further columns only those named in `columns` are read. Text cannot be a tensor: a column of strings is left out
    of the batch, and so is a column that is None in every row of the batch.

    Args:
        pad_token_id: token to pad with.
        pad_to_multiple_of: round P and R up to a multiple of this.
        columns: further columns that the method reads.

    Raises:
        ValueError: there is no pad token, a column has the name of a mask, the lists of a row do not fit together, or
            a response has no token to train on.

    Example:

        >>> collator = PreferenceCollator(pad_token_id=0)
        >>> batch = collator([
        ...     {"prompt_ids": [5, 6, 7], "response_ids": [[8], [9, 10]], "scores": [1.0, 0.0]},
        ...     {"prompt_ids": [5], "response_ids": [[8, 9], [10], [11]], "scores": [0.5, 2.0, 1.0]},
        ... ])
        >>> batch["prompt_ids"]
        tensor([[5, 6, 7],
                [5, 0, 0]])
        >>> batch["response_ids"]
        tensor([[[ 8,  0],
                 [ 9, 10],
                 [ 0,  0]],
        <BLANKLINE>
                [[ 8,  9],
                 [10,  0],
                 [11,  0]]])
        >>> batch["mask"]
        tensor([[ True,  True, False],
                [ True,  True,  True]])
        >>> batch["scores"]
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 2.0000, 1.0000]])
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    columns: tuple[str, ...] = ()

    def __post_init__(self):
        if {*self.columns} & {"prompt_mask", "response_mask", "mask"}:
            raise ValueError(f"one of the columns {self.columns} has the name of a mask of the batch: rename it.")
        if self.pad_token_id is None:
            raise ValueError(
                "the tokenizer has no pad token: set one, such as tokenizer.pad_token = tokenizer.eos_token."
            )

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        names = dict.fromkeys(name for row in rows for name in row)
        read = [*OWN, *(name for name in names if name in ("weight", *self.columns) and name not in OWN)]
        trained = [_plain(row.get(TRAINED)) for row in rows]
        rows = [{name: _plain(row[name]) for name in read} for row in rows]
        lengths = [[len(ids) for ids in row["response_ids"]] for row in rows]
        for row, counts in zip(rows, lengths, strict=True):
            if not row["prompt_ids"] or not counts or not all(counts) or len(row["scores"]) != len(counts):
                raise ValueError("a row has no tokens, or not one score per response: tokenise with tokenize_dataset.")
        p = self._round_up(max(len(row["prompt_ids"]) for row in rows))
        k = max(map(len, lengths))
        r = self._round_up(max(map(max, lengths)))
        tokens = _pad(lengths, (k,), np.int64)
        batch = {
            "prompt_ids": _pad([row["prompt_ids"] for row in rows], (p,), np.int64, self.pad_token_id),
            "prompt_mask": _pad([[True] * len(row["prompt_ids"]) for row in rows], (p,), np.bool_),
            "response_ids": _pad([row["response_ids"] for row in rows], (k, r), np.int64, self.pad_token_id),
            "response_mask": _trained(trained, lengths, torch.arange(r) < tokens[..., None]),
            "mask": tokens > 0,
            "scores": _pad([row["scores"] for row in rows], (k,), np.float32),
        }
        further = {name: _column(name, [row[name] for row in rows], lengths, k, r) for name in read if name not in OWN}
        return batch | {name: column for name, column in further.items() if column is not None}

    def _round_up(self, length: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple


def _trained(masks: list[list | None], lengths: list[list[int]], tokens: Tensor) -> Tensor:
    """The tokens (B,K,R) that are trained on: those of the rows' masks, and all of the rows without."""
    for index, (mask, counts) in enumerate(zip(masks, lengths, strict=True)):
        if mask is None:
            continue
        if not is_per_token(mask, counts) or not all(map(any, mask)):
            raise ValueError(f"{TRAINED!r} must mark at least one token of each response, in lists as long as these.")
        tokens[index] = _pad([mask], tokens.shape[1:], np.bool_)[0]
    return tokens


def _pad(rows: list[list], shape: tuple[int, ...], dtype: type, value: float = 0) -> Tensor:
    """Pad B nested lists to (B, *shape) on the right; None becomes NaN."""
    out: np.ndarray = np.full((len(rows), *shape), value, dtype=dtype)
    for index, row in enumerate(rows):
        if len(shape) == 1:
            out[index, : len(row)] = row
        else:
            out[index, : len(row)] = _pad(row, shape[1:], dtype, value)
    return torch.from_numpy(out)


def _column(name: str, values: list[Any], lengths: list[list[int]], k: int, r: int) -> Tensor | None:
    """A further column as a tensor, or None if it holds text."""
    leaves = [leaf for value in values for leaf in _leaves(value)]
    if any(not isinstance(leaf, Real | None) for leaf in leaves) or all(value is None for value in values):
        return None
    if all(isinstance(value, bool) for value in values):
        return torch.tensor(values, dtype=torch.bool)
    if all(isinstance(value, int) for value in values):
        return torch.tensor(values, dtype=torch.long)
    if not any(isinstance(value, list) for value in values):
        return _pad([values], (len(values),), np.float32)[0]
    if all(_is_per_response(value, row) for value, row in zip(values, lengths, strict=True)):
        return _pad(values, (k,), np.float32)
    if all(is_per_token(value, row) for value, row in zip(values, lengths, strict=True)):
        return _pad(values, (k, r), np.float32)
    raise ValueError(
        f"column {name!r} holds lists that fit neither the number of responses nor the number of response tokens of "
        "their row; correct it, or remove it from the dataset."
    )


def _is_per_response(value: Any, lengths: list[int]) -> bool:
    return isinstance(value, list) and len(value) == len(lengths) and not any(isinstance(x, list) for x in value)


def _leaves(value: Any) -> list:
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list) else [value]


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value
