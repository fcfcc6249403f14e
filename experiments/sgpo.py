"""SGPO on short instructions with reference answers: the recipe, its ablations, and what an outside scorer says.

    python scripts/sgpo_experiment.py --data sft_alpaca.jsonl.gz

`--data` holds `prompt` and `response`. Everything lies in runs/sgpo and resumes after a kill. The scorer is ROUGE-L
against the reference answers of prompts that no training saw; results.md has the tables of docs/results/sgpo.md.
"""

import argparse
import dataclasses
import json
import random
import shutil
from pathlib import Path

import numpy as np
import yaml
from datasets import Dataset
from transformers import AutoTokenizer

from trainers import SGPOConfig, SGPOTrainer
from trainers.cli import train
from trainers.generation.logps import collect_logps
from trainers.generation.rewards import rouge_l
from trainers.generation.start import load_start
from trainers.precision import settle_dtype
from trainers.runs.checkpoints import last_checkpoint
from trainers.runs.files import read_rows, write_atomic, write_json, write_rows
from trainers.runs.processes import Processes
from trainers.runs.settings import fingerprint
from trainers.runs.stage import train_into
from trainers.sgpo.filters import fault
from trainers.sgpo.sampling import Sampler
from trainers.sgpo.text import improver_prompt
from trainers.sgpo.training import pair
from trainers.statistics import bootstrap_interval

