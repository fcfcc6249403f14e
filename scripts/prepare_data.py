"""Moved: `polypo prepare`."""

from moved import run

if __name__ == "__main__":
    run("trainers.cli.prepare", "polypo prepare")
