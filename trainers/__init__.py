"""PolyPO: preference optimisation on lists of scored responses, as subclasses of `transformers.Trainer`."""

from .base import PreferenceTrainer
from .config import PreferenceConfig
from .data import PreferenceCollator, load_preferences
from .forward.run import Forward
from .swepo import SWEPOConfig, SWEPOTrainer, swepo_loss

__all__ = [
    "Forward",
    "PreferenceCollator",
    "PreferenceConfig",
    "PreferenceTrainer",
    "SWEPOConfig",
    "SWEPOTrainer",
    "load_preferences",
    "swepo_loss",
]
