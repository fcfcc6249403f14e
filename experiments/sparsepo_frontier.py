"""Sentiment control in miniature: reward against KL for DPO, TDPO1, MaPO and SparsePO over several beta.

    python scripts/sparsepo_frontier.py --model ../shared/models/stories260K

A small story model is the reference. Story openings are continued by it and scored by VADER; per opening the best
sample is preferred to the worst and the second best to the second worst. Every method is trained on these pairs, and
sampled on openings that were not trained on. The KL is that of the policy from the reference over whole responses,
estimated on the policy's own samples (temperature 1, no cuts): the sum over positions of the exact KL of the two
next-token distributions. Finished runs are never repeated, so a killed or extended experiment goes on.
sparsepo_frontier_report.py turns the results into a table and a picture.
"""

import argparse
import itertools
import json
import random
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.sparsepo_frontier_report import write_report
from trainers import SparsePOConfig, SparsePOTrainer
from trainers.generation import sample_responses
from trainers.generation.rewards import vader_sentiment
from trainers.generation.sampler import Sample, SamplingConfig, encode_prompt
from trainers.runs.files import append_records, read_journal, repair_journal, write_json, write_rows
from trainers.runs.settings import refuse_other_settings

DENSE = {"mask_init": "dense"}
METHODS = {
    "DPO": {"mask": "ones", "kl_term": "none"},
    "TDPO1": {"mask": "ones"},
    "MaPO": {"mask": "activations"},
    "SparsePO common": {"mask": "learned", **DENSE},
    "SparsePO independent": {"mask": "learned", "independent": True, **DENSE},
}
BETAS = [0.05, 0.2, 0.8, 3.2]
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
NAMES = {
    "train": ["Lily", "Tom", "Sue", "Max", "Mia", "Ben"],
    "test": ["Anna", "Tim", "Lucy", "Jack"],
}


def main() -> None:
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
    options = parser.parse_args()
    experiment = Experiment(options)
    for seed, beta, method in itertools.product(options.seeds, options.betas, options.methods):
        experiment.run(method, beta, seed)
    write_report(options.output, options.report)


