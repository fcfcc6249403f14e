"""SGPO on short instructions with reference answers: the recipe, its ablations, and what an outside scorer says.

    python -m experiments.sgpo --data sft_alpaca.jsonl.gz

`--data` holds `prompt` and `response`. Everything lies in runs/sgpo and resumes after a kill. The scorer is ROUGE-L
against the reference answers of prompts that no training saw; results.md has the tables of docs/results/sgpo.md.
"""

import argparse
import random
import shutil
from pathlib import Path

import numpy as np
import yaml
from datasets import Dataset
from transformers import AutoTokenizer

from trainers import SGPOTrainer
from trainers.cli import train
from trainers.cli.answers import at_equal_length
from trainers.generation.rewards import rouge_l
from trainers.generation.start import load_start
from trainers.pages.text import interval, markdown
from trainers.runs.checkpoints import last_checkpoint
from trainers.runs.files import read_rows, write_atomic, write_json, write_rows
from trainers.runs.stage import train_into
from trainers.sgpo.filters import fault
from trainers.sgpo.sampling import Sampler
from trainers.sgpo.stages import MODEL, ROWS, pair
from trainers.statistics import bootstrap_interval

RECIPE = Path("configs/sgpo/alpaca.yaml")
WORDS, PROMPT_WORDS = (5, 50), 60  # of the reference answers and prompts that are taken
OF_REFERENCE = ["--reviser", "external", "--reviser_function", "trainers.sgpo.sampling.reference_answer"]
# Flags that differ from the recipe; another run, and the stages whose files are the same there.
RUNS = {
    "reference": (OF_REFERENCE, "self", ["current"]),
    "reference, narrow filter": ([*OF_REFERENCE, "--filter_factor", "0.5"], "reference", ["current", "targets"]),
    "no filter": (["--filter_statistic", "none"], "self", ["current", "targets"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="JSON lines with prompt and response, .gz or not.")
    options = parser.parse_args()
    recipe = yaml.safe_load(RECIPE.read_text())
    base = Path(recipe["output_dir"]).parent
    take_rows(Path(options.data), Path(recipe["dataset_name"]))
    for name, (changes, source, shared) in ({"self": ([], "self", [])} | RUNS).items():
        folder = base / folder_of(name)
        for stage in shared:  # which is tied to its settings and to the stages before it, and not to its folder
            if not (folder / "round-00" / stage).exists():
                shutil.copytree(base / source / "round-00" / stage, folder / "round-00" / stage)
        train.main(["--config", str(RECIPE), *changes, "--output_dir", str(folder)])
    results = measure(base)
    write_json(base / "results.json", results)
    text = "\n".join(markdown(head, rows) for head, rows in tables(results))
    write_atomic(base / "results.md", text.encode())
    print(text)


def folder_of(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def take_rows(source: Path, target: Path) -> None:
    """The short rows of the data in a fixed random order."""
    rows = [
        {"prompt": row["prompt"], "response": row["response"]}
        for row in read_rows(source)
        if WORDS[0] <= len(row["response"].split()) <= WORDS[1] and len(row["prompt"].split()) <= PROMPT_WORDS
    ]
    random.Random(0).shuffle(rows)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_rows(target, rows)


def measure(base: Path) -> dict:
    """ROUGE-L of all answers, and the reference answers' likelihood, against the model before training."""
    _, _, args, model = train.parse(["--config", str(RECIPE)])
    gold = base / "gold_pairs" / MODEL
    train_into(gold, lambda folder: train_on_gold_pairs(folder, base / "self/round-00", args, model))
    before = read_rows(base / "self/round-00/measure/policy.jsonl.gz")
    name = model.model_name_or_path
    sampler = Sampler(args, name, AutoTokenizer.from_pretrained(name))

    def policy(title: str, path: Path | None, answers: list[str]) -> dict:
        folder = base / "likelihood" / folder_of(title.replace(": ", "-"))
        logps = sampler.logps(folder, path, before, ("reference", "reference"))
        likelihood = np.array([np.mean(row[0]) for row in logps])
        result = compare(before, [row["answer"] for row in before], answers)
        return result | {"likelihood": likelihood.tolist(), "reference_logp": bootstrap_interval(likelihood)}

    results = {"improvers": {}, "policies": {"start": policy("start", None, [row["answer"] for row in before])}}
    for title in ("self", *RUNS):
        folder = base / folder_of(title) / "round-00"
        improver, final = (read_rows(folder / f"{part}.jsonl.gz") for part in ("gate/improver", "measure/policy"))
        kept, dropped = read_rows(folder / "pairs" / ROWS), read_rows(folder / "pairs/dropped.jsonl.gz")
        for part, rows in (("held out", improver), ("of the pairs", kept + dropped), ("of the pairs, kept", kept)):
            rows = [row for row in rows if row["chosen"] is not None]
            sides = [[row[side] for row in rows] for side in ("rejected", "chosen")]
            results["improvers"][f"{title}, {part}"] = compare(rows, *sides)
        for label, stage, rows in (("improver, plain prompt", "improver", improver), ("after DPO", "dpo", final)):
            answers = [row["rejected"] for row in rows]
            results["policies"][f"{title}: {label}"] = policy(f"{title}-{stage}", folder / stage / MODEL, answers)
    drawn = sampler.draw(base / "gold_pairs/answers", before, "gold", gold, "sampling", 0)
    results["policies"]["self: after DPO on (reference, y-)"] = policy("gold", gold, [row["gold"] for row in drawn])
    start = np.array(results["policies"]["start"]["likelihood"])
    for row in results["policies"].values():
        row["reference_logp_gain"] = bootstrap_interval(np.array(row.pop("likelihood")) - start)
    return results


def train_on_gold_pairs(folder: Path, run: Path, args, model) -> None:
    """DPO from the same improver on the same prompts and rejected responses, but the reference is chosen."""
    rows = [pair(row | {"chosen": row["reference"]}) for row in read_rows(run / "pairs" / ROWS)
            if not fault(row["reference"])]  # fmt: skip
    policy = load_start(
        model.model_name_or_path, run / "improver" / MODEL, init_kwargs=args.model_init_kwargs, trainable=True
    )
    trainer = SGPOTrainer(policy, args=args.of_dpo(folder, args.seed), train_dataset=Dataset.from_list(rows))
    trainer.train_and_save(last_checkpoint(folder))


def compare(rows: list[dict], before: list[str], after: list[str]) -> dict:
    """Gain in ROUGE-L, as it is and with both texts cut to the words of the shorter one."""
    references = [row["reference"] for row in rows]
    first, second, short_first, short_second = (
        np.array(rouge_l(None, texts, reference=references))
        for texts in (before, after, *at_equal_length(before, after))
    )
    return {
        "prompts": len(rows),
        "before": bootstrap_interval(first),
        "after": bootstrap_interval(second),
        "gain": bootstrap_interval(second - first),
        "gain_at_equal_length": bootstrap_interval(short_second - short_first),
        "win_rate": bootstrap_interval((second > first) + 0.5 * (second == first)),
        "words": [float(np.mean([len(text.split()) for text in texts])) for texts in (before, after)],
        "copies": float(np.mean([a.split() == b.split() for a, b in zip(before, after, strict=True)])),
    }


def tables(results: dict) -> list[tuple[list[str], list[list[str]]]]:
    """Improvers (y+ against y-), and policies against the start on held-out prompts."""
    improvers = [
        [name, str(row["prompts"]), f"{row['before']['mean']:.3f}", f"{row['after']['mean']:.3f}",
         *(interval(row[key], "+.3f") for key in ("gain", "gain_at_equal_length")), interval(row["win_rate"]),
         "{:.1f} -> {:.1f}".format(*row["words"]), f"{row['copies']:.0%}"]
        for name, row in results["improvers"].items()
    ]  # fmt: skip
    policies = [
        [name, interval(row["after"]), *(interval(row[key], "+.3f") for key in ("gain", "gain_at_equal_length")),
         f"{row['words'][1]:.1f}", interval(row["reference_logp"]), interval(row["reference_logp_gain"], "+.3f")]
        for name, row in results["policies"].items()
    ]  # fmt: skip
    return [
        (["improver", "prompts", "ROUGE-L y-", "ROUGE-L y+", "gain", "gain at equal length", "win rate", "words",
          "copies"], improvers),
        (["policy", "ROUGE-L", "gain", "gain at equal length", "words", "log p of the reference per token", "gain"],
         policies),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
