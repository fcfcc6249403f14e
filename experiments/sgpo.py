"""SGPO: does a model that learned to improve drafts teach itself more than sharpening its own answers would?

    python -m experiments.sgpo [--quick]

A word-level model, made in seconds, adds up three groups of three items: all totals first, which it often gets wrong,
and then the running sums that they come from, which it gets right. So a draft shows what its first words should have
been. The improver learns from drafts whose first two errors an outside function has repaired. Measured is the share of
right words at temperature 1 on new prompts, after each stage, and by how much improved answers beat plain ones.
"""

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from trainers import SGPOConfig, SGPOTrainer
from trainers.runs.files import read_json, read_rows
from trainers.runs.stage import MANIFEST
from trainers.sgpo.improver import sft_config, train_sft
from trainers.sgpo.stages import pair

from .bills import CUE_ID, GROUP, GROUPS, LARGEST, LENGTH, PRICED, TOKENIZER, as_rows, bills, texts
from .frame import Contrast, Curves, Experiment, Point, main
from .training import SHARED, quiet
from .worlds import exact_kl, pretrain, sample, word_model

STEPS, LEARN, UNLABELLED, HELD, SAMPLES, EDITS = 500, 2000, 4000, 500, 4, 2
OPTIONS = {
    "reviser": "external", "policy_weight": 0.3, "scorer": "experiments.sgpo.accuracy", "max_length": 100,
    "sampling": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": LENGTH + 4, "batch_size": 500},
    "revision": {"temperature": 0.3},
    "improver": {"learning_rate": 2e-3, "num_train_epochs": 10, "per_device_train_batch_size": 32},
    "learning_rate": 1e-4, "num_train_epochs": 1, "per_device_train_batch_size": 64, "sft_weight": 1.0,
}  # fmt: skip
REVISERS = {"incremental": "experiments.sgpo.repair", "full reference": "trainers.sgpo.sampling.reference_answer"}


def repair(prompts: list, drafts: list[str], references: list[str]) -> list[str]:
    """Drafts with their first errors mended, as an outside reviser would."""
    mended = []
    for draft, right in zip(map(str.split, drafts), map(str.split, references), strict=True):
        wrong = [i for i, (a, b) in enumerate(zip(draft, right, strict=False)) if a != b][:EDITS]
        mended.append(" ".join(right[i] if i in wrong else word for i, word in enumerate(draft)))
    return mended


def accuracy(prompts: list, completions: list[str], *, reference: list[str], **columns) -> list[float]:
    """Share of the words of each reference that stand at their place: a scorer."""
    return [sum(a == b for a, b in zip(right.split(), text.split(), strict=False)) / LENGTH
            for text, right in zip(completions, reference, strict=True)]  # fmt: skip


