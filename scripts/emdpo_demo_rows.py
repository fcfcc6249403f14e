"""Moved: `python -m experiments.emdpo_demo_rows`."""

from moved import run

if __name__ == "__main__":
    run("experiments.emdpo_demo_rows", "python -m experiments.emdpo_demo_rows")
