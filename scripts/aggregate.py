"""Moved: `polypo aggregate`."""

from moved import run

if __name__ == "__main__":
    run("trainers.cli.aggregate", "polypo aggregate")
