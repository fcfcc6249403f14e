"""SparsePO: token masks on reward and KL, learned from a reference's hidden states or taken from its activations."""

from .activations import activation_mask, find_sites
from .config import SparsePOConfig
from .learned import MaskHead, MaskHeads
from .readings import ReadPolicy, ReadReference
from .trainer import SparsePOTrainer, mask_statistics, sparsepo_loss, tdpo2_loss

__all__ = [
    "MaskHead", "MaskHeads", "ReadPolicy", "ReadReference", "SparsePOConfig", "SparsePOTrainer", "activation_mask",
    "find_sites", "mask_statistics", "sparsepo_loss", "tdpo2_loss",
]  # fmt: skip
