"""The only code that pads."""

from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .rows import Row, is_per_token

OWN = ("prompt_ids", "response_ids", "scores")
RESERVED = ("prompt_mask", "response_mask", "mask")


@dataclass
class PreferenceCollator:
    """Tokenised rows to one padded batch; dimension 0 is the number of prompts B in every tensor.

    Padding is on the right. K is the largest number of responses in the batch; `mask` says which of the K slots hold a
    response. The prompt is stored once, not K times.

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
        ValueError: if there is no pad token, if a further column has the name of a mask, or if the lists of a row do
            not fit together.

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
        if self.pad_token_id is None:
            raise ValueError(
                "the tokenizer has no pad token; set one before training, for example tokenizer.pad_token = "
                "tokenizer.eos_token."
            )
        if clash := sorted({*self.columns} & {*RESERVED}):
            raise ValueError(f"column {clash[0]!r} has the name of a mask that the collator makes; rename it.")

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        read = {*OWN, "weight", *self.columns}
        rows = [{name: _plain(value) for name, value in row.items() if name in read} for row in rows]
        for index, row in enumerate(rows):
            _check_row(row, index, set(rows[0]))
        lengths = [[len(ids) for ids in row["response_ids"]] for row in rows]
        p = self._round_up(max(len(row["prompt_ids"]) for row in rows))
        k = max(len(row) for row in lengths)
        r = self._round_up(max(max(row) for row in lengths))
        mask, response_mask = _masks(lengths, k, r)
        batch = {
            "prompt_ids": _pad([row["prompt_ids"] for row in rows], (p,), torch.long, self.pad_token_id),
            "prompt_mask": _pad([[True] * len(row["prompt_ids"]) for row in rows], (p,), torch.bool),
            "response_ids": _pad([row["response_ids"] for row in rows], (k, r), torch.long, self.pad_token_id),
            "response_mask": response_mask,
            "mask": mask,
            "scores": _pad([row["scores"] for row in rows], (k,), torch.float32),
        }
        for name in rows[0]:
            if name not in OWN:
                column = _column(name, [row[name] for row in rows], lengths, k, r)
                if column is not None:
                    batch[name] = column
        return batch

    def _round_up(self, length: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple


def _masks(lengths: list[list[int]], k: int, r: int) -> tuple[Tensor, Tensor]:
    tokens = _pad(lengths, (k,), torch.long)
    return tokens > 0, torch.arange(r) < tokens[..., None]


def _pad(rows: list[list], shape: tuple[int, ...], dtype: torch.dtype, value: float = 0) -> Tensor:
    """Pad B nested lists to (B, *shape) on the right."""
    out = torch.full((len(rows), *shape), value, dtype=dtype)
    for b, row in enumerate(rows):
        if len(shape) == 1:
            out[b, : len(row)] = torch.tensor(row, dtype=dtype)
        else:
            out[b, : len(row)] = _pad(row, shape[1:], dtype, value)
    return out


def _column(name: str, values: list[Any], lengths: list[list[int]], k: int, r: int) -> Tensor | None:
    """A further column as a tensor, or None if it holds text."""
    leaves = [leaf for value in values for leaf in _leaves(value)]
    if any(not isinstance(leaf, Real | None) for leaf in leaves) or all(value is None for value in values):
        return None
    if all(isinstance(value, Real | None) for value in values):
        return _scalars(values)
    values = [_with_nan(value) for value in values]
    if all(_fits(value, row) for value, row in zip(values, lengths, strict=True)):
        return _pad(values, (k,), torch.float32)
    if all(is_per_token(value, row) for value, row in zip(values, lengths, strict=True)):
        return _pad(values, (k, r), torch.float32)
    raise ValueError(
        f"column {name!r} holds lists that fit neither the number of responses nor the number of response tokens of "
        "their row; correct it, or remove it from the dataset."
    )


def _scalars(values: list[Real | None]) -> Tensor:
    if all(isinstance(value, bool) for value in values):
        return torch.tensor(values, dtype=torch.bool)
    if all(isinstance(value, int) for value in values):
        return torch.tensor(values, dtype=torch.long)
    return torch.tensor(_with_nan(values), dtype=torch.float32)


def _fits(value: Any, lengths: list[int]) -> bool:
    return isinstance(value, list) and len(value) == len(lengths) and not any(isinstance(x, list) for x in value)


def _leaves(value: Any) -> list:
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list) else [value]


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return float("nan") if value is None else value


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _check_row(row: Row, index: int, names: set[str]) -> None:
    odd = sorted(set(row) ^ names)
    if odd:
        raise ValueError(f"row {index}: column {odd[0]!r} is not in every row of the batch; give it in all or none.")
    missing = [name for name in OWN if name not in row]
    if missing:
        raise ValueError(f"row {index}: no column {missing[0]!r}; tokenise the data with tokenize_dataset first.")
    if len(row["scores"]) != len(row["response_ids"]):
        raise ValueError(
            f"row {index}: {len(row['response_ids'])} 'response_ids' but {len(row['scores'])} 'scores'; give one "
            "score per response."
        )
    if not row["prompt_ids"] or not row["response_ids"] or not all(row["response_ids"]):
        raise ValueError(
            f"row {index}: 'prompt_ids' or one of 'response_ids' has no tokens; tokenize_dataset removes such rows."
        )
