"""The E-step: which type an annotator is, from how well each type's policy explains all of their answers.

All of it is float64 and in log space: the log-likelihood of an annotator with many items is far below -700, where
probabilities underflow. N annotators, T types, J items.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp

SMALLEST_PRIOR = 1e-12  # a type that is empty now can still win an annotator back
SURE = 0.99  # a posterior above this is certain for all purposes


class EStep(NamedTuple):
    """`posterior` (N,T), the next `prior` (T,), `log_likelihood` (N,T), `per_annotator` (N,) of the mixture."""

    posterior: np.ndarray
    prior: np.ndarray
    log_likelihood: np.ndarray
    per_annotator: np.ndarray

    @property
    def observed(self) -> float:
        return float(self.per_annotator.sum())


def annotator_log_likelihood(item_logps: np.ndarray, owner: np.ndarray, annotators: int) -> np.ndarray:
    """Sums the items of each annotator: (J,T) log-likelihoods, (J,) owners -> (N,T); 0 for one without items."""
    total = np.zeros((annotators, item_logps.shape[1]))
    np.add.at(total, owner, np.asarray(item_logps, dtype=np.float64))
    return total


def clamp_log_prior(prior: np.ndarray) -> np.ndarray:
    """Logarithm of mixture weights of any shape, those below 1e-12 taken for 1e-12."""
    return np.log(np.maximum(np.asarray(prior, dtype=np.float64), SMALLEST_PRIOR))


def posterior(log_likelihood: np.ndarray, log_prior: np.ndarray) -> np.ndarray:
    """Probability of each type for each annotator: softmax(log_prior + log_likelihood).

    Args:
        log_likelihood: (N,T) of all items of an annotator under each type's policy.
        log_prior: (T,) of the mixture weights, or (N,T) if something is known of each annotator.

    Returns:
        (N,T) rows that sum to 1. Equal likelihoods give the prior back.
    """
    joint = np.asarray(log_prior, dtype=np.float64) + np.asarray(log_likelihood, dtype=np.float64)
    shares = np.exp(joint - joint.max(1, keepdims=True))
    return shares / np.sort(shares, axis=1).sum(1, keepdims=True)  # sorted: the order of the types changes no bit


def observed_log_likelihood(log_likelihood: np.ndarray, log_prior: np.ndarray) -> np.ndarray:
    """(N,) log-likelihood of each annotator's items under the mixture, in nats. Arguments as in `posterior`."""
    joint = np.asarray(log_prior, dtype=np.float64) + np.asarray(log_likelihood, dtype=np.float64)
    return logsumexp(np.sort(joint, axis=1), axis=1)


def mixture_weights(posterior: np.ndarray) -> np.ndarray:
    """(N,T) -> (T,): the mean over annotators. Each counts once, however many items they have."""
    return np.asarray(posterior, dtype=np.float64).mean(0)


def e_step(item_logps: np.ndarray, owner: np.ndarray, prior: np.ndarray, annotators: int) -> EStep:
    """From the log-likelihood (J,T) of every item to the posterior and the next prior.

    `prior` (T,) is the one of the M-step before, the mean of the posterior that was trained on; (N,T) if something is
    known of each annotator.
    """
    likelihood = annotator_log_likelihood(item_logps, owner, annotators)
    log_prior = clamp_log_prior(prior)
    after = posterior(likelihood, log_prior)
    return EStep(after, mixture_weights(after), likelihood, observed_log_likelihood(likelihood, log_prior))


def match_types(posterior: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Share of annotators typed right under the best naming of the types, and that naming.

    Args:
        posterior: (N,T).
        labels: (N,) true groups, from 0.

    Returns:
        accuracy, and `group_of_type` (T,), -1 for a type that no group is left for.
    """
    groups, types = int(labels.max()) + 1, posterior.shape[1]
    counts = np.zeros((types, groups))
    np.add.at(counts, (posterior.argmax(1), labels), 1)
    rows, columns = linear_sum_assignment(-counts)
    names = np.full(types, -1)
    names[rows] = columns
    return float(counts[rows, columns].sum() / len(labels)), names
