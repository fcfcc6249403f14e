"""Token masks from a reference model: learned from its hidden states, or taken from its activations."""

from .activations import activation_mask, find_sites
from .learned import MaskHead, MaskHeads
from .readings import ReadPolicy, ReadReference
from .statistics import mask_statistics

__all__ = ["MaskHead", "MaskHeads", "ReadPolicy", "ReadReference", "activation_mask", "find_sites", "mask_statistics"]
