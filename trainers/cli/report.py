"""Writes the page of a run, or of several beside each other: polypo report FOLDER [FOLDER ...]

The folder is that of any run, finished or not, or a checkpoint: the page has its curves, warning signs, settings and
the data that was left out, and what the demo, rounds, SGPO, EM-DPO and comparisons have to show beyond that. With
`--samples` the policy answers held-out prompts, beside the model that the run started from. The masks of a SparsePO
run need its recipe and take any of its fields:

    polypo report runs/sparsepo-demo --config configs/sparsepo/demo.yaml --rows 0 3

The page is report.html in the folder, masks.html with masks, and comparison.html in the first of several folders.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import check_options, option
from ..pages.page import Sections, write
from ..pages.training import sections
from ..runs.record import Run, read_run
from . import config_files

KINDS = {  # what a run leaves -> the module that makes its own parts; each loads what it needs, which takes seconds
    "runs.json": "compare_report",
    "self_enhance.json": "rounds_report",
    "round-*/current": "sgpo_report",
    "restart-*": "emdpo_report",
    "results.json": "demo_report",
}


@dataclass
class ReportArguments:
    """What to add to the page."""

    samples: int = option(0, "Answer so many held-out prompts of the run, before and after the training.", at_least=0)
    max_new_tokens: int = option(128, "Longest of these answers, in tokens.", at_least=1)

    def __post_init__(self):
        check_options(self)


def main(argv: list[str]) -> None:
    folders = [*map(Path, argv[: next((i for i, part in enumerate(argv) if part.startswith("-")), len(argv))])]
    if not folders:
        sys.exit(__doc__)
    print(f"{write_report(folders, argv[len(folders) :])} is ready.")


def write_report(folders: Path | Sequence[Path], flags: Sequence[str] = ()) -> Path:
    """Writes the page of what lies in the folders and returns its path.

    Args:
        flags: those of `ReportArguments`; with samples, which rows to take the prompts of; and those of the masks.

    Raises:
        ValueError: a folder is missing or holds no run, or its files cannot be read; there is nothing to sample with.
    """
    folders = [folders] if isinstance(folders, Path) else folders
    asked, rest = config_files.first(ReportArguments, [*flags])
    if rest and not asked.samples:
        if len(folders) > 1:
            raise ValueError(f"{rest[0]}: masks are shown of one run, so name one folder.")
        from . import masks

        return masks.write_report(["--checkpoint", str(folders[0]), *rest])
    title, own, runs = folders[0].resolve().name, Sections(), list[Run]()
    if len(folders) > 1:
        title = f"{len(folders)} runs side by side"
    elif kind := next((kind for kind in KINDS if any(folders[0].glob(kind))), None):
        try:
            title, own, runs = importlib.import_module(f"trainers.cli.{KINDS[kind]}").read(folders[0])
        except KeyError as error:
            raise ValueError(
                f"{folders[0]}: {kind} there lacks {error}, so this program has not written it, or not to its end: "
                "move it away, for a page without it."
            ) from error
    if not own:
        runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    samples = []
    if asked.samples and own:
        raise ValueError(
            f"--samples: {folders[0]} is a run in stages or a comparison, whose page has the samples that it made "
            "itself. Name the folder of one of its trainings."
        )
    if asked.samples:
        from .report_samples import sample_parts

        samples = sample_parts(folders, runs, asked, rest)
    shared = sections(runs, samples) if runs else Sections()  # a run in stages may not have trained yet
    page = "report.html" if len(folders) == 1 else "comparison.html"
    return write(folders[0] / page, title, _merged(own, shared))


def _merged(own: Sections, shared: Sections) -> Sections:
    """The parts that a kind of run has of its own, then those that every run has."""
    if own and shared:
        shared["Training"][:0] = shared.pop("")
    return {name: [*own.get(name, []), *shared.get(name, [])] for name in {**own, **shared}}


def _names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart: their paths below the folder that they have in common."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError("a folder is named twice: a run is compared with others.")
    above = Path(os.path.commonpath(paths))
    return [str(path.relative_to(above if above not in paths else above.parent)) for path in paths]
