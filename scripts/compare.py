"""Moved: `python -m trainers.cli.compare`."""

from moved import run

if __name__ == "__main__":
    run("trainers.cli.compare", "python -m trainers.cli.compare")
