r"""Samples K responses per prompt, scores them and writes canonical rows that `load_preferences` reads.

    polypo generate --model runs/models/smollm2-135m \
        --prompts data/demo/prompts.jsonl --output data/demo/preferences.jsonl.gz \
        --num_generations 6 --scorer trainers.generation.rewards.vader_sentiment

With `--answers alpaca_eval`, `arena_hard` or `mt_bench` in place of `--scorer`, `--prompts` is the question file of
that benchmark, and the output holds one answer to each question, as its judge reads them.

`--num_processes 8` uses several GPUs. A run that was killed goes on where it stopped when the same
command is given again; the samples are the same as those of an uninterrupted run. While there are no scores,
`--scorer` may be another. Every column of a prompt row
(`split`, `topic`, ...) is copied to its output row.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from transformers import AutoTokenizer

from polypo.recipes import shipped

from ..config import option
from ..data.json_rows import digest
from ..data.load import read_dataset
from ..data.rows import prompt_to_answer
from ..forward.policy import find_adapter
from ..generation import SamplingConfig, collect_samples, collect_scores, summarize
from ..generation.collect import MADE, columns_of
from ..generation.engine import opened
from ..generation.options import DTYPES
from ..generation.sampler import encode_prompts
from ..generation.scorer import as_mapping, asked_of_servers, check_scorer, compared_scorer
from ..generation.start import Weights, dtype_for_all
from ..runs.files import read_json, read_rows, write_json, write_rows
from ..runs.processes import Processes, free_memory, join_launcher
from ..runs.settings import model_fingerprint, refuse_other_settings, run_settings
from ..runs.stage import Stage
from . import config_files, judges

REPLACED_COLUMNS = (*MADE, "chosen", "rejected")
WAYS_OUT = "choose another output, or start over with --overwrite"
Made = tuple[dict[str, float], Callable[[Path], None]]  # statistics, and what writes the output


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(SamplingConfig):
    """Options of `polypo generate`."""

    model: str = option(MISSING, "Folder or hub id of the policy; a folder with a PEFT adapter works too.")
    prompts: str = option(MISSING, "A .jsonl or .jsonl.gz file, or the hub id of a data set, with `prompt`.")
    output: str = option(MISSING, "File to write: .jsonl or .jsonl.gz, and .json for alpaca_eval.")
    scorer: list[str] | None = option(
        None,
        "Import path of a reward function, folder or hub id of a reward model, or JSON that names a server. Several "
        "give the sum, with weights written as NAME=0.5; a folder whose own name ends so is not cut.",
    )
    answers: str | None = option(
        None,
        "In place of a scorer: the benchmark whose questions `prompts` is. One answer each, as its judge reads it.",
        choices=list(judges.QUESTIONS),
    )
    generator: str | None = option(None, "Name of the policy in an answer file; by default that of the file.")
    dtype: str = option("float32", "Weights of the policy; fast is bfloat16 where that is fast.", choices=DTYPES)
    scorer_batch_size: int = option(8, "Texts per forward pass or request of a reward model.", at_least=1)
    split: str = option("train", "Split to take from a hub data set of prompts.")
    limit: int | None = option(None, "Use the first so many prompts.", at_least=1)
    as_chat: bool = option(False, "Make plain-text prompts user messages.")
    overwrite: bool = option(False, "Delete an earlier output and its partial results.")
    dry_run: bool = option(False, "Say how much would be sampled and what servers would be asked.")

    def __post_init__(self):
        super().__post_init__()
        if bool(self.scorer) == bool(self.answers):
            raise ValueError(
                "give --scorer, for scored rows, or --answers, for a judge's answer file: one of the two."
            )
        if self.answers:
            judges.check_output(self.output, self.answers)

    @property
    def name(self) -> str:
        """Of the policy in an answer file."""
        return self.generator or Path(self.output).stem


def load_prompts(args: GenerateArguments) -> list[dict]:
    """Rows with a `prompt`, in order. Raises ValueError naming the row that has none, or where there is no row."""
    if args.answers:
        return judges.read_questions(args.prompts, args.answers)[: args.limit]
    path = Path(shipped(args.prompts))
    rows = read_rows(path) if path.is_file() else list(read_dataset(args.prompts, args.split))
    if not rows:
        raise ValueError(f"--prompts: {args.prompts} has no rows.")
    for i, row in enumerate(rows[: args.limit]):
        prompt = prompt_to_answer(row, f"--prompts: row {i}")
        if args.as_chat and isinstance(prompt, str):
            row["prompt"] = [{"role": "user", "content": prompt}]
    return rows[: args.limit]


def parse_scorers(specs: list | None) -> list[dict]:
    """`NAME`, `NAME=weight`, JSON or mappings -> the dicts `load_scorer` takes. A folder that exists is a NAME.

    Raises:
        ValueError: JSON that cannot be read.
    """
    return [_named(spec) if isinstance(spec, str) else spec for spec in specs or []]


def _named(spec: str) -> dict:
    if (own := as_mapping(spec)) != {"spec": spec}:
        return own
    name, _, weight = spec.rpartition("=")
    if name and not Path(spec).is_dir():  # whose name may have such a sign
        with suppress(ValueError):
            return {"spec": name, "weight": float(weight)}
    return {"spec": spec, "weight": 1.0}


def settings_of(args: GenerateArguments, rows: list[dict]) -> dict:
    """What the output depends on. Batch sizes and paths of files do not belong here."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "dtype")
    own = {name: getattr(args, name) for name in names}
    if args.answers:
        own |= {"answers": args.answers, "generator": args.name}
    else:
        own |= {"num_generations": args.num_generations, "scorer": compared_scorer(parse_scorers(args.scorer))}
    return run_settings(model=model_fingerprint(args.model) or args.model, prompts=digest(rows), **own)


