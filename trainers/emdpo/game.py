"""The game that mixes the policies of the types: no type shall regret the mixture more than it must.

Rows of a regret matrix are types, columns are policies; a mixture weights the policies. Its regrets are linear,
regret @ mixture, because a policy is drawn per answer and answered with throughout.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog


class Solution(NamedTuple):
    """`mixture` (P,) over the policies and `value`, the largest regret of a type under it, in the unit of the matrix.

    `value` is not below 0 with the zero row. A regret that is nowhere above 0 leaves the mixture open; then it is the
    one of smallest largest regret.
    """

    mixture: np.ndarray
    value: float


def regret_matrix(gains: np.ndarray) -> np.ndarray:
    """Regret of type i when policy j answers, in nats; its diagonal is 0.

    Args:
        gains: (T,P), P >= T, mean over prompts and samples y of policy j of log pi_i(y|x) - log pi_ref(y|x); the first
            T policies are the types' own.

    Returns:
        (T,P). Times beta it is in the unit of the reward.
    """
    gains = np.asarray(gains, dtype=np.float64)
    return np.diagonal(gains)[:, None] - gains


def min_max_regret(
    regret: np.ndarray, weights: np.ndarray | None = None, *, solver: str = "exact", zero_row: bool = True, steps=None
) -> Solution:
    """The mixture of policies whose largest regret over the types is smallest: min v with regret @ w <= v.

    Args:
        regret: (T,P), rows types, columns policies (more policies than types are allowed).
        weights: (T,) positive factors on the types' regrets; all 1 by default.
        solver, steps: the linear program is the only solver, and takes no steps.
        zero_row: let the adversary also choose a type without regret, so that nothing is gained below 0.

    Raises:
        ValueError: another solver, a matrix with NaN, or weights that are not positive numbers.
    """
    if solver != "exact" or steps is not None:
        raise ValueError(f"solver={solver!r}, steps={steps!r}: the mixture is solved exactly; leave both out.")
    regret = np.asarray(regret, dtype=np.float64)
    if weights is not None:
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != regret.shape[:1] or not ((weights > 0) & (weights < np.inf)).all():
            raise ValueError(f"weights={weights.tolist()} must be one positive number per type ({len(regret)}).")
        regret = weights[:, None] * regret
    types, policies = regret.shape
    scale = np.abs(regret).max()  # the solution does not depend on it, but the solver's tolerance does
    if scale == 0:
        return Solution(np.full(policies, 1 / policies), 0.0)
    # A zero row would leave the mixture open where v < 0, so the program has none.
    answer = linprog(
        np.r_[np.zeros(policies), 1.0],
        A_ub=np.c_[regret / scale, -np.ones(types)],
        b_ub=np.zeros(types),
        A_eq=np.r_[np.ones(policies), 0.0][None],
        b_eq=[1.0],
        bounds=[(0, 1)] * policies + [(None, None)],
        method="highs",
    )
    if not answer.success:
        raise RuntimeError(f"the linear program of the mixture failed: {answer.message}")
    mixture = np.maximum(answer.x[:-1], 0)
    mixture /= mixture.sum()
    worst = float((regret @ mixture).max())
    return Solution(mixture, max(0.0, worst) if zero_row else worst)
