"""Moved: `python -m trainers.cli.report`."""

from moved import run

if __name__ == "__main__":
    run("trainers.cli.report", "python -m trainers.cli.report")
