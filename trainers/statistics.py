"""Intervals of a mean: over prompts by the bootstrap, over training seeds by Student's t."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

FEWEST = 5  # values that a bootstrap interval needs: that of one value has no width, that of two or three hardly any
FEW = 20  # with fewer values it is narrower than it says


def about_intervals(count: int, what: str) -> str:
    """What a caption says of bootstrap intervals over `count` values: why there are none, or that they are narrow."""
    if count < FEWEST:
        return f"No intervals: {count} {what} are fewer than {FEWEST}."
    return f"Intervals from fewer than {FEW} {what} ({count}) are too narrow." if count < FEW else ""


def bootstrap_interval(values: Sequence[float] | np.ndarray, *, level: float = 0.95, resamples: int = 10_000,
                       seed: int = 0, fewest: int = 1) -> dict:  # fmt: skip
    """Mean of values (N,), one per prompt, and its percentile bootstrap interval over prompts; NaN is left out.

    Give per-prompt differences to get a paired interval. Fewer values than `fewest` have none: `low` and `high` are
    None.
    """
    numbers = np.asarray(values, dtype=float)
    numbers = numbers[~np.isnan(numbers)]
    mean, count = float(numbers.mean()), len(numbers)
    if count < fewest:
        return {"mean": mean, "low": None, "high": None, "count": count}
    draws = np.random.default_rng(seed).integers(0, count, (resamples, count))
    low, high = np.quantile(numbers[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return {"mean": mean, "low": float(low), "high": float(high), "count": count}


def t_interval(values: Sequence[float], *, level: float = 0.95) -> dict:
    """Mean of one value per seed and its t interval, which is wide for few seeds: 3 of them give +-2.5 deviations.

    A single value has no interval: `low` and `high` are None.
    """
    numbers = np.asarray(values, dtype=float)
    mean, count = float(numbers.mean()), len(numbers)
    if count < 2:
        return {"mean": mean, "low": None, "high": None, "count": count}
    half = float(student.ppf((1 + level) / 2, count - 1) * numbers.std(ddof=1) / count**0.5)
    return {"mean": mean, "low": mean - half, "high": mean + half, "count": count}
