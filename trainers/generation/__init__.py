"""Sampling responses from a policy and scoring them."""

from .backends import Backend, HuggingFace, Request
from .collect import collect_samples, collect_scores, sample_responses, summarize
from .rewards import vader_sentiment
from .sampler import GumbelSampler, Sample, SamplingConfig
from .scorer import load_scorer

__all__ = [
    "Backend", "GumbelSampler", "HuggingFace", "Request", "Sample", "SamplingConfig", "collect_samples",
    "collect_scores", "load_scorer", "sample_responses", "summarize", "vader_sentiment",
]  # fmt: skip
