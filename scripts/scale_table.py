"""Moved: `python -m benchmarks.scale_table`."""

from moved import run

if __name__ == "__main__":
    run("benchmarks.scale_table", "python -m benchmarks.scale_table")
