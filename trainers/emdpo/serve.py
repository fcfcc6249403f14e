"""The mixture of the types' policies as one policy: a type is drawn per prompt and answers throughout."""

from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from ..data import PreferenceCollator
from ..forward.policy import base_model, disable_dropout
from ..forward.run import Runner
from ..generation.start import load_start
from .tables import MIXTURE, base_of, read_json

TYPE = "type"  # of the names of adapters: type-0, type-1, ...
# Arguments of `generate` whose results cannot be put together, with the value that they may have.
ONE_ANSWER = {"num_return_sequences": 1, "return_dict_in_generate": False}
ONE_POLICY = ("past_key_values", "streamer", "assistant_model", "inputs", "inputs_embeds")


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
        self.weights = _checked_weights(weights, _count(models))
        for model in [models] if isinstance(models, PeftModel) else models:
            disable_dropout(model)
        self._random = np.random.default_rng(seed)
        self._runner: Runner | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, weights=None, device: str = "cpu", seed: int = 0,
                        **init_kwargs) -> "MixturePolicy":  # fmt: skip
        """Reads what a run (and scripts/aggregate.py) left in `folder`.

        Args:
            weights: instead of those in mixture.json.
            init_kwargs: keywords of `from_pretrained`, over those the run was made with.

        Raises:
            ValueError: there is no mixture.json, or `weights` are not one probability per policy.
        """
        folder = Path(folder)
        if not (folder / MIXTURE).is_file():
            raise ValueError(f"{folder} has no {MIXTURE}: give the output_dir of a finished EM-DPO run.")
        found = read_json(folder / MIXTURE)
        base, kwargs = base_of(folder, found), {**(found["model_init_kwargs"] or {}), **init_kwargs}
        paths = [folder / policy for policy in found["policies"]]
        if found["adapters"]:
            models = _with_adapters(load_start(base, None, init_kwargs=kwargs), paths).to(device).eval()
        else:
            models = [load_start(base, path, init_kwargs=kwargs).to(device).eval() for path in paths]
        weights = found["weights"] if weights is None else weights
        return cls(models, weights, AutoTokenizer.from_pretrained(folder, trust_remote_code=False), seed=seed)

    def policy(self, k: int) -> nn.Module:
        """The policy of type k; with adapters the one model with that adapter active."""
        if isinstance(self.models, PeftModel):
            self.models.set_adapter(f"{TYPE}-{k}", inference_mode=True)
            return self.models
        return self.models[k]

    def draw(self, count: int) -> np.ndarray:
        """(count,) types, drawn by the weights."""
        return self._random.choice(len(self.weights), count, p=(self.weights / self.weights.sum()).numpy())

    def _checked_types(self, types, count: int) -> np.ndarray:
        types, last = np.asarray(types), len(self.weights) - 1
        if types.shape != (count,) or types.dtype.kind not in "iu" or not ((types >= 0) & (types <= last)).all():
            raise ValueError(
                f"types={types.tolist()} must be one whole number from 0 to {last} for each of the {count} prompts."
            )
        return types

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, types=None, **kwargs) -> Tensor:
        """As `generate` of a Hugging Face model: (B,P) prompts, padded on the left -> (B,P + new tokens).

        Args:
            types: (B,) who answers; drawn by the weights if omitted.
            kwargs: handed to each policy's `generate`. Sampling is at temperature 1 without cuts unless they say
                otherwise, because the mixture is one of distributions. One answer per prompt, and tokens only.

        Raises:
            ValueError: `types` are not B policies, or an argument that does not fit answers of several policies.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        _refuse_arguments(input_ids, attention_mask, kwargs)
        kwargs = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
                  "pad_token_id": self.tokenizer.pad_token_id, **kwargs}  # fmt: skip
        types = self.draw(len(input_ids)) if types is None else self._checked_types(types, len(input_ids))
        parts = {}
        for k in sorted(set(types.tolist())):
            rows = torch.as_tensor(np.flatnonzero(types == k), device=input_ids.device)
            parts[k] = (
                rows,
                self.policy(k).generate(input_ids=input_ids[rows], attention_mask=attention_mask[rows], **kwargs),
            )
        width = max(part.size(1) for _, part in parts.values())
        out = input_ids.new_full((len(input_ids), width), self.tokenizer.pad_token_id)
        for rows, part in parts.values():
            out[rows, : part.size(1)] = part
        return out

    @torch.no_grad()
    def logps(self, prompt_ids: list[list[int]], response_ids: list[list[list[int]]]) -> Tensor:
        """(B,K) log-probability of each response under the mixture, end token included if it is among the ids.

        Args:
            prompt_ids: B prompts.
            response_ids: for each of them K responses; K may differ, empty slots are 0.

        Raises:
            ValueError: there is no prompt, a prompt has no token or no response, or a response no token.
        """
        _refuse_empty(prompt_ids, response_ids)
        rows = [
            {"prompt_ids": list(p), "response_ids": [list(ids) for ids in r], "scores": [0.0] * len(r)}
            for p, r in zip(prompt_ids, response_ids, strict=True)
        ]
        first = self.policy(0)
        if self._runner is None:
            bases = [first] if isinstance(self.models, PeftModel) else self.models
            self._runner = Runner([base_model(model) for model in bases], "auto")
        device = next(first.parameters()).device
        batch = {k: v.to(device) for k, v in PreferenceCollator(self.tokenizer.pad_token_id)(rows).items()}
        logps = [self._runner(self.policy(k), batch).logps.sum(-1).double() for k in range(len(self.weights))]
        return mixture_logps(torch.stack(logps, -1), self.weights.to(device)) * batch["mask"]


def _count(models: list | PeftModel) -> int:
    if not isinstance(models, PeftModel):
        return len(models)
    return sum(name.startswith(f"{TYPE}-") for name in models.peft_config)


def _checked_weights(weights, types: int) -> Tensor:
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (types,):
        raise ValueError(f"weights={values.tolist()} must be one probability for each of the {types} policies.")
    if not (values >= 0).all() or abs(values.sum() - 1) > 1e-6:  # NaN is not above 0 either
        raise ValueError(f"weights={values.tolist()} must be probabilities that sum to 1.")
    return torch.as_tensor(values)


def _refuse_arguments(input_ids: Tensor, attention_mask: Tensor, kwargs: dict) -> None:
    """Raises ValueError for what several policies that answer parts of a batch cannot put together."""
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: give (prompts, tokens), at least one each.")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: it must be that of input_ids, "
            f"{tuple(input_ids.shape)}."
        )
    config = kwargs.get("generation_config")
    for name, only in ONE_ANSWER.items():
        value = kwargs.get(name, getattr(config, name, None))
        if value is not None and value != only:
            raise ValueError(
                f"{name}={value!r} does not work with a mixture, which gives one row of tokens per prompt: omit it. "
                "For several answers repeat the prompts; a type is drawn for each."
            )
    for name, value in kwargs.items():
        if name in ONE_POLICY or torch.is_tensor(value):
            raise ValueError(f"{name} does not work with a mixture, whose policies answer parts of a batch: omit it.")


def _refuse_empty(prompt_ids: list[list[int]], response_ids: list[list[list[int]]]) -> None:
    if not len(prompt_ids) or len(prompt_ids) != len(response_ids):
        raise ValueError(
            f"prompt_ids has {len(prompt_ids)} prompts and response_ids {len(response_ids)} lists of responses: give "
            "one list for each prompt, and at least one prompt."
        )
    for i, (prompt, responses) in enumerate(zip(prompt_ids, response_ids, strict=True)):
        if not len(prompt):
            raise ValueError(f"prompt_ids[{i}] is empty: give at least one token.")
        if not len(responses) or not all(len(ids) for ids in responses):
            raise ValueError(f"response_ids[{i}] has no response or an empty one: give at least one token each.")


def _with_adapters(base: PreTrainedModel, paths: list[Path]) -> PeftModel:
    model = PeftModel.from_pretrained(base, str(paths[0]), adapter_name=f"{TYPE}-0")
    for k, path in enumerate(paths[1:], 1):
        model.load_adapter(str(path), adapter_name=f"{TYPE}-{k}")
    return model
