"""SWEPO: do sets of K scored responses beat the best pair, when K is large?

    python -m experiments.swepo [--quick]

A story model continues 24 openings 16 times; VADER scores the samples. Every method trains 18 steps of 6 openings on
the same samples. K = 4 takes the first four of the sixteen. In the corrupted data one score in ten is grossly wrong:
3 or -3, where true ones lie between -1 and 1.
"""

import numpy as np

from trainers import DPOTrainer, InfoNCATrainer, SWEPOTrainer

from .frame import Contrast, Curves, Experiment, main
from .stories import TOKENS, measuring, prompts, sentiment, story_model, tokenizer
from .training import train
from .worlds import sample, scored_rows

OPENINGS, STEPS, BATCH = 24, 18, 6
WRONG = 0.1
METHODS = {
    "DPO best/worst": (DPOTrainer, {}),
    "DPO all pairs": (DPOTrainer, {"pairs": "all"}),
    "SWEPO none": (SWEPOTrainer, {"weighting": "none"}),
    "SWEPO absolute": (SWEPOTrainer, {"weighting": "absolute"}),
    "SWEPO signed": (SWEPOTrainer, {"weighting": "signed"}),
    "InfoNCA": (InfoNCATrainer, {}),
}
FEW = ("DPO best/worst", "SWEPO none", "SWEPO absolute")
DATA = {"K=16": (16, False, tuple(METHODS)), "K=4": (4, False, FEW), "K=16, errors": (16, True, FEW)}
AT = 12.0  # nats


def world(seed: int, quick: bool):
    """Openings, their samples with scores, what is measured of a policy, and that of the reference."""
    reference = story_model()
    questions = prompts("train", OPENINGS, seed)
    samples, _ = sample(reference, questions, 16, TOKENS, seed)
    measure = measuring(reference, seed, **({"openings": 8, "samples": 2} if quick else {}))
    return questions, samples, sentiment(samples), measure, measure(reference)


def run(seed: int, quick: bool) -> Curves:
    questions, samples, scores, measure, start = world(seed, quick)
    curves = {}
    for data, (count, corrupted, methods) in DATA.items():
        given = corrupt(scores, seed) if corrupted else scores
        rows = scored_rows(questions, samples[:, :count], given[:, :count])
        for method in methods[:: 3 if quick else 1]:
            curves[f"{method}, {data}"] = fit(method, rows, seed, measure, start, 2 if quick else STEPS)
    return curves


def fit(method: str, rows: list[dict], seed: int, measure, start, steps: int, **more) -> list[dict]:
    trainer, options = METHODS[method]
    spread = float(np.concatenate([row["scores"] - np.mean(row["scores"]) for row in rows]).std())
    if trainer is not DPOTrainer:
        options = options | {"alpha": 1 / spread}  # so that a deviation of one standard deviation weighs e
    if method == "DPO best/worst":  # the same loss on two responses, at the cost of two
        rows = [best_and_worst(row) for row in rows]
    options = options | {"learning_rate": 3e-4, "beta": 0.1, "max_steps": steps, "seed": seed,
                         "per_device_train_batch_size": BATCH, **more}  # fmt: skip
    points = train(trainer, options, story_model(), rows, tokenizer(), measure, every=3, start=start)
    tokens = BATCH * sum(len(row["prompt_ids"]) + TOKENS * len(row["response_ids"]) for row in rows) / len(rows)
    return [point | {"tokens": point["step"] * tokens} for point in points]


def corrupt(scores: np.ndarray, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    wrong = random.random(scores.shape) < WRONG
    return np.where(wrong, random.choice([-3.0, 3.0], scores.shape), scores)


def best_and_worst(row: dict) -> dict:
    places = [int(np.argmax(row["scores"])), int(np.argmin(row["scores"]))]
    return row | {name: [row[name][place] for place in places] for name in ("response_ids", "scores")}


def contrast(method: str, data: str, expected: float | None = None, minus: str = "DPO best/worst", at: float = AT):
    return Contrast(f"{method}, {data}", f"{minus}, {data}", expected, at)


EXPERIMENT = Experiment(
    name="swepo",
    claim="Sets of many scored responses, weighted by score, gain more reward at equal KL than the best pair",
    run=run,
    seeds=tuple(range(201, 217)),
    minutes=100,
    settings={"openings": OPENINGS, "steps": STEPS, "batch": BATCH, "tokens": TOKENS, "wrong": WRONG},
    primary=contrast("SWEPO absolute", "K=16", 0.06),
    secondary=(
        contrast("SWEPO none", "K=16", 0.045),
        contrast("SWEPO signed", "K=16"),
        contrast("DPO all pairs", "K=16"),
        contrast("InfoNCA", "K=16", at=6.0),
        contrast("SWEPO absolute", "K=16", 0.0, minus="DPO all pairs"),
        contrast("SWEPO absolute", "K=4", 0.0),
        contrast("SWEPO none", "K=4"),
        contrast("SWEPO absolute", "K=16, errors"),
        contrast("SWEPO none", "K=16, errors", 0.06),
        contrast("SWEPO absolute", "K=16", 0.045, at=8.0),
        contrast("SWEPO none", "K=16, errors", 0.1, at=6.0),
    ),
    shown=tuple(f"{method}, K=16" for method in METHODS),
    columns=("tokens", "seconds"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
