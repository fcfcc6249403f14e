"""Moved: `polypo report`."""

from moved import run

if __name__ == "__main__":
    run("trainers.cli.report", "polypo report")
