"""The min-max mixture of an EM-DPO run: polypo aggregate --run_dir runs/emdpo --dataset_name prompts.jsonl

Samples from each type's policy, works out who regrets what, writes the weights into the run's mixture.json, and a
table and a picture into RUN/aggregate or --output. With --distill it also trains one policy on answers of the mixture.
Give the same command again after a kill: samples and scores that are there already are kept. Several processes (DDP)
share the work and give the same weights: polypo aggregate --num_processes 2 ... The policy that is distilled may be
sharded: --accelerate_config zero3. All others are whole in each process while they answer and score.
"""

import math
import os
from dataclasses import MISSING, dataclass, field
from pathlib import Path

import numpy as np

from .. import load_preferences
from ..config import check_options, option
from ..data.rows import prompt_to_answer
from ..emdpo.aggregate import MIN_MAX, OTHER_PROMPTS, SHARES, UNIFORM, Arena, Player, compare
from ..emdpo.distill import DISTILLED, distilled
from ..emdpo.figures import regrets
from ..emdpo.tables import MIXTURE
from ..generation.sampler import TRANSFORMERS, plain_prompt
from ..pages.text import interval, markdown
from ..runs.files import read_json, read_rows, write_atomic, write_json
from ..runs.processes import join_launcher, refuse_partial_weights
from ..statistics import about_intervals
from . import config_files

OVERVIEW = "aggregate.json"
BASE = "base-model"


@dataclass
class AggregateArguments:
    """What to mix, and on which prompts."""

    run_dir: str = option(MISSING, "output_dir of a finished EM-DPO run.")
    dataset_name: str = option(MISSING, "Prompts: hub id, folder, or file of rows with a `prompt`.")
    dataset_split: str = option("train", "Split of a hub data set or a folder.")
    output: str | None = option(None, "Folder of samples and results; RUN/aggregate. One folder, one setting.")
    max_prompts: int = option(128, "Use the first so many different prompts.", at_least=1)
    num_generations: int = option(4, "Answers per prompt and policy.")
    max_new_tokens: int = option(128, "A cut answer estimates a cut regret.")
    batch_size: int = option(32, "Sequences per forward pass while sampling, or requests under way.")
    engine: str = option(TRANSFORMERS, "What samples, as of polypo generate: a command such as vllm serve.")
    seed: int = option(0, "Of the samples.")
    type_weights: list[float] | None = option(None, "Factor on each type's regret; all 1.")
    extra: list[str] = field(
        default_factory=list, metadata={"help": "Further policies to judge, name=folder, for example dpo=runs/dpo."}
    )
    distill: bool = option(False, "Train one policy on answers of the mixture.")
    distill_learning_rate: float = option(1e-5, "Learning rate of the distillation.")
    distill_epochs: float = option(1.0, "Passes over the answers.")
    distill_batch_size: int = option(8, "Answers per step and process.")

    def __post_init__(self):
        check_options(self)
        parts = [text.partition("=") for text in self.extra]
        self.players = [Player(name, Path(folder)) for name, _, folder in parts]
        names = [BASE, DISTILLED, "reference", MIN_MAX, UNIFORM, SHARES, *(name for name, *_ in parts)]
        if not all(folder for *_, folder in parts) or len(set(names)) < len(names):
            raise ValueError(f"--extra {self.extra} must be name=folder, with names that are not taken.")


def main(argv: list[str]) -> None:
    (args,) = config_files.read(argv, AggregateArguments)
    accelerator = join_launcher()
    if args.distill:
        refuse_partial_weights(accelerator, "--distill")
    run = Path(args.run_dir)
    own = ("num_generations", "max_new_tokens", "batch_size", "engine", "seed")
    sampling = {name: getattr(args, name) for name in own}
    arena = Arena(run, read_prompts(args), args.output or run / "aggregate", **sampling)
    factors = args.type_weights or [1.0] * len(arena.types)
    if len(factors) != len(arena.types) or not all(0 < factor < math.inf for factor in factors):
        raise ValueError(f"type_weights={factors}: give one positive number for each of the {len(arena.types)} types.")
    players = [*arena.types, *args.players]
    report = judge(arena, players, args)
    if args.distill:
        training = {"learning_rate": args.distill_learning_rate, "num_train_epochs": args.distill_epochs,
                    "per_device_train_batch_size": args.distill_batch_size}  # fmt: skip
        players += [Player(BASE, None), distilled(arena, report["mixture"], seed=args.seed, **training)]
        report = judge(arena, players, args)
    if arena.processes.is_main_process:
        origin = os.path.relpath(arena.folder / OVERVIEW, run)
        weights = {"weights": report["mixture"], "weights_are": f"min-max weights of {origin}"}
        write_json(run / MIXTURE, read_json(run / MIXTURE) | weights)
        print(table(report))


