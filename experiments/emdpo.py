"""EM-DPO: does one ranking of three per annotator tell the types apart on a language model, where one pair cannot?

    python -m experiments.emdpo [--quick]

Two types of annotators with opposed tastes for the adjective of a template sentence, equally frequent, share no item
and give one answer each: a pair, the best of three, a ranking of three, or two pairs. A word-level model of one layer,
made in seconds, is the reference. EM starts from random posteriors. The round is chosen by the likelihood of held-out
annotators with answers of the same kind; other new annotators, who give two rankings whatever the arm, are typed by
the policies of that round. As arms stop at different rounds, the last round of each is kept and compared too.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from trainers import EMDPOConfig, EMDPOTrainer
from trainers.emdpo.mixture import match_types
from trainers.emdpo.tables import HELD_OUT, read_annotators
from trainers.runs.files import read_json
from trainers.runs.stage import MANIFEST

from .frame import Contrast, Curves, Experiment, Point, main
from .training import SHARED, quiet
from .worlds import pretrain, word_model, word_tokenizer

NOUNS, PLACES, ADJECTIVES = 20, 20, 40
ANNOTATORS, HELD, ROUNDS, EPOCHS, BATCH, TASTE = 5000, 1000, 14, 2, 250, 1.5
# name: (responses shown, rows per annotator, stages that are told)
FEEDBACK = {"one pair": (2, 1, None), "best of 3": (3, 1, 1), "ranking of 3": (3, 1, None), "two pairs": (2, 2, None)}
LAST = ", last round"
TYPED = (3, 2, None)  # what the annotators answer who are typed
OPTIONS = {
    "num_types": 2, "init": "dirichlet", "start_from": "previous", "normalize": "posterior", "beta": 0.3,
    "learning_rate": 1e-3, "layout": "rows", "per_device_train_batch_size": BATCH, "ref_tokens_per_batch": 40_000,
    "rounds": ROUNDS, "num_train_epochs": EPOCHS,
}  # fmt: skip
WORDS = ["<ask>", "the", "in", "was", *(f"noun{i}" for i in range(NOUNS)), *(f"place{i}" for i in range(PLACES)),
         *(f"adjective{i}" for i in range(ADJECTIVES))]  # fmt: skip
TOKENIZER = word_tokenizer(WORDS)
ASK, THE, IN, WAS, NOUN = TOKENIZER.convert_tokens_to_ids(["<ask>", "the", "in", "was", "noun0"])
PLACE, ADJECTIVE = NOUN + NOUNS, NOUN + NOUNS + PLACES


def sentences(count: int, random: np.random.Generator) -> np.ndarray:
    """(count,7) token ids: <ask> the NOUN in PLACE was ADJECTIVE."""
    words = [np.full(count, ASK), np.full(count, THE), NOUN + random.integers(0, NOUNS, count), np.full(count, IN),
             PLACE + random.integers(0, PLACES, count), np.full(count, WAS),
             ADJECTIVE + random.integers(0, ADJECTIVES, count)]  # fmt: skip
    return np.stack(words, 1)


def answers(prefix: str, count: int, kind: tuple, values: np.ndarray, random: np.random.Generator, second=0.5):
    """Rows of `count` annotators with their answers, and the type of each, which is 1 with probability `second`."""
    shown, repeats, top = kind
    types, rows = (random.random(count) < second).astype(int), []
    for annotator, of_type in enumerate(types):
        for _ in range(repeats):
            texts = sentences(shown, random)
            utility = TASTE * (1 - 2 * of_type) * values[texts[:, -1] - ADJECTIVE] + random.gumbel(size=shown)
            scores = utility.argsort().argsort().astype(float)
            scores = (scores == shown - 1).astype(float) if top == 1 else scores  # only who won is told
            rows.append({"prompt_ids": [ASK], "response_ids": texts[:, 1:].tolist(), "scores": scores.tolist(),
                         "annotator": f"{prefix}-{annotator}"})  # fmt: skip
    return rows, types


def world(seed: int, quick: bool):
    """The stream of random numbers, how much each adjective is liked, with deviation 1, and the reference."""
    random = np.random.default_rng(seed)
    values = random.permutation(np.linspace(-1.7, 1.7, ADJECTIVES))
    reference = word_model(TOKENIZER, layers=1, width=64, seed=seed)
    texts = torch.tensor(sentences(20_000, random))
    pretrain(reference, texts, steps=20 if quick else 300, batch=128, learning_rate=3e-3, seed=seed)
    return random, values, reference


def run(seed: int, quick: bool) -> Curves:
    random, values, reference = world(seed, quick)
    typed, types = answers("typed", HELD, TYPED, values, random)
    curves = {}
    for name in ("one pair", "ranking of 3") if quick else FEEDBACK:
        rows, _ = answers("annotator", 200 if quick else ANNOTATORS, FEEDBACK[name], values, random)
        held, _ = answers("held", HELD, FEEDBACK[name], values, random)
        with tempfile.TemporaryDirectory() as folder, quiet():
            fit(reference, rows, folder, seed, [*held, *typed], rounds=2 if quick else ROUNDS)
            rounds = sorted(Path(folder).glob("restart-0/round-*"))
            points = [point(round, number, types) for number, round in enumerate(rounds, 1)]
        curves |= {name: stopped(points), name + LAST: points}
    return curves


def fit(reference, rows: list[dict], folder: str, seed: int, held: list[dict] | None = None, **options):
    """A trained `EMDPOTrainer`; options that are not given are those of the experiment."""
    args = EMDPOConfig(output_dir=folder, seed=seed, **SHARED | OPTIONS | options)
    trainer = EMDPOTrainer(
        reference, args=args, train_dataset=Dataset.from_list(rows), processing_class=TOKENIZER,
        eval_dataset=held and Dataset.from_list(held),
    )  # fmt: skip
    trainer.train()
    return trainer


def point(folder: Path, number: int, types: np.ndarray) -> Point:
    """What a round found: the likelihood of the held-out annotators, and how many of the typed ones are right."""
    manifest, (names, posterior, _) = read_json(folder / MANIFEST), read_annotators(folder / HELD_OUT)
    held = [v for name, v in manifest["held_out"]["per_annotator"].items() if name.startswith("held-")]
    found = dict(zip(names, posterior, strict=True))
    right, _ = match_types(np.stack([found[f"typed-{i}"] for i in range(len(types))]), types)
    return {"round": number, "held_out": float(np.mean(held)), "typed_right": right,
            "smallest_type": min(manifest["prior"])}  # fmt: skip


def stopped(points: list[Point]) -> list[Point]:
    """The rounds up to the one with the best held-out likelihood, which is the last point."""
    chosen = max(range(len(points)), key=lambda i: points[i]["held_out"])
    return points[: chosen + 1]


EXPERIMENT = Experiment(
    name="emdpo",
    claim="One ranking of three per annotator identifies the types, and one pair does not",
    run=run,
    seeds=tuple(range(501, 511)),
    minutes=200,
    settings=dict(annotators=ANNOTATORS, held=HELD, rounds=ROUNDS, epochs=EPOCHS, batch=BATCH, taste=TASTE),
    primary=Contrast("ranking of 3", "one pair", 0.4),
    secondary=(
        Contrast("ranking of 3" + LAST, "one pair" + LAST),
        Contrast("best of 3", "one pair"),
        Contrast("two pairs", "one pair"),
        Contrast("ranking of 3", "two pairs"),
    ),
    x=("round", "round of EM"),
    value=("typed_right", "new annotators typed right"),
    columns=("held_out", "smallest_type"),
    shown=tuple(name + LAST for name in FEEDBACK),
)

if __name__ == "__main__":
    main(EXPERIMENT)
