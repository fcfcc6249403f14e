"""Sentiment control in miniature: reward against KL for DPO, TDPO1, MaPO and SparsePO over several beta.

    python -m experiments.sparsepo_frontier --model ../shared/models/stories260K

A small story model is the reference. Story openings are continued by it and scored by VADER; per opening the best
sample is preferred to the worst and the second best to the second worst. Every method is trained on these pairs, and
sampled on openings that were not trained on. The KL is that of the policy from the reference over whole responses,
estimated on the policy's own samples (temperature 1, no cuts): the sum over positions of the exact KL of the two
next-token distributions. Finished runs are never repeated, so a killed or extended experiment goes on. At the end a
summary (JSON), its tables (Markdown) and a picture (SVG) are written beside each other.
"""

import argparse
import itertools
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers import SparsePOConfig, SparsePOTrainer
from trainers.generation import sample_responses
from trainers.generation.rewards import vader_sentiment
from trainers.generation.sampler import Sample, SamplingConfig, encode_prompt
from trainers.pages import plots
from trainers.pages.text import interval, markdown
from trainers.runs.files import append_records, read_journal, read_rows, repair_journal, write_atomic, write_rows
from trainers.runs.stage import Stage
from trainers.statistics import bootstrap_interval, t_interval

DENSE = {"mask_init": "dense"}
METHODS = {
    "DPO": {"mask": "ones", "kl_term": "none"},
    "TDPO1": {"mask": "ones"},
    "MaPO": {"mask": "activations"},
    "SparsePO common": {"mask": "learned", **DENSE},
    "SparsePO independent": {"mask": "learned", "independent": True, **DENSE},
}
BETAS = [0.05, 0.2, 0.8, 3.2]
EQUAL_KL = (6.0, 9.0, 12.0, 18.0)  # nats at which methods are compared
TOKENS = 64  # per response
OPENINGS = [
    "Once upon a time, there was a {kind} named {name}. One day, {name}",
    "{name} was a {kind} who lived near the woods. In the morning, {name}",
    "One day, a {kind} named {name} went outside. It was raining and {name}",
    "There was a {kind} called {name}. {name} had a best friend, but",
    "{name} the {kind} found a big box. Inside the box,",
    "It was late and {name} the {kind} could not sleep. Then",
]
KINDS = ["little girl", "little boy", "small dog", "brown bear", "shy cat", "old man"]
NAMES = {"train": ["Lily", "Tom", "Sue", "Max", "Mia", "Ben"], "test": ["Anna", "Tim", "Lucy", "Jack"]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="../shared/models/stories260K", help="folder of the reference model")
    parser.add_argument("--output", type=Path, default=Path("runs/sparsepo-frontier"))
    parser.add_argument("--report", type=Path, default=Path("docs/results/sparsepo-frontier"), help="path, no suffix")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--betas", nargs="+", type=float, default=BETAS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--samples", type=int, default=8, help="per training opening")
    parser.add_argument("--eval-samples", type=int, default=2, help="per held-out opening")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--mask-learning-rate", type=float, default=1e-2)
    options = parser.parse_args(argv)
    experiment = Experiment(options)
    for seed, beta, method in itertools.product(options.seeds, options.betas, options.methods):
        experiment.run(method, beta, seed)
    write_report(summarize(experiment.settings, len(experiment.rows), experiment.records()), options.report)


