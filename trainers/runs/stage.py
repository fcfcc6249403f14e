"""A stage of a run on disk: what it depends on, what it left, and whether it is done.

    <folder>/settings.json   what its result depends on, written before any work: other settings are refused
    <folder>/...             journals and files of the work itself, each with a way to go on after a kill
    <folder>/manifest.json   hash of the settings, and what came out; written last, which ends it

A later stage takes the key of the one that it reads from, the hash of its settings, into its own settings, so it is
tied to all that came before it.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..data.json_rows import digest, plain
from .checkpoints import remove_incomplete_checkpoints
from .files import read_json, write_json
from .processes import Processes, free_memory
from .settings import WEIGHTS, refuse_other_settings

SETTINGS, MANIFEST = "settings.json", "manifest.json"
WORK = (".jsonl", ".gz", ".parquet", ".bin", ".pt", *WEIGHTS)  # files that bind a stage to its settings
JOURNALS = "*-?????.jsonl"
WAYS_OUT = "choose another output_dir"


@dataclass
class Stage:
    """One stage in `folder`. All processes make the same calls.

    Args:
        settings: from `run_settings`, or anything else by name that JSON can hold.
        ways_out: what to do where the folder was made with other settings, beside setting them back.
        settings_name: of the file with the settings.
    """

    folder: Path
    settings: dict
    ways_out: str = WAYS_OUT
    settings_name: str = SETTINGS

    def __post_init__(self):
        self.folder, self.settings = Path(self.folder), plain(self.settings)
        self.key, self.processes = digest(self.settings), Processes()

    def done(self) -> bool:
        """Whether the stage has ended.

        Raises:
            ValueError: it was made with other settings.
        """
        ended = (self.folder / MANIFEST).exists()
        if (self.folder / self.settings_name).exists() and (ended or self._has_work()):
            self._check()
        return ended

    def open(self) -> Path:
        """Writes the settings and returns the folder; those of a stage that failed before it made anything go.

        Raises:
            ValueError: there is work that was made with other settings, or with unknown ones.
        """
        path = self.folder / self.settings_name
        if not path.exists() and any(self.folder.glob(JOURNALS)):
            raise ValueError(
                f"{self.folder} holds samples or scores, but no {path.name} that says how they were made: "
                f"{self.ways_out}, or remove that folder."
            )
        self.processes.main(lambda: None if path.exists() and self._has_work() else self.write_settings())
        self._check()
        return self.folder

    def write_settings(self) -> None:
        """Binds the folder to the settings of this stage (one process only)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / self.settings_name, {"settings": self.settings, "hash": self.key})

    def finish(self, **content) -> None:
        """Writes the manifest, atomically: the hash of the settings, and `content`."""
        self.processes.main(lambda: write_json(self.folder / MANIFEST, {"hash": self.key, **content}))

    def manifest(self) -> dict:
        return read_json(self.folder / MANIFEST)

    def _check(self) -> None:
        path = self.folder / self.settings_name
        saved = read_json(path)["settings"]
        # A name that only one side has is a difference too: an option that a recipe no longer sets, or sets now.
        names = dict.fromkeys([*saved, *self.settings])
        refuse_other_settings(path, names | saved, names | self.settings, ways_out=self.ways_out)

    def _has_work(self) -> bool:
        return any(path.suffix in WORK and path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


def refuse_fewer_rounds(folder: Path, rounds: int, further: Path) -> None:
    """Raises ValueError where `folder` has `further`, which only a run of more rounds leaves there."""
    if further.exists():
        raise ValueError(
            f"rounds={rounds}, but {folder} holds more, whose policy an older one would replace: raise rounds, or "
            f"{WAYS_OUT}."
        )


def train_into(done: Path, train: Callable[[Path], None]) -> None:
    """Calls `train(folder)` unless `done` is there, which the folder becomes when its training is over.

    `train` leaves model and results in the folder and must resume from `last_checkpoint(folder)`.
    """
    processes = Processes()
    if not done.exists():
        training = done.with_name("training")
        processes.main(lambda: remove_incomplete_checkpoints(training))
        train(training)
        free_memory()
        processes.main(lambda: training.rename(done))
    # After the rename, so that a kill amid the deletion leaves no half checkpoint to resume from.
    processes.main(lambda: [*map(shutil.rmtree, done.glob("checkpoint-*"))])
