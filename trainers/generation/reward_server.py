"""A reward model that vLLM serves."""

import math
from dataclasses import MISSING, dataclass

from transformers import AutoConfig

from ..config import option
from ..runs.settings import model_fingerprint
from .reward_model import RewardText
from .served import Counts, ServedScorer
from .server import ServerError


@dataclass(kw_only=True)
class RewardServer(ServedScorer):
    """Asks `vllm serve` of a model with one output for its raw scores, as `RewardModelScorer` gives them."""

    model: str = option(MISSING, "Folder or hub id of the reward model, whose tokenizer is read here.")
    reward_server: str = option(MISSING, "Address of a vLLM server of a model with one output.")
    served_model_name: str | None = option(None, "Name under which it is served, where that is another one.")

    @property
    def url(self) -> str:
        return self.reward_server

    @property
    def cached_for(self) -> dict:
        return {"reward_server": model_fingerprint(self.model) or self.model}

    def connect(self, batch_size: int, counts: Counts) -> ServedScorer:
        self.text = RewardText(self.model, AutoConfig.from_pretrained(self.model, trust_remote_code=False))
        return super().connect(batch_size, counts)

    def encode(self, prompt, completion, columns: dict) -> list[int]:
        ids = self.text.encode(prompt, completion)
        while len(ids) > 1 and ids[-1] == self.text.pad:  # the engine reads the score at the very last token
            ids.pop()
        return ids

    def ask(self, texts: list[list[int]]) -> tuple[list[float | None], Counts]:
        # Without an activation the "probability" of the one class is the model's output itself.
        content = {"model": self.served_model_name or self.model, "input": texts, "use_activation": False}
        answer = self.server.ask("/classify", content)
        try:
            data = sorted(answer["data"], key=lambda item: item["index"])
            scores = [float(score) for item in data for score in item["probs"]]
            whole = len(data) == len(scores) == len(texts) and all(map(math.isfinite, scores))
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise ServerError(f"{self.url} gave other than a score for {len(texts)} texts: {answer!s:.300}")
        return [*scores], self.used(answer)
