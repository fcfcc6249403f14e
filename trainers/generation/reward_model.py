"""A reward model that scores here: a sequence-classification model of one output, and the text as it reads it."""

import logging
from functools import cache

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PretrainedConfig

from ..forward.policy import SAFE, context_length

logger = logging.getLogger(__name__)


class RewardText:
    """Token ids of a prompt and its response, as the chat template of a reward model writes them.

    A tokenizer with a chat template gets user and assistant messages, also from plain text; one without gets prompt
    and completion as one text. Texts beyond the model's context lose their beginning, with one warning.

    Args:
        name: folder or hub id of the reward model.
        config: the model's.

    Raises:
        ValueError: the model has several outputs.
    """

    def __init__(self, name: str, config: PretrainedConfig):
        if config.num_labels != 1:
            raise ValueError(
                f"Reward model {name} has {config.num_labels} outputs, but a score is one number: use a model "
                "trained with num_labels=1."
            )
        self.name = name
        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        self.pad: int | None = config.get_text_config().pad_token_id
        self.limit = context_length(config)

    def encode(self, prompt: str | list[dict], completion: str | list[dict]) -> list[int]:
        if self.tokenizer.chat_template is None and isinstance(prompt, str) and isinstance(completion, str):
            ids = self.tokenizer(prompt + completion)["input_ids"]
        else:
            chat = _as_messages(prompt, "user") + _as_messages(completion, "assistant")
            ids = self.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        if self.limit is not None and len(ids) > self.limit:
            _warn_of_a_cut(self.name, self.limit)
        return list(ids if self.limit is None else ids[-self.limit :])


class RewardModelScorer:
    """Scores with a sequence-classification model of one output, on the text that `RewardText` writes."""

    def __init__(self, name: str, *, batch_size: int = 8, dtype=None, device: torch.device | str | None = None):
        self.batch_size = batch_size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype or "auto", **SAFE)
        self.text = RewardText(name, model.config)
        self.model = model.to(self.device).eval()
        self.text_config = model.config.get_text_config()

    @torch.no_grad()
    def __call__(self, prompts, completions, **columns) -> list[float]:
        rows = [self.text.encode(*pair) for pair in zip(prompts, completions, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        scores = torch.empty(len(rows))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            scores[batch] = self._forward([rows[i] for i in batch])
        return scores.tolist()

    def _forward(self, rows: list[list[int]]) -> Tensor:
        """(B,) float32 scores of token rows."""
        # Such a model reads its score at the last id that is not the pad id. Where none is configured, training
        # read the very last token; an id that occurs in no row keeps it so.
        used = {token for row in rows for token in row}
        pad = self.text.pad if self.text.pad is not None else next(i for i in range(len(used) + 1) if i not in used)
        self.text_config.pad_token_id = pad
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.device)
        attention = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        return self.model(input_ids=ids, attention_mask=attention).logits[:, 0].float().cpu()


@cache
def _warn_of_a_cut(name: str, limit: int) -> None:
    logger.warning("%s: texts over %d tokens lose their beginning.", name, limit)


def _as_messages(text: str | list[dict], role: str) -> list[dict]:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)
