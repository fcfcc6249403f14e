"""Reward functions that need no network. Signature as in TRL: `(prompts, completions, **columns) -> list[float]`."""

from functools import cache


def completion_text(completion: str | list[dict]) -> str:
    """The text of a completion: itself, or the contents of its messages joined by newlines."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] for message in completion)


def vader_sentiment(prompts, completions, **columns) -> list[float]:
    """Sentiment of each completion by VADER, from -1 (negative) over 0 (neutral) to 1 (positive).

    Scores words and punctuation, not truth or relevance: optimising it hard makes text gushing.

    Raises:
        ImportError: vaderSentiment is not installed.
    """
    analyzer = _vader()
    return [analyzer.polarity_scores(completion_text(completion))["compound"] for completion in completions]


@cache
def _vader():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("vader_sentiment needs vaderSentiment: pip install polypo[demo]") from error
    return SentimentIntensityAnalyzer()
