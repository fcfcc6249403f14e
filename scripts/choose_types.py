"""Moved: `polypo types`."""

from moved import run

if __name__ == "__main__":
    run("trainers.cli.types", "polypo types")
