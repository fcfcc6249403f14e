"""Who writes the improvement targets: the policy, a local model, or any function such as a call of an API."""

from collections.abc import Callable
from pathlib import Path

from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..runs.files import append_records, read_journal, repair_journal
from ..runs.processes import Processes

CHUNK = 16  # prompts per call of a function and per journal entry

Reviser = Callable[..., list[str | None]]


def reference_answer(prompts: list, drafts: list[str], references: list[str]) -> list[str | None]:
    """The reference itself as the target: no revision at all, for comparisons."""
    return list(references)


def collect_revisions(
    folder: Path, function: Reviser, prompts: list, drafts: list[str], references: list[str], processes: Processes
) -> list[str | None]:
    """Revisions of all drafts, None where there is none; journalled in `folder`, prompts shared out over processes.

    Args:
        function: called by keyword with `prompts` (texts, or lists of messages), `drafts` and `references` of up to
            `CHUNK` prompts, it returns a list with a text, or None for none, for each.

    Raises:
        ValueError: it gives anything else, another number of texts, or text that UTF-8 cannot hold.
    """
    known: dict[int, str | None] = {}
    processes.main(lambda: _prepare(folder))
    for path in sorted(folder.glob("revisions-*.jsonl")):
        known.update({record["prompt"]: record["text"] for record in read_journal(path)})
    processes.wait_for_everyone()  # no process may append before all have read
    todo = [i for i in range(len(prompts)) if i not in known]
    own, made = todo[processes.process_index :: processes.num_processes], {}
    with tqdm(total=len(own), desc="revising", unit="prompt", disable=not (own and processes.is_main_process)) as bar:
        for start in range(0, len(own), CHUNK):
            chunk = own[start : start + CHUNK]
            texts = _call(function, *([values[i] for i in chunk] for values in (prompts, drafts, references)))
            new = dict(zip(chunk, texts, strict=True))
            records = ({"prompt": i, "text": text} for i, text in new.items())
            append_records(folder / f"revisions-{processes.process_index:05d}.jsonl", records)
            made.update(new)
            bar.update(len(chunk))
    known.update(gather_object(list(made.items())) if processes.num_processes > 1 else made)
    return [known[i] for i in range(len(prompts))]


def _prepare(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("revisions-*.jsonl"):
        repair_journal(path)


def _call(function: Reviser, prompts: list, drafts: list[str], references: list[str]) -> list[str | None]:
    texts = function(prompts=prompts, drafts=drafts, references=references)
    if not isinstance(texts, list | tuple):
        raise ValueError(
            f"reviser_function gave {texts!r:.100}, of type {type(texts).__name__}: it must return a list with a "
            "text, or None, for each draft."
        )
    if len(texts) != len(prompts):
        raise ValueError(f"reviser_function gave {len(texts)} texts for {len(prompts)} drafts.")
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"reviser_function gave {text!r}: every revision must be a text, or None for none.")
        if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"reviser_function gave {text!a:.100}, which holds half of a surrogate pair: decode it.")
    return list(texts)
