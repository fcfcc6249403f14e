"""Moved: `python -m experiments.emdpo_recovery`."""

from moved import run

if __name__ == "__main__":
    run("experiments.emdpo_recovery", "python -m experiments.emdpo_recovery")
