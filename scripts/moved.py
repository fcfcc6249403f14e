"""The old names of what moved out of scripts/, for one release."""

import os
import runpy
import sys
import warnings
from pathlib import Path

MODULES = {  # script -> where it is now
    "aggregate": "trainers.cli.aggregate",
    "benchmark": "benchmarks.run",
    "choose_types": "trainers.cli.types",
    "compare": "trainers.cli.compare",
    "compare_report": "trainers.cli.report",
    "emdpo_demo_rows": "experiments.emdpo_demo_rows",
    "generate": "trainers.cli.generate",
    "prepare_data": "trainers.cli.prepare",
    "report": "trainers.cli.report",
    "rounds_report": "trainers.cli.report",
    "scale_table": "benchmarks.scale_table",
    "sgpo_experiment": "experiments.sgpo",
    "sgpo_report": "trainers.cli.report",
    "show_masks": "trainers.cli.masks",
    "sparsepo_frontier": "experiments.sparsepo",
}


def run(name: str, file: str) -> None:
    """Run what the script `file` is now, if it is the program (`name` is its `__name__`)."""
    if name != "__main__":
        return
    path, module = Path(file).resolve(), MODULES[Path(file).stem]
    sys.path[:] = [str(path.parents[1]), *sys.path, os.getcwd()]  # a user's own scorers and formats are in the last
    told = "{} moved: use `{}`."
    if module.startswith("trainers.cli."):
        import polypo

        command = module.rpartition(".")[2]
        warnings.warn(told.format(path.name, f"polypo {command}"), FutureWarning, stacklevel=3)
        polypo.main([command, *sys.argv[1:]])  # which answers --help
        return
    warnings.warn(told.format(path.name, f"python -m {module}"), FutureWarning, stacklevel=3)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
