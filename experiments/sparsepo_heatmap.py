"""What SparsePO's mask lights up: the page of `polypo masks` for the sparse arm of `experiments.sparsepo`, one seed.

    python -m experiments.sparsepo_heatmap [SEED]

The seed is the first of the experiment's unless one is given, the shown rows are the first of its training pairs, and
the policy is the one after 10 steps. Writes runs/experiments/sparsepo-heatmap.html.
"""

import argparse
from pathlib import Path

from trainers.cli.masks import row_parts
from trainers.pages.page import write

from .sparsepo import EXPERIMENT, SPARSE, fit, preferences, pretrained

STEPS, ROWS, FILLER = 10, 2, 20


def main(seed: int) -> Path:
    reference, shown = pretrained(seed, FILLER), {}

    def keep(trainer) -> dict:
        rows = [trainer.train_dataset[i] for i in range(ROWS)]
        shown.update({f"Pair {i}": row_parts(trainer, i, row) for i, row in enumerate(rows)})
        return {}

    rows = preferences(reference, FILLER, seed)
    fit(SPARSE, reference, rows, lambda policy: {}, {}, seed, STEPS, watch=keep)
    target = Path("runs/experiments/sparsepo-heatmap.html")
    target.parent.mkdir(parents=True, exist_ok=True)
    return write(target, f"{SPARSE}, seed {seed}, after {STEPS} steps", shown)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws the masks of the sparse arm on the first training pairs.")
    parser.add_argument("seed", nargs="?", type=int, default=EXPERIMENT.seeds[0])
    print(f"{main(parser.parse_args().seed)} is ready.")
