"""Moved: `polypo masks`."""

from moved import run

if __name__ == "__main__":
    run("trainers.cli.masks", "polypo masks")
