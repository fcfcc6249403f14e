"""Moved: `python -m trainers.cli.prepare`."""

from moved import run

if __name__ == "__main__":
    run("trainers.cli.prepare", "python -m trainers.cli.prepare")
