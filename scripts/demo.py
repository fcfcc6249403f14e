"""`make demo`: trains SWEPO on a small real model and measures what it learned on prompts it has not seen.

    python scripts/demo.py

Everything runs on the CPU and lands in runs/; runs/demo/report.html needs no network. Each prompt is sampled with the
same random streams by every policy, so samples differ only by what was learned. Checkpoints of the training answer
prompts that are held out for it, and show what each further step costs; the test prompts are for the end alone.
"""

import os
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from math import ceil
from pathlib import Path

import torch
import yaml
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from trainers.cli import train
from trainers.cli.answers import Answer, compare_answers, matched_gain
from trainers.cli.compare_samples import SampleOptions, sample_and_measure, score
from trainers.cli.dry_run import read_splits
from trainers.cli.probe import measure
from trainers.cli.report import write_report
from trainers.data.tokenization import UNFINISHED, prepare_dataset
from trainers.generation import sample_responses
from trainers.generation.scorer import load_scorer
from trainers.metrics import pairwise_accuracy
from trainers.pages.text import interval
from trainers.precision import instructions
from trainers.runs.files import read_rows, write_json, write_rows
from trainers.statistics import bootstrap_interval

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Path("configs/swepo/demo.yaml")
PREFERENCES = Path("data/demo/preferences.jsonl.gz")
ALL_ROWS = Path("runs/data/demo")  # the same rows as they are, by split: other recipes read them
TRAIN = ["accelerate", "launch", "--cpu", "--num_processes", "1", "scripts/train.py", "--config", str(CONFIG)]
SCORER = "trainers.generation.rewards.vader_sentiment"
# In float32: CPUs generate several times faster in it than in bfloat16.
SAMPLING = SampleOptions(
    prompts=60, num_generations=2, max_new_tokens=64, temperature=0.8, top_p=0.95, batch_size=60, seed=1,
    dtype="float32", scorer=SCORER,
)  # fmt: skip
COURSE = replace(SAMPLING, prompts=20, batch_size=40)
RANKED = 30  # test prompts whose given answers are ranked
PACKAGES = ("polypo", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "vaderSentiment")

# Offline, one thread per core, and without the libraries' start-up notices, which would bury the progress bars.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    "ACCELERATE_LOG_LEVEL": "ERROR",
    "DS_ACCELERATOR": "cpu",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


class Stages:
    """Prints `[2/6] title` and keeps the seconds of each stage."""

    def __init__(self, count: int):
        self.count, self.seconds = count, {}

    @contextmanager
    def __call__(self, title: str):
        print(f"\n[{len(self.seconds) + 1}/{self.count}] {title}", flush=True)
        start = time.monotonic()
        yield
        self.seconds[title] = time.monotonic() - start


def main() -> None:
    os.chdir(ROOT)
    os.environ.update(ENVIRONMENT)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable_progress_bar()
    disable_progress_bars()
    config, stage = yaml.safe_load(CONFIG.read_text()), Stages(7)
    output, model = Path(config["output_dir"]), config["model_name_or_path"]

    with stage("Getting the model and the data"):
        rows = get_model_and_data(config)
    prompts = {name: [row["prompt"] for row in part] for name, part in rows.items()}
    with stage("Timing a step, to tell how long all of it will take"):
        dtype, estimate = foresee(config, prompts["test"])
        print(estimate, flush=True)
    with stage("Before training: answers to prompts that are not trained on"):
        before = sample(model, None, prompts["test"], SAMPLING)[0]
        start = sample(model, None, prompts["validation"], COURSE)
        course = [point(0, *start, before=start[0])]
    with stage(f"Training: {' '.join(TRAIN)}"):
        run_training(output)
    with stage("The course of the training: the checkpoints answer held-out prompts"):
        for folder in sorted(output.glob("checkpoint-*"), key=step_of):
            course.append(point(step_of(folder), *sample(model, folder, prompts["validation"], COURSE), start[0]))
    with stage("After training: the test prompts, and the ranking of given answers to them"):
        after, logratios = sample(model, output, prompts["test"], SAMPLING)
        ranking = rank(config, dtype, rows["test"][:RANKED])
    with stage("Writing the report"):
        results = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "train_command": " ".join(TRAIN),
            "config": config | {"dtype": dtype},
            "sampling": asdict(SAMPLING),
            "machine": {"instruction set": instructions(), "threads": torch.get_num_threads()},
            "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES},
            "seconds": {name: round(seconds, 1) for name, seconds in stage.seconds.items()},
            "estimate": estimate,
            "course": course,
            "generation": compare_answers(before, after),
            "ranking": ranking,
            "checks": {
                "gain in reward at equal length": matched_gain(before, after, load_scorer(SCORER)),
                "KL to the base model, nats per answer": bootstrap_interval(logratios.mean(-1).numpy()),
            },
            "answers": [
                {"prompt": prompt[-1]["content"], "before": first, "after": second}
                for prompt, first, second in zip(prompts["test"], before, after, strict=True)
            ],
        }
        write_json(output / "results.json", results)
        write_report(output)
    print(summary(results))


