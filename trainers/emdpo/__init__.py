"""EM-DPO: latent types of annotators by EM, a policy for each, and one fair policy by min-max regret."""

from ..likelihood import ranking_logps
from .annotators import Annotators, usable
from .config import EMDPOConfig
from .game import min_max_regret
from .m_step import TypePolicyTrainer, m_step_rows
from .mixture import mixture_weights, observed_log_likelihood, posterior
from .serve import MixturePolicy
from .trainer import EMDPOTrainer

__all__ = [
    "Annotators",
    "EMDPOConfig",
    "EMDPOTrainer",
    "MixturePolicy",
    "TypePolicyTrainer",
    "m_step_rows",
    "min_max_regret",
    "mixture_weights",
    "observed_log_likelihood",
    "posterior",
    "ranking_logps",
    "usable",
]
