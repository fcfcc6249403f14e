"""`make demo`: trains SWEPO on a small real model and measures what it learned on prompts it has not seen.

    python scripts/demo.py

Everything runs on the CPU and lands in runs/; runs/demo/report.html needs no network. Each prompt is sampled with the
same random streams before and after training, so the two samples differ only by what was learned.
"""

import os
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import yaml
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from answers import Answer, compare_answers, matched_gain
from trainers import SWEPOConfig, SWEPOTrainer
from trainers.data.prepare import prepare_dataset
from trainers.loop.journal import read_rows, write_json, write_rows
from trainers.loop.sampler import SamplingConfig, sample_responses
from trainers.loop.scorer import load_scorer
from trainers.metrics import pairwise_accuracy
from trainers.statistics import bootstrap_interval

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Path("configs/swepo/demo.yaml")
PROMPTS, PREFERENCES = Path("data/demo/prompts.jsonl"), Path("data/demo/preferences.jsonl.gz")
TRAIN = ["accelerate", "launch", "--cpu", "--num_processes", "1", "scripts/train.py", "--config", str(CONFIG)]
SCORER = "trainers.loop.rewards.vader_sentiment"
SAMPLING = SamplingConfig(num_generations=3, max_new_tokens=64, batch_size=48, seed=1)
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
    config, stage = yaml.safe_load(CONFIG.read_text()), Stages(6)
    output = Path(config["output_dir"])

    with stage("Getting the model and the data"):
        get_model_and_data(config)
    prompts = [row["prompt"] for row in read_rows(PROMPTS) if row["split"] == "test"]
    with stage(f"Before training: sampling {SAMPLING.num_generations} answers to each of {len(prompts)} new prompts"):
        before = answer(config, prompts)
    with stage(f"Training: {' '.join(TRAIN)}"):
        train(output)
    with stage("After training: the same prompts with the same random streams"):
        after = answer(config, prompts, adapter=output)
    with stage("Ranking the held-out answers, and comparing with the base model"):
        ranking, drift = judge(config, prompts, after)
        matched = matched_gain(before, after, load_scorer(SCORER))
    with stage("Writing the report"):
        results = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "train_command": " ".join(TRAIN),
            "config": config,
            "sampling": asdict(SAMPLING) | {"scorer": SCORER},
            "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES},
            "seconds": {name: round(seconds, 1) for name, seconds in stage.seconds.items()},
            "generation": compare_answers(before, after),
            "ranking": ranking,
            "checks": {"gain in reward at equal length": matched} | drift,
            "answers": [
                {"prompt": prompt[-1]["content"], "before": first, "after": second}
                for prompt, first, second in zip(prompts, before, after, strict=True)
            ],
        }
        write_json(output / "results.json", results)
        subprocess.run([sys.executable, "scripts/report.py", str(output)], check=True)
    print(summary(results))


def get_model_and_data(config: dict) -> None:
    """Makes the model folder, and one file per split so that training never reads a held-out prompt."""
    model = ["scripts/get_smollm2.py", "--output", config["model_name_or_path"]]
    subprocess.run([sys.executable, *model], check=True)
    folder, rows = Path(config["dataset_name"]), read_rows(PREFERENCES)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        part = [row for row in rows if row["split"] == split]
        write_rows(folder / f"{split}.jsonl.gz", part)
        print(f"{folder}/{split}.jsonl.gz: {len(part)} prompts, {sum(len(row['responses']) for row in part)} answers")


def train(output: Path) -> None:
    """Runs the launcher. Its progress bar goes to the terminal, its log lines to train.log."""
    output.mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    log = output / "train.log"
    print(f"metrics go to {log}", flush=True)
    with open(log, "w") as file:
        subprocess.run(TRAIN, check=True, stdout=file, env=os.environ | {"PATH": path})


def load_policy(config: dict, adapter: Path | None = None, dtype: torch.dtype = torch.float32):
    """The base model, or the one with a trained adapter."""
    model = AutoModelForCausalLM.from_pretrained(config["model_name_or_path"], dtype=dtype)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter)


def answer(config: dict, prompts: list, adapter: Path | None = None) -> list[list[Answer]]:
    """Samples and scores answers, in float32: these CPUs generate several times faster in it than in bfloat16."""
    tokenizer = AutoTokenizer.from_pretrained(config["model_name_or_path"])
    model = load_policy(config, adapter)
    samples = sample_responses(model.merge_and_unload() if adapter else model, tokenizer, prompts, SAMPLING)
    scorer = load_scorer(SCORER)
    rows = []
    for prompt, row in zip(prompts, samples, strict=True):
        completions = [[{"role": "assistant", "content": sample.text}] for sample in row]
        scores = scorer(prompts=[prompt] * len(row), completions=completions)
        pairs = zip(row, scores, strict=True)
        rows.append(
            [{"text": s.text, "score": x, "tokens": len(s.token_ids), "truncated": s.truncated} for s, x in pairs]
        )
    return rows


