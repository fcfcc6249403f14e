"""Moved: `python -m trainers.cli.rounds_report`."""

from moved import run

if __name__ == "__main__":
    run("trainers.cli.rounds_report", "python -m trainers.cli.rounds_report")
