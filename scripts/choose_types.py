"""Moved: `python -m trainers.cli.types`."""

from moved import run

if __name__ == "__main__":
    run("trainers.cli.types", "python -m trainers.cli.types")
