"""Answers to held-out prompts for the page of a run: of the model that it started from, and of its policy."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from polypo.recipes import split_recipe

from .. import PreferenceConfig
from ..forward import policy as policies
from ..generation.sampler import plain_prompt
from ..pages.page import blocks
from ..runs.checkpoints import last_checkpoint
from ..runs.record import Run
from ..sgpo.text import turns
from . import config_files
from .arguments import DataArguments, ModelArguments
from .compare_samples import SampleOptions, sample_and_measure

MODEL = "model_name_or_path"
ROWS = ("dataset_name", "dataset_config", "dataset_test_split", "data_format")
WEIGHTS = ("config.json", "adapter_config.json")


def sample_parts(folders: Sequence[Path], runs: Sequence[Run], asked, flags: Sequence[str]) -> list[str]:
    """One answer to each prompt by the start of the runs and by each policy, with the same random streams.

    Args:
        asked: `ReportArguments`.
        flags: a recipe or its fields, for what a run.json does not say: `model_name_or_path`, and the rows.

    Raises:
        ValueError: the runs began with several models, or it is not known with which one; a folder holds no policy;
            there are no rows to take prompts of.
    """
    own, recipe = split_recipe([*flags])
    wanted = _recorded(runs) | {name: value for name, value in recipe.items() if name in (*ROWS, MODEL)}
    data, model = config_files.parse([DataArguments, ModelArguments], own, wanted)
    if not model.model_name_or_path:
        raise ValueError(f"--samples: it is not recorded that all runs began with one model: give --{MODEL}.")
    name, init_kwargs = model.model_name_or_path, runs[0].settings.get("model_init_kwargs")
    with TemporaryDirectory() as scratch:
        known = {key: runs[0].settings[key] for key in ("as_chat", "seed", "use_cpu") if key in runs[0].settings}
        args = PreferenceConfig(output_dir=scratch, report_to=[], **known)
    prompts = _prompts(data, args)[: asked.samples]
    tokenizer = policies.tokenizer_at(name, init_kwargs)
    policies.set_pad_token(tokenizer, runs[0].settings.get("pad_token"))
    options = SampleOptions(prompts=len(prompts), max_new_tokens=asked.max_new_tokens, seed=args.seed)
    starts = {"before": None} | {
        run.name if len(runs) > 1 else "after": _policy(folder) for run, folder in zip(runs, folders, strict=True)
    }
    measured = {
        side: sample_and_measure(
            name, start, tokenizer, prompts, options, device=args.device, init_kwargs=init_kwargs
        ) for side, start in starts.items()
    }  # fmt: skip
    return [_told(name, options), _table(measured), *(_pair(i, prompt, measured) for i, prompt in enumerate(prompts))]


def _recorded(runs: Sequence[Run]) -> dict:
    """Held-out rows of the first run, and the model where all of them began."""
    data, models = runs[0].record.get("data", {}), {run.record.get("model") for run in runs}
    known = {name: data.get(name) for name in ROWS} | {MODEL: models.pop() if len(models) == 1 else None}
    return {name: value for name, value in known.items() if value}


def _policy(folder: Path) -> Path:
    """The folder of the trained policy: the run's own, or its newest checkpoint."""
    for path in (folder, *map(Path, filter(None, [last_checkpoint(folder)]))):
        if any((path / name).is_file() for name in WEIGHTS):
            return path
    raise ValueError(f"--samples: {folder} holds no policy yet, nor a whole checkpoint with one.")


def _prompts(data: DataArguments, args: PreferenceConfig) -> list:
    """The different prompts of the rows that were held out."""
    if not (data.dataset_name and data.dataset_test_split):
        raise ValueError(
            "--samples: the run names no held-out rows to take prompts of: give --dataset_name FILE "
            "--dataset_test_split train, of rows that were not trained on."
        )
    rows = data.load(args, "test")
    prompts = [plain_prompt(row["prompt"]) for row in rows or []]
    return [*{json.dumps(prompt): prompt for prompt in prompts}.values()]


def _told(name: str, options: SampleOptions) -> str:
    return (
        f"The first {options.prompts} held-out prompts, one answer each: before is {name}, the model that was trained "
        f"on; temperature {options.temperature:g}, at most {options.max_new_tokens} tokens, the same random streams."
    )


def _table(measured: dict[str, dict]) -> str:
    rows = [
        [side, f"{np.mean(of['tokens']):.1f}", f"{np.mean(of['truncated']):.0%}", f"{np.mean(of['logratios']):.2f}"]
        for side, of in measured.items()
    ]
    return blocks.table(["Policy", "Tokens", "Cut off at the limit", "KL to before, nats per answer"], rows)


def _pair(index: int, prompt, measured: dict[str, dict]) -> str:
    text = "\n".join(turn["content"] for turn in turns(prompt))
    sides = []
    for side, of in measured.items():
        cut = ", cut off" if of["truncated"][index] else ""
        caption = f"{side}, {of['tokens'][index]} tokens{cut}"
        sides.append(("" if side == "before" else "after", caption, of["texts"][index].strip()))
    return blocks.pair(text, sides)
