"""Moved: `polypo generate`."""

from moved import run

if __name__ == "__main__":
    run("trainers.cli.generate", "polypo generate")
