"""The options of SparsePO."""

import math
from dataclasses import dataclass, field

from ..config import Demands, PreferenceConfig
from .learned import STARTS

MASKS = ("learned", "activations", "ones", "random")
KL_TERMS = ("masked", "none", "tdpo2")
RANKINGS = ("best_worst", "plackett_luce")


@dataclass
class SparsePOConfig(PreferenceConfig):
    """Options of SparsePO; the fields of `PreferenceConfig` and `transformers.TrainingArguments` apply as well."""

    learning_rate: float = field(default=5e-7, metadata={"help": "Peak learning rate (1e-5 is a start for LoRA)."})
    beta: float = field(
        default=0.1, metadata={"help": "Strength of the pull towards the reference; mask values multiply it."}
    )
    mask: str = field(
        default="learned",
        metadata={
            "help": "Token weights: learned from the reference's hidden states, from its activations (MaPO), all one "
            "(TDPO1; with kl_term none DPO), or random.",
            "choices": list(MASKS),
        },
    )
    independent: bool = field(
        default=False, metadata={"help": "Two masks, one for rewards and one for the KL, instead of a common one."}
    )
    mask_reward: bool = field(default=True, metadata={"help": "Apply the mask to rewards; false: weight 1."})
    mask_kl: bool = field(default=True, metadata={"help": "Apply the mask to the KL; false: weight 1."})
    kl_term: str = field(
        default="masked",
        metadata={
            "help": "KL per token: weighted by its mask, left out, or TDPO2's (mask ones: times tdpo2_alpha, and no "
            "gradient through that of the better response).",
            "choices": list(KL_TERMS),
        },
    )
    tdpo2_alpha: float = field(default=0.5, metadata={"help": "TDPO2's weight of the KL."})
    reward_l1: float = field(default=0.0, metadata={"help": "L1 penalty per token on the reward mask (1e-3 for HH)."})
    kl_l1: float = field(
        default=0.0,
        metadata={"help": "L1 penalty per token on the KL mask. A common mask pays half of both penalties."},
    )
    ranking: str = field(
        default="best_worst",
        metadata={
            "help": "With more than two responses: the best against the worst, or the likelihood of the ranking.",
            "choices": list(RANKINGS),
        },
    )
    mask_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the mask head; by default that of the policy."}
    )
    mask_weight_decay: float = field(
        default=0.01, metadata={"help": "Weight decay of the mask head, biases and LayerNorm apart."}
    )
    mask_init: str = field(
        default="released",
        metadata={
            "help": "Start of the mask head: as released, with masks near 0.02 or dead, or dense, near 0.6.",
            "choices": list(STARTS),
        },
    )
    mask_init_std: float = field(
        default=0.02, metadata={"help": "Standard deviation of the head's start; mask values grow with its square."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_loss_options(self.beta, self.reward_l1, self.kl_l1, self.ranking, self.tdpo2_alpha)
        for name, allowed in (("mask", MASKS), ("kl_term", KL_TERMS), ("mask_init", STARTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}.")
        if not (0 < self.mask_init_std < math.inf and 0 <= self.mask_weight_decay < math.inf):
            raise ValueError("mask_init_std must be positive and mask_weight_decay 0 or more, both finite.")
        if self.mask_learning_rate is not None and not 0 <= self.mask_learning_rate < math.inf:
            raise ValueError(f"mask_learning_rate={self.mask_learning_rate!r} must be finite and 0 or more.")
        self._check_combination()

    @property
    def masked(self) -> tuple[str, ...]:
        """Which of "reward" and "kl" have a mask that is not constant."""
        if self.mask == "ones":
            return ()
        return tuple(
            name
            for name, on in (("reward", self.mask_reward), ("kl", self.mask_kl and self.kl_term == "masked"))
            if on
        )

    @property
    def head_names(self) -> list[str]:
        """Names of the learned mask heads: "common", or those of `masked`."""
        if self.mask != "learned":
            return []
        return list(self.masked) if self.independent else ["common"]

    @property
    def mask_settings(self) -> dict:
        """What the mask heads are for; a run can only go on with heads of the same purpose."""
        return {"names": self.head_names, "masked": list(self.masked), "kl_term": self.kl_term}

    @property
    def needs_states(self) -> bool:
        """Whether the loss needs more of the reference than log-probabilities."""
        return self.mask in ("learned", "activations") or self.kl_term != "none"

    @property
    def penalties(self) -> dict[str, float]:
        """L1 coefficients for the loss: a mask that serves both terms is counted twice there, and pays half each."""
        shared = len(self.masked) == 2 and not self.independent
        return {"reward_l1": self.reward_l1 / (1 + shared), "kl_l1": self.kl_l1 / (1 + shared)}

    @property
    def demands(self) -> Demands:
        return Demands(kl=self.kl_term != "none", mask_heads=len(self.head_names))

    def _check_combination(self) -> None:
        """Raises ValueError for options that would have no effect together."""
        if self.mask != "ones" and not self.masked:
            raise ValueError("mask_reward and mask_kl leave no use for a mask: set mask to ones.")
        if self.independent and (self.mask not in ("learned", "random") or len(self.masked) < 2):
            raise ValueError(
                "independent has no effect: it needs mask learned or random, and a mask on both rewards and KL."
            )
        for name, mask in (("reward_l1", "reward"), ("kl_l1", "kl")):
            if getattr(self, name) and not (self.mask == "learned" and mask in self.masked):
                raise ValueError(f"{name} has no effect: the {mask} mask is not learned. Set it to 0.")
        if self.mask_learning_rate is not None and self.mask != "learned":
            raise ValueError("mask_learning_rate has no effect: the masks are not learned. Leave it out.")
        if self.kl_term != "tdpo2" and self.tdpo2_alpha != type(self).tdpo2_alpha:
            raise ValueError("tdpo2_alpha has no effect: it needs kl_term tdpo2. Leave it out.")
        if self.kl_term == "tdpo2" and (self.mask != "ones" or self.ranking != "best_worst"):
            raise ValueError("kl_term='tdpo2' needs mask ones and ranking best_worst.")
        if self.precompute_ref_logps and self.needs_states:
            raise ValueError(
                "precompute_ref_logps keeps log-probabilities only, but this mask or KL needs the reference's hidden "
                "states: set it to false. (It works with mask ones or random and kl_term none.)"
            )


def check_loss_options(beta, reward_l1, kl_l1, ranking, alpha) -> None:
    """Raises ValueError for an option of the loss outside its range."""
    if not 0 < beta < math.inf:
        raise ValueError(f"beta={beta!r} must be finite and positive.")
    for name, value in (("reward_l1", reward_l1), ("kl_l1", kl_l1), ("tdpo2_alpha", alpha)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r} must be finite and 0 or more.")
    if ranking not in RANKINGS:
        raise ValueError(f"ranking={ranking!r} is unknown: choose one of {', '.join(RANKINGS)}.")
