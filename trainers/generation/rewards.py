"""Reward functions that need no network. Signature as in TRL: `(prompts, completions, **columns) -> list[float]`."""

import re
from functools import cache


def as_completion(prompt: str | list[dict], text: str) -> str | list[dict]:
    """A response to a prompt: text to text, an assistant's message to messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def completion_text(completion: str | list[dict]) -> str:
    """The text of a completion: itself, or the contents of its messages joined by newlines."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] for message in completion)


def rouge_l(prompts, completions, *, reference, **columns) -> list[float]:
    """ROUGE-L F1 of each completion against the text in the column `reference`, 0 to 1, over lower-case words.

    The longest common subsequence of words: it rewards saying what the reference says, in its order and length.
    """
    return [_rouge_l(completion_text(c), r) for c, r in zip(completions, reference, strict=True)]


def _rouge_l(text: str, reference: str) -> float:
    a, b = (re.findall(r"\w+", t.lower()) for t in (text, reference))
    row = [0] * (len(b) + 1)  # row[j]: longest common subsequence of the words so far and the first j of b
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b)) if a and b else 0.0


def vader_sentiment(prompts, completions, **columns) -> list[float]:
    """Sentiment of each completion by VADER, from -1 (negative) over 0 (neutral) to 1 (positive).

    Scores words and punctuation, not truth or relevance: optimising it hard makes text gushing.

    Raises:
        ImportError: vaderSentiment is not installed.
    """
    return [_vader().polarity_scores(completion_text(completion))["compound"] for completion in completions]


@cache
def _vader():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("vader_sentiment needs vaderSentiment: pip install polypo[demo]") from error
    return SentimentIntensityAnalyzer()