class Experiment:
    """The reference, its pairs and the results so far, in one folder."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        names = ("samples", "eval_samples", "epochs", "learning_rate", "mask_learning_rate")
        self.settings = {name: getattr(options, name) for name in names} | {"model": Path(options.model).name}
        self.folder = Stage(options.output, self.settings, ways_out="choose another --output").open()
        self.journal = self.folder / "results.jsonl"
        self.journal.touch()
        repair_journal(self.journal)
        self.tokenizer, self.fixed = AutoTokenizer.from_pretrained(options.model), self.reference()
        self.rows, self.test = self._pairs(), prompts("test")
        self.run("reference", 0.0, 0)

    def reference(self):
        return AutoModelForCausalLM.from_pretrained(self.options.model, dtype=torch.float32)

    def records(self) -> list[dict]:
        return read_journal(self.journal)

    def run(self, method: str, beta: float, seed: int) -> None:
        """Train (but for the reference) and measure, unless that was done already."""
        key = {"method": method, "beta": beta, "seed": seed}
        if any(key.items() <= record.items() for record in self.records()):
            return
        start, history, policy = time.monotonic(), [], self.fixed
        if method != "reference":
            policy, history = self._train(method, beta, seed)
        seconds = time.monotonic() - start
        result = {**self.measure(policy, seed), "seconds": seconds, "history": history}
        append_records(self.journal, [key | result])
        print(f"{key}: reward {result['reward']:.3f}, KL {result['kl']:.2f}, {seconds:.0f} s", flush=True)

    def _train(self, method: str, beta: float, seed: int) -> tuple:
        options, learned = self.options, METHODS[method]["mask"] == "learned"
        with tempfile.TemporaryDirectory() as scratch:
            args = SparsePOConfig(
                output_dir=scratch, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
                learning_rate=options.learning_rate, lr_scheduler_type="cosine", warmup_steps=0.1,
                num_train_epochs=options.epochs, per_device_train_batch_size=32, logging_steps=4, seed=seed,
                beta=beta, mask_learning_rate=options.mask_learning_rate if learned else None, **METHODS[method],
            )  # fmt: skip
            rows = Dataset.from_list(self.rows)
            trainer = SparsePOTrainer(self.reference(), args=args, train_dataset=rows, processing_class=self.tokenizer)
            trainer.train()
        return trainer.model, [log for log in trainer.state.log_history if "loss" in log]

    def sample(self, policy, openings: list[str], count: int, seed: int = 0) -> list[list[Sample]]:
        config = SamplingConfig(num_generations=count, max_new_tokens=TOKENS, temperature=1.0, top_p=1.0,
                                batch_size=144, seed=seed)  # fmt: skip
        return sample_responses(policy, self.tokenizer, openings, config, progress=False)

    def measure(self, policy, seed: int) -> dict:
        """Sentiment, KL from the reference and length of samples on held-out openings: means, and one per opening."""
        count = self.options.eval_samples
        samples = self.sample(policy, self.test, count, 1000 + seed)
        flat = [(prompt, sample) for prompt, row in zip(self.test, samples, strict=True) for sample in row]
        kls, logratios = zip(*(self._kl(policy, prompt, sample) for prompt, sample in flat), strict=True)
        values = {
            "reward": vader_sentiment([p for p, _ in flat], [sample.text for _, sample in flat]),
            "kl": kls,
            "logratio": logratios,
            "tokens": [float(len(sample.token_ids)) for _, sample in flat],
        }
        by_opening = {name: np.reshape(v, (-1, count)).mean(1).tolist() for name, v in values.items()}
        means = {name: float(np.mean(v)) for name, v in values.items()}
        return means | {"by_opening": by_opening, "text": flat[0][1].text}

    @torch.no_grad()
    def _kl(self, policy, prompt: str, sample: Sample) -> tuple[float, float]:
        """Sum over positions of the exact KL(policy || reference) along a sample, and the sample's log-ratio."""
        ids = encode_prompt(self.tokenizer, prompt)
        row, targets = torch.tensor([ids + sample.token_ids]), torch.tensor(sample.token_ids)
        ours, theirs = (
            model(input_ids=row).logits[0, len(ids) - 1 : -1].double().log_softmax(-1)
            for model in (policy, self.fixed)
        )
        kl = (ours.exp() * (ours - theirs)).sum()
        return float(kl), float((ours - theirs).gather(-1, targets.unsqueeze(-1)).sum())

    def _pairs(self) -> list[dict]:
        """Tokenised pairs of the reference's samples, made once."""
        path = self.folder / "pairs.jsonl"
        if not path.exists():
            openings, rows = prompts("train"), []
            for prompt, row in zip(openings, self.sample(self.fixed, openings, self.options.samples), strict=True):
                scores = vader_sentiment([prompt] * len(row), [sample.text for sample in row])
                order = sorted(range(len(row)), key=lambda i: -scores[i])
                for pair in ((order[0], order[-1]), (order[1], order[-2])):
                    if scores[pair[0]] > scores[pair[1]]:
                        rows.append({"prompt_ids": encode_prompt(self.tokenizer, prompt),
                                     "response_ids": [row[i].token_ids for i in pair],
                                     "scores": [scores[i] for i in pair]})  # fmt: skip
            write_rows(path, rows)
        return read_rows(path)


def prompts(split: str) -> list[str]:
    """All openings of a split, in a fixed random order; the splits share no name."""
    texts = [opening.format(kind=kind, name=name) for opening in OPENINGS for kind in KINDS for name in NAMES[split]]
    random.Random(0).shuffle(texts)
    return texts


# The report.


