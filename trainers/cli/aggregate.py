"""The min-max mixture of an EM-DPO run: python scripts/aggregate.py --run_dir runs/emdpo --dataset_name prompts.jsonl

Samples from each type's policy, works out who regrets what, writes the weights into the run's mixture.json, and a
table and a picture into RUN/aggregate or --output. With --distill it also trains one policy on answers of the mixture.
Give the same command again after a kill: samples and scores that are there already are kept. Several processes (DDP)
share the work and give the same weights: accelerate launch scripts/aggregate.py ... It does not shard a policy.
"""

import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from transformers import HfArgumentParser

from .. import load_preferences
from ..data.rows import refuse_template_options
from ..emdpo.aggregate import MIN_MAX, OTHER_PROMPTS, SHARES, SINGLE, UNIFORM, Arena, Player, compare, identity
from ..emdpo.distill import SETTINGS, distill, mixture_samples
from ..emdpo.figures import regret_bars
from ..emdpo.tables import MIXTURE, read_json
from ..generation.sampler import SamplingConfig, encode_prompts
from ..rounds import plain
from ..runs.files import read_rows, write_atomic, write_json
from ..runs.settings import digest
from ..statistics import about_intervals

OVERVIEW = "aggregate.json"
BASE, DISTILLED = "base-model", "distilled"
TAKEN = (BASE, DISTILLED, "reference", MIN_MAX, UNIFORM, SHARES)


