"""The stages that train: supervised fine-tuning of the start, the improver, and the policy on its own pairs."""

import json
from pathlib import Path

from ..runs.settings import digest
from ..runs.stage import train_into
from .config import DATA_KEYS
from .data import count_drops
from .health import dpo_health
from .improver import Example, length_faults, sft_config, train_sft
from .run import MODEL, Run, Stage, Step


def _needs_sft(run: Run, index: int) -> dict:
    return run.trained("sft") | {"conversations": digest(run.conversations)}


def _sft(run: Run, stage: Stage, index: int) -> dict:
    examples = [(row["prompt"], row["reference"]) for row in run.conversations]
    options = {name: value for name, value in run.args.sft.items() if name not in DATA_KEYS}
    faults = length_faults(examples, run.tokenizer, options.get("max_length", run.args.max_length))
    kept = [example for example, reason in zip(examples, faults, strict=True) if reason is None]
    return count_drops(faults) | _train(run, stage, index, None, options, kept)


def _needs_improver(run: Run, index: int) -> dict:
    own = {"policy_weight": run.args.policy_weight, "template": run.template()}
    return run.inputs(index, "start", "filter") | run.trained("improver") | own


def _improver(run: Run, stage: Stage, index: int) -> dict:
    rows = run.read("filter", index)
    examples = [(run.ask_improver(row, "current"), row["target"]) for row in rows]
    guard = [(row["prompt"], row["reference"]) for row in rows]
    trained = _train(run, stage, index, run.start(index), run.args.improver, examples, guard, run.args.policy_weight)
    return {"examples": len(rows)} | trained


def _train(run: Run, stage: Stage, index: int, start: Path | None, options: dict, examples: list[Example],
           guard: list[Example] | None = None, weight: float = 0.0) -> dict:  # fmt: skip
    if not examples:
        raise ValueError(
            f"{stage.folder.name}: no example fits into max_length={options.get('max_length')}: raise it."
        )

    def train(folder: Path) -> None:
        config = sft_config(run.args, options, folder, run.args.seed + index)
        model, adapter = run.load(start)
        train_sft(model, run.tokenizer, config, examples, peft_config=adapter, policy_examples=guard,
                  policy_weight=weight)  # fmt: skip

    train_into(stage.folder / MODEL, train, run.processes)
    state = trainer_state(stage.folder / MODEL)
    losses = [log["loss"] for log in state["log_history"] if "loss" in log]
    return {"steps": state["global_step"]} | ({"first_loss": losses[0], "last_loss": losses[-1]} if losses else {})


def _needs_dpo(run: Run, index: int) -> dict:
    return run.inputs(index, "start", "improver", "pairs") | run.trained() | {
        "separate_improver": run.args.separate_improver
    }  # fmt: skip


def _dpo(run: Run, stage: Stage, index: int) -> dict:
    rows = [pair(row) for row in run.read("pairs", index)]
    start = run.policy(index)
    reference = () if run.args.ref == "improved" else (run.start(0),)

    def train(folder: Path) -> None:
        run.train_dpo(rows, start, reference, folder, run.args.seed + index)

    train_into(stage.folder / MODEL, train, run.processes)
    state, starts_at_reference = trainer_state(stage.folder / MODEL), reference in ((), (start,))
    return {"pairs": len(rows)} | dpo_health(state, run.args.beta, starts_at_reference=starts_at_reference)


def pair(row: dict) -> dict:
    """A canonical row: chosen over rejected, both under the plain prompt."""
    texts = [row["chosen"], row["rejected"]]
    responses = texts if isinstance(row["prompt"], str) else [[{"role": "assistant", "content": t}] for t in texts]
    return {"prompt": row["prompt"], "responses": responses, "scores": [1.0, 0.0]}


def trainer_state(folder: Path) -> dict:
    """What a trainer left of its steps and logs."""
    return json.loads((folder / "trainer_state.json").read_text())


SFT = Step(_needs_sft, _sft, (MODEL,))
IMPROVER = Step(_needs_improver, _improver, (MODEL,))
DPO = Step(_needs_dpo, _dpo, (MODEL,))
