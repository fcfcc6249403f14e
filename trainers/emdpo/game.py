"""The game that mixes the policies of the types: no type shall regret the mixture more than it must.

Rows of a regret matrix are types, columns are policies; a mixture weights the policies. Its regrets are linear,
regret @ mixture, because a policy is drawn per answer and answered with throughout.
"""

from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import linprog

SOLVERS = ("exact", "omwu")
OMWU_STEPS = 100_000


class Solution(NamedTuple):
    """`mixture` (P,) over the policies and `value`, the largest regret of a type under it, in the unit of the matrix.

    `value` is not below 0 with the zero row. A regret that is nowhere above 0 leaves the mixture open; then it is the
    one of smallest largest regret.
    """

    mixture: np.ndarray
    value: float


def regret_matrix(gains: np.ndarray, own: np.ndarray | None = None) -> np.ndarray:
    """Regret of type i when policy j answers, in nats; its diagonal is 0 where policy i is that of type i.

    Args:
        gains: (T,P) mean over prompts and samples y of policy j of log pi_i(y|x) - log pi_ref(y|x).
        own: (T,) column of each type's own policy; by default column i.

    Returns:
        (T,P). Times beta it is in the unit of the reward.
    """
    gains = np.asarray(gains, dtype=np.float64)
    own = np.arange(len(gains)) if own is None else np.asarray(own)
    return gains[np.arange(len(gains)), own][:, None] - gains


def max_regret(regret: np.ndarray, mixture: np.ndarray, *, zero_row: bool = True) -> float:
    """Largest regret of a type under a mixture of the policies; not below 0 with the zero row."""
    worst = float((np.asarray(regret, dtype=np.float64) @ np.asarray(mixture, dtype=np.float64)).max())
    return max(0.0, worst) if zero_row else worst


def min_max_regret(
    regret: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    solver: Literal["exact", "omwu"] = "exact",
    zero_row: bool = True,
    steps: int = OMWU_STEPS,
) -> Solution:
    """The mixture of policies whose largest regret over the types is smallest.

    Args:
        regret: (T,P), rows types, columns policies (more policies than types are allowed).
        weights: (T,) positive factors on the types' regrets; all 1 by default.
        solver: a linear program, or the authors' optimistic multiplicative weights.
        zero_row: let the adversary also choose a type without regret, so that nothing is gained below 0.
        steps: of multiplicative weights.

    Raises:
        ValueError: an argument outside its range, or a matrix with NaN.
    """
    regret = np.asarray(regret, dtype=np.float64)
    if regret.ndim != 2 or not regret.size or not np.isfinite(regret).all():
        raise ValueError(f"regret must be a finite matrix (types, policies), got shape {regret.shape}.")
    if weights is not None:
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != regret.shape[:1] or not (weights > 0).all():
            raise ValueError(f"weights={weights.tolist()} must be one positive number per type ({len(regret)}).")
        regret = weights[:, None] * regret
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown: choose one of {', '.join(SOLVERS)}.")
    scale = np.abs(regret).max()  # the solution does not depend on it, but both solvers' steps do
    if scale == 0:
        return Solution(np.full(regret.shape[1], 1 / regret.shape[1]), 0.0)
    solve = _linear_program if solver == "exact" else lambda r: multiplicative_weights(r, steps, zero_row=zero_row)[0]
    mixture = solve(regret / scale)
    return Solution(mixture, max_regret(regret, mixture, zero_row=zero_row))


def _linear_program(regret: np.ndarray) -> np.ndarray:
    """min v with regret @ w <= v, w on the simplex. A zero row would leave w open where v < 0, so it has none."""
    types, policies = regret.shape
    found = linprog(
        np.r_[np.zeros(policies), 1.0],
        A_ub=np.c_[regret, -np.ones(types)],
        b_ub=np.zeros(types),
        A_eq=np.r_[np.ones(policies), 0.0][None],
        b_eq=[1.0],
        bounds=[(0, 1)] * policies + [(None, None)],
        method="highs",
    )
    if not found.success:
        raise RuntimeError(f"the linear program of the mixture failed: {found.message}")
    mixture = np.maximum(found.x[:-1], 0)
    return mixture / mixture.sum()


def multiplicative_weights(regret: np.ndarray, steps: int, *, zero_row: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The authors' solver: optimistic multiplicative weights of both players, step 5 / sqrt(steps).

    Returns:
        mixture (P,) and adversary (T,), or (T+1,) with the zero row first: averages over the steps.
    """
    a = np.vstack([np.zeros(regret.shape[1]), regret]) if zero_row else np.asarray(regret, dtype=np.float64)
    step = 5 / steps**0.5
    x, y = (np.full(n, 1 / n) for n in a.shape)
    last_x, last_y = x, y
    sum_x, sum_y = np.zeros_like(x), np.zeros_like(y)
    for _ in range(steps):
        sum_x += x
        sum_y += y
        next_x = x * np.exp(step * (a @ (2 * y - last_y)))
        next_y = y * np.exp(-step * ((2 * x - last_x) @ a))
        last_x, last_y = x, y
        x, y = next_x / next_x.sum(), next_y / next_y.sum()
    return sum_y / steps, sum_x / steps


def bootstrap_mixture(
    gains: np.ndarray, *, own: np.ndarray | None = None, weights: np.ndarray | None = None, resamples: int = 1000,
    level: float = 0.95, seed: int = 0,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Percentile intervals of mixture and value when the prompts are drawn again, exact solver.

    Args:
        gains: (T,P,prompts) mean over the samples of each prompt, as in `regret_matrix`.

    Returns:
        {"low", "high"} of the mixture (P,), and "value" (2,).
    """
    random, prompts = np.random.default_rng(seed), gains.shape[-1]
    found = []
    for _ in range(resamples):
        drawn = gains[..., random.integers(0, prompts, prompts)].mean(-1)
        mixture, value = min_max_regret(regret_matrix(drawn, own), weights)
        found.append(np.r_[mixture, value])
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {"low": low[:-1], "high": high[:-1], "value": np.array([low[-1], high[-1]])}
