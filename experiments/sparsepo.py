"""SparsePO: does a learned mask find the tokens that decide the score, and does the policy gain by it?

    python -m experiments.sparsepo [--quick]

A word-level model of two layers is made in seconds: sentences of 20 free filler words and one slot "was <adjective>"
at any place, which alone decides the score (8 of 16 adjectives are good; score = good + noise of deviation 0.3). 64
pairs of its own samples train every arm. Measured are the share of good adjectives, the exact KL, and whether the mask
tells the slot from the filler (area under the ROC curve).
"""

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.stats import mannwhitneyu

from trainers import DPOTrainer, SparsePOTrainer

from .frame import Contrast, Curves, Experiment, Point, main
from .training import train
from .worlds import exact_kl, pretrain, sample, scored_rows, word_model, word_tokenizer

FILLER, GOOD, BAD = 120, 8, 8  # different words
PAIRS, STEPS, BATCH, EVERY, NOISE = 64, 50, 16, 5, 0.3
LEARNED = {"mask": "learned", "mask_init": "dense", "mask_learning_rate": 1e-2}
ARMS = {
    "DPO": {},
    "TDPO1": {"mask": "ones"},
    "random mask": {"mask": "random"},
    "oracle mask": {"mask": "ones"},
    **{f"SparsePO, L1 {l1:g}": LEARNED | {"reward_l1": l1, "kl_l1": l1} for l1 in (0.005, 0.01, 0.02)},
}
DOSES = (5, 40)  # filler words beside the 20
SPARSE = "SparsePO, L1 0.01"
WORDS = ["<ask>", "was", *(f"good{i}" for i in range(GOOD)), *(f"bad{i}" for i in range(BAD)),
         *(f"word{i}" for i in range(FILLER))]  # fmt: skip
TOKENIZER = word_tokenizer(WORDS)
ASK, WAS, FIRST_GOOD = TOKENIZER.convert_tokens_to_ids(["<ask>", "was", "good0"])
FIRST_BAD, FIRST_FILLER = FIRST_GOOD + GOOD, FIRST_GOOD + GOOD + BAD
AT = 0.3  # nats


def is_adjective(ids):
    return (ids >= FIRST_GOOD) & (ids < FIRST_FILLER)


class OracleTrainer(SparsePOTrainer):
    """Weight 1 on the tokens of the slot and 0 elsewhere, in rewards and KL: what a perfect mask would do."""

    slot = staticmethod(is_adjective)

    def token_terms(self, batch, policy, reference):
        terms = super().token_terms(batch, policy, reference)
        slot = self.slot(batch["response_ids"]) & batch["response_mask"]
        return terms | {"reward_mask": slot.to(policy.logps), "kl_mask": slot.to(policy.logps)}


def sentences(count: int, filler: int, seed: int) -> torch.Tensor:
    """(count, filler + 3) token ids: the prompt, and filler words of unequal frequency around one slot."""
    random = np.random.default_rng(seed)
    frequency = 1 / (10 + np.arange(FILLER))
    words = FIRST_FILLER + random.choice(FILLER, (count, filler), p=frequency / frequency.sum())
    slots = np.stack([np.full(count, WAS), random.integers(FIRST_GOOD, FIRST_FILLER, count)], 1)
    places = random.integers(0, filler + 1, count)
    rows = [np.insert(row, [place, place], slot) for row, place, slot in zip(words, places, slots, strict=True)]
    return torch.tensor(np.insert(np.stack(rows), 0, ASK, 1))


def run(seed: int, quick: bool) -> Curves:
    curves = {}
    for filler in (20,) if quick else (20, *DOSES):
        reference = pretrained(seed, filler, *((1000, 30) if quick else ()))
        rows = preferences(reference, filler, seed)
        measure = measuring(reference, filler, seed, 100 if quick else 2000)
        start = measure(reference)
        for arm in ("DPO", SPARSE) if quick or filler != 20 else ARMS:
            name = arm if filler == 20 else f"{arm}, {filler} filler"
            curves[name] = fit(arm, reference, rows, measure, start, seed, EVERY if quick else STEPS)
    return curves


