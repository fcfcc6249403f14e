"""Moved: `python -m trainers.cli.masks`."""

from moved import run

if __name__ == "__main__":
    run("trainers.cli.masks", "python -m trainers.cli.masks")
