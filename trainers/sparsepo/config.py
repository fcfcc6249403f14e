"""The options of SparsePO."""

from dataclasses import dataclass

from ..config import Demands, PreferenceConfig, option


@dataclass
class SparsePOConfig(PreferenceConfig):
    """Options of SparsePO; the fields of `PreferenceConfig` and `transformers.TrainingArguments` apply as well.

    Raises:
        ValueError: an option outside its bounds, or one that has no effect beside the others.
    """

    learning_rate: float = option(5e-7, "Peak learning rate (1e-5 is a start for LoRA).")
    beta: float = option(0.1, "Strength of the pull towards the reference; mask values multiply it.", above=0)
    mask: str = option(
        "learned",
        "Token weights: learned from the reference's hidden states, from its activations (MaPO), all one (TDPO1; with "
        "kl_term none DPO), or random.",
        choices=["learned", "activations", "ones", "random"],
    )
    independent: bool = option(False, "Two masks, one for rewards and one for the KL, instead of a common one.")
    mask_reward: bool = option(True, "Apply the mask to rewards; false: weight 1.")
    mask_kl: bool = option(True, "Apply the mask to the KL; false: weight 1.")
    kl_term: str = option(
        "masked",
        "KL per token: weighted by its mask, left out, or TDPO2's (mask ones: times tdpo2_alpha, and no gradient "
        "through that of the better response).",
        choices=["masked", "none", "tdpo2"],
    )
    tdpo2_alpha: float = option(0.5, "TDPO2's weight of the KL.", at_least=0)
    reward_l1: float = option(0.0, "L1 penalty per token on the reward mask (1e-3 for HH).", at_least=0)
    kl_l1: float = option(
        0.0, "L1 penalty per token on the KL mask. A common mask pays half of both penalties.", at_least=0
    )
    ranking: str = option(
        "best_worst",
        "With more than two responses: the best against the worst, or the likelihood of the ranking.",
        choices=["best_worst", "plackett_luce"],
    )
    mask_learning_rate: float | None = option(
        None, "Learning rate of the mask head; by default that of the policy.", at_least=0
    )
    mask_weight_decay: float = option(0.01, "Weight decay of the mask head, biases and LayerNorm apart.", at_least=0)
    mask_init: str = option(
        "released",
        "Start of the mask head: as released, with masks near 0.02 or dead, or dense, near 0.6.",
        choices=["released", "dense"],
    )
    mask_init_std: float = option(
        0.02, "Standard deviation of the head's start; mask values grow with its square.", above=0
    )

    def __post_init__(self):
        super().__post_init__()
        learned = self.masked if self.mask == "learned" else ()
        # What would silently be another method than the options say.
        wrong = {
            "mask_reward and mask_kl leave no use for a mask: set mask to ones": self.mask != "ones"
            and not self.masked,
            "independent needs mask learned or random, and a mask on both rewards and KL": self.independent
            and (self.mask not in ("learned", "random") or len(self.masked) < 2),
            "reward_l1 has no effect: the reward mask is not learned": self.reward_l1 and "reward" not in learned,
            "kl_l1 has no effect: the kl mask is not learned": self.kl_l1 and "kl" not in learned,
            "mask_learning_rate has no effect: the masks are not learned": self.mask_learning_rate is not None
            and not learned,
            "tdpo2_alpha has no effect: it needs kl_term tdpo2": self.kl_term != "tdpo2"
            and self.tdpo2_alpha != type(self).tdpo2_alpha,
            "kl_term='tdpo2' needs mask ones and ranking best_worst": self.kl_term == "tdpo2"
            and (self.mask != "ones" or self.ranking != "best_worst"),
            "sync_ref_model does not reach what mask and KL keep of the reference from the start: set it to false (or "
            "mask to ones or random and kl_term to none)": self.sync_ref_model and self.needs_states,
            "precompute_ref_logps keeps log-probabilities only, but this mask or KL needs the reference's hidden "
            "states (mask ones or random with kl_term none does not)": self.precompute_ref_logps and self.needs_states,
        }
        for message, holds in wrong.items():
            if holds:
                raise ValueError(f"{message}.")

    @property
    def masked(self) -> tuple[str, ...]:
        """Which of "reward" and "kl" have a mask that is not constant."""
        on = {"reward": self.mask_reward, "kl": self.mask_kl and self.kl_term == "masked"}
        return tuple(name for name, used in on.items() if used and self.mask != "ones")

    @property
    def head_names(self) -> list[str]:
        """Names of the learned mask heads: "common", or those of `masked`."""
        if self.mask != "learned":
            return []
        return list(self.masked) if self.independent else ["common"]

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
