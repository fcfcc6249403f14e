"""Responses, revisions and log-probabilities of the models of a run, each kept in a folder and made once."""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ..forward.cache import score_rows
from ..forward.policy import context_length
from ..generation.backends import Backend
from ..generation.collect import collect, collect_samples, in_chunks
from ..generation.engine import opened
from ..generation.sampler import Prompt, encode_prompts
from ..generation.start import Weights, weights_of
from ..runs.files import Journal
from ..runs.processes import Processes, free_memory
from .config import SGPOConfig
from .improver import tokenize_texts
from .text import free_marker, parse_revision, reviser_prompt, turns

CHUNK = 16  # drafts per call of a reviser function


@dataclass
class Sampler:
    """Draws with the model of a run, or what a stage made of it; at most one policy is in memory.

    What samples is kept until a `with` block ends.

    Args:
        model: path or hub id of the model before all rounds; a start folder may hold an adapter on it.
        tokenizer: that of `model`.
    """

    args: SGPOConfig
    model: str
    tokenizer: PreTrainedTokenizerBase
    quantization_config: object = None

    def __post_init__(self):
        self._stack, self._key = ExitStack(), ()
        self._backend: Backend | None = None

    def draw(
        self, folder: Path, rows: list[dict], column: str, start: Path | None, option: str, round: int, *,
        ask: Callable[[dict], Prompt | None] | None = None, model: str | None = None, greedy: bool = False,
    ) -> list[dict]:  # fmt: skip
        """The rows with a response in `column` and, in `<column>_truncated`, whether it was cut.

        It is None where the prompt is None or leaves no room for one in the model's context.

        Args:
            start: a model that a stage left, or None for the model of the run.
            option: `sampling` or `revision`, which says how.
            ask: gives the prompt of a row, by default what is in it.
            model: another model, in place of the run's.
            greedy: the most likely tokens, in place of draws.
        """
        options, name, config = getattr(self.args, option), model or self.model, self.args.sampling_config(option)
        prompts = [row["prompt"] if ask is None else ask(row) for row in rows]
        at = self._with_room(name, prompts, options["max_new_tokens"])
        rows = [row | {column: None, f"{column}_truncated": False} for row in rows]
        folder.mkdir(parents=True, exist_ok=True)

        def load() -> AbstractContextManager[Backend]:
            return nullcontext(self._open(config.engine, name, None if model else start, options["dtype"], folder))

        config = replace(config, temperature=0.0) if greedy else config
        drawn = collect_samples(folder, load, [*at.values()], config, round=round)
        for i, [sample] in zip(at, drawn, strict=True):
            rows[i] |= {column: sample.text, f"{column}_truncated": sample.truncated}
        return rows

    def revise(self, folder: Path, rows: list[dict], start: Path | None, round: int) -> list[dict]:
        """The rows with what the reviser makes of the draft in `current` as `target`; "" where there is none."""
        args = self.args
        if args.reviser == "external":
            return self._revise_outside(folder, rows)

        def ask(row: dict) -> Prompt:
            return reviser_prompt(row["prompt"], row["current"], row["reference"], analysis=args.reviser_analysis)

        rows = self.draw(folder, rows, "target", start, "revision", round, ask=ask, model=args.reviser_model)
        for row in rows:
            texts = [*(turn["content"] for turn in turns(row["prompt"])), row["current"], row["reference"]]
            marker = free_marker(texts) if args.reviser_analysis else None
            if row["target"] is not None:
                row["target"] = parse_revision(row["target"], marker) or ""
        return rows

    def _revise_outside(self, folder: Path, rows: list[dict]) -> list[dict]:
        assert self.args.reviser_function is not None
        function = load_reviser(self.args.reviser_function)
        columns = {"prompts": "prompt", "drafts": "current", "references": "reference"}

        def make(at: list[int]) -> list[str | None]:
            texts = function(**{key: [rows[i][column] for i in at] for key, column in columns.items()})
            # A text has items too, which would become one revision each.
            if (
                not isinstance(texts, list | tuple)
                or len(texts) != len(at)
                or not all(isinstance(text, str | None) for text in texts)
            ):
                raise ValueError(
                    f"reviser_function gave {texts!r:.100} for {len(at)} drafts: it must return a list with a text, "
                    "or None, for each."
                )
            return list(texts)

        folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(folder, "revisions")
        known = {record["row"]: record["text"] for record in journal.read()}
        made = collect(
            [i for i in range(len(rows)) if i not in known], in_chunks(make, CHUNK),
            lambda new: journal.append({"row": i, "text": t} for i, t in new.items()), title="revising",
        )  # fmt: skip
        texts = known | made
        return [row | {"target": texts[i] or "", "target_truncated": False} for i, row in enumerate(rows)]

    def logps(self, folder: Path, start: Path | None, rows: list[dict], names: tuple[str, ...]) -> list:
        """Log-probabilities of the tokens of `row[name]` under the plain prompt, for each row and name."""
        texts = [[row[name] for name in names] for row in rows]
        logps = score_rows(
            lambda: self.weights(self.model, start, self.args.sampling["dtype"]).whole(),
            [tokenize_texts(self.tokenizer, [row["prompt"] for row in rows], texts)], folder,
            accelerator=Processes(), pad_token_id=self.tokenizer.pad_token_id, layout=self.args.layout,
            per_token=True, budget=1,  # a prompt at a time: no number depends, by rounding, on where a pass was killed
        )[0]  # fmt: skip
        free_memory()
        return logps

    def _open(self, engine: str, name: str, start: Path | None, dtype: str | None, folder: Path) -> Backend:
        """The backend of the draw before where it has the same weights: an engine takes minutes to start."""
        key = (engine, name, start, dtype)
        if self._backend is None or key != self._key:
            self.__exit__(None, None, None)
            self._backend = self._stack.enter_context(opened(engine, self.weights(name, start, dtype), folder))
            self._key = key
        return self._backend

    def __enter__(self) -> "Sampler":
        return self

    def __exit__(self, *failure) -> None:
        """Ends what samples, so that another model has the memory."""
        self._backend = None
        self._stack.__exit__(*failure)
        free_memory()

    def weights(self, name: str, start: Path | None, dtype: str | None) -> Weights:
        quantization = self.quantization_config if name == self.model else None
        return weights_of(name, start, self.args, dtype=dtype, quantization_config=quantization)

    def _with_room(self, name: str, prompts: list[Prompt | None], new_tokens: int) -> dict[int, Prompt]:
        limit = context_length(AutoConfig.from_pretrained(name))
        at = {i: prompt for i, prompt in enumerate(prompts) if prompt is not None}
        tokenizer = self.tokenizer if name == self.model else AutoTokenizer.from_pretrained(name)
        lengths = map(len, encode_prompts(tokenizer, [*at.values()]))
        return {i: at[i] for i, n in zip(at, lengths, strict=True) if limit is None or n + new_tokens <= limit}


def load_reviser(path: str) -> Callable[..., list[str | None]]:
    """The function of `reviser_function`. Raises ValueError where it cannot be imported."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reviser_function={path!r} cannot be imported: {error}.") from error


def reference_answer(prompts: list, drafts: list[str], references: list[str]) -> list[str | None]:
    """A reviser whose target is the reference itself: no revision at all, for comparisons."""
    return list(references)
