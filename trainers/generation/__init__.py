"""Sampling responses from a policy and scoring them."""

from .collect import collect_samples, collect_scores, open_folder, summarize
from .rewards import vader_sentiment
from .sampler import GumbelSampler, Sample, SamplingConfig, sample_responses
from .scorer import load_scorer

__all__ = [
    "GumbelSampler",
    "Sample",
    "SamplingConfig",
    "collect_samples",
    "collect_scores",
    "load_scorer",
    "open_folder",
    "sample_responses",
    "summarize",
    "vader_sentiment",
]