class Experiment:
    """The reference, its pairs and the results so far, in one folder."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.folder = options, options.output
        self.folder.mkdir(parents=True, exist_ok=True)
        shared = ("samples", "eval_samples", "epochs", "learning_rate", "mask_learning_rate")
        settings = {name: getattr(options, name) for name in shared} | {"model": Path(options.model).name}
        manifest = self.folder / "manifest.json"
        if manifest.exists():
            before = json.loads(manifest.read_text())["settings"]
            refuse_other_settings(manifest, before, settings, ways_out="choose another --output")
        write_json(manifest, {"settings": settings})
        self.journal = self.folder / "results.jsonl"
        self.journal.touch()
        repair_journal(self.journal)
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.rows = self._pairs()
        self.test = prompts("test")
        self.done = {(r["method"], r["beta"], r["seed"]) for r in read_journal(self.journal)}
        if ("reference", 0.0, 0) not in self.done:
            self._record("reference", 0.0, 0, self.measure(self.reference(), 0))

    def reference(self):
        return AutoModelForCausalLM.from_pretrained(self.options.model, dtype=torch.float32)

    def run(self, method: str, beta: float, seed: int) -> None:
        """Train and measure, unless that was done already."""
        if (method, beta, seed) in self.done:
            return
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            options = self.options
            learned = METHODS[method]["mask"] == "learned"
            args = SparsePOConfig(
                output_dir=scratch, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
                learning_rate=options.learning_rate, lr_scheduler_type="cosine", warmup_steps=0.1,
                num_train_epochs=options.epochs, per_device_train_batch_size=32, logging_steps=4, seed=seed,
                beta=beta, mask_learning_rate=options.mask_learning_rate if learned else None, **METHODS[method],
            )  # fmt: skip
            trainer = SparsePOTrainer(
                self.reference(),
                args=args,
                train_dataset=Dataset.from_list(self.rows),
                processing_class=self.tokenizer,
            )
            trainer.train()
        seconds = time.monotonic() - start
        history = [log for log in trainer.state.log_history if "loss" in log]
        self._record(method, beta, seed, {**self.measure(trainer.model, seed), "seconds": seconds, "history": history})

    def measure(self, policy, seed: int) -> dict:
        """Sentiment, KL from the reference and length of samples on held-out openings: means, and one per opening."""
        count = self.options.eval_samples
        config = SamplingConfig(
            num_generations=count, max_new_tokens=TOKENS, temperature=1.0, top_p=1.0, batch_size=144, seed=1000 + seed
        )
        samples = sample_responses(policy, self.tokenizer, self.test, config, progress=False)
        flat = [(prompt, sample) for prompt, row in zip(self.test, samples, strict=True) for sample in row]
        scores = vader_sentiment([p for p, _ in flat], [sample.text for _, sample in flat])
        kls = [self._kl(policy, prompt, sample) for prompt, sample in flat]
        values = {"reward": scores, "kl": [k for k, _ in kls], "logratio": [r for _, r in kls],
                  "tokens": [float(len(sample.token_ids)) for _, sample in flat]}  # fmt: skip
        found = {name: sum(v) / len(v) for name, v in values.items()}
        by_opening = {name: [sum(v[i : i + count]) / count for i in range(0, len(v), count)]
                      for name, v in values.items()}  # fmt: skip
        return found | {"by_opening": by_opening, "text": flat[0][1].text}

    @torch.no_grad()
    def _kl(self, policy, prompt: str, sample: Sample) -> tuple[float, float]:
        """Sum over positions of the exact KL(policy || reference) along a sample, and the sample's log-ratio."""
        ids = encode_prompt(self.tokenizer, prompt)
        row, targets = torch.tensor([ids + sample.token_ids]), torch.tensor(sample.token_ids)
        self._fixed = getattr(self, "_fixed", None) or self.reference()
        ours, theirs = (
            model(input_ids=row).logits[0, len(ids) - 1 : -1].double().log_softmax(-1)
            for model in (policy, self._fixed)
        )
        kl = (ours.exp() * (ours - theirs)).sum()
        return float(kl), float((ours - theirs).gather(-1, targets.unsqueeze(-1)).sum())

    def _pairs(self) -> list[dict]:
        """Tokenised pairs of the reference's samples, made once."""
        path = self.folder / "pairs.jsonl"
        if not path.exists():
            openings = prompts("train")
            config = SamplingConfig(num_generations=self.options.samples, max_new_tokens=TOKENS, temperature=1.0,
                                    top_p=1.0, batch_size=144)  # fmt: skip
            samples = sample_responses(self.reference(), self.tokenizer, openings, config)
            rows = []
            for prompt, row in zip(openings, samples, strict=True):
                scores = vader_sentiment([prompt] * len(row), [sample.text for sample in row])
                order = sorted(range(len(row)), key=lambda i: -scores[i])
                for best, worst in ((order[0], order[-1]), (order[1], order[-2])):
                    if scores[best] > scores[worst]:
                        pair = (best, worst)
                        rows.append({"prompt_ids": encode_prompt(self.tokenizer, prompt),
                                     "response_ids": [row[i].token_ids for i in pair],
                                     "scores": [scores[i] for i in pair]})  # fmt: skip
            write_rows(path, rows)
        return [json.loads(line) for line in path.read_text().splitlines()]

    def _record(self, method: str, beta: float, seed: int, result: dict) -> None:
        append_records(self.journal, [{"method": method, "beta": beta, "seed": seed, **result}])
        self.done.add((method, beta, seed))
        print(
            f"{method}, beta {beta}, seed {seed}: reward {result['reward']:.3f}, KL {result['kl']:.2f}, "
            f"{result.get('seconds', 0):.0f} s", flush=True,
        )  # fmt: skip


def prompts(split: str) -> list[str]:
    """All openings of a split, in a fixed random order; the splits share no name."""
    found = [opening.format(kind=kind, name=name) for opening in OPENINGS for kind in KINDS for name in NAMES[split]]
    random.Random(0).shuffle(found)
    return found


if __name__ == "__main__":
    main()
