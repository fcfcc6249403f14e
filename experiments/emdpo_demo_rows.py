"""Rankings of made-up annotators with opposed tastes over the demo's real samples, for configs/emdpo/demo.yaml:

python -m experiments.emdpo_demo_rows [FILE]     # runs/data/emdpo-demo.jsonl without one

Even annotators rank three of a prompt's six answers from glad to sad (VADER), odd ones from sad to glad, with noise.
"""

import argparse
from pathlib import Path

import numpy as np

from trainers.data.tokenization import UNFINISHED
from trainers.runs.files import read_rows, write_rows

SOURCE = Path(__file__).resolve().parents[1] / "data" / "demo" / "preferences.jsonl.gz"
ANNOTATORS, ITEMS, NOISE = 16, 6, 0.15  # VADER scores lie in [-1, 1]


def make_rows(samples: list[dict], seed: int = 0) -> list[dict]:
    """Canonical rows with an annotator; every second annotator turns the scores round."""
    random, rows = np.random.default_rng(seed), []
    for annotator in range(ANNOTATORS):
        sign = 1 if annotator % 2 == 0 else -1
        for i in random.choice(len(samples), ITEMS, replace=False):
            row = samples[i]
            shown = random.choice(len(row["responses"]), 3, replace=False)
            scores = sign * np.array(row["scores"])[shown] + NOISE * random.gumbel(size=3)
            rows.append({
                "prompt": row["prompt"], "responses": [row["responses"][k] for k in shown],
                UNFINISHED: [row[UNFINISHED][k] for k in shown],
                "scores": scores.tolist(), "annotator": f"{'glad' if sign > 0 else 'sad'}-{annotator:02d}",
            })  # fmt: skip
    return [rows[i] for i in random.permutation(len(rows))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes rankings of made-up annotators over the demo's samples.")
    parser.add_argument("file", nargs="?", type=Path, default=Path("runs/data/emdpo-demo.jsonl"))
    target = parser.parse_args().file
    target.parent.mkdir(parents=True, exist_ok=True)
    write_rows(target, make_rows(read_rows(SOURCE)))
    print(f"{target}: {ANNOTATORS * ITEMS} rankings of {ANNOTATORS} annotators")
