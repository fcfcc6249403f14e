"""The options of EM-DPO."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

from ..config import Demands, PreferenceConfig
from .init import STARTS

CHOICES = {
    "init": ("auto", *STARTS),
    "start_from": ("reference", "previous"),
    "score_on": ("train", "heldout_half"),
    "normalize": ("batch", "posterior"),
}


@dataclass
class EMDPOConfig(PreferenceConfig):
    """Options of EM-DPO. Those of the training (`num_train_epochs`, `learning_rate`, ...) are of each M-step.

    The reference is always scored once and kept in `output_dir`, so `precompute_ref_logps` changes nothing.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate (1e-5 is a start for LoRA)."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the rows in each M-step."})
    beta: float = field(default=0.1, metadata={"help": "Strength of the pull towards the reference policy."})
    top_q: int | None = field(
        default=None,
        metadata={"help": "Count only the first so many stages of a ranking: 1 is the best of K. Default: all."},
    )
    num_types: int = field(default=2, metadata={"help": "Types of annotators, and so policies."})
    rounds: int = field(default=5, metadata={"help": "M-steps and E-steps, at most; one type needs one round only."})
    init: str = field(
        default="auto",
        metadata={
            "help": "First guess of the types: initial_posterior (given), clusters of annotators who agree on shared "
            "items (agreement) or who prefer like tokens and lengths (kmeans), or random (dirichlet). auto takes the "
            "first of given, agreement and dirichlet that the data allow.",
            "choices": list(CHOICES["init"]),
        },
    )
    initial_posterior: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "{annotator: probabilities of the types}, or a CSV or parquet file with annotator, type_0, ..."
        },
    )
    start_from: str = field(
        default="reference",
        metadata={
            "help": "Each M-step starts from the reference or from the type's policy of the round before; the "
            "optimiser is new in either case.",
            "choices": list(CHOICES["start_from"]),
        },
    )
    score_on: str = field(
        default="train",
        metadata={
            "help": "train: the E-step scores the rows that were trained on. heldout_half: policies train on one half "
            "of each annotator's rows and score the other; the halves swap every round, and each row counts as it was "
            "scored when it was last held out; at the end each type trains once more, on all rows. Use it when the "
            "first E-step is sure of everything.",
            "choices": list(CHOICES["score_on"]),
        },
    )
    normalize: str = field(
        default="batch",
        metadata={
            "help": "Divide a batch's sum of posterior-weighted losses by its number of rows (batch), or by the sum "
            "of the posteriors, which gives small types larger steps (posterior).",
            "choices": list(CHOICES["normalize"]),
        },
    )
    restarts: int = field(
        default=1, metadata={"help": "Runs from other first guesses; the highest observed log-likelihood is kept."}
    )
    stop_change: float = field(
        default=0.0,
        metadata={
            "help": "Stop when a round changes the observed log-likelihood per annotator by less than this (1e-4 is "
            "a start); 0 runs all rounds."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.initial_posterior, str) and self.initial_posterior.lstrip().startswith("{"):
            self.initial_posterior = json.loads(self.initial_posterior)
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta!r} must be finite and positive.")
        for name in ("num_types", "rounds", "restarts", *(["top_q"] if self.top_q is not None else [])):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(choices)}.")
        if not 0 <= self.stop_change < math.inf:
            raise ValueError(f"stop_change={self.stop_change!r} must be 0 or positive.")
        if (self.init == "given") != (self.initial_posterior is not None) and self.init != "auto":
            raise ValueError("init='given' and initial_posterior belong together: set both, or leave init at 'auto'.")
        if self.restarts > 1 and self.initial_posterior is not None:
            raise ValueError("restarts > 1 would begin with the same initial_posterior each time: set it to 1.")
        if (self.start_from, self.score_on) == ("previous", "heldout_half"):
            raise ValueError(
                "start_from='previous' starts from a policy that was trained on the half that score_on='heldout_half' "
                "holds out next: set start_from to 'reference', or score_on to 'train'."
            )
        for name in ("load_best_model_at_end", "push_to_hub", "self_enhance"):
            if getattr(self, name):
                raise ValueError(f"{name} does not work with EM-DPO, which has several policies: leave it out.")

    @property
    def demands(self) -> Demands:
        """One type needs one round. All rows are scored by the reference and, in each round, by each type's policy."""
        m_steps = self.restarts * self.num_types * (self.rounds if self.num_types > 1 else 1)
        if self.score_on == "heldout_half":  # and once more on all rows
            return Demands(trainings=0.5 * m_steps + self.num_types, scorings=1 + m_steps + self.num_types)
        return Demands(trainings=m_steps, scorings=1 + m_steps)
