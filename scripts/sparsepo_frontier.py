"""Moved: `python -m experiments.sparsepo_frontier`."""

from moved import run

if __name__ == "__main__":
    run("experiments.sparsepo_frontier", "python -m experiments.sparsepo_frontier")
