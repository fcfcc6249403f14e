"""SparsePO on a story model: is the word that decides the score found in real text, and does the policy gain by it?

    python -m experiments.sparsepo_stories [--quick]

Openings end just before an adjective ("Tom looked at the sky. Tom was so"), and the sentiment of the first word that
follows, by VADER and with noise of deviation 0.3, is the score of all 24 tokens. 64 pairs of the model's own
samples train every arm. The word is always first, so a mask may find it by its place.
"""

from functools import cache

import numpy as np
import torch

from trainers.generation.rewards import vader_sentiment

from .frame import Contrast, Curves, Experiment, Point, main
from .sparsepo import BATCH, NOISE, PAIRS, OracleTrainer, fit_arm
from .stories import prompts, rating, story_model, tokenizer
from .worlds import sample, scored_rows

TOKENS, STEPS, EVERY, AT = 24, 24, 4, 2.0  # the last in nats
OPENINGS = (
    "Once upon a time, there was a {kind} named {name}. {name} was very",
    "{name} was a {kind} who lived near the woods. One day, {name} felt very",
    "A {kind} called {name} looked at the sky. {name} was so",
    "It was late and {name} the {kind} was very",
)
SPARSE = "SparsePO, L1 0.01"
# A head that learns at 1e-2, as in the world of words, dies here within 5 steps.
LEARNED = {"mask": "learned", "mask_init": "dense", "mask_learning_rate": 3e-3, "reward_l1": 0.01, "kl_l1": 0.01}
ARMS = {"DPO": {}, "TDPO1": {"mask": "ones"}, "random mask": {"mask": "random"}, "oracle mask": {"mask": "ones"},
        SPARSE: LEARNED}  # fmt: skip


def first_word(ids: torch.Tensor) -> torch.Tensor:
    """True on the tokens (...,R) of a response's first word."""
    return word_starts()[ids].cumsum(-1) <= 1


@cache
def word_starts() -> torch.Tensor:
    """(V) True on the tokens that begin a word."""
    tokens = tokenizer().convert_ids_to_tokens(range(len(tokenizer())))
    return torch.tensor([token.startswith("▁") for token in tokens])


class FirstWordTrainer(OracleTrainer):
    slot = staticmethod(first_word)


def sentiment(samples: torch.Tensor) -> np.ndarray:
    """(P,K) VADER's compound score of the first word of each sample (P,K,R), 0 where it knows none."""
    texts = tokenizer().batch_decode(samples.flatten(0, 1), skip_special_tokens=True)
    words = [(text.split() or [""])[0] for text in texts]
    return np.reshape(vader_sentiment([None] * len(words), words), samples.shape[:2])


def run(seed: int, quick: bool) -> Curves:
    reference, questions = story_model(), prompts("train", PAIRS, seed, OPENINGS)
    drawn, _ = sample(reference, questions, 2, TOKENS, seed)
    scores = sentiment(drawn)
    rows = scored_rows(questions, drawn, scores + np.random.default_rng(seed).normal(0, NOISE, scores.shape))
    held = prompts("test", 8 if quick else 48, seed, OPENINGS)
    measure = rating(reference, held, seed, sentiment, 2 if quick else 8, TOKENS)
    start = measure(reference)
    return {arm: fit(arm, rows, measure, start, seed, EVERY if quick else STEPS)
            for arm in (("DPO", SPARSE) if quick else ARMS)}  # fmt: skip


def fit(arm: str, rows: list[dict], measure, start: Point, seed: int, steps: int) -> list[Point]:
    options = {"learning_rate": 1e-4, "max_steps": steps, "seed": seed, **ARMS[arm]}
    return fit_arm(arm, options, story_model(), rows, tokenizer(), measure, every=EVERY, start=start,
                   oracle=FirstWordTrainer)  # fmt: skip


EXPERIMENT = Experiment(
    name="sparsepo-stories",
    claim="A sparse mask finds the word that decides the score in real text",
    run=run,
    seeds=tuple(range(431, 443)),
    minutes=20,
    settings={"pairs": PAIRS, "steps": STEPS, "batch": BATCH, "noise": NOISE, "tokens": TOKENS, "arms": list(ARMS)},
    primary=Contrast(SPARSE, "DPO", 0, AT),  # the pilot's mask did not tell the word from the rest
    secondary=tuple(Contrast(arm, "DPO", None, AT) for arm in ("TDPO1", "random mask", "oracle mask")),
    value=("reward", "sentiment of the first word"),
    columns=("auc", "zeros", "mask", "seconds"),
)

if __name__ == "__main__":
    main(EXPERIMENT)
