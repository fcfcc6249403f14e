"""SWEPO with a likelihood term: does imitating the good responses beside the contrast gain reward at equal KL?

    python -m experiments.swepo_sft [--quick]

The world of `experiments.swepo`, K = 16, absolute weights; `sft_weight` times the negative log-likelihood per token of
the responses above the mean is added.
"""

from .frame import Contrast, Curves, Experiment, main
from .stories import TOKENS
from .swepo import AT, BATCH, OPENINGS, STEPS, fit, world
from .worlds import scored_rows

WEIGHTS = (0.0, 0.1, 1.0)
NONE, LIGHT, HEAVY = (f"sft_weight {weight:g}" for weight in WEIGHTS)


def run(seed: int, quick: bool) -> Curves:
    questions, samples, scores, measure, start = world(seed, quick)
    rows, steps = scored_rows(questions, samples, scores), 2 if quick else STEPS
    return {f"sft_weight {weight:g}": fit("SWEPO absolute", rows, seed, measure, start, steps, sft_weight=weight)
            for weight in WEIGHTS}  # fmt: skip


EXPERIMENT = Experiment(
    name="swepo-sft",
    claim="A likelihood term on the good responses gains reward at equal KL",
    run=run,
    seeds=tuple(range(221, 231)),
    minutes=30,
    settings={"openings": OPENINGS, "steps": STEPS, "batch": BATCH, "tokens": TOKENS},
    primary=Contrast(LIGHT, NONE, 0.02, AT),
    secondary=(Contrast(HEAVY, NONE, None, AT), Contrast(LIGHT, NONE, None, 6.0), Contrast(HEAVY, NONE, None, 6.0)),
    columns=("seconds",),
)

if __name__ == "__main__":
    main(EXPERIMENT)
