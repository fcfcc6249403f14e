"""The old names of what moved out of scripts/, for one release."""

import runpy
import sys
import warnings
from pathlib import Path


def run(module: str, command: str) -> None:
    """Runs `module` as the program that `command` is now."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    warnings.warn(f"{sys.argv[0]} moved: use `{command}`.", FutureWarning, stacklevel=2)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
