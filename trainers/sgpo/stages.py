"""A stage of a run on disk: what it depends on, what it left, and whether it is done.

    <folder>/settings.json   what its result depends on, written before any work: other settings are refused
    <folder>/...             journals and files of the work itself, each with a way to go on after a kill
    <folder>/manifest.json   hash of the settings and of the outputs, seed, counts; written last, which ends the stage

The settings hold the hashes of what earlier stages left, so a stage is tied to all that came before it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from ..generation.collect import check_settings
from ..runs.files import write_json
from ..runs.processes import Processes
from ..runs.settings import WEIGHTS, digest, fingerprint

SETTINGS, MANIFEST = "settings.json", "manifest.json"
WORK = (".jsonl", ".gz", ".parquet", ".bin", ".pt", *WEIGHTS)  # files that bind a stage to its settings
WAYS_OUT = "delete the stage's folder and those of later stages, or choose another output_dir"


@dataclass
class Stage:
    """One stage in `folder`; `outputs` are the names of the files or model folders that later stages read."""

    folder: Path
    settings: dict
    outputs: tuple[str, ...]
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self):
        self.settings = json.loads(json.dumps(self.settings, default=str))  # as it reads back from a file
        self.key = digest(self.settings)

    def done(self) -> bool:
        """Whether the stage has ended.

        Raises:
            ValueError: it was made with other settings, or an output was changed since.
        """
        if (self.folder / SETTINGS).exists() and self._has_work():
            check_settings(self.folder / SETTINGS, self.settings, ways_out=WAYS_OUT)
        if not (self.folder / MANIFEST).exists():
            return False
        for name, found in self.manifest()["outputs"].items():
            if found != fingerprint(self.folder / name):
                raise ValueError(f"{self.folder / name} was changed after the stage had ended: {WAYS_OUT}.")
        return True

    def open(self) -> None:
        """Writes the settings; those of a stage that was given up before it made anything are replaced."""

        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / SETTINGS, {"settings": self.settings, "hash": self.key})

        self.processes.main(lambda: self._has_work() or write())
        check_settings(self.folder / SETTINGS, self.settings, ways_out=WAYS_OUT)

    def finish(self, counts: dict) -> None:
        """Writes the manifest, atomically. A count that is not a number is left out, as JSON has no such thing."""
        manifest = {
            "hash": self.key,
            "inputs": self.settings.get("inputs", {}),
            "template": self.settings.get("template"),
            "seed": self.settings.get("seed"),
            "outputs": {name: fingerprint(self.folder / name) for name in self.outputs},
            "counts": {name: value for name, value in counts.items() if value == value},
        }
        self.processes.main(lambda: write_json(self.folder / MANIFEST, manifest))

    def manifest(self) -> dict:
        return json.loads((self.folder / MANIFEST).read_text())

    def _has_work(self) -> bool:
        return any(path.suffix in WORK and path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
