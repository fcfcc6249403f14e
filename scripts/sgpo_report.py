"""Moved: `python -m trainers.cli.sgpo_report`."""

from moved import run

if __name__ == "__main__":
    run("trainers.cli.sgpo_report", "python -m trainers.cli.sgpo_report")
