"""Moved: `python -m trainers.cli.aggregate`."""

from moved import run

if __name__ == "__main__":
    run("trainers.cli.aggregate", "python -m trainers.cli.aggregate")
