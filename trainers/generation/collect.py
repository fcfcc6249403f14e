"""Sampling and scoring, shared by all processes and kept in a folder, so that a killed run ends with the same result.

A folder holds `samples-<process>.jsonl` and `scores-<process>.jsonl`, each written by one process only. Samples do not
depend on the batch, so it does not matter where the run was cut.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..runs.files import Journal
from ..runs.processes import Processes
from .backends import Backend, HuggingFace, Request
from .rewards import as_completion
from .sampler import Key, Prompt, Sample, SamplingConfig, encode_prompts, sample_seed
from .scorer import Scorer

SCORE_CHUNK = 16  # prompts per call of the scorer and per journal entry


class Batch(NamedTuple):
    keys: list
    filler: bool  # repeats work of another process


def collect(
    todo: list[Hashable],
    make: Callable[[list], list],
    *,
    size: int,
    processes: Processes,
    on_batch: Callable[[dict], None] | None = None,
    lockstep: bool = False,
    title: str = "",
    progress: bool = True,
) -> dict:
    """Makes what is missing: `make(keys)` for batches of `todo`, shared by the processes, of which all get the result.

    Args:
        on_batch: called in each process with what it made, after each batch, for instance to save it.
        lockstep: every process makes as many batches as any, as sharded models need it.
    """
    own, made = todo[processes.process_index :: processes.num_processes], {}
    with tqdm(total=len(own), desc=title, disable=not (progress and own and processes.is_main_process)) as bar:
        for batch in batches(todo, size, processes.process_index, processes.num_processes):
            if batch.filler and not lockstep:
                continue
            values = make(batch.keys)
            if batch.filler:
                continue
            new = dict(zip(batch.keys, values, strict=True))
            made.update(new)
            bar.update(len(new))
            if on_batch is not None:
                on_batch(new)
    return dict(gather_object(list(made.items()))) if processes.num_processes > 1 else made


def batches(todo: list, size: int, rank: int, world: int) -> Iterator[Batch]:
    """This process's batches; the same number of them in every process."""
    own, longest = todo[rank::world], len(todo[0::world])
    for start in range(0, longest, size):
        keys = own[start : start + size]
        yield Batch(keys or todo[:1], filler=not keys)


# Samples.


def draw(
    backend: Backend,
    prompts: list[Prompt],
    config: SamplingConfig,
    *,
    round: int = 0,
    accelerator=None,
    progress: bool = True,
    known: Mapping[Key, Sample] | None = None,
    on_batch: Callable[[dict[Key, Sample]], None] | None = None,
) -> list[list[Sample]]:
    """`config.num_generations` responses of a backend to each prompt, in the order of `prompts`.

    Args:
        prompts: plain texts or lists of messages.
        round: counts the rounds of a loop; another round gives other samples.
        accelerator: with several processes each one samples its share and all return the full result. All must
            make the call with the same arguments.
        known: samples that exist already, by (prompt position, sample index); they are returned, not made again.
        on_batch: called in each process after each batch with that batch's new samples, for instance to save them.

    Raises:
        ValueError: a prompt without tokens, messages without a chat template, a prompt that does not fit in the
            context together with `max_new_tokens`.
    """
    encoded, known = encode_prompts(backend.tokenizer, prompts), known or {}
    for i, ids in enumerate(encoded):
        if backend.context is not None and len(ids) + config.max_new_tokens > backend.context:
            raise ValueError(
                f"Prompt {i} has {len(ids)} tokens; with max_new_tokens={config.max_new_tokens} that exceeds the "
                f"model's context of {backend.context}. Shorten the prompt or lower max_new_tokens."
            )

    def make(keys: list[Key]) -> list[Sample]:
        requests = [Request(encoded[i], sample_seed(config.seed, round, prompts[i], j)) for i, j in keys]
        return backend.sample(requests, config)

    keys = [(i, j) for i in range(len(prompts)) for j in range(config.num_generations)]
    todo = sorted((key for key in keys if key not in known), key=lambda key: (-len(encoded[key[0]]), key))
    made = collect(
        todo, make, size=config.batch_size, processes=accelerator or Processes(), on_batch=on_batch, lockstep=True,
        title="sampling", progress=progress,
    )  # fmt: skip
    return _rows({**known, **made}, len(prompts), config)


def sample_responses(model, tokenizer, prompts: list[Prompt], config: SamplingConfig, *, accelerator=None, **options):
    """`draw` from a Hugging Face model, see `HuggingFace`; returns [prompts][num_generations] samples."""
    backend = HuggingFace(model, tokenizer, accelerator or Processes())
    return draw(backend, prompts, config, accelerator=accelerator, **options)