def judge(arena: Arena, players: list[Player], args: AggregateArguments) -> dict:
    """Samples, scores and plays the game; writes the report, its table and its picture."""
    gains, samples = arena.gains(players)
    report = compare(gains, [p.name for p in players], arena.mixture["prior"], args.type_weights, seed=args.seed)
    report["samples"] = {
        player.name: {
            "tokens": float(np.mean([len(s.token_ids) for row in answers for s in row])),
            "truncated_share": float(np.mean([s.truncated for row in answers for s in row])),
        }
        for player, answers in zip(players, samples, strict=True)
    }
    own: tuple[str, ...] = ("dataset_name", "dataset_split", "num_generations", "seed", "max_new_tokens", "extra")
    own += tuple(n for n in vars(args) if n.startswith("distill")) if args.distill else ()
    report["settings"] = {"prompts": len(arena.prompts), **{name: getattr(args, name) for name in own}}
    if arena.processes.is_main_process:
        write_json(arena.folder / OVERVIEW, report)
        write_atomic(arena.folder / "table.md", table(report).encode())
        rows = {name: row for name, row in report["table"].items() if name != OTHER_PROMPTS}
        write_atomic(arena.folder / "regret.svg", regrets(rows).encode())
    arena.processes.wait_for_everyone()
    return report


def read_prompts(args: AggregateArguments) -> list:
    """The first different prompts of a file of rows or of a data set."""
    lines = args.dataset_name.removesuffix(".gz").endswith(".jsonl")
    prompts: dict[str, object] = {}
    rows = read_rows(args.dataset_name) if lines else load_preferences(args.dataset_name, args.dataset_split)
    for i, row in enumerate(rows):
        prompt = prompt_to_answer(row, f"--dataset_name: row {i}")
        prompts.setdefault(str(prompt), plain_prompt(prompt))
        if len(prompts) == args.max_prompts:
            break
    if not prompts:
        raise ValueError(f"--dataset_name: {args.dataset_name} has no rows.")
    return list(prompts.values())


def table(report: dict) -> str:
    """Markdown: weights, and one row per aggregate with each type's regret and the largest."""

    def cell(mean: float, low: float | None = None, high: float | None = None) -> str:
        return interval({"mean": mean, "low": low, "high": high})

    types = [f"type {k}" for k in range(len(report["mixture"]))]
    ends = zip(report["interval"]["low"], report["interval"]["high"], strict=True) if report["interval"] else None
    cells = [cell(w, *pair) for w, pair in zip(report["mixture"], ends or [()] * len(types), strict=True)]
    weights = ", ".join(f"{name}: {text}" for name, text in zip(types, cells, strict=True))
    about = f" (95 % bootstrap over {report['prompts']} prompts)" if ends else ""
    weighted = any(factor != 1 for factor in report["type_weights"])
    head = ["policy", "largest regret", *(["largest after the factors"] if weighted else []), *types]
    rows = [
        [name, cell(row["max"], row.get("max_low"), row.get("max_high")),
         *map(cell, [row["weighted_max"]] if weighted else []), *map(cell, row["regret"])]
        for name, row in report["table"].items()
    ]  # fmt: skip
    return f"Min-max weights: {weights}{about}.\n\n{markdown(head, rows)}\n" + "\n".join(caption(report)) + "\n"


def caption(report: dict) -> list[str]:
    """What the numbers are, and what they say of the distilled policy."""
    settings = report["settings"]
    cut = ", ".join(f"{name} {s['truncated_share']:.0%}" for name, s in report["samples"].items())
    lines = [
        f"Regret of a type in nats per response (its implicit reward / beta): the mean over "
        f"{settings['num_generations']} answers at temperature 1 to each prompt, of at most "
        f"{settings['max_new_tokens']} tokens. Answers cut there: {cut}.",
    ]
    if any(factor != 1 for factor in report["type_weights"]):
        terms = ", ".join(f"{factor:g} x type {k}" for k, factor in enumerate(report["type_weights"]))
        lines.append(f"The min-max weights minimise the largest regret after the factors: {terms}.")
    if note := about_intervals(report["prompts"], "prompts"):
        lines.append(note)
    types = range(len(report["mixture"]))
    favourites = [f"type-{k}" for k in types if max(row[k] for row in report["regret"]) <= 0]
    if favourites and len(types) > 1:
        lines.append(
            f"No type regrets the answers of {', '.join(favourites)}, so the weights say little. Policies that hardly "
            "differ give that, and policies that no longer write like their reference: look at samples, and train the "
            "types once more from the reference (docs/emdpo.md)."
        )
    worst = {name: report["table"][name]["max"] for name in (DISTILLED, BASE) if name in report["table"]}
    if len(worst) == 2 and worst[DISTILLED] >= worst[BASE]:
        lines.append(
            f"The distilled policy is not better than the base model that it was trained from: its largest regret is "
            f"{worst[DISTILLED]:.3f}, that of the base model {worst[BASE]:.3f}. Train it on more prompts, for more "
            "epochs (--distill_epochs), or at another --distill_learning_rate."
        )
    return lines
