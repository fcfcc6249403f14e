"""The options of EM-DPO."""

import json
from dataclasses import dataclass
from typing import Any

from ..config import Demands, PreferenceConfig, option


@dataclass
class EMDPOConfig(PreferenceConfig):
    """Options of EM-DPO. Those of the training (`num_train_epochs`, `learning_rate`, ...) are of each M-step.

    The reference is always scored once and kept in `output_dir`, so `precompute_ref_logps` changes nothing.
    """

    learning_rate: float = option(1e-6, "Peak learning rate (1e-5 is a start for LoRA).", at_least=0)
    num_train_epochs: float = option(1.0, "Passes over the rows in each M-step.")
    beta: float = option(0.1, "Strength of the pull towards the reference policy.", above=0)
    top_q: int | None = option(
        None, "Count only the first so many stages of a ranking: 1 is the best of K. Default: all.", at_least=1
    )
    num_types: int = option(2, "Types of annotators, and so policies.", at_least=1)
    rounds: int = option(5, "M-steps and E-steps, at most; one type needs one round only.", at_least=1)
    init: str = option(
        "auto",
        "First guess of the types: initial_posterior (given), clusters of annotators who agree on shared items "
        "(agreement) or who prefer like tokens and lengths (kmeans), or random (dirichlet). auto takes the first of "
        "given, agreement and dirichlet that the data allow.",
        choices=["auto", "given", "agreement", "kmeans", "dirichlet"],
    )
    initial_posterior: dict[str, Any] | str | None = option(
        None, "{annotator: probabilities of the types}, or a CSV or parquet file with annotator, type_0, ..."
    )
    start_from: str = option(
        "reference",
        "Each M-step starts from the reference or from the type's policy of the round before; the optimiser is new in "
        "either case.",
        choices=["reference", "previous"],
    )
    score_on: str = option(
        "train",
        "train: the E-step scores the rows that were trained on. heldout_half: policies train on one half of each "
        "annotator's rows and score the other; the halves swap every round, and each row counts as it was scored when "
        "it was last held out; at the end each type trains once more, on all rows. Use it when the first E-step is "
        "sure of everything.",
        choices=["train", "heldout_half"],
    )
    normalize: str = option(
        "batch",
        "Divide a batch's sum of posterior-weighted losses by its number of rows (batch), or by the sum of the "
        "posteriors, which gives small types larger steps (posterior).",
        choices=["batch", "posterior"],
    )
    restarts: int = option(
        1, "Runs from other first guesses; the highest observed log-likelihood is kept.", at_least=1
    )
    stop_change: float = option(
        0.0,
        "Stop when a round changes the observed log-likelihood per annotator by less than this (1e-4 is a start); 0 "
        "runs all rounds.",
        at_least=0,
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.initial_posterior, str) and self.initial_posterior.lstrip().startswith("{"):
            self.initial_posterior = json.loads(self.initial_posterior)
        if (self.init == "given") != (self.initial_posterior is not None) and self.init != "auto":
            raise ValueError("init='given' and initial_posterior belong together: set both, or leave init at 'auto'.")
        if (self.start_from, self.score_on) == ("previous", "heldout_half"):
            raise ValueError(
                "start_from='previous' starts from a policy that was trained on the half that score_on='heldout_half' "
                "holds out next: set start_from to 'reference', or score_on to 'train'."
            )
        refuse_checkpoint(self.resume_from_checkpoint)
        self.resume_from_checkpoint = None  # true asks for what is done anyhow
        for name in ("load_best_model_at_end", "push_to_hub", "self_enhance", "sync_ref_model"):
            if getattr(self, name):
                raise ValueError(f"{name} does not work with EM-DPO, which has several policies: leave it out.")

    @property
    def demands(self) -> Demands:
        """One type needs one round. All rows are scored by the reference and, in each round, by each type's policy."""
        m_steps = self.restarts * self.num_types * (self.rounds if self.num_types > 1 else 1)
        if self.score_on == "heldout_half":  # and once more on all rows
            return Demands(trainings=0.5 * m_steps + self.num_types, scorings=1 + m_steps)
        return Demands(trainings=m_steps, scorings=1 + m_steps)


def refuse_checkpoint(name: str | bool | None) -> None:
    """Raises ValueError for the name of a checkpoint, which EM would pass over; true and "last" name none."""
    if str(name).lower() not in ("none", "false", "", "true", "last"):
        raise ValueError(
            f"resume_from_checkpoint={name!r}: EM-DPO goes on from all that is done in output_dir, and from no single "
            "checkpoint: leave it out, or set it to true, and set output_dir to the folder of the run."
        )
