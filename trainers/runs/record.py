"""run.json, which a training writes beside its log: settings, data that was left out, where it began; and the reader.

`polypo report` makes its page of both. Nothing here decides what is trained.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainingArguments

from ..data.drops import DropReport
from ..data.json_rows import plain
from .checkpoints import SETTINGS, STATE, is_complete
from .files import read_json, write_json

RECORD = "run.json"
FILLED_IN = ("output_dir", "accelerator_config", "report_to", "ref_cache_dir")  # differ from their default in any run


class Run(NamedTuple):
    """What a folder says of a training; `record` is empty for a run of an older version."""

    name: str
    record: dict
    history: list[dict]
    step: int = 0
    steps: int = 0  # that were planned
    checkpoint: str = ""  # whose log this is, "" where the run has written its own at its end

    @property
    def settings(self) -> dict:
        return self.record.get("settings", {})


def write_record(args: TrainingArguments, left_out: Iterable[tuple[str, Any]], **facts: Any) -> None:
    """Writes run.json to `args.output_dir`. One process calls it.

    Args:
        left_out: what each pass over the data dropped, as `collected_reports` has it.
        facts: trainer, model and data, as JSON can hold them.
    """
    values = args.to_dict()  # which takes every field that is called a token for a secret
    if "pad_token" in values:
        values["pad_token"] = vars(args)["pad_token"]
    if keywords := values.get("model_init_kwargs"):
        values["model_init_kwargs"] = {name: value for name, value in keywords.items() if name != "token"}
    passes = [
        {"title": title, **(vars(report) if isinstance(report, DropReport) else {"told": str(report)})}
        for title, report in left_out
    ]
    content = facts | {"changed": changed(args), "settings": values, "left_out": passes}
    assert args.output_dir is not None  # set by TrainingArguments
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    write_json(Path(args.output_dir) / RECORD, plain(content))


def changed(args: TrainingArguments) -> list[str]:
    """Names of the settings that are not the default; None, false and empty count as the same."""
    names = []
    for field in dataclasses.fields(args):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        value = vars(args).get(field.name)
        if field.name not in FILLED_IN and value != default and (value or default):
            names.append(field.name)
    return names


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """What is known of the training in `folder`, an output folder or a checkpoint; `name` is by default its path.

    The log is the newest of that in the folder and those of its whole checkpoints, or the one that goes on with it.

    Raises:
        ValueError: there is neither a log nor run.json, or one of them cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist: name the output folder of a run.")
    states = [path / STATE for path in (folder, *filter(is_complete, folder.glob("checkpoint-*")))]
    states = [path for path in states if path.is_file()]
    above = folder.parent if folder.name.startswith("checkpoint-") else folder
    record = next((path for path in (folder / RECORD, above / RECORD) if path.is_file()), None)
    if not states and record is None:
        raise ValueError(
            f"{folder} holds no log of a training: neither {STATE}, which a run writes with every checkpoint "
            f"(save_steps) and at its end, nor {RECORD}, which it writes before its first step.{_runs_below(folder)}"
        )
    known = {} if record is None else read_json(record)
    if not states:
        return Run(name or str(folder), known, [])
    read = {path: read_json(path) for path in states}
    newest = max(_ends(read), key=lambda path: (path.stat().st_mtime, path.parent == folder))
    saved = newest.parent / SETTINGS
    if record is None and saved.is_file():
        known = {"settings": read_json(saved).get("settings", {})}
    state = read[newest]
    checkpoint = newest.parent.name if newest.parent.name.startswith("checkpoint-") else ""
    steps = state.get("global_step", 0), state.get("max_steps", 0)
    return Run(name or str(folder), known, _numbers(state["log_history"]), *steps, checkpoint)


def _ends(states: dict[Path, dict]) -> list[Path]:
    """Those whose log no other one goes on with: times alone do not tell, as a copy may have new ones."""
    logs = {}
    for path, state in states.items():
        log = state.get("log_history")
        if not isinstance(log, list):
            raise ValueError(f"{path} is no state of a Trainer: it has no log_history.")
        logs[path] = repr(log).removesuffix("]")
    return [path for path, log in logs.items() if not any(o != log and o.startswith(log) for o in logs.values())]


def _runs_below(folder: Path) -> str:
    """Where to look instead, as in the folder of a sweep."""
    below = sorted({str(path.parent) for name in (RECORD, STATE) for path in folder.glob(f"*/{name}")})
    more = f" and {len(below) - 3} more" if len(below) > 3 else ""
    return f" There are runs below it: name one, or several ({' '.join(below[:3])}{more})." if below else ""


def _numbers(logs: list) -> list[dict]:
    """The logs of a step, and of these what is a number: callbacks may log anything."""
    logs = [log for log in logs if isinstance(log, dict) and isinstance(log.get("step"), int)]
    return [{name: value for name, value in log.items() if isinstance(value, int | float)} for log in logs]
