"""Moved: `polypo compare`."""

from moved import run

if __name__ == "__main__":
    run("trainers.cli.compare", "polypo compare")