@dataclass
class AggregateArguments:
    """What to mix, and on which prompts."""

    run_dir: str = field(metadata={"help": "output_dir of a finished EM-DPO run."})
    dataset_name: str = field(metadata={"help": "Prompts: hub id, folder, or file of rows with a `prompt`."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a hub data set or a folder."})
    output: str | None = field(
        default=None, metadata={"help": "Folder of samples and results; RUN/aggregate. One folder, one setting."}
    )
    max_prompts: int = field(default=128, metadata={"help": "Use the first so many different prompts."})
    num_generations: int = field(default=4, metadata={"help": "Answers per prompt and policy."})
    max_new_tokens: int = field(default=128, metadata={"help": "A cut answer estimates a cut regret."})
    batch_size: int = field(default=32, metadata={"help": "Sequences per forward pass while sampling."})
    seed: int = field(default=0, metadata={"help": "Of the samples."})
    type_weights: list[float] | None = field(default=None, metadata={"help": "Factor on each type's regret; all 1."})
    extra: list[str] = field(
        default_factory=list, metadata={"help": "Further policies to judge, name=folder, for example dpo=runs/dpo."}
    )
    distill: bool = field(default=False, metadata={"help": "Train one policy on answers of the mixture."})
    distill_learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the distillation."})
    distill_epochs: float = field(default=1.0, metadata={"help": "Passes over the answers."})
    distill_batch_size: int = field(default=8, metadata={"help": "Answers per step and process."})

    def __post_init__(self):
        if self.max_prompts < 1:
            raise ValueError(f"--max_prompts {self.max_prompts} must be at least 1.")
        self.players = extra_players(self.extra)


def main(argv: list[str]) -> None:
    (args,) = HfArgumentParser(AggregateArguments).parse_args_into_dataclasses(argv)
    run, accelerator = Path(args.run_dir), Accelerator()
    folder = run / "aggregate" if args.output is None else Path(args.output)
    config = SamplingConfig(num_generations=args.num_generations, max_new_tokens=args.max_new_tokens, temperature=1.0,
                            top_p=1.0, batch_size=args.batch_size, seed=args.seed)  # fmt: skip
    arena = Arena(run, read_prompts(args), config, folder, accelerator)
    refuse_type_weights(args.type_weights, len(arena.types))
    players = [*arena.types, *args.players]
    report = judge(arena, players, args)
    if args.distill:
        players += [Player(BASE, None), distilled(arena, report["mixture"], args)]
        report = judge(arena, players, args)
    if accelerator.is_main_process:
        mixture = read_json(run / MIXTURE)
        origin = os.path.relpath(folder / OVERVIEW, run)
        mixture |= {"weights": report["mixture"], "weights_are": f"min-max weights of {origin}"}
        write_json(run / MIXTURE, mixture)
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
    own = ("dataset_name", "dataset_split", "num_generations", "seed", "max_new_tokens", "extra")
    own += tuple(n for n in vars(args) if n.startswith("distill")) if args.distill else ()
    report["settings"] = {"prompts": len(arena.prompts), **{name: getattr(args, name) for name in own}}
    if arena.processes.is_main_process:
        write_json(arena.folder / OVERVIEW, report)
        write_atomic(arena.folder / "table.md", table(report).encode())
        rows = {name: row for name, row in report["table"].items() if name != OTHER_PROMPTS}
        intervals = {n: (np.array(r["low"]), np.array(r["high"])) for n, r in rows.items() if "low" in r}
        bars = regret_bars({n: np.array(r["regret"]) for n, r in rows.items()}, intervals or None)
        write_atomic(arena.folder / "regret.svg", bars.encode())
    arena.processes.wait_for_everyone()
    return report


def distilled(arena: Arena, weights: list[float], args: AggregateArguments) -> Player:
    """The mixture as one policy that starts where the types started; an earlier one is kept if nothing changed."""
    prompt_ids = encode_prompts(arena.tokenizer, arena.prompts)
    rows = mixture_samples([arena.samples(p) for p in arena.types], prompt_ids, np.array(weights), seed=args.seed)
    settings = {
        "mixture weights": [round(w, 6) for w in weights],
        "answers": digest(list(rows["input_ids"])),
        "base files": identity(arena.base),
        "distill_learning_rate": args.distill_learning_rate,
        "distill_epochs": args.distill_epochs,
        "answers per step": args.distill_batch_size * arena.processes.num_processes,
        "seed": args.seed,
    }
    player = Player(DISTILLED, arena.folder / DISTILLED)
    path = player.start / SETTINGS
    found = read_json(path) if path.is_file() else {}
    changed = [name for name, value in settings.items() if found.get(name) != value]
    arena.processes.wait_for_everyone()  # all have read it before one removes it
    if not changed:
        return player
    if player.start.exists():
        arena.processes.say(f"{player.start} is trained anew, because of other {', '.join(changed)}.")

    def clear() -> None:
        shutil.rmtree(arena.samples_of(player), ignore_errors=True)
        shutil.rmtree(player.start, ignore_errors=True)

    arena.processes.main(clear)
    distill(
        arena.load(Player(BASE, None)), arena.tokenizer, rows, player.start, settings=settings,
        learning_rate=args.distill_learning_rate, num_train_epochs=args.distill_epochs,
        per_device_train_batch_size=args.distill_batch_size, seed=args.seed,
        use_cpu=arena.accelerator.device.type == "cpu", disable_tqdm=False,
    )  # fmt: skip
    return player


def read_prompts(args: AggregateArguments) -> list:
    """The first different prompts of a file of rows or of a data set."""
    path = Path(args.dataset_name)
    if path.is_file() and path.name.removesuffix(".gz").endswith(".jsonl"):
        rows = read_rows(path)
    else:
        rows = load_preferences(args.dataset_name, split=args.dataset_split)
    found: dict[str, object] = {}
    for row in rows:
        if "prompt" not in row:
            raise ValueError(f"a row of {args.dataset_name} has no 'prompt': it has {sorted(row)}.")
        refuse_template_options(row)
        found.setdefault(str(row["prompt"]), plain(row["prompt"]))
        if len(found) == args.max_prompts:
            break
    return list(found.values())


def extra_players(texts: list[str]) -> list[Player]:
    """The policies of --extra.

    Raises:
        ValueError: one is not name=folder, or its name is taken, or is none that a file may have.
    """
    players = []
    for text in texts:
        name, _, path = text.partition("=")
        start = Path(path)
        if not path or not any((start / f"{kind}config.json").is_file() for kind in ("", "adapter_")):
            raise ValueError(f"--extra {text!r} is not name=folder: name a folder with a model or an adapter.")
        if not re.fullmatch(r"\w[\w .+-]*", name):
            raise ValueError(f"--extra {text!r}: the name may have letters, digits, spaces and . _ + - only.")
        taken = (*TAKEN, *(player.name for player in players))
        if name in taken or re.fullmatch(r"type-\d+", name) or name.startswith(SINGLE):
            raise ValueError(f"--extra {text!r}: the name {name!r} is taken, choose another one.")
        players.append(Player(name, start))
    return players


def refuse_type_weights(weights: list[float] | None, types: int) -> None:
    """Raises ValueError unless there is one positive number per type, before anything is sampled."""
    if weights is not None and (len(weights) != types or not all(0 < w < np.inf for w in weights)):
        raise ValueError(f"--type_weights {weights} must be one positive number for each of the {types} types.")


def table(report: dict) -> str:
    """Markdown: weights, and one row per aggregate with each type's regret and the largest."""
    types, factors, interval = range(len(report["mixture"])), report["type_weights"], report["interval"]
    weighted = any(factor != 1 for factor in factors)
    weights = ", ".join(f"type {k}: {w:.3f}{_range(interval, k)}" for k, w in enumerate(report["mixture"]))
    about = f" (95 % bootstrap over {report['prompts']} prompts)" if interval else ""
    largest = ["largest regret", *(["largest after the factors"] if weighted else [])]
    lines = [
        f"Min-max weights: {weights}{about}.",
        "",
        f"| policy | {' | '.join(largest)} | " + " | ".join(f"type {k}" for k in types) + " |",
        "|---|" + "---|" * (len(largest) + len(types)),
    ]
    for name, row in report["table"].items():
        ends = f" [{row['max_low']:.3f}, {row['max_high']:.3f}]" if "max_low" in row else ""
        cells = [f"{row['max']:.3f}{ends}", *([f"{row['weighted_max']:.3f}"] if weighted else [])]
        lines.append(f"| {name} | {' | '.join([*cells, *(f'{value:.3f}' for value in row['regret'])])} |")
    return "\n".join([*lines, "", *caption(report, weighted)]) + "\n"


def caption(report: dict, weighted: bool) -> list[str]:
    """What the numbers are, and what they say of the distilled policy."""
    settings = report["settings"]
    cut = ", ".join(f"{name} {s['truncated_share']:.0%}" for name, s in report["samples"].items())
    lines = [
        f"Regret of a type in nats per response (its implicit reward / beta): the mean over "
        f"{settings['num_generations']} answers at temperature 1 to each prompt, of at most "
        f"{settings['max_new_tokens']} tokens. Answers cut there: {cut}.",
    ]
    if weighted:
        terms = ", ".join(f"{factor:g} x type {k}" for k, factor in enumerate(report["type_weights"]))
        lines.append(f"The min-max weights minimise the largest regret after the factors: {terms}.")
    if note := about_intervals(report["prompts"], "prompts"):
        lines.append(note)
    worst = {name: report["table"][name]["max"] for name in (DISTILLED, BASE) if name in report["table"]}
    if len(worst) == 2 and worst[DISTILLED] >= worst[BASE]:
        lines.append(
            f"The distilled policy is not better than the base model that it was trained from: its largest regret is "
            f"{worst[DISTILLED]:.3f}, that of the base model {worst[BASE]:.3f}. Train it on more prompts, for more "
            "epochs (--distill_epochs), or at another --distill_learning_rate."
        )
    return lines


def _range(interval: dict | None, k: int) -> str:
    return f" [{interval['low'][k]:.3f}, {interval['high'][k]:.3f}]" if interval else ""


if __name__ == "__main__":
    main(sys.argv[1:])
