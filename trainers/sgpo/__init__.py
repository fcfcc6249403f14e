"""SGPO: a model learns to improve its own answers, and then to prefer the improved ones (DPO)."""

from .config import SGPOConfig
from .filters import filter_statistic, iqr_keep
from .text import improver_prompt, reviser_prompt
from .trainer import SGPOTrainer, sgpo_loss

__all__ = [
    "SGPOConfig", "SGPOTrainer", "filter_statistic", "improver_prompt", "iqr_keep", "reviser_prompt", "sgpo_loss",
]  # fmt: skip
