"""Sampling and scoring, shared by all processes and kept in a folder, so that a killed run ends with the same result.

A folder holds `samples-<process>.jsonl` and `scores-<process>.jsonl`, each written by one process only. Samples do not
depend on the batch, so it does not matter where the run was cut.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..data.rows import UNFINISHED
from ..runs.files import Journal
from ..runs.processes import Processes
from .backends import Backend, HuggingFace, Request
from .options import Spec
from .rewards import as_completion
from .sampler import TRANSFORMERS, Key, Prompt, Sample, SamplingConfig, encode_prompts, sample_seed
from .scorer import Scorer, load_scorer
from .served import Counts, add_counts

SCORE_CHUNK = 16  # prompts per call of the scorer and per journal entry
MADE = ("prompt", "responses", "scores", UNFINISHED)  # columns of a row that sampling and scoring make
NO_COLUMNS = (*MADE, "prompts", "completions", "chosen", "rejected")  # for a scorer


def collect(
    todo: list, make: Callable[[list], Iterable[dict[int, Any]]], save: Callable[[dict], None], *, title: str,
    progress: bool = True,
) -> dict:  # fmt: skip
    """Makes what is missing: `todo` is shared by the processes, of which all get the whole result.

    Args:
        make: yields what it made of its share, by position, in portions as they are done.
        save: called with each portion by its keys, in the process that made it.
    """
    processes, made = Processes(), {}
    own = todo[processes.process_index :: processes.num_processes]
    with tqdm(total=len(own), desc=title, disable=not (progress and own and processes.is_main_process)) as bar:
        for portion in make(own):
            new = {own[at]: result for at, result in portion.items()}
            made.update(new)
            save(new)
            bar.update(len(new))
    return dict(gather_object(list(made.items()))) if processes.num_processes > 1 else made


def in_chunks(function: Callable[[list], list], size: int) -> Callable[[list], Iterator[dict[int, Any]]]:
    """A function of lists as `collect` wants it: called with `size` items at a time."""

    def make(items: list) -> Iterator[dict[int, Any]]:
        for start in range(0, len(items), size):
            yield dict(enumerate(function(items[start : start + size]), start))

    return make


def sample_responses(model, tokenizer, prompts: list[Prompt], config: SamplingConfig, **options) -> list[list[Sample]]:
    """`collect_samples` of a Hugging Face model that keeps nothing: [prompts][num_generations] samples."""
    return collect_samples(None, lambda: nullcontext(HuggingFace(model, tokenizer)), prompts, config, **options)


def collect_samples(
    folder: str | Path | None, load: Callable[[], AbstractContextManager[Backend]], prompts: list[Prompt],
    config: SamplingConfig, *, round: int = 0, name: str = "samples", progress: bool = True,
) -> list[list[Sample]]:  # fmt: skip
    """`config.num_generations` responses to each prompt, in the order of `prompts`.

    Each process samples its share with a whole policy, and all return the full result.

    Args:
        folder: where they are kept, and samples that exist already are found; None keeps nothing.
        load: opens the backend; it is not called when all samples are there already.
        prompts: plain texts or lists of messages.
        round: counts the rounds of a loop; another round gives other samples.
        name: of the journal in the folder, for several calls that share one.

    Raises:
        ValueError: a prompt without tokens, messages without a chat template, a prompt that does not fit in the
            context together with `max_new_tokens`.
    """
    journal = Journal(folder, name)
    records = journal.read()
    known: dict[Key, Sample] = {
        (record["prompt"], record["index"]): Sample(record["text"], record["token_ids"], record["truncated"])
        for record in records
    }
    keys = [(i, j) for i in range(len(prompts)) for j in range(config.num_generations)]
    if todo := [key for key in keys if key not in known]:
        if others := sum(record.get("by", TRANSFORMERS) != config.sampled_by for record in records):
            Processes().say(
                f"WARNING: {others} of {len(keys)} samples in {folder} are not by {config.sampled_by}, but those to "
                "come will be. They are of the same policy; remove that folder for samples of one engine."
            )
        with load() as backend:
            known |= _sample(backend, todo, prompts, config, journal, round, progress)
    return [[known[i, j] for j in range(config.num_generations)] for i in range(len(prompts))]


def _sample(backend: Backend, todo: list[Key], prompts, config, journal: Journal, round: int, progress: bool) -> dict:
    encoded = encode_prompts(backend.tokenizer, prompts)
    longest = max(range(len(prompts)), key=lambda i: len(encoded[i]))
    if backend.context is not None and len(encoded[longest]) + config.max_new_tokens > backend.context:
        raise ValueError(
            f"Prompt {longest} has {len(encoded[longest])} tokens; with max_new_tokens={config.max_new_tokens} that "
            f"exceeds the model's context of {backend.context}. Shorten the prompt or lower max_new_tokens."
        )

    seen: defaultdict[str, count] = defaultdict(count)
    occurrences = [next(seen[str(prompt)]) for prompt in prompts]

    def make(keys: list[Key]) -> Iterator[dict[int, Sample]]:
        seeds = [sample_seed(config.seed, round, prompts[i], j, occurrences[i]) for i, j in keys]
        requests = [Request(encoded[i], seed) for (i, _), seed in zip(keys, seeds, strict=True)]
        return backend.sample(requests, config)

    def save(made: dict[Key, Sample]) -> None:
        by = {"by": config.sampled_by}
        journal.append({"prompt": i, "index": j, **sample._asdict(), **by} for (i, j), sample in made.items())

    todo = sorted(todo, key=lambda key: (-len(encoded[key[0]]), key))
    return collect(todo, make, save, title="sampling", progress=progress)


def collect_scores(
    folder: str | Path, spec: Spec, rows: list[dict], responses: list[list[str]], *, batch_size: int = 8
) -> tuple[list[list[float]], Counts]:
    """Scores of all responses to the prompts of `rows`, kept in `folder`, and what servers were asked for them.

    A prompt of messages has its responses handed over as assistant messages; further columns of the rows go to the
    scorer too.

    Args:
        spec: of the scorer, which is not loaded when all scores are there already; see `load_scorer`.
        batch_size: texts per forward pass, or per request, of a reward model.

    Returns:
        the scores, and the counts of all processes, in earlier starts too; what a kill cut off is missing there, and
        its answers count as known.
    """
    journal, asked, processes = Journal(folder, "scores"), Journal(folder, "asked"), Processes()
    counts: Counts = {}

    def keep() -> None:
        if counts:
            asked.append([counts])
            counts.clear()

    def save(new: dict[int, list[float]]) -> None:
        journal.append({"prompt": i, "scores": scores} for i, scores in new.items())
        keep()

    known = {record["prompt"]: record["scores"] for record in journal.read()}
    if todo := [i for i in range(len(rows)) if i not in known]:
        names = columns_of(rows)
        scorer = load_scorer(spec, batch_size=batch_size, device=processes.device, counts=counts)
        score = in_chunks(lambda at: _score(scorer, at, rows, responses, names), SCORE_CHUNK)
        try:
            known |= collect(todo, score, save, title="scoring")
        finally:
            keep()
    for record in asked.read():
        add_counts(counts, record)
    if counts:
        processes.say("  " + ", ".join(f"{name.replace('_', ' ')}: {value:,}" for name, value in counts.items()))
    return [known[i] for i in range(len(rows))], counts


def columns_of(rows: list[dict]) -> list[str]:
    """Names of the columns that a scorer gets beside prompts and completions."""
    return sorted({name for row in rows for name in row if name not in NO_COLUMNS})


def _score(scorer: Scorer, at: list[int], rows: list[dict], responses, names: list[str]) -> list[list[float]]:
    owners = [rows[i] for i in at for _ in responses[i]]
    completions = [as_completion(rows[i]["prompt"], text) for i in at for text in responses[i]]
    columns = {name: [row.get(name) for row in owners] for name in names}
    scores = iter(scorer(prompts=[row["prompt"] for row in owners], completions=completions, **columns))
    return [[next(scores) for _ in responses[i]] for i in at]


def summarize(samples: list[list[Sample]], scores: list[list[float]] | None = None) -> dict[str, float]:
    """Statistics of a finished run, those of scores where there are any.

    Shares are of responses, except where the name says prompts.
    """
    flat = [sample for row in samples for sample in row]
    texts = [[sample.text.strip() for sample in row] for row in samples]
    repeats = sum(count - 1 for row in texts for count in Counter(row).values())
    count, tokens = len(flat), sum(len(sample.token_ids) for sample in flat)
    statistics = {
        "prompts": len(samples),
        "responses": count,
        "response_tokens": tokens,
        "mean_response_tokens": tokens / count,
        "truncated_share": sum(sample.truncated for sample in flat) / count,
        "duplicate_share": repeats / count,
        "empty_share": sum(not text for row in texts for text in row) / count,
    }
    if scores is not None:
        values = [score for row in scores for score in row]
        mean = sum(values) / len(values)
        statistics |= {
            "mean_score": mean,
            "score_std": (sum((value - mean) ** 2 for value in values) / count) ** 0.5,
            "mean_score_range_within_prompt": sum(max(row) - min(row) for row in scores) / len(scores),
            "prompts_with_all_scores_tied_share": sum(max(row) == min(row) for row in scores) / len(scores),
        }
    return {name: round(value, 4) for name, value in statistics.items()}
