"""Sampling and scoring into a folder, so that a killed run goes on where it stopped and gives the same result.

A folder holds `manifest.json` (the settings), `samples-<process>.jsonl` and `scores-<process>.jsonl`, each written by
one process only. Samples do not depend on the batch, so it does not matter where the run was cut.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..runs.files import append_records, read_journal, repair_journal, write_json
from ..runs.settings import digest, refuse_other_settings
from .sampler import Key, Sample, SamplingConfig, sample_responses
from .scorer import Scorer

SCORE_CHUNK = 16  # prompts per call of the scorer and per journal entry
OVERWRITE = "choose another output, or start over with overwrite"


def check_settings(manifest: Path, settings: dict, *, ways_out: str = OVERWRITE) -> None:
    """Raises ValueError listing what differs when `manifest` was written for other settings."""
    refuse_other_settings(manifest, json.loads(manifest.read_text())["settings"], settings, ways_out=ways_out)


def open_folder(folder: str | Path, settings: dict, accelerator=None, *, ways_out: str = OVERWRITE) -> Path:
    """Creates or reopens the folder of a run; drops half-written last lines. `ways_out` is advice for the error.

    Raises:
        ValueError: the folder belongs to a run with other settings.
    """
    folder = Path(folder)
    manifest = folder / "manifest.json"
    if accelerator is None or accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        journals = [*folder.glob("samples-*.jsonl"), *folder.glob("scores-*.jsonl")]
        if not journals:  # a run that failed before its first sample binds nobody
            write_json(manifest, {"settings": settings, "hash": digest(settings)})
        for path in journals:
            repair_journal(path)
    _barrier(accelerator)
    check_settings(manifest, settings, ways_out=ways_out)
    return folder


def collect_samples(
    folder: str | Path,
    load: Callable[[], tuple],
    prompts: list,
    config: SamplingConfig,
    *,
    round: int = 0,
    accelerator=None,
    progress: bool = True,
    draw: Callable[..., list[list[Sample]]] = sample_responses,
) -> list[list[Sample]]:
    """As `sample_responses`, journalled in `folder`; `draw` may be another function with the same arguments.

    `load()` returns model and tokenizer. It is not called when all samples are there already.
    """
    folder, rank = Path(folder), accelerator.process_index if accelerator else 0
    known: dict[Key, Sample] = {}
    for path in sorted(folder.glob("samples-*.jsonl")):
        for record in read_journal(path):
            sample = Sample(record["text"], record["token_ids"], record["truncated"])
            known[record["prompt"], record["index"]] = sample
    _barrier(accelerator)  # no process may append before all have read
    if len(known) == len(prompts) * config.num_generations:
        return [[known[i, j] for j in range(config.num_generations)] for i in range(len(prompts))]

    def save(batch: dict[Key, Sample]) -> None:
        records = ({"prompt": i, "index": j, **sample._asdict()} for (i, j), sample in batch.items())
        append_records(folder / f"samples-{rank:05d}.jsonl", records)

    options = {"round": round, "accelerator": accelerator, "progress": progress}
    return draw(*load(), prompts, config, known=known, on_batch=save, **options)


def collect_scores(
    folder: str | Path,
    load: Callable[[], Scorer],
    prompts: list,
    responses: list[list[str]],
    *,
    columns: dict[str, list] | None = None,
    accelerator=None,
    progress: bool = True,
) -> list[list[float]]:
    """Scores all responses, journalled in `folder`, prompts sharded over processes.

    `load()` returns a scorer and is not called when all scores are there already. A prompt of messages has its
    responses handed over as assistant messages. `columns` hold one value per prompt.
    """
    folder = Path(folder)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    known = {}
    for path in sorted(folder.glob("scores-*.jsonl")):
        known.update({record["prompt"]: record["scores"] for record in read_journal(path)})
    _barrier(accelerator)
    todo = [i for i in range(len(prompts)) if i not in known]
    own, scorer, made = todo[rank::world], load() if todo else None, {}
    with tqdm(total=len(own), desc="scoring", unit="prompt", disable=not (progress and own and rank == 0)) as bar:
        for start in range(0, len(own), SCORE_CHUNK):
            chunk = own[start : start + SCORE_CHUNK]
            new = _score(scorer, chunk, prompts, responses, columns or {})
            records = ({"prompt": i, "scores": scores} for i, scores in new.items())
            append_records(folder / f"scores-{rank:05d}.jsonl", records)
            made.update(new)
            bar.update(len(chunk))
    known.update(gather_object(list(made.items())) if world > 1 else made)
    return [known[i] for i in range(len(prompts))]


def _score(scorer: Scorer, chunk: list[int], prompts, responses, columns) -> dict[int, list[float]]:
    owner = [i for i in chunk for _ in responses[i]]
    completions = [
        text if isinstance(prompts[i], str) else [{"role": "assistant", "content": text}]
        for i in chunk
        for text in responses[i]
    ]
    repeated = {name: [values[i] for i in owner] for name, values in columns.items()}
    scores = iter(scorer(prompts=[prompts[i] for i in owner], completions=completions, **repeated))
    return {i: [next(scores) for _ in responses[i]] for i in chunk}


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


def _barrier(accelerator) -> None:
    if accelerator is not None:
        accelerator.wait_for_everyone()
