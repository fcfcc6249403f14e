"""EM-DPO: whom does one policy for two types of annotators serve badly, and do min-max weights mend it?

    python -m experiments.emdpo_regret [--quick]

The world of `experiments.emdpo`, in which 70 % of the annotators have one taste and 30 % the opposite one, and each
gives one ranking of three. EM finds the types in 28 passes, after which its policies no longer write sentences; so
they are trained once more from the reference, gently, with the posterior that EM found. The weights of the mixture
come from the trainer's own game, from the policies' log-ratios. Judged is the truth, which no method sees: by how much
less a type likes the answers than those of its own policy, in units of the utility.
"""

import tempfile
from pathlib import Path

import numpy as np

from trainers.emdpo.aggregate import Arena, Player, compare
from trainers.emdpo.distill import distilled

from .emdpo import ADJECTIVE, ANNOTATORS, FEEDBACK, TASTE, TOKENIZER, answers, fit, world
from .frame import Contrast, Curves, Experiment, main
from .training import quiet

SECOND, SAMPLES, WORDS = 0.3, 4000, 6
GENTLE = {"rounds": 1, "start_from": "reference", "learning_rate": 3e-4}
MIN_MAX, SHARES, UNIFORM, ONE = "min-max weights", "shares of EM", "uniform weights", "one policy"


def run(seed: int, quick: bool) -> Curves:
    random, values, reference = world(seed, quick)
    rows, _ = answers("annotator", 200 if quick else ANNOTATORS, FEEDBACK["ranking of 3"], values, random, SECOND)
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder)
        reference.save_pretrained(path / "base")
        TOKENIZER.save_pretrained(path / "base")
        fit(str(path / "base"), rows, folder + "/find", seed, **{"rounds": 2} if quick else {})
        again = GENTLE | {"init": "given", "initial_posterior": folder + "/find/annotators.csv"}
        fit(str(path / "base"), rows, folder + "/em", seed, **again)
        one = fit(str(path / "base"), rows, folder + "/one", seed, num_types=1, **GENTLE)
        samples = 200 if quick else SAMPLES
        arena = Arena(path / "em", ["<ask>"], path / "arena", num_generations=samples, max_new_tokens=WORDS, seed=seed,
                      batch_size=500)  # fmt: skip
        players = [*arena.types, Player(ONE, one.policies[0])]
        gains, _ = arena.gains(players)
        shares = arena.mixture["prior"]
        mixture = compare(gains, [player.name for player in players], shares)["mixture"]
        players.append(distilled(arena, mixture, seed=seed, learning_rate=1e-3, num_train_epochs=5,
                                 per_device_train_batch_size=100))  # fmt: skip
        liked = np.array([liking(arena.samples(player), values) for player in players])
    first, second, single, of_mixture = liked
    types = np.array([first, second])
    served = {MIN_MAX: types @ mixture, SHARES: types @ shares, UNIFORM: types.mean(), ONE: single,
              "distilled": of_mixture}  # fmt: skip
    best, worst = types.max(), types.min()
    return {arm: [{"frequent": float(best - value), "rare": float(value - worst),
                   "largest": float(max(best - value, value - worst))}] for arm, value in served.items()}  # fmt: skip


def liking(samples: list[list], values: np.ndarray) -> float:
    """Mean utility of answers for the frequent type; for the rare one it is minus that."""
    words = [sample.token_ids[-1] - ADJECTIVE for row in samples for sample in row]
    return TASTE * float(np.mean([values[word] for word in words if 0 <= word < len(values)]))


EXPERIMENT = Experiment(
    name="emdpo-regret",
    claim="Min-max weights of the types' policies are fairer than the types' shares or one policy",
    run=run,
    seeds=tuple(range(521, 527)),
    minutes=30,
    settings={"annotators": ANNOTATORS, "second": SECOND, "samples": SAMPLES, "again": GENTLE},
    primary=Contrast(MIN_MAX, SHARES, -0.05),
    secondary=(
        Contrast(MIN_MAX, ONE),
        # The largest regret is at least half the range of the types' likings, and uniform weights give just that.
        Contrast(MIN_MAX, UNIFORM, known="cannot be below 0 by construction"),
        Contrast("distilled", MIN_MAX),
    ),
    x=("frequent", "regret of the frequent type"),
    value=("largest", "largest regret of a type"),
    columns=("rare",),
)

if __name__ == "__main__":
    main(EXPERIMENT)
