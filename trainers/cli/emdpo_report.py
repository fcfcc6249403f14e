"""What the page of an EM-DPO run shows: who is of which type, how likely the rows became, and the types' trainings."""

from pathlib import Path

from ..emdpo.figures import log_likelihood, responsibilities
from ..emdpo.rounds import ANNOTATOR, ITEM, Round
from ..pages.page import Sections, blocks
from ..runs.record import RECORD, Run, read_run
from ..runs.stage import MANIFEST


def read(folder: Path) -> tuple[str, Sections, list[Run]]:
    """Title, parts and the trainings of the types in the last round of the likeliest restart, finished or not.

    Raises:
        ValueError: no round is finished.
    """
    restarts = [
        [Round.read(path.parent) for path in sorted(restart.glob(f"round-*/{MANIFEST}"))]
        for restart in sorted(folder.glob("restart-*"))
    ]
    restarts = [rounds for rounds in restarts if rounds]
    if not restarts:
        raise ValueError(f"{folder} holds no finished round of EM-DPO yet: its page needs one.")
    best = max(restarts, key=lambda rounds: rounds[-1].manifest["log_likelihood"])
    last = best[-1].manifest
    shares = [[f"type {k}", f"{share:.2f}"] for k, share in enumerate(last["prior"])]
    cards = [
        ("Log-likelihood per row", f"{last[ITEM]:.3f}", f"nats; per annotator {last[ANNOTATOR]:.3f}"),
        ("Annotators that changed their type", f"{last['changed_type']:.0%}", "in the last round"),
        ("Median certainty", f"{last['median_certainty']:.2f}", "probability of an annotator's likeliest type"),
    ]
    histories = [[round.manifest for round in rounds] for rounds in restarts]
    pictures = [responsibilities([round.posterior for round in best]), log_likelihood(histories)]
    own = {
        "": [
            f"EM-DPO looks for {len(last['prior'])} types of annotators: {len(best)} round(s) of the likeliest of "
            f"{len(restarts)} restart(s).",
            blocks.cards(cards),
        ],
        "Types": [blocks.figures(pictures), blocks.table(["Type", "Share of the annotators"], shares)],
    }
    final = best[-1].folder / "final"  # of halves: policies that are trained on all rows
    end = Round.read(final).manifest if (final / MANIFEST).exists() else last
    trained = [folder / policy for policy in end["policies"] if (folder / policy).is_dir()]
    runs = [read_run(path, path.parent.name) for path in trained]
    if (folder / RECORD).is_file():  # that of the run, and not of its trainings, whose rows were made for them
        runs = [run._replace(record=read_run(folder).record) for run in runs]
    return f"EM-DPO: {folder.name}", own, runs