def policy_of(args: GenerateArguments) -> Weights:
    """What is sampled from: a model, or an adapter on the base that it names."""
    tokenizer, adapter = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False), find_adapter(args.model)
    if adapter is None:
        return Weights(args.model, None, tokenizer, args.dtype)
    base = adapter.base_model_name_or_path or ""
    return Weights(base, Path(args.model), tokenizer, args.dtype, {"revision": adapter.revision or "main"})


def scored(args: GenerateArguments, parts: Path, rows: list[dict]) -> Made:
    """Samples and scores, kept in `parts`."""
    prompts = [row["prompt"] for row in rows]
    samples = collect_samples(parts, lambda: opened(args.engine, policy_of(args), parts), prompts, args)
    free_memory()  # for the reward model
    responses = [[sample.text for sample in drawn] for drawn in samples]
    scorer = parse_scorers(args.scorer)
    scores, counts = collect_scores(parts, scorer, rows, responses, batch_size=args.scorer_batch_size)

    def write(output: Path) -> None:
        cut = [[sample.truncated for sample in drawn] for drawn in samples]
        write_rows(output, (
            dict(zip(MADE, made, strict=True)) | {k: v for k, v in row.items() if k not in REPLACED_COLUMNS}
            for row, *made in zip(rows, prompts, responses, scores, cut, strict=True)
        ))  # fmt: skip

    return summarize(samples, scores) | counts, write


def answered(args: GenerateArguments, parts: Path, rows: list[dict]) -> Made:
    """Answers to the questions of a benchmark, kept in `parts`."""
    assert args.answers
    policy = policy_of(args)
    samples = judges.sample_answers(
        parts, lambda: opened(args.engine, policy, parts), rows, args, answers=args.answers,
        chat=policy.tokenizer.chat_template is not None,
    )  # fmt: skip
    return summarize(samples), partial(
        judges.write_answers, questions=rows, samples=samples, answers=args.answers, generator=args.name
    )


def release_samples(stage: Stage) -> None:
    """Samples that none has scored yet become those of this scorer, as another may be given after one that failed."""
    path = stage.folder / stage.settings_name
    if path.exists() and not any(file.stat().st_size for file in stage.folder.glob("scores-*.jsonl")):
        saved = read_json(path)["settings"]
        if "scorer" in saved.keys() & stage.settings.keys():
            replace(stage, settings=saved | {"scorer": stage.settings["scorer"]}).write_settings()


def generate(args: GenerateArguments) -> dict:
    """Samples, scores, writes; returns the statistics.

    Raises:
        ValueError: the output, or what is there of it, was made with other settings or by something else.
    """
    processes, rows = Processes(), load_prompts(args)
    args = replace(args, dtype=dtype_for_all(args.dtype, processes.device))  # its settings hold on another machine too
    if args.scorer:
        check_scorer(parse_scorers(args.scorer), columns_of(rows))
    output, manifest, parts, gone = (
        Path(f"{args.output}{end}") for end in ("", ".manifest.json", ".parts", ".parts.done")
    )
    stage = Stage(parts, settings_of(args, rows), ways_out=WAYS_OUT)

    def clear() -> None:
        shutil.rmtree(gone, ignore_errors=True)
        if args.overwrite:
            shutil.rmtree(parts, ignore_errors=True)
            output.unlink(missing_ok=True)

    processes.main(clear)
    if output.exists() and not parts.exists():  # the parts go last
        if not manifest.exists():
            raise ValueError(f"{output} exists, but not {manifest.name}: choose another --output or --overwrite.")
        made = json.loads(manifest.read_text())
        refuse_other_settings(manifest, made["settings"], stage.settings, ways_out=WAYS_OUT)
        processes.say(f"{output} is complete already.")
        return made["statistics"]
    processes.main(lambda: release_samples(stage))
    stage.open()
    make = answered if args.answers else scored
    statistics, write_output = make(args, parts, rows)

    def write() -> None:
        write_output(output)
        used = {"model": args.model, "prompts": args.prompts, "batch_size": args.batch_size}  # told, not compared
        used |= {name: version(name) for name in ("torch", "transformers")}
        known = {"settings": stage.settings, "hash": stage.key, "statistics": statistics}
        write_json(manifest, {**known, "made_with": used})
        # Renamed first: half of its files would be sampled anew after a kill amid their deletion, or refused.
        shutil.rmtree(parts.rename(gone))

    processes.main(write)
    return statistics


def plan(args: GenerateArguments) -> str:
    """How much would be sampled, and what servers would be asked; reads prompts and tokenizer alone."""
    rows, scorer = load_prompts(args), parse_scorers(args.scorer)
    if args.answers:
        return f"{len(rows):,} questions, answers of at most {args.max_new_tokens:,} tokens"
    check_scorer(scorer, columns_of(rows))
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    lengths = map(len, encode_prompts(tokenizer, [row["prompt"] for row in rows]))
    responses = len(rows) * args.num_generations
    tokens = args.num_generations * sum(length + args.max_new_tokens for length in lengths)
    told = f"{len(rows):,} prompts, {responses:,} responses of at most {args.max_new_tokens:,} tokens"
    return "\n  ".join([told, *asked_of_servers(scorer, responses, tokens, args.scorer_batch_size)])


def main(argv: list[str]) -> None:
    accelerator = join_launcher()
    (args,) = config_files.read(argv, GenerateArguments)
    if args.dry_run:
        accelerator.print(plan(args))
        return accelerator.end_training()
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    statistics = generate(args)
    lines = [f"  {name.replace('_', ' '):<38}{value:>12,}" for name, value in statistics.items()]
    accelerator.print("\n".join([args.output, *lines]))
    accelerator.end_training()