RECIPE = Path("configs/sgpo/alpaca.yaml")
WORDS, PROMPT_WORDS = (5, 50), 60  # of the reference answers and prompts that are taken
OF_REFERENCE = ["--reviser", "external", "--reviser_function", "trainers.sgpo.revisers.reference_answer"]
# Flags that differ from the recipe; another run, and the stages whose files are the same there.
RUNS = {
    "reference": (OF_REFERENCE, "self", ("current",)),
    "reference, narrow filter": ([*OF_REFERENCE, "--filter_factor", "0.5"], "reference", ("current", "targets")),
    "no filter": (["--filter_statistic", "none"], "self", ("current", "targets")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="JSON lines with prompt and response, .gz or not.")
    options = parser.parse_args()
    recipe = yaml.safe_load(RECIPE.read_text())
    base = Path(recipe["output_dir"])
    take_rows(Path(options.data), Path(recipe["dataset_name"]))
    flags = ["--config", str(RECIPE)]
    train.main(flags)
    experiment = Experiment(recipe, base)
    experiment.train_on_gold_pairs()
    runs = {"self": base / "round-00"}
    report(experiment, runs)
    for name, (changes, source, shared) in RUNS.items():
        if name == "no filter" and not dropped_by_fences(base):
            print("The fences drop no row, so that a run without a filter is the same run: left out.")
            continue
        folder = base.with_name(name.replace(", ", "-").replace(" ", "-"))
        share_stages(base.with_name(source), folder, shared)
        held_out = ["--dataset_test_split", ""]  # measured below, in fewer modes
        train.main([*flags, *changes, *held_out, "--output_dir", str(folder)])
        runs[name] = folder / "round-00"
        report(experiment, runs)


def report(experiment: "Experiment", runs: dict[str, Path]) -> None:
    """Writes what is known so far."""
    results = experiment.measure(runs)
    write_json(experiment.base.with_name("results.json"), results)
    text = tables(results)
    write_atomic(experiment.base.with_name("results.md"), text.encode())
    print(text)


def take_rows(source: Path, target: Path) -> None:
    """The short rows of the data in a fixed random order."""
    if target.exists():
        return
    rows = [
        {"prompt": row["prompt"], "response": row["response"]}
        for row in read_rows(source)
        if WORDS[0] <= len(row["response"].split()) <= WORDS[1] and len(row["prompt"].split()) <= PROMPT_WORDS
    ]
    random.Random(0).shuffle(rows)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_rows(target, rows)


def share_stages(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """A stage is tied to its settings and inputs and not to its folder, so that runs can have it in common."""
    for name in names:
        if not (target / "round-00" / name).exists():
            shutil.copytree(source / "round-00" / name, target / "round-00" / name)


def dropped_by_fences(base: Path) -> int:
    counts = json.loads((base / "round-00/filter/manifest.json").read_text())["counts"]
    return sum(n for reason, n in counts["dropped"].items() if "fences" in reason)


class Experiment:
    """What is done beside the stages: the gold pairs, and answers and likelihoods on held-out prompts."""

    def __init__(self, recipe: dict, base: Path):
        self.model, self.base, self.folder = recipe["model_name_or_path"], base, base.with_name("measured")
        known = {f.name for f in dataclasses.fields(SGPOConfig)}
        self.args = SGPOConfig(**{k: v for k, v in recipe.items() if k in known})
        self.init_kwargs = {"dtype": settle_dtype(recipe["dtype"], self.args.device)[0]}
        self.held_out = read_rows(base / "round-00/before/rows.jsonl.gz")
        self.sampler = Sampler(self.args, self.model, Processes())
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)

    def train_on_gold_pairs(self) -> None:
        """DPO from the same improver on the same prompts and rejected responses, but the reference is chosen."""
        rows = read_rows(self.base / "round-00/pairs/rows.jsonl.gz")
        rows = [pair(row | {"chosen": row["reference"]}) for row in rows if not fault(row["reference"])]

        def fit(folder: Path) -> None:
            policy = load_start(
                self.model, self.base / "round-00/improver/model", init_kwargs=self.init_kwargs, trainable=True
            )
            args = self.args.of_dpo(folder)
            trainer = SGPOTrainer(
                policy, args=args, train_dataset=Dataset.from_list(rows), processing_class=self.tokenizer
            )
            trainer.train(resume_from_checkpoint=last_checkpoint(folder))
            trainer.save_model()
            trainer.save_state()

        train_into(self.base.with_name("gold_pairs") / "model", fit, Processes())

    def measure(self, runs: dict[str, Path]) -> dict:
        start = self._policy("start", None, [row["answer"] for row in self.held_out], None)
        results = {"start": start["summary"], "policies": {}, "improvers": {}}
        for name, folder in runs.items():
            answers, rewrites, final = self._answers(name, folder)
            results["improvers"][name] = {
                "held-out prompts": self._compare(self.held_out, answers, rewrites),
                "prompts of the pairs": self._pairs(folder),
            }
            for label, model, texts in (("improver, plain prompt", "improver", answers), ("after DPO", "dpo", final)):
                found = self._policy(f"{name}-{model}", folder / model / "model", texts, start)
                results["policies"][f"{name}: {label}"] = found["summary"]
        model = self.base.with_name("gold_pairs") / "model"
        found = self._policy("gold_pairs", model, self._draw("gold_pairs", model), start)
        results["policies"]["self: after DPO on (reference, y-)"] = found["summary"]
        return results

    def _answers(self, name: str, folder: Path) -> tuple[list[str], list[str], list[str]]:
        """Held-out answers of the improver, its rewrites of them, and answers of the policy after DPO."""
        if (folder / "measure/policy.jsonl.gz").exists():
            improver, policy = (read_rows(folder / f"measure/{part}.jsonl.gz") for part in ("improver", "policy"))
            columns = ((improver, "rejected"), (improver, "chosen"), (policy, "rejected"))
            return tuple([row[column] for row in rows] for rows, column in columns)
        answers = self._draw(f"{name}-improver", folder / "improver/model")
        asked = [row | {"rejected": answer} for row, answer in zip(self.held_out, answers, strict=True)]
        rewrites = self._rewrite(f"{name}-rewrites", folder / "improver/model", asked)
        return answers, rewrites, self._draw(f"{name}-policy", folder / "dpo/model")

    def _draw(self, name: str, model: Path) -> list[str]:
        prompts = [row["prompt"] for row in self.held_out]
        options = self.args.sampling_options()
        drawn = self.sampler.draw(self.folder / name, model, prompts, options, 0, settings_hash=fingerprint(model))
        return [sample.text for sample in drawn]

    def _rewrite(self, name: str, model: Path, rows: list[dict]) -> list[str]:
        asked = [improver_prompt(row["prompt"], row["rejected"]) for row in rows]
        options = self.args.revision_options()
        drawn = self.sampler.draw(self.folder / name, model, asked, options, 0, settings_hash=fingerprint(model))
        return [sample.text for sample in drawn]

    def _pairs(self, folder: Path) -> dict:
        rows = [row for name in ("rows", "dropped") for row in read_rows(folder / f"pairs/{name}.jsonl.gz")]
        rows = [row for row in rows if row["chosen"] is not None]
        kept = read_rows(folder / "pairs/rows.jsonl.gz")
        return {
            "all": self._compare(rows, [row["rejected"] for row in rows], [row["chosen"] for row in rows]),
            "kept": self._compare(kept, [row["rejected"] for row in kept], [row["chosen"] for row in kept]),
        }

    def _policy(self, name: str, model: Path | None, answers: list[str], start: dict | None) -> dict:
        """ROUGE-L and length of the answers, and the reference answers' likelihood, each against the start's."""
        likelihood = self._likelihood(name, model)
        found = {"answers": answers, "likelihood": likelihood, "summary": {
            "rouge_l": bootstrap_interval(scores(self.held_out, answers)),
            "words": float(np.mean([len(a.split()) for a in answers])),
            "reference_logp_per_token": bootstrap_interval(likelihood),
        }}  # fmt: skip
        if start is not None:
            found["summary"] |= self._compare(self.held_out, start["answers"], answers)
            found["summary"]["reference_logp_gain"] = bootstrap_interval(likelihood - start["likelihood"])
        return found

    def _likelihood(self, name: str, model: Path | None) -> np.ndarray:
        """(N,) mean log-probability per token of each reference answer under the plain prompt."""
        load = lambda: self.sampler.load_policy(self.model, model, self.args.sampling["dtype"])  # noqa: E731
        prompts = [row["prompt"] for row in self.held_out]
        references = [[row["reference"], row["reference"]] for row in self.held_out]
        found = collect_logps(self.folder / f"{name}-likelihood", load, self.tokenizer, prompts, references)
        return np.array([np.mean(row[0]) for row in found])

    @staticmethod
    def _compare(rows: list[dict], before: list[str], after: list[str]) -> dict:
        """Gain in ROUGE-L, as it is and with both texts cut to the words of the shorter one."""
        first, second = scores(rows, before), scores(rows, after)
        cut = [[" ".join(t.split()[: min(len(a.split()), len(b.split()))]) for t in (a, b)]
               for a, b in zip(before, after, strict=True)]  # fmt: skip
        matched = scores(rows, [pair[1] for pair in cut]) - scores(rows, [pair[0] for pair in cut])
        lengths = np.array([[len(a.split()), len(b.split())] for a, b in zip(before, after, strict=True)])
        return {
            "prompts": len(rows),
            "before": float(first.mean()),
            "after": float(second.mean()),
            "gain": bootstrap_interval(second - first),
            "gain_at_equal_length": bootstrap_interval(matched),
            "win_rate": bootstrap_interval((second > first) + 0.5 * (second == first)),
            "words_before": float(lengths[:, 0].mean()),
            "words_after": float(lengths[:, 1].mean()),
            "copies": float(np.mean([a.split() == b.split() for a, b in zip(before, after, strict=True)])),
        }


def scores(rows: list[dict], texts: list[str]) -> np.ndarray:
    """(N,) ROUGE-L of each text against the row's reference."""
    return np.array(rouge_l(None, texts, reference=[row["reference"] for row in rows]))


def tables(results: dict) -> str:
    """Markdown: improvers (y+ against y-), and policies against the start on held-out prompts."""
    head = ["improver", "prompts", "ROUGE-L y-", "ROUGE-L y+", "gain", "gain at equal length", "win rate", "words",
            "copies"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for name, found in results["improvers"].items():
        parts = {"held out": found["held-out prompts"], "of the pairs": found["prompts of the pairs"]["all"],
                 "of the pairs, kept": found["prompts of the pairs"]["kept"]}  # fmt: skip
        for part, row in parts.items():
            lines.append([
                name, f"{row['prompts']} {part}", f"{row['before']:.3f}", f"{row['after']:.3f}",
                *(interval(row[key], "+") for key in ("gain", "gain_at_equal_length")), interval(row["win_rate"]),
                f"{row['words_before']:.1f} -> {row['words_after']:.1f}", f"{row['copies']:.0%}",
            ])  # fmt: skip
    text = markdown(lines)
    head = ["policy", "ROUGE-L", "gain", "gain at equal length", "words", "log p of the reference per token", "gain"]
    lines = [head, ["---"] * len(head)]
    for name, row in {"start": results["start"], **results["policies"]}.items():
        gains = [interval(row[key], "+") if key in row else "" for key in ("gain", "gain_at_equal_length")]
        last = interval(row["reference_logp_gain"], "+") if "reference_logp_gain" in row else ""
        lines.append([
            name, interval(row["rouge_l"]), *gains, f"{row['words']:.1f}", interval(row["reference_logp_per_token"]),
            last,
        ])  # fmt: skip
    return text + "\n" + markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def interval(value: dict, sign: str = "") -> str:
    return f"{value['mean']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


if __name__ == "__main__":
    main()