def get_model_and_data(config: dict) -> dict[str, list[dict]]:
    """Makes the model folder, and one file per split, so that training reads no prompt that is sampled later."""
    model = config["model_name_or_path"]
    subprocess.run([sys.executable, "scripts/get_smollm2.py", "--output", model], check=True)
    given = read_rows(PREFERENCES)
    train_rows = [row for row in given if row["split"] == "train"]
    rows = {
        "train": [finished_first(row) for i, row in enumerate(train_rows) if i % 6],
        "validation": train_rows[::6],
        "test": [row for row in given if row["split"] == "test"],
    }
    files = {Path(config["dataset_name"]) / f"{name}.jsonl.gz": part for name, part in rows.items()}
    files |= {ALL_ROWS / "train.jsonl.gz": train_rows, ALL_ROWS / "test.jsonl.gz": rows["test"]}
    for path, part in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, part)
        print(f"{path}: {len(part)} prompts, {sum(len(row['responses']) for row in part)} answers")
    return rows


def finished_first(row: dict) -> dict:
    """The row with the lowest score for answers that were cut off, or length would be learned before kindness."""
    return row | {"scores": [-1.0 if c else s for c, s in zip(row[UNFINISHED], row["scores"], strict=True)]}


def foresee(config: dict, prompts: list) -> tuple[str, str]:
    """The dtype of the training, and how long all of it will take, from a timed step and a few sampled tokens."""
    trainer_class, data, args, model = train.parse(["--config", str(CONFIG), "--use_cpu", "true"])
    tokenizer, splits, *_ = read_splits(trainer_class, data, args, model, ("train",))
    size = args.per_device_train_batch_size
    batches = [[list(range(size))], [list(range(size, 2 * size))]]  # of two steps, of which the first warms up
    step = measure(trainer_class, args, model, tokenizer, splits["train"], batches).seconds[-1]
    steps, checkpoints = config["max_steps"], config["max_steps"] // config["save_steps"]
    few, more = (time_sampling(config, prompts, tokens) for tokens in (2, 10))
    batch = few + (SAMPLING.max_new_tokens - 2) * (more - few) / 8
    sampled = SAMPLING.num_generations * (2 * SAMPLING.prompts + (1 + checkpoints) * COURSE.prompts)
    # A step is four forwards' worth, of which the ranking needs two on every four prompts.
    ranking = RANKED / size * step / 2
    # A quarter more: loading models, and comparing the answers with the base model.
    seconds = 1.25 * (steps * step + sampled / SAMPLING.batch_size * batch + ranking)
    return model.dtype, (
        f"From here about {ceil(seconds / 60)} minutes on this machine: {steps} steps of {step:.1f} s, {sampled} "
        f"answers, {SAMPLING.batch_size} of them in {batch:.0f} s or less, and {ranking:.0f} s for the ranking."
    )


