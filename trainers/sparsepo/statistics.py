"""What is logged about token masks."""

import math

from torch import Tensor


def mask_statistics(values: Tensor, token_mask: Tensor) -> dict[str, Tensor]:
    """Of mask values (B,R) at response tokens: percent of exact zeros, mean, L1 norm, 1 if all are 0; (B,) each.

    NaN for a response without tokens.
    """
    counts = token_mask.sum(-1)
    values = values.masked_fill(~token_mask, 0)
    zeros = (token_mask & (values == 0)).sum(-1)
    norm = values.abs().sum(-1)
    found = {
        "sparsity": 100 * zeros.to(norm) / counts,
        "mean": norm / counts,
        "l1": norm,
        "dead": (zeros == counts).to(norm),
    }
    return {name: value.masked_fill(counts == 0, math.nan) for name, value in found.items()}
