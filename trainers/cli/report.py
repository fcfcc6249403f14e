"""Writes the page of a finished run: polypo report FOLDER

What the folder is of shows in what lies in it: the demo, a self-enhancement in rounds, SGPO, or a comparison of
methods. The masks of a SparsePO run need its recipe and take any of its fields:

    polypo report runs/sparsepo-demo --config configs/sparsepo/demo.yaml --rows 0 3
"""

import sys
from pathlib import Path


def main(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        sys.exit(__doc__)
    print(f"{write_report(Path(argv[0]), argv[1:])} is ready.")


def write_report(folder: Path, flags: list[str]) -> Path:
    """Writes the page of what `folder` holds and returns its path; `flags` are those of the masks' page.

    Raises:
        ValueError: the folder holds nothing that there is a page for.
    """
    # Each page loads what it needs, which takes seconds.
    if flags:
        from . import masks

        return masks.write_report(["--checkpoint", str(folder), *flags])
    if (folder / "runs.json").is_file():
        from .compare_report import write_report as write
    elif (folder / "self_enhance.json").is_file():
        from .rounds_report import write_report as write
    elif any(folder.glob("round-*/current")):
        from .sgpo_report import write_report as write
    elif (folder / "results.json").is_file():
        from .demo_report import write_report as write
    else:
        raise ValueError(
            f"{folder} is no folder of the demo, of a run in rounds, of SGPO or of a comparison. For the masks of "
            "SparsePO add --config with the recipe of the run."
        )
    return write(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
