"""Writes the page of a finished run: polypo report FOLDER

What the folder is of shows in what lies in it: the demo, a self-enhancement in rounds, SGPO, or a comparison of
methods. The masks of a SparsePO run need its recipe and take any of its fields:

    polypo report runs/sparsepo-demo --config configs/sparsepo/demo.yaml --rows 0 3
"""

import importlib
import sys
from pathlib import Path

PAGES = {  # what a run leaves -> the module of its page; each loads what it needs, which takes seconds
    "runs.json": "compare_report",
    "self_enhance.json": "rounds_report",
    "round-*/current": "sgpo_report",
    "results.json": "demo_report",
}


def main(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        sys.exit(__doc__)
    print(f"{write_report(Path(argv[0]), argv[1:])} is ready.")


def write_report(folder: Path, flags: list[str]) -> Path:
    """Writes the page of what `folder` holds and returns its path; `flags` are those of the masks' page.

    Raises:
        ValueError: there is no such folder, or it holds nothing that there is a page for.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist: name the output folder of a run.")
    if flags:
        from . import masks

        return masks.write_report(["--checkpoint", str(folder), *flags])
    for left, name in PAGES.items():
        if any(folder.glob(left)):
            return importlib.import_module(f"trainers.cli.{name}").write_report(folder)
    raise ValueError(
        f"{folder} is no folder of the demo, of a run in rounds, of SGPO or of a comparison. For the masks of "
        "SparsePO add --config with the recipe of the run."
    )
