"""Answers in the files that AlpacaEval 2, Arena-Hard-Auto v2 and MT-Bench read (docs/judges.md)."""

import itertools
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

from ..data.json_rows import digest
from ..generation import Backend, Sample, SamplingConfig, collect_samples
from ..runs.files import read_rows, write_json, write_rows

# Fields of a question that its answer needs; the last one is what the user says.
QUESTIONS = {
    "alpaca_eval": ("instruction",),
    "arena_hard": ("uid", "prompt"),
    "mt_bench": ("question_id", "category", "turns"),
}
# temperature_config of FastChat's llm_judge/common.py, and what its gen_model_answer.py takes for another category.
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
OTHER_TEMPERATURE = 0.7


def read_questions(path: str, answers: str) -> list[dict]:
    """The questions of the benchmark `answers`, from the file that it is published as: a JSON list or JSON lines.

    Raises:
        ValueError: no such file, no JSON, no question, or one without a field that its answer needs.
    """
    if not Path(path).is_file():
        raise ValueError(f"--prompts: {path} is no file: --answers {answers} reads the benchmark's own question file.")
    rows = _read(Path(path))
    if not rows:
        raise ValueError(f"--prompts: {path} has no questions.")
    fields = QUESTIONS[answers]
    for i, row in enumerate(rows):
        missing = [n for n in fields if row.get(n) in (None, "", [])] if isinstance(row, dict) else fields
        if missing:
            raise ValueError(
                f"--prompts: question {i} of {path} has no {', '.join(missing)}: --answers {answers} reads questions "
                f"with {', '.join(fields)}, and this is {str(row)[:80]}."
            )
        turns = turns_of(answers, row)
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            kind = "a list of texts" if answers == "mt_bench" else "a text"
            raise ValueError(f"--prompts: question {i} of {path}: {fields[-1]} must be {kind}.")
    return rows


def _read(path: Path) -> list:
    data = path.read_bytes()
    if not data.lstrip().startswith(b"["):
        return read_rows(path)
    try:
        return json.loads(data)
    except ValueError as error:
        raise ValueError(f"--prompts: {path} is not JSON ({error}).") from error


def check_output(output: str, answers: str) -> None:
    """Raises ValueError for a name that the benchmark's reader would not take or look for."""
    suffix = ".json" if answers == "alpaca_eval" else ".jsonl"
    if not output.endswith(suffix):
        raise ValueError(f"--output {output}: --answers {answers} writes a file that ends in {suffix}.")


def turns_of(answers: str, question: dict) -> list[str]:
    """What the user says, one text per turn."""
    said = question[QUESTIONS[answers][-1]]
    return said if answers == "mt_bench" else [said]


def sample_answers(
    folder: Path, load: Callable[[], AbstractContextManager[Backend]], questions: list[dict], config: SamplingConfig,
    *, answers: str, chat: bool,
) -> list[list[Sample]]:  # fmt: skip
    """One sample for each turn of each question, [questions][turns], kept in `folder`.

    A turn is asked after the answers to those before it. MT-Bench has a temperature for each category, the others that
    of `config`.

    Args:
        load: opens the backend, once for all turns and only where an answer is missing.
        chat: whether the tokenizer has a chat template, without which the question alone is the prompt.

    Raises:
        ValueError: several turns without a chat template, and as `collect_samples`.
    """
    turns = [turns_of(answers, question) for question in questions]
    longest = max(map(len, turns))
    if longest > 1 and not chat:
        raise ValueError(
            f"--answers {answers} asks {longest} turns, and the tokenizer has no chat template: give it the one that "
            "the policy was trained with."
        )
    heats = [config.temperature] * len(questions)
    if answers == "mt_bench":
        heats = [TEMPERATURES.get(question["category"], OTHER_TEMPERATURE) for question in questions]
    samples: list[list[Sample]] = [[] for _ in questions]
    with ExitStack() as stack:
        backend = cache(lambda: stack.enter_context(load()))
        for turn, heat in itertools.product(range(longest), sorted(set(heats))):
            at = [i for i in range(len(questions)) if heats[i] == heat and turn < len(turns[i])]
            prompts = [_conversation(turns[i], samples[i]) if chat else turns[i][0] for i in at]
            own, name = replace(config, temperature=heat, num_generations=1), f"turn-{turn + 1}-at-{heat}"
            drawn = collect_samples(folder, lambda: nullcontext(backend()), prompts, own, name=name)
            for i, new in zip(at, drawn, strict=True):
                samples[i] += new
    return samples


def _conversation(turns: list[str], given: list[Sample]) -> list[dict]:
    """Messages up to the first turn that has no answer yet."""
    said = [text for turn, sample in zip(turns, given, strict=False) for text in (turn, sample.text.strip())]
    texts = [*said, turns[len(given)]]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def write_answers(
    path: Path, questions: list[dict], samples: list[list[Sample]], *, answers: str, generator: str
) -> None:
    """Writes the file, atomically. The texts are stripped, as alpaca_eval and FastChat strip what they sample."""
    rows = [
        _record(answers, generator, question, [sample.text.strip() for sample in drawn])
        for question, drawn in zip(questions, samples, strict=True)
    ]
    if answers == "alpaca_eval":
        write_json(path, rows)
    else:
        write_rows(path, rows)


def _record(answers: str, generator: str, question: dict, texts: list[str]) -> dict:
    known, now = digest([generator, question, texts])[:22], time.time()  # of the length of a shortuuid
    if answers == "alpaca_eval":
        own = {name: question[name] for name in ("dataset", "instruction") if name in question}
        return own | {"output": texts[0], "generator": generator}
    if answers == "arena_hard":
        content = [("user", question["prompt"]), ("assistant", {"answer": texts[0]})]
        messages = [{"role": role, "content": said} for role, said in content]
        return {"uid": question["uid"], "ans_id": known, "model": generator, "messages": messages, "tstamp": now}
    own = {"question_id": question["question_id"], "answer_id": known, "model_id": generator}
    return own | {"choices": [{"index": 0, "turns": texts}], "tstamp": now}
