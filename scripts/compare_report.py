"""Moved: `python -m trainers.cli.compare_report`."""

from moved import run

if __name__ == "__main__":
    run("trainers.cli.compare_report", "python -m trainers.cli.compare_report")