def summarize(settings: dict, pairs: int, records: list[dict]) -> dict:
    """The reference, and one point per method and beta: means over seeds with t intervals, and the last masks."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault((record["method"], record["beta"]), []).append(record)
    (reference,) = groups.pop(("reference", 0.0))
    points = []
    for (method, beta), runs in sorted(groups.items(), key=lambda item: (list(METHODS).index(item[0][0]), item[0][1])):
        names = ("reward", "kl", "logratio", "tokens", "seconds")
        point = {"method": method, "beta": beta, "seeds": sorted(run["seed"] for run in runs)}
        point |= {name: t_interval([run[name] for run in runs]) for name in names}
        last = [run["history"][-1] if run["history"] else {} for run in runs]
        masks = [f"mask_{what}/{mask}_chosen" for mask in ("reward", "kl") for what in ("mean", "sparsity")]
        for name in ("rewards/accuracies", *masks):
            if all(name in log for log in last):
                point[name] = sum(log[name] for log in last) / len(last)
        points.append(point)
    by_opening = reference["by_opening"]
    trained = [run for runs in groups.values() for run in runs]
    return {"settings": settings, "pairs": pairs, "held_out_openings": len(by_opening["reward"]),
            "reference": {name: bootstrap_interval(values) for name, values in by_opening.items()},
            "points": points, "at_equal_kl": at_equal_kl(trained)}  # fmt: skip


def at_equal_kl(records: list[dict], baseline: str = "DPO") -> dict[str, dict]:
    """Reward of each method minus that of `baseline` at the same KL, both read off the seed's own line through beta.

    {method: {KL: t interval over the seeds whose two lines reach that KL, or None}}
    """
    lines: dict[tuple, list] = {}
    for record in records:
        lines.setdefault((record["method"], record["seed"]), []).append((record["kl"], record["reward"]))
    lines = {key: sorted(points) for key, points in lines.items() if len(points) > 1}

    def reward(method: str, seed: int, kl: float) -> float:
        kls, rewards = zip(*lines.get((method, seed), [(np.nan, np.nan)]), strict=True)
        return float(np.interp(kl, kls, rewards, left=np.nan, right=np.nan))

    gains = {}
    for method in dict.fromkeys(m for m, _ in lines if m != baseline):
        seeds = [seed for m, seed in lines if m == method]
        for kl in EQUAL_KL:
            pairs = [reward(method, seed, kl) - reward(baseline, seed, kl) for seed in seeds]
            reached = [gain for gain in pairs if not np.isnan(gain)]
            gains.setdefault(method, {})[f"{kl:g}"] = t_interval(reached) if reached else None
    return gains


def write_report(summary: dict, target: Path) -> None:
    """Writes `target`.json (the summary), `target`.md (its tables) and `target`.svg."""
    target.parent.mkdir(parents=True, exist_ok=True)
    files = {".json": json.dumps(summary, indent=1) + "\n", ".md": tables(summary), ".svg": plot(summary)}
    for suffix, text in files.items():
        write_atomic(Path(f"{target}{suffix}"), text.encode())
    print(files[".md"])


def tables(summary: dict) -> str:
    """Markdown: one row per method and beta, and the gains over DPO at the same KL."""
    head = ["method", "beta", "sentiment", "KL, nats", "sampled log-ratio", "tokens", "mean m_u", "zeros in m_u, %",
            "training, s"]  # fmt: skip
    base = {name: value["mean"] for name, value in summary["reference"].items()}
    rows = [["reference", "", f"{base['reward']:.3f}", "0", "0", f"{base['tokens']:.1f}", "", "", ""]]
    for point in summary["points"]:
        mask = [point.get(f"mask_{what}/reward_chosen") for what in ("mean", "sparsity")]
        rows.append([
            point["method"], f"{point['beta']:g}", interval(point["reward"]), interval(point["kl"], ".2f"),
            interval(point["logratio"], ".2f"), interval(point["tokens"], ".1f"),
            *("" if m is None else f"{m:.2f}" for m in mask), f"{point['seconds']['mean']:.0f}",
        ])  # fmt: skip
    gains = [
        [method, *(f"{interval(v, '+.3f')} (n={v['count']})" if v else "not reached" for v in row.values())]
        for method, row in summary["at_equal_kl"].items()
    ]
    equal = ["minus DPO at the same KL", *(f"{kl:g} nats" for kl in EQUAL_KL)]
    return markdown(head, rows) + "\n" + markdown(equal, gains)


def plot(summary: dict) -> str:
    """Reward against KL: a line per method through its betas, with the seeds' t intervals."""
    series = []
    for method, marker in zip(METHODS, "osD^v", strict=True):
        points = [p for p in summary["points"] if p["method"] == method]
        points.sort(key=lambda p: p["kl"]["mean"])
        notes = [f"{p['beta']:g}" for p in points]
        x, y = ([p[name] for p in points] for name in ("kl", "reward"))
        series.append(plots.Series(method, x, y, f"{marker}-", notes=notes))
    return plots.chart(
        "Reward against KL; numbers are beta, bars 95 % t intervals over seeds",
        "KL(policy || reference) of whole responses, nats",
        series,
        ylabel=f"VADER sentiment (reference: {summary['reference']['reward']['mean']:.2f})",
        xlim=(0, None),
        size=(8.2, 5.2),
    )


if __name__ == "__main__":
    main()
