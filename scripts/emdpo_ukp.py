"""Moved: `python -m experiments.emdpo_ukp`."""

from moved import run

if __name__ == "__main__":
    run("experiments.emdpo_ukp", "python -m experiments.emdpo_ukp")
