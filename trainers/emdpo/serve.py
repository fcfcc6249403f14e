"""A mixture of policies as one policy: a type is drawn per prompt and answers throughout."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedModel

from ..data import PreferenceCollator
from ..forward.policy import base_model, disable_dropout
from ..forward.run import Runner
from ..generation.start import load_start
from .tables import read_mixture

TYPE = "type"  # of the names of adapters: type-0, type-1, ...


def mixture_logps(logps: Tensor, weights: Tensor) -> Tensor:
    """Log-probability of a response under the mixture, (...,T) under each policy and (T,) weights -> (...).

    The mean of the responses' probabilities, not of the next tokens': a policy answers a prompt from start to end.
    """
    return torch.logsumexp(weights.to(logps).log() + logps, -1)


class MixturePolicy:
    """Serves the policies of an EM-DPO run.

    With adapters there is one base in memory; fully fine-tuned policies are all held, T times the memory of one.

    Args:
        models: the policies, or one PeftModel with an adapter "type-0", "type-1", ... for each. Their dropout is
            switched off.
        weights: (T,) probabilities of the policies.
        tokenizer: with a pad token.
        seed: of the draws of types.

    Raises:
        ValueError: `weights` are not one probability per policy.
    """

    def __init__(self, models: list[PreTrainedModel] | PeftModel, weights, tokenizer, *, seed: int = 0):
        self.models, self.tokenizer = models, tokenizer
        every: list = [models] if isinstance(models, PeftModel) else models
        count = len(models.peft_config if isinstance(models, PeftModel) else models)
        values = np.asarray(weights, dtype=np.float64)
        if values.shape != (count,) or not (values >= 0).all() or abs(values.sum() - 1) > 1e-6:
            raise ValueError(f"weights={values.tolist()} must be {count} probabilities that sum to 1, one per policy.")
        self.weights = torch.as_tensor(values)
        for model in every:
            disable_dropout(model)
        self._random = np.random.default_rng(seed)
        self._runner = Runner([base_model(model) for model in every], "auto")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, weights=None, device: str = "cpu", seed: int = 0,
                        **init_kwargs) -> "MixturePolicy":  # fmt: skip
        """Reads what a run (and the aggregation) left in `folder`.

        Args:
            weights: instead of those in mixture.json.
            init_kwargs: keywords of `from_pretrained`, over those the run was made with.

        Raises:
            ValueError: there is no mixture.json, or `weights` are not one probability per policy.
        """
        mixture = read_mixture(folder)
        kwargs = {**(mixture["model_init_kwargs"] or {}), **init_kwargs}
        paths = [Path(folder) / policy for policy in mixture["policies"]]
        starts = [None] if mixture["adapters"] else paths
        plain = (load_start(mixture["base"], start, init_kwargs=kwargs) for start in starts)
        models: Any = [model.to(device).eval() for model in plain]  # type: ignore[arg-type]
        if mixture["adapters"]:
            models = PeftModel.from_pretrained(models[0], str(paths[0]), adapter_name=f"{TYPE}-0")
            for k, path in enumerate(paths[1:], 1):
                models.load_adapter(str(path), adapter_name=f"{TYPE}-{k}")
            models.to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return cls(models, mixture["weights"] if weights is None else weights, tokenizer, seed=seed)

    def policy(self, k: int) -> PreTrainedModel | PeftModel:
        """The policy of type k; with adapters the one model with that adapter active."""
        if isinstance(self.models, PeftModel):
            self.models.set_adapter(f"{TYPE}-{k}", inference_mode=True)
            return self.models
        return self.models[k]

    def draw(self, count: int) -> np.ndarray:
        """(count,) types, drawn by the weights."""
        return self._random.choice(len(self.weights), count, p=(self.weights / self.weights.sum()).numpy())

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, types=None, **kwargs) -> Tensor:
        """As `generate` of a Hugging Face model: (B,P) prompts, padded on the left -> (B,P + new tokens).

        Args:
            types: (B,) who answers; drawn by the weights if omitted.
            kwargs: handed to each policy's `generate`, which answers its part of the batch with one row of tokens per
                prompt. Sampling is at temperature 1 without cuts unless they say otherwise, because the mixture is one
                of distributions.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        kwargs = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
                  "pad_token_id": self.tokenizer.pad_token_id, **kwargs}  # fmt: skip
        types = self.draw(len(input_ids)) if types is None else np.asarray(types)
        answers: list = [None] * len(input_ids)
        for k in sorted(set(types.tolist())):
            rows = np.flatnonzero(types == k).tolist()
            own = {"input_ids": input_ids[rows], "attention_mask": attention_mask[rows]}
            out = self.policy(k).generate(**own, **kwargs)  # type: ignore[operator]
            for row, ids in zip(rows, out, strict=True):
                answers[row] = ids
        return pad_sequence(answers, batch_first=True, padding_value=self.tokenizer.pad_token_id)

    @torch.no_grad()
    def logps(self, prompt_ids: list[list[int]], response_ids: list[list[list[int]]]) -> Tensor:
        """(B,K) log-probability of each response under the mixture, end token included if it is among the ids.

        Args:
            prompt_ids: B prompts of at least one token.
            response_ids: for each of them K responses of at least one token; K may differ, empty slots are 0.
        """
        rows = [
            {"prompt_ids": list(p), "response_ids": [list(ids) for ids in r], "scores": [0.0] * len(r)}
            for p, r in zip(prompt_ids, response_ids, strict=True)
        ]
        device = next(self.policy(0).parameters()).device
        batch = {k: v.to(device) for k, v in PreferenceCollator(self.tokenizer.pad_token_id)(rows).items()}
        logps = [self._runner(self.policy(k), batch).logps.sum(-1).double() for k in range(len(self.weights))]
        return mixture_logps(torch.stack(logps, -1), self.weights.to(device)) * batch["mask"]
