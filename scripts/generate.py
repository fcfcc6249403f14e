"""Moved: `python -m trainers.cli.generate`."""

from moved import run

if __name__ == "__main__":
    run("trainers.cli.generate", "python -m trainers.cli.generate")
