"""Moved: `python -m experiments.emdpo_identify`."""

from moved import run

if __name__ == "__main__":
    run("experiments.emdpo_identify", "python -m experiments.emdpo_identify")
