"""Answers to held-out prompts for the page of a run: of the model that it started from, and of its policy."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from polypo.recipes import holds_adapter, holds_policy, split_recipe

from .. import PreferenceConfig
from ..data.facts import plain
from ..data.rows import refuse_template_kwargs, refuse_template_options
from ..forward import policy as policies
from ..generation.sampler import plain_prompt
from ..pages.page import blocks
from ..runs.checkpoints import last_checkpoint
from ..runs.record import Run
from . import config_files
from .arguments import DataArguments, ModelArguments
from .compare_samples import SampleOptions, sample_and_measure

MODEL = "model_name_or_path"
ROWS = ("dataset_name", "dataset_config", "dataset_test_split", "data_format")


def sample_parts(folders: Sequence[Path], runs: Sequence[Run], asked, flags: Sequence[str]) -> list[str]:
    """One answer to each prompt by the policy that the runs began with and by each trained one, with the same streams.

    Args:
        asked: `ReportArguments`.
        flags: a recipe or its fields, for what a run.json does not say: `model_name_or_path`, of the model or of the
            adapter that training went on from, and the rows.

    Raises:
        ValueError: the runs began with several models, or it is not known with which one; a folder holds no policy;
            there are no rows to take prompts of, or options of the chat template come with them.
    """
    own, recipe = split_recipe([*flags])
    wanted = _recorded(runs) | {name: value for name, value in recipe.items() if name in (*ROWS, MODEL)}
    data, model = config_files.parse([DataArguments, ModelArguments], own, wanted)
    if not model.model_name_or_path:
        raise ValueError(f"--samples: it is not recorded that all runs began with one model: give --{MODEL}.")
    for run in runs:
        refuse_template_kwargs(run.settings.get("chat_template_kwargs"))
    with TemporaryDirectory() as scratch:
        known = {key: runs[0].settings[key] for key in ("as_chat", "seed", "use_cpu") if key in runs[0].settings}
        args = PreferenceConfig(output_dir=scratch, report_to=[], **known)
    prompts = _prompts(data, args, asked.samples)
    trained = [_policy(folder, run) for folder, run in zip(folders, runs, strict=True)]
    name, before, told = _before(model.model_name_or_path, runs, trained)
    init_kwargs = runs[0].settings.get("model_init_kwargs")
    tokenizer = policies.tokenizer_at(name, init_kwargs)
    policies.set_pad_token(tokenizer, runs[0].settings.get("pad_token"))
    options = SampleOptions(prompts=len(prompts), max_new_tokens=asked.max_new_tokens, seed=args.seed)
    starts = {"before": before} | {
        run.name if len(runs) > 1 else "after": policy for run, policy in zip(runs, trained, strict=True)
    }
    measured = {
        side: sample_and_measure(
            name, start, tokenizer, prompts, options, device=args.device, init_kwargs=init_kwargs, before=before
        ) for side, start in starts.items()
    }  # fmt: skip
    return [_told(told, options), _table(measured), *(_pair(i, prompt, measured) for i, prompt in enumerate(prompts))]


def _recorded(runs: Sequence[Run]) -> dict:
    """Held-out rows of the first run, and the model where all of them began."""
    data, models = runs[0].record.get("data", {}), {run.record.get("model") for run in runs}
    known = {name: data.get(name) for name in ROWS} | {MODEL: models.pop() if len(models) == 1 else None}
    return {name: value for name, value in known.items() if value}


def _policy(folder: Path, run: Run) -> Path:
    """The folder of the trained policy: the run's own, or its newest checkpoint; PEFT saves a named adapter in it."""
    for path in (folder, *map(Path, filter(None, [last_checkpoint(folder)]))):
        for policy in (path, path / (run.record.get("adapter_name") or "")):
            if holds_policy(policy):
                return policy
    raise ValueError(f"--samples: {folder} holds no policy yet, nor a whole checkpoint with one.")


def _before(named: str, runs: Sequence[Run], trained: Sequence[Path]) -> tuple[str, Path | None, str]:
    """The model under all policies; the adapter on it that training went on from, if it is on disk; both in words.

    Args:
        named: a model or such an adapter.
        trained: the folders of the policies, one of which may have been written over the adapter.
    """
    adapters = {run.record.get("start_adapter") or "" for run in runs}
    if holds_adapter(named) and (config := policies.find_adapter(named)):
        named, adapters = str(config.base_model_name_or_path), {named}
    told = " and ".join(filter(None, sorted(adapters)))
    if not told:
        return named, None, f"{named}, the model that was trained on"
    adapter = Path(told)
    there = len(adapters) == 1 and holds_adapter(adapter)
    if there and adapter.resolve() not in [path.resolve() for path in trained]:
        return named, adapter, f"{told}, the adapter on {named} that training went on from"
    left = f"not on disk as it was, or not one for all: --{MODEL} FOLDER names it"
    return named, None, f"{named}, the model under the adapter that training went on from ({told}), {left}"


def _prompts(data: DataArguments, args: PreferenceConfig, count: int) -> list:
    """So many different prompts of the rows that were held out."""
    if not (data.dataset_name and data.dataset_test_split):
        raise ValueError(
            "--samples: the run names no held-out rows to take prompts of: give --dataset_name FILE "
            "--dataset_test_split train, of rows that were not trained on."
        )
    prompts: dict[str, Any] = {}
    for row in data.load(args, "test") or []:
        if len(prompts) == count:
            break
        refuse_template_options(row)
        prompts[json.dumps(row["prompt"])] = plain_prompt(row["prompt"])
    return [*prompts.values()]


def _told(before: str, options: SampleOptions) -> str:
    return (
        f"The first {options.prompts} held-out prompts, one answer each: before is {before}; "
        f"temperature {options.temperature:g}, at most {options.max_new_tokens} tokens, the same random streams. "
        "The KL is an estimate from these answers alone, which may be below 0 where they are few."
    )


def _table(measured: dict[str, dict]) -> str:
    rows = [
        [side, f"{np.mean(of['tokens']):.1f}", f"{np.mean(of['truncated']):.0%}", f"{np.mean(of['logratios']):.2f}"]
        for side, of in measured.items()
    ]
    return blocks.table(["Policy", "Tokens", "Cut off at the limit", "KL to before, nats per answer (estimate)"], rows)


def _pair(index: int, prompt, measured: dict[str, dict]) -> str:
    sides = []
    for side, of in measured.items():
        cut = ", cut off" if of["truncated"][index] else ""
        caption = f"{side}, {of['tokens'][index]} tokens{cut}"
        sides.append(("" if side == "before" else "after", caption, of["texts"][index].strip()))
    return blocks.pair(plain(prompt), sides)