def time_sampling(config: dict, prompts: list, tokens: int) -> float:
    """Seconds in which one batch of answers of so many tokens is sampled."""
    name = config["model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=SAMPLING.dtype)
    sampling = replace(SAMPLING, num_generations=1, max_new_tokens=tokens)
    begin = time.monotonic()
    sample_responses(model, tokenizer, prompts[: SAMPLING.batch_size], sampling, progress=False)
    return time.monotonic() - begin


def run_training(output: Path) -> None:
    """Runs the launcher. Its progress bar goes to the terminal, its log lines to train.log."""
    for old in output.glob("checkpoint-*"):
        shutil.rmtree(old)
    output.mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    log = output / "train.log"
    print(f"metrics go to {log}", flush=True)
    with open(log, "w") as file:
        subprocess.run(TRAIN, check=True, stdout=file, env=os.environ | {"PATH": path})


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def sample(model: str, start: Path | None, prompts: list, options: SampleOptions) -> tuple[list, torch.Tensor]:
    """Scored answers (N rows of n) of the policy in `start`, and their log-ratios (N,n) to the base model."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    measured = sample_and_measure(model, start, tokenizer, prompts, options, device="cpu", init_kwargs={})
    columns = zip(*(measured[name] for name in ("texts", "rewards", "tokens", "truncated")), strict=True)
    answers = [dict(zip(("text", "score", "tokens", "truncated"), values, strict=True)) for values in columns]
    n = options.num_generations
    return [answers[i : i + n] for i in range(0, len(answers), n)], torch.tensor(measured["logratios"]).view(-1, n)


def point(step: int, answers: list[list[Answer]], logratios: torch.Tensor, before: list[list[Answer]]) -> dict:
    """One point of the course: how far the policy is from the base model, and what that gave."""
    means = {name: row["after"] for name, row in compare_answers(before, answers).items()}
    matched = matched_gain(before, answers, load_scorer(SCORER))
    kl = bootstrap_interval(logratios.mean(-1).numpy())
    print(
        f"step {step}: reward {means['reward']['mean']:.2f}, at equal length {matched['mean']:+.2f}, KL "
        f"{kl['mean']:.1f} nats, {means['share cut off at the limit']['mean']:.0%} cut off", flush=True,
    )  # fmt: skip
    return {"step": step, "KL": kl, "gain at equal length": matched, **means}


def rank(config: dict, dtype: str, rows: list[dict]) -> dict[str, dict]:
    """Pairwise ranking accuracy of the trained policy, and of what could explain it without any learning."""
    name, adapter = config["model_name_or_path"], Path(config["output_dir"])
    tokenizer = AutoTokenizer.from_pretrained(name)
    given = Dataset.from_list([{n: row[n] for n in ("prompt", "responses", "scores", UNFINISHED)} for row in rows])
    tokens = prepare_dataset(given, tokenizer, max_length=config["max_length"])
    policy, reference = (
        torch.tensor(score(name, start, tokens, tokenizer, device="cpu", init_kwargs={"dtype": dtype}))
        for start in (adapter, None)
    )
    lengths = torch.tensor([[len(ids) for ids in row["response_ids"]] for row in tokens], dtype=torch.float)
    rankings = {
        "after": policy - reference,
        "before": torch.zeros_like(policy),
        "base model's log-probability": reference,
        "base model's log-probability per token": reference / lengths,
        "longer answer first": lengths,
    }
    scores, mask = torch.tensor(tokens["scores"]), torch.ones_like(policy, dtype=torch.bool)
    return {n: bootstrap_interval(pairwise_accuracy(r, scores, mask).numpy()) for n, r in rankings.items()}


def summary(results: dict) -> str:
    """What the demo prints at its end."""
    lines = [
        f"\nOn {len(results['answers'])} prompts that were not trained on (95 % bootstrap intervals over prompts):",
        f"  {'':32}{'before':>10}{'after':>10}{'gain':>27}",
    ]
    for name, row in results["generation"].items():
        before, after = row["before"]["mean"], row["after"]["mean"]
        lines.append(f"  {name:32}{before:10.3f}{after:10.3f}{interval(row['gain'], '+.3f'):>27}")
    lines.append("\nPairwise ranking accuracy on held-out answers (0.5 is chance):")
    names = {"after": "trained policy", "before": "policy before training (by construction)"}
    lines += [f"  {names.get(n, n):42}{interval(value):>22}" for n, value in results["ranking"].items()]
    lines += ["", *(f"{name}: {interval(value, '.2f')}" for name, value in results["checks"].items())]
    lines.append(f"Trained in {results['config']['dtype']} on a CPU with {results['machine']['instruction set']}.")
    report = Path(results["config"]["output_dir"]) / "report.html"
    return "\n".join([*lines, f"\nOpen {report} in a browser."])


if __name__ == "__main__":
    main()
