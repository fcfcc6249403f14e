"""A reward model that vLLM serves."""

import math
from dataclasses import MISSING, dataclass

from transformers import AutoConfig

from ..config import option
from ..runs.settings import model_fingerprint
from .reward_model import RewardText
from .served import Counts, ServedOptions, ServedScorer
from .server import ServerError


@dataclass(frozen=True, kw_only=True)
class RewardServerOptions(ServedOptions):
    """The keys of a reward model on a server."""

    model: str = option(MISSING, "Folder or hub id of the reward model, whose tokenizer is read here.")
    reward_server: str = option(MISSING, "Address of a vLLM server of a model with one output.")
    served_model_name: str | None = option(None, "Name under which it is served, where that is another one.")

    @property
    def url(self) -> str:
        return self.reward_server

    @property
    def cached_for(self) -> dict:
        return {"reward_server": model_fingerprint(self.model) or self.model}

    def scorer(self, batch_size: int, counts: Counts) -> "RewardServer":
        return RewardServer(self, batch_size, counts)


class RewardServer(ServedScorer):
    """Asks `vllm serve` of a model with one output for its raw scores, as `RewardModelScorer` gives them."""

    def __init__(self, options: RewardServerOptions, batch_size: int, counts: Counts):
        super().__init__(options, batch_size, counts)
        self.text = RewardText(options.model, AutoConfig.from_pretrained(options.model, trust_remote_code=False))
        self.name = options.served_model_name or options.model

    def encode(self, prompt, completion, columns: dict) -> list[int]:
        ids = self.text.encode(prompt, completion)
        while len(ids) > 1 and ids[-1] == self.text.pad:  # the engine reads the score at the very last token
            ids.pop()
        return ids

    def ask(self, texts: list[list[int]]) -> tuple[list[float | None], Counts]:
        # Without an activation the "probability" of the one class is the model's output itself.
        answer = self.server.ask("/classify", {"model": self.name, "input": texts, "use_activation": False})
        try:
            data = sorted(answer["data"], key=lambda item: item["index"])
            scores = [float(score) for item in data for score in item["probs"]]
            whole = len(data) == len(scores) == len(texts) and all(map(math.isfinite, scores))
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise ServerError(f"{self.served.url} gave other than a score for {len(texts)} texts: {answer!s:.300}")
        return [*scores], self.used(answer)