def pretrained(seed: int, filler: int, texts: int = 20_000, steps: int = 400):
    reference = word_model(TOKENIZER, layers=2, width=64, seed=seed)
    pretrain(reference, sentences(texts, filler, seed), steps=steps, batch=64, learning_rate=3e-3, seed=seed)
    return reference


def preferences(reference, filler: int, seed: int) -> list[dict]:
    """Pairs of the reference's samples, scored by the number of good adjectives with noise."""
    asked = [[ASK]] * PAIRS
    drawn, _ = sample(reference, asked, 2, filler + 2, seed)
    good = ((drawn >= FIRST_GOOD) & (drawn < FIRST_BAD)).sum(-1).numpy()
    scores = good + np.random.default_rng(seed).normal(0, NOISE, good.shape)
    return scored_rows(asked, drawn, scores)


def measuring(reference, filler: int, seed: int, samples: int):
    def measure(policy) -> Point:
        drawn, logits = sample(policy, [[ASK]], samples, filler + 2, seed + 10_000)
        adjectives = drawn[is_adjective(drawn)]
        share = float((adjectives < FIRST_BAD).double().mean()) if len(adjectives) else float("nan")
        kl = exact_kl(logits, reference, [[ASK]], drawn).mean()
        return {"reward": share, "kl": float(kl), "adjectives": len(adjectives) / samples}

    return measure


def fit(arm: str, reference, rows: list[dict], measure, start: Point, seed: int, steps: int, **more) -> list[Point]:
    options = {"learning_rate": 3e-4, "max_steps": steps, "seed": seed, **ARMS[arm]}
    return fit_arm(arm, options, copy.deepcopy(reference), rows, TOKENIZER, measure, every=EVERY, start=start, **more)


def fit_arm(arm: str, options: dict, *inputs, oracle: type[OracleTrainer] = OracleTrainer, **more) -> list[Point]:
    """The curve of an arm, by `train`; learned masks are watched, unless something else is."""
    trainer = {"DPO": DPOTrainer, "oracle mask": oracle}.get(arm, SparsePOTrainer)
    watched = {"watch": partial(masked, slot_of=oracle.slot)} if options.get("mask") == "learned" else {}
    options = {"beta": 0.3, "per_device_train_batch_size": BATCH, **options}
    return train(trainer, options, *inputs, **watched | more)


def masked(trainer, slot_of: Callable) -> Point:
    """How well the reward mask tells slots from filler, the share of exact zeros on filler, and its mean."""
    rows = [trainer.train_dataset[i] for i in range(BATCH)]
    values = trainer.token_values(rows)["reward_mask"]
    slot = slot_of(torch.tensor([row["response_ids"] for row in rows]))
    area = mannwhitneyu(values[slot], values[~slot]).statistic / (int(slot.sum()) * int((~slot).sum()))
    return {"auc": float(area), "zeros": float((values[~slot] == 0).double().mean()), "mask": float(values.mean())}


EXPERIMENT = Experiment(
    name="sparsepo",
    claim="A sparse mask finds the tokens that decide the score, and spends its KL there",
    run=run,
    seeds=tuple(range(413, 425)),
    minutes=75,
    settings={"pairs": PAIRS, "steps": STEPS, "batch": BATCH, "noise": NOISE, "doses": DOSES, "arms": list(ARMS)},
    primary=Contrast(SPARSE, "DPO", 0.05, AT),
    secondary=(
        *(Contrast(arm, "DPO", None, AT) for arm in ARMS if arm not in ("DPO", SPARSE)),
        *(Contrast(SPARSE, arm, None, AT) for arm in ("TDPO1", "random mask", "oracle mask")),
        Contrast(SPARSE, "DPO", None, 1.0),
        *(Contrast(f"{SPARSE}, {filler} filler", f"DPO, {filler} filler", None, AT) for filler in DOSES),
    ),
    value=("reward", "share of good adjectives"),
    shown=("DPO", "TDPO1", "oracle mask", "SparsePO, L1 0.005", SPARSE, "SparsePO, L1 0.02"),
    columns=("auc", "zeros", "mask", "seconds"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
