"""LIRE: do more candidates help, and fresh ones?

    python -m experiments.lire [--quick]

(a) A story model continues 24 openings 16 times, VADER scores the samples, and LIRE trains on the first K of them with
several temperatures and transforms of the scores. (b) Evolve: four rounds of 6 steps on 8 samples of 96 openings,
where each round samples from the policy as it is then ("fresh"), against the same steps on the first round's samples
("stale"), and on new samples of the start in every round ("start"), which have cost as much as the fresh ones.
"""

from trainers import DPOTrainer, LIRETrainer

from .frame import Contrast, Curves, Experiment, main
from .stories import TOKENS, measuring, prompts, sentiment, story_model, tokenizer
from .training import train
from .worlds import sample, scored_rows

OPENINGS, STEPS, BATCH = 24, 15, 6
EVOLVE = {"openings": 96, "samples": 8, "rounds": 4, "steps": 6, "batch": 16}
TEMPERATURES, CANDIDATES = (2.0, 10.0, 20.0), (2, 4, 8, 16)
RECIPE = ("zscore", 10.0)  # the one whose number of candidates is varied, and that evolves
AT = 12.0  # nats


def run(seed: int, quick: bool) -> Curves:
    reference = story_model()
    measure = measuring(reference, seed, **({"openings": 8, "samples": 2} if quick else {}))
    start = measure(reference)
    return candidates(reference, seed, measure, start, quick) | evolve(reference, seed, measure, start, quick)


def candidates(reference, seed: int, measure, start, quick: bool) -> Curves:
    questions = prompts("train", OPENINGS, seed)
    samples, _ = sample(reference, questions, 16, TOKENS, seed)
    scores = sentiment(samples)
    arms = [(transform, temperature, 16) for transform in ("softmax", "zscore") for temperature in TEMPERATURES]
    arms += [(*RECIPE, count) for count in CANDIDATES[:-1]] + [("softmax", RECIPE[1], 4)]
    shared = {"max_steps": 2 if quick else STEPS, "per_device_train_batch_size": BATCH, "seed": seed}

    def fit(trainer, options: dict, count: int) -> list[dict]:
        rows = scored_rows(questions, samples[:, :count], scores[:, :count])
        return train(trainer, {"learning_rate": 3e-4} | shared | options, story_model(), rows, tokenizer(), measure,
                     every=3, start=start)  # fmt: skip

    curves = {"DPO best/worst": fit(DPOTrainer, {"beta": 0.1}, 16)}
    for transform, temperature, count in [(*RECIPE, 16), (*RECIPE, 4)] if quick else arms:
        options = {"temperature": temperature, "score_transform": transform}
        curves[name(transform, temperature, count)] = fit(LIRETrainer, options, count)
    return curves


def evolve(reference, seed: int, measure, start, quick: bool) -> Curves:
    """The curve of four rounds for each source of their samples; the optimiser begins anew with every round."""
    size = {"openings": 16, "samples": 4, "rounds": 2, "steps": 1, "batch": 16} if quick else EVOLVE
    questions, curves = prompts("train", size["openings"], seed + 1), {}
    for source in ("stale", "start", "fresh"):
        policy, points = story_model(), [{"step": 0, **start}]
        for number in range(size["rounds"]):
            draws = seed + (0 if source == "stale" else number)
            sampler = policy if source == "fresh" else reference
            drawn, _ = sample(sampler, questions, size["samples"], TOKENS, 7 * draws)
            options = {"temperature": RECIPE[1], "score_transform": RECIPE[0], "learning_rate": 3e-4,
                       "max_steps": size["steps"], "per_device_train_batch_size": size["batch"],
                       "seed": seed + number}  # fmt: skip
            rows = scored_rows(questions, drawn, sentiment(drawn))
            done = points[-1]["step"]
            curve = train(LIRETrainer, options, policy, rows, tokenizer(), measure, every=3, start=start)
            points += [point | {"step": done + point["step"]} for point in curve[1:]]
        curves[source] = points
    return curves


def name(transform: str, temperature: float, count: int) -> str:
    return f"{transform}, T={temperature:g}, K={count}"


MOST = name(*RECIPE, 16)
EXPERIMENT = Experiment(
    name="lire",
    claim="More candidates per prompt, and fresh ones, gain more reward at equal KL",
    run=run,
    seeds=tuple(range(301, 311)),
    minutes=45,
    settings={"openings": OPENINGS, "steps": STEPS, "batch": BATCH, "tokens": TOKENS, "evolve": EVOLVE},
    primary=Contrast(MOST, name(*RECIPE, 4), 0.05, AT),
    secondary=(
        Contrast("fresh", "stale", 0.03, AT),
        Contrast("fresh", "stale", None, 24.0),
        Contrast("fresh", "start", None, AT),
        Contrast("start", "stale", None, AT),
        Contrast(MOST, name(*RECIPE, 2), None, AT),
        Contrast(MOST, name(*RECIPE, 8), None, AT),
        *(Contrast(name(transform, temperature, 16), "DPO best/worst", None, AT)
          for transform in ("softmax", "zscore") for temperature in TEMPERATURES[1:]),
        Contrast(name("softmax", 2, 16), "DPO best/worst", -0.096, 6.0),
        Contrast(name("zscore", 2, 16), "DPO best/worst", None, 6.0),
    ),
    columns=("seconds",),
    shown=("DPO best/worst", MOST, name(*RECIPE, 4), name("softmax", 2, 16), "stale", "start", "fresh"),
)  # fmt: skip

if __name__ == "__main__":
    main(EXPERIMENT)
