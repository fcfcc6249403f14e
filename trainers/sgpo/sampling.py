"""Responses and log-probabilities of the models of a run, each kept in a folder and made once."""

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from ..generation.backends import Backend, HuggingFace
from ..generation.collect import collect_samples, open_folder
from ..generation.logps import collect_logps
from ..generation.sampler import Prompt, Sample, encode_prompts
from ..generation.start import load_for_sampling
from ..generation.vllm import VLLM
from ..runs.processes import Processes, free_memory
from .config import Sampling, SGPOConfig
from .filters import fits


class Sampler:
    """Draws with the model of a run, or what a stage made of it; at most one policy is in memory.

    Args:
        model: path or hub id of the model before all rounds; a start folder may hold an adapter on it.
    """

    def __init__(self, args: SGPOConfig, model: str, processes: Processes, quantization_config=None):
        self.args, self.model, self.processes = args, model, processes
        self.quantization_config = quantization_config

    def draw(
        self, folder: Path, start: Path | None, prompts: list[Prompt], options: Sampling, round: int,
        *, settings_hash: str, model: str | None = None,
    ) -> list[Sample | None]:  # fmt: skip
        """One response for each prompt; None for a prompt that has no room for one in the model's context.

        Args:
            start: a model that a stage left, or None for the model of the run.
            settings_hash: of the stage, which `folder` is tied to.
            model: another model, in place of the run's.
        """
        name = model or self.model
        at = self._with_room(name, prompts, options.max_new_tokens)
        if not at:
            return [None] * len(prompts)
        open_folder(folder, {"stage": settings_hash}, self.processes)
        load = lambda: self._load(name, None if model else start, options)  # noqa: E731
        drawn = collect_samples(
            folder, load, [prompts[i] for i in at], options.config(self.args.seed), round=round,
            accelerator=self.processes,
        )  # fmt: skip
        free_memory()
        found = dict(zip(at, (row[0] for row in drawn), strict=True))
        return [found.get(i) for i in range(len(prompts))]

    def logps(self, folder: Path, start: Path | None, tokenizer, rows: list[dict], names: tuple[str, ...]) -> list:
        """Log-probabilities of the tokens of `row[name]` under the plain prompt, for each row and name."""
        load = lambda: self.load_policy(self.model, start, self.args.sampling["dtype"])  # noqa: E731
        return collect_logps(
            folder, load, tokenizer, [row["prompt"] for row in rows], [[row[name] for name in names] for row in rows],
            layout=self.args.layout, processes=self.processes,
        )  # fmt: skip

    def _load(self, name: str, start: Path | None, options: Sampling) -> Backend:
        if not self.args.use_vllm:
            return HuggingFace(*self.load_policy(name, start, options.dtype))
        from vllm import LLM  # not installed with the project

        dtype = {} if options.dtype is None else {"dtype": options.dtype}
        return VLLM(LLM(model=str(start or name), **dtype), AutoTokenizer.from_pretrained(name))

    def load_policy(self, name: str, start: Path | None, dtype: str | None) -> tuple:
        """Model and tokenizer, on the device; see `load_for_sampling`."""
        quantization = self.quantization_config if name == self.model else None
        return load_for_sampling(name, start, self.args, dtype=dtype, quantization_config=quantization)

    def _with_room(self, name: str, prompts: list[Prompt], new_tokens: int) -> list[int]:
        config = AutoConfig.from_pretrained(name).get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        encoded = encode_prompts(AutoTokenizer.from_pretrained(name), prompts)
        return [i for i, ids in enumerate(encoded) if fits(len(ids), new_tokens, limit)]
