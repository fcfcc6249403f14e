"""The M-step of one type: an ordinary training run on rows that are weighted by the posterior of their annotators."""

import numpy as np
from datasets import Dataset
from torch import Tensor

from ..base import PreferenceTrainer
from ..likelihood import ordered_stages, ranking_logps
from .config import EMDPOConfig

POSTERIOR, REFERENCE = "posterior", "ref_logps"  # columns of the rows of an M-step
NEGLIGIBLE = 1e-6  # a row of less weight than this share of the largest one is left out where weights are normalised


class TypePolicyTrainer(PreferenceTrainer):
    """The M-step of one type: minus the log-likelihood of rankings, each row times the posterior of its annotator.

    Rows carry the reference's log-probabilities (`ref_logps`), so that no reference is needed here.
    """

    config_class = EMDPOConfig
    args: EMDPOConfig
    method = "EM-DPO"
    paper = (
        "Direct Preference Optimization With Unobserved Preference Heterogeneity: "
        "The Necessity of Ternary Preferences",
        "2405.15065",
    )
    needs_reference = False
    columns = (POSTERIOR, REFERENCE)

    def loss(self, batch, policy, reference):
        rewards = self.args.beta * (policy.logps.sum(-1) - batch[REFERENCE])
        losses = -ranking_logps(rewards, batch["scores"], batch["mask"], top=self.args.top_q)
        # Here a factor on the loss, and no weight: the base divides by the sum of the weights.
        losses = losses * batch[POSTERIOR] if POSTERIOR in batch else losses
        return losses, self.ranking_metrics(batch, rewards.detach())

    def preferred(self, batch) -> Tensor:
        """A type imitates what its own annotators prefer: the posterior weighs this term as it does the loss."""
        best = super().preferred(batch)
        return best * batch[POSTERIOR].unsqueeze(-1) if POSTERIOR in batch else best

    def run_settings(self) -> dict:
        """EM compares the settings of the whole run, whose `rounds` may be others when an M-step goes on."""
        return {}

    def signal(self, batch) -> Tensor:
        return ordered_stages(batch["scores"], batch["mask"], self.args.top_q).any(-1)


def m_step_rows(
    rows: Dataset, gamma: np.ndarray, weights: np.ndarray, reference: list[list[float]], normalize: str
) -> Dataset:
    """The rows of an M-step with the columns that `TypePolicyTrainer` reads.

    Args:
        rows: tokenised rows (J).
        gamma: (J,) posterior of the type for the annotator of each row; NaN for rows that take no part.
        weights: (J,) of the rows themselves.
        reference: K reference log-probabilities per row.
        normalize: "batch": the posterior becomes a factor on the loss, and the mean is over the rows. "posterior": it
            joins the column `weight`, which the mean divides by, and rows that weigh nothing are left out. If all
            weigh nothing, they stay with a posterior of 0, and the policy stays where it starts.
    """
    kept, total = ~np.isnan(gamma), np.nan_to_num(gamma) * weights
    columns, largest = {REFERENCE: reference}, total.max(initial=0)
    if not largest:
        kept[:] = True
    if normalize == "batch" or not largest:
        columns[POSTERIOR] = np.nan_to_num(gamma).tolist()
    else:
        kept &= total > NEGLIGIBLE * largest
        columns["weight"] = (total / largest).tolist()
    rows = rows.remove_columns([name for name in {POSTERIOR, *columns} if name in rows.column_names])
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows if kept.all() else rows.select(np.flatnonzero(kept))