def run(seed: int, quick: bool) -> Curves:
    random = np.random.default_rng(seed)
    prices = random.permutation(np.arange(PRICED) % (LARGEST + 1))
    model = word_model(TOKENIZER, layers=2, width=64, seed=seed)
    pretrain(model, texts(prices, random), steps=20 if quick else STEPS, batch=64, learning_rate=3e-3, seed=seed)
    sizes = {"train": LEARN, "preferences": UNLABELLED, "test": HELD}
    drawn = {name: bills(size // (20 if quick else 1), prices, random) for name, size in sizes.items()}
    splits = {name: Dataset.from_list(as_rows(*part)) for name, part in drawn.items()}
    measure = measuring(model, *drawn["test"], seed)
    start = measure(model)
    with tempfile.TemporaryDirectory() as scratch, quiet():
        folder = Path(scratch)
        model.save_pretrained(folder / "start")
        TOKENIZER.save_pretrained(folder / "start")
        args = {name: arguments(folder / name, seed, reviser) for name, reviser in REVISERS.items()}
        for own in args.values():
            SGPOTrainer.run(own, splits, str(folder / "start"))
        curves = {name: [start, *(of_stage(folder / name, stage, measure) for stage in ("improver", "dpo"))]
                  for name in REVISERS}  # fmt: skip
        begun, controls = folder / "incremental/round-00", arguments(folder / "controls", seed)
        improved = AutoModelForCausalLM.from_pretrained(begun / "improver/model")
        pairs = read_rows(begun / "pairs/rows.jsonl.gz")
        likeliest = greedy(improved, TOKENIZER([row["prompt"] for row in pairs]).input_ids)
        sharper = [row | {"chosen": text}
                   for row, text in zip(pairs, TOKENIZER.batch_decode(likeliest), strict=True)]  # fmt: skip
        drafts = [row | {"chosen": row["reference"], "rejected": row["current"]}
                  for row in read_rows(begun / "targets/rows.jsonl.gz")]  # fmt: skip
        curves["sharpening"] = [*curves["incremental"][:2], measure(prefer(improved, sharper, controls))]
        curves["SPIN"] = [start, measure(prefer(copy.deepcopy(model), drafts, controls))]
        examples = [(row["prompt"], row["chosen"]) for row in splits["train"]]  # as often as the improver's
        config, imitator = sft_config(controls, OPTIONS["improver"], folder / "sft", seed), copy.deepcopy(model)
        train_sft(imitator, TOKENIZER, config, examples)
        curves["more SFT"] = [start, measure(imitator)]
    return curves


def arguments(folder: Path, seed: int, reviser: str = REVISERS["incremental"]) -> SGPOConfig:
    return SGPOConfig(output_dir=str(folder), **SHARED | OPTIONS, seed=seed, reviser_function=reviser)


def measuring(reference, asked: np.ndarray, answers: np.ndarray, seed: int):
    prompts, right = np.insert(asked, GROUPS * GROUP, CUE_ID, 1), torch.tensor(answers)[:, None]

    @torch.no_grad()
    def measure(policy) -> Point:
        drawn, logits = sample(policy.eval(), prompts.tolist(), SAMPLES, LENGTH, seed + 10_000)
        kl = exact_kl(logits, reference, prompts.tolist(), drawn).mean()
        found, likeliest = (drawn == right).double(), (greedy(policy, prompts) == right[:, 0]).double()
        return {"reward": float(found.mean()), "totals": float(found[..., :GROUPS].mean()), "kl": float(kl),
                "greedy": float(likeliest.mean())}  # fmt: skip

    return measure


def of_stage(folder: Path, stage: str, measure) -> Point:
    """What the model that a stage left does, and by how much its improved answers are better than its plain ones."""
    point = measure(AutoModelForCausalLM.from_pretrained(folder / "round-00" / stage / "model"))
    name, key = {"improver": ("gate", "improver_scorer_gain"), "dpo": ("measure", "policy_scorer_gain")}[stage]
    return point | {"gate": read_json(folder / "round-00" / name / MANIFEST)["counts"][key]}


@torch.no_grad()
def greedy(model, prompts) -> torch.Tensor:
    """(P,LENGTH) token ids of the most likely next word after every word, for prompts (P,L) of token ids."""
    drawn = model.generate(torch.as_tensor(prompts), do_sample=False, min_new_tokens=LENGTH, max_new_tokens=LENGTH,
                           pad_token_id=0)  # fmt: skip
    return drawn[:, -LENGTH:]


def prefer(model, rows: list[dict], args: SGPOConfig):
    """`model` after DPO on the chosen over the rejected answers, where these differ."""
    pairs = Dataset.from_list([pair(row) for row in rows if row["chosen"] != row["rejected"]])
    args = args.of_dpo(args.output_dir, args.seed)
    SGPOTrainer(model, args=args, train_dataset=pairs, processing_class=TOKENIZER).train()
    return model


EXPERIMENT = Experiment(
    name="sgpo",
    claim="An improver that was taught small repairs makes pairs that teach more than sharpening does",
    run=run,
    seeds=tuple(range(601, 607)),
    minutes=55,
    settings={"steps": STEPS, "rows": (LEARN, UNLABELLED, HELD), "options": OPTIONS},
    primary=Contrast("incremental", "sharpening", 0.07),
    secondary=tuple(Contrast("incremental", arm) for arm in ("full reference", "SPIN", "more SFT")),
    value=("reward", "share of right words, temperature 1"),
    columns=("totals", "gate", "greedy"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