def collect_samples(
    folder: str | Path,
    load: Callable[[], Backend],
    prompts: list[Prompt],
    config: SamplingConfig,
    *,
    round: int = 0,
    accelerator=None,
    progress: bool = True,
) -> list[list[Sample]]:
    """As `draw`, kept in `folder`. `load()` is not called when all samples are there already."""
    journal = Journal(folder, "samples", accelerator or Processes())
    known: dict[Key, Sample] = {
        (record["prompt"], record["index"]): Sample(record["text"], record["token_ids"], record["truncated"])
        for record in journal.read()
    }
    if len(known) == len(prompts) * config.num_generations:
        return _rows(known, len(prompts), config)

    def save(batch: dict[Key, Sample]) -> None:
        journal.append({"prompt": i, "index": j, **sample._asdict()} for (i, j), sample in batch.items())

    options = {"round": round, "accelerator": accelerator, "progress": progress}
    return draw(load(), prompts, config, known=known, on_batch=save, **options)


def _rows(samples: dict[Key, Sample], prompts: int, config: SamplingConfig) -> list[list[Sample]]:
    return [[samples[i, j] for j in range(config.num_generations)] for i in range(prompts)]


# Scores.


def collect_scores(
    folder: str | Path,
    load: Callable[[], Scorer],
    prompts: list[Prompt],
    responses: list[list[str]],
    *,
    columns: dict[str, list] | None = None,
    accelerator=None,
    progress: bool = True,
) -> list[list[float]]:
    """Scores all responses, kept in `folder`.

    `load()` returns a scorer and is not called when all scores are there already. A prompt of messages has its
    responses handed over as assistant messages. `columns` hold one value per prompt.
    """
    journal = Journal(folder, "scores", accelerator or Processes())
    known = {record["prompt"]: record["scores"] for record in journal.read()}
    todo = [i for i in range(len(prompts)) if i not in known]
    scorer = load() if todo else None
    made = collect(
        todo, lambda chunk: score(scorer, chunk, prompts, responses, columns or {}), size=SCORE_CHUNK,
        processes=journal.processes, title="scoring", progress=progress,
        on_batch=lambda new: journal.append({"prompt": i, "scores": scores} for i, scores in new.items()),
    )  # fmt: skip
    return [(known | made)[i] for i in range(len(prompts))]


def score(scorer: Scorer, at: list[int], prompts, responses, columns: dict[str, list]) -> list[list[float]]:
    """Scores of all responses to the prompts at these positions, from one call of the scorer."""
    owner = [i for i in at for _ in responses[i]]
    completions = [as_completion(prompts[i], text) for i in at for text in responses[i]]
    repeated = {name: [values[i] for i in owner] for name, values in columns.items()}
    scores = iter(scorer(prompts=[prompts[i] for i in owner], completions=completions, **repeated))
    return [[next(scores) for _ in responses[i]] for i in at]


def summarize(samples: list[list[Sample]], scores: list[list[float]]) -> dict[str, float]:
    """Statistics of a finished run. Shares are of responses, except where the name says prompts."""
    flat = [sample for row in samples for sample in row]
    values = [score for row in scores for score in row]
    texts = [[sample.text.strip() for sample in row] for row in samples]
    repeats = sum(count - 1 for row in texts for count in Counter(row).values())
    count, tokens = len(flat), sum(len(sample.token_ids) for sample in flat)
    mean = sum(values) / count
    statistics = {
        "prompts": len(samples),
        "responses": count,
        "response_tokens": tokens,
        "mean_response_tokens": tokens / count,
        "truncated_share": sum(sample.truncated for sample in flat) / count,
        "duplicate_share": repeats / count,
        "empty_share": sum(not text for row in texts for text in row) / count,
        "mean_score": mean,
        "score_std": (sum((value - mean) ** 2 for value in values) / count) ** 0.5,
        "mean_score_range_within_prompt": sum(max(row) - min(row) for row in scores) / len(scores),
        "prompts_with_all_scores_tied_share": sum(max(row) == min(row) for row in scores) / len(scores),
    }
    return {name: round(value, 4) for name, value in statistics.items()}


# Until all users open a Stage and compare settings there.


def open_folder(folder, settings: dict, accelerator=None, *, ways_out: str = "choose another output") -> Path:
    from ..runs.stage import Stage

    return Stage(folder, settings, ways_out=ways_out).open()


def check_settings(manifest: Path, settings: dict, *, ways_out: str = "choose another output") -> None:
    import json

    from ..runs.settings import refuse_other_settings

    refuse_other_settings(manifest, json.loads(manifest.read_text())["settings"], settings, ways_out=ways_out)
