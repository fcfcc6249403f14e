"""Scorers on a server: their keys, their cache, and what they count.

What a server said of a text is kept on disk, in one file per process that only grows, so that a run that was killed,
or another one, does not pay for it again. The key of a server comes from the environment and is written nowhere.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from huggingface_hub.constants import HF_HOME

from ..config import check_options, option
from ..data.json_rows import digest
from ..runs.files import append_records, read_journal
from .server import KEY_VARIABLE, Server, in_flight

Counts = dict[str, float]  # what a server was asked, by the name that it has in statistics


@dataclass(kw_only=True)
class ServedScorer(ABC):
    """A scorer `(prompts, completions, **columns) -> list[float]` that asks a server what its cache does not know.

    These are the keys that a judge and a reward model have in common. All but `model` change no score.
    """

    model: str = option(MISSING, "Name of the model.")
    concurrency: int = option(16, "Requests under way at once, in each process.", at_least=1)
    timeout: float = option(600.0, "Seconds to wait for an answer; what takes longer is asked again.", above=0)
    key_variable: str = option(KEY_VARIABLE, "Environment variable that holds the key.")
    cache: str | None = option(None, "Folder of known scores; by default polypo/scores in the Hugging Face home.")
    prices: Sequence[float] | None = option(None, "Per million tokens of questions, and of answers.")

    unscored = math.nan  # a class attribute: the score of a response that gets none

    def __post_init__(self):
        check_options(self)
        if self.key_variable != KEY_VARIABLE and self.key_variable not in os.environ:  # it may be the key: not shown
            raise ValueError("key_variable must name a variable that is set in the environment and holds the key.")
        if self.prices is not None and (len(self.prices) != 2 or not all(0 <= p < math.inf for p in self.prices)):
            raise ValueError(f"prices={self.prices}: give two, per million tokens of questions and of answers.")
        address = urlsplit(self.url)
        if "@" in address.netloc or address.query:  # may be secret: not shown
            raise ValueError("leave user, password and query out of the address: a key comes from the environment.")
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"{self.url!r} is no address of a server, such as http://localhost:8000/v1.")

    @property
    @abstractmethod
    def url(self) -> str: ...

    @property
    @abstractmethod
    def cached_for(self) -> dict:
        """What a score depends on, beside the text that is sent."""

    @property
    def compared(self) -> dict:
        """What the scores of a run depend on, for its settings."""
        return self.cached_for

    @property
    def columns(self) -> set[str]:
        """Of the rows, that are read beside prompt and response."""
        return set()

    @abstractmethod
    def encode(self, prompt, completion, columns: dict) -> Any:
        """What is sent of a response."""

    @abstractmethod
    def ask(self, texts: list) -> tuple[list[float | None], Counts]:
        """A finite score for each text, None where the server gives none, and what that took."""

    def forecast(self, responses: int, tokens: int, batch_size: int) -> str:
        """What will be asked for so many responses which, with their prompts, have so many tokens."""
        return self._forecast(f"{math.ceil(responses / batch_size):,} calls", tokens)

    def _forecast(self, calls: str, tokens: int, answers: int = 0) -> str:
        told = f"{self.model} at {self.url}: {calls}, about {tokens:,} tokens"
        told += f", answers of at most {answers:,}" if answers else ""
        return told + (f", for {self._cost(tokens, answers):,.2f}" if self.prices is not None else "")

    def connect(self, batch_size: int, counts: Counts) -> "ServedScorer":
        """Reads the cache, before the first call.

        Args:
            batch_size: texts per request.
            counts: what is asked is added here.
        """
        self.batch_size, self.counts = batch_size, counts
        self.server = Server(self.url, timeout=self.timeout, key=self.key_variable)
        folder = Path(self.cache or Path(HF_HOME) / "polypo" / "scores") / digest(self.cached_for)[:32]
        records = (record for path in folder.glob("*.jsonl") for record in read_journal(path))
        self.known = {record["key"]: record["score"] for record in records}
        self.file = folder / f"{uuid4().hex}.jsonl"  # of this process alone: a kill harms no more than its last line
        add_counts(counts, {"scorer_calls": 0})
        return self

    def __call__(self, prompts, completions, **columns) -> list[float]:
        """Raises ServerError; what was answered before is in the cache."""
        rows = [{name: values[i] for name, values in columns.items()} for i in range(len(completions))]
        texts = [self.encode(*parts) for parts in zip(prompts, completions, rows, strict=True)]
        keys = [digest(text) for text in texts]
        todo = [*{key: text for key, text in zip(keys, texts, strict=True) if key not in self.known}.items()]
        batches = [todo[start : start + self.batch_size] for start in range(0, len(todo), self.batch_size)]
        sent = [[text for _, text in batch] for batch in batches]
        repeated = self.server.repeated
        for portion in in_flight(self.ask, sent, self.concurrency):
            for at, (scores, counts) in portion.items():
                add_counts(self.counts, counts)
                answered = zip(batches[at], scores, strict=True)
                self._keep({key: score for (key, _), score in answered if score is not None})
        add_counts(self.counts, {"scorer_repeated": self.server.repeated - repeated})
        add_counts(self.counts, {"scorer_answers_known": len(keys) - len(todo)})
        return [self.known.get(key, self.unscored) for key in keys]

    def _keep(self, scores: dict[str, float]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        append_records(self.file, ({"key": key, "score": score} for key, score in scores.items()))
        self.known |= scores

    def used(self, answer: dict) -> Counts:
        """One call and its tokens."""
        usage = answer.get("usage") or {}
        tokens = [usage.get(f"{name}_tokens") or 0 for name in ("prompt", "completion")]
        cost = {} if self.prices is None else {"scorer_cost": self._cost(*tokens)}
        names = ("scorer_prompt_tokens", "scorer_completion_tokens")
        return {"scorer_calls": 1, **dict(zip(names, tokens, strict=True)), **cost}

    def _cost(self, questions: float, answers: float) -> float:
        first, second = self.prices or (0.0, 0.0)
        return (questions * first + answers * second) / 1e6


def add_counts(counts: Counts, more: Counts) -> None:
    for name, value in more.items():
        counts[name] = round(counts.get(name, 0) + value, 9)  # of a cost