def judge(config: dict, prompts: list, after: list[list[Answer]]) -> tuple[dict, dict]:
    """Ranking accuracy on the held-out rows, and how far the trained model's own answers are from the base model."""
    dtype = getattr(torch, config["dtype"])
    policy, reference = load_policy(config, config["output_dir"], dtype), load_policy(config, dtype=dtype)
    args = SWEPOConfig(
        output_dir=config["output_dir"],
        max_length=config["max_length"],
        per_device_eval_batch_size=4,
        use_cpu=True,
        report_to="none",
    )
    tokenizer = AutoTokenizer.from_pretrained(config["model_name_or_path"])
    trainer = SWEPOTrainer(policy, reference, args, processing_class=tokenizer)
    ranking = rank(trainer, read_rows(Path(config["dataset_name"]) / "test.jsonl.gz"))
    # One answer per prompt is enough for the mean drift; two make a row.
    rows = [
        {"prompt": prompt, "responses": [a["text"] for a in row[:2]], "scores": [a["score"] for a in row[:2]]}
        for prompt, row in zip(prompts, after, strict=True)
    ]
    return ranking, measure_drift(trainer, rows)


def predict(trainer: SWEPOTrainer, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Log-probabilities of policy and reference, lengths, scores and mask of the rows, each (N,K)."""
    columns = [{name: row[name] for name in ("prompt", "responses", "scores")} for row in rows]
    tokens = prepare_dataset(Dataset.from_list(columns), trainer.processing_class, max_length=trainer.args.max_length)
    output = trainer.predict(tokens)
    scores, mask = output.label_ids
    lengths = np.zeros_like(scores)
    for i, responses in enumerate(tokens["response_ids"]):
        lengths[i, : len(responses)] = [len(ids) for ids in responses]
    arrays = {"policy": output.predictions[0], "reference": output.predictions[1], "lengths": lengths}
    return {name: torch.as_tensor(a) for name, a in (arrays | {"scores": scores, "mask": mask.astype(bool)}).items()}


def rank(trainer: SWEPOTrainer, rows: list[dict]) -> dict[str, dict]:
    """Pairwise ranking accuracy of the policy, and of what could explain it without any learning."""
    found = predict(trainer, rows)
    rankings = {
        "after": found["policy"] - found["reference"],
        "before": torch.zeros_like(found["policy"]),
        "base model's log-probability": found["reference"],
        "base model's log-probability per token": found["reference"] / found["lengths"].clamp(min=1),
        "longer answer first": found["lengths"],
    }
    accuracies = {n: pairwise_accuracy(r, found["scores"], found["mask"]).numpy() for n, r in rankings.items()}
    return {name: bootstrap_interval(values) for name, values in accuracies.items()}


def measure_drift(trainer: SWEPOTrainer, rows: list[dict]) -> dict[str, dict]:
    """How unlike the base model the trained model's answers are: an estimate of KL(policy || base) per answer."""
    found = predict(trainer, rows)
    logratios = (found["policy"] - found["reference"]) * found["mask"]
    means = logratios.sum(-1) / found["mask"].sum(-1)
    return {"KL to the base model, nats per answer": bootstrap_interval(means.numpy())}


def summary(results: dict) -> str:
    """What the demo prints at its end."""
    lines = [
        f"\nOn {len(results['answers'])} prompts that were not trained on (95 % bootstrap intervals over prompts):",
        f"  {'':32}{'before':>10}{'after':>10}{'gain':>27}",
    ]
    for name, row in results["generation"].items():
        before, after = row["before"]["mean"], row["after"]["mean"]
        lines.append(f"  {name:32}{before:10.3f}{after:10.3f}{_with_interval(row['gain'], '+.3f'):>27}")
    lines.append("\nPairwise ranking accuracy on held-out answers (0.5 is chance):")
    names = {"after": "trained policy", "before": "policy before training (by construction)"}
    for name, value in results["ranking"].items():
        lines.append(f"  {names.get(name, name):42}{_with_interval(value, '.3f'):>22}")
    lines += ["", *(f"{name}: {_with_interval(value, '.2f')}" for name, value in results["checks"].items())]
    report = Path(results["config"]["output_dir"]) / "report.html"
    return "\n".join([*lines, f"\nOpen {report} in a browser."])


def _with_interval(value: dict, form: str) -> str:
    return f"{value['mean']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"


if __name__ == "__main__":
    main()
