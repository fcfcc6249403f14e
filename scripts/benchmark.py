"""Moved: `python -m benchmarks.run`."""

from moved import run

if __name__ == "__main__":
    run("benchmarks.run", "python -m benchmarks.run")
