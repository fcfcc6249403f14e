"""PolyPO: preference optimisation on lists of scored responses, as subclasses of `transformers.Trainer`."""

from .base import PreferenceTrainer
from .config import PreferenceConfig
from .data import PreferenceCollator, load_preferences
from .dpo import DPOConfig, DPOTrainer, dpo_loss
from .emdpo import EMDPOConfig, EMDPOTrainer, MixturePolicy, min_max_regret, posterior, ranking_logps
from .forward.run import Forward
from .infonca import InfoNCAConfig, InfoNCATrainer, NCAConfig, NCATrainer, infonca_loss, nca_loss
from .lire import LIREConfig, LIRETrainer, lire_loss
from .plackett_luce import PlackettLuceConfig, PlackettLuceTrainer, plackett_luce_loss
from .rrhf import RRHFConfig, RRHFTrainer, rrhf_loss
from .sgpo import SGPOConfig, SGPOTrainer, sgpo_loss
from .sparsepo import SparsePOConfig, SparsePOTrainer, sparsepo_loss, tdpo2_loss
from .swepo import SWEPOConfig, SWEPOTrainer, swepo_loss

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "EMDPOConfig",
    "EMDPOTrainer",
    "Forward",
    "InfoNCAConfig",
    "InfoNCATrainer",
    "LIREConfig",
    "LIRETrainer",
    "MixturePolicy",
    "NCAConfig",
    "NCATrainer",
    "PlackettLuceConfig",
    "PlackettLuceTrainer",
    "PreferenceCollator",
    "PreferenceConfig",
    "PreferenceTrainer",
    "RRHFConfig",
    "RRHFTrainer",
    "SGPOConfig",
    "SGPOTrainer",
    "SWEPOConfig",
    "SWEPOTrainer",
    "SparsePOConfig",
    "SparsePOTrainer",
    "dpo_loss",
    "infonca_loss",
    "lire_loss",
    "load_preferences",
    "min_max_regret",
    "nca_loss",
    "plackett_luce_loss",
    "posterior",
    "ranking_logps",
    "rrhf_loss",
    "sgpo_loss",
    "sparsepo_loss",
    "swepo_loss",
    "tdpo2_loss",
]
