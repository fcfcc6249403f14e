"""Moved: `python -m experiments.sgpo`."""

from moved import run

if __name__ == "__main__":
    run("experiments.sgpo", "python -m experiments.sgpo")
