"""A small part of real judgments for `types`: the untied choices of some busy annotators.

python -m experiments.emdpo_ukp ../shared/data/ukp_judgments.jsonl.gz runs/data/emdpo-ukp.jsonl

Ties say nothing about a pair and are left out. Annotators are drawn among those with enough untied judgments.
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from trainers.runs.files import read_rows, write_rows

ANNOTATORS, ITEMS, SEED = 32, 20, 0
LONGEST = 300  # characters of a response, so that a small model's context holds the pair


def select(rows: list[dict]) -> list[dict]:
    """ITEMS untied judgments of each of ANNOTATORS annotators, in random order."""
    random, own = np.random.default_rng(SEED), defaultdict(list)
    for row in rows:
        if row["scores"][0] != row["scores"][1] and max(map(len, row["responses"])) <= LONGEST:
            own[row["annotator"]].append(row)
    busy = sorted(name for name, judged in own.items() if len(judged) >= ITEMS)
    if len(busy) < ANNOTATORS:
        raise ValueError(f"{len(busy)} annotators have {ITEMS} usable judgments: lower ANNOTATORS or ITEMS.")
    found = [
        own[busy[a]][i]
        for a in random.choice(len(busy), ANNOTATORS, replace=False)
        for i in random.choice(len(own[busy[a]]), ITEMS, replace=False)
    ]
    return [found[i] for i in random.permutation(len(found))]


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    target.parent.mkdir(parents=True, exist_ok=True)
    chosen = select(read_rows(source))
    write_rows(target, chosen)
    longer = np.mean([(len(r["responses"][0]) > len(r["responses"][1])) == (r["scores"][0] > r["scores"][1])
                      for r in chosen])  # fmt: skip
    print(f"{target}: {len(chosen)} judgments of {ANNOTATORS} annotators; the longer text won {longer:.1%}")
