"""The min-max mixture of an EM-DPO run: python scripts/aggregate.py --run runs/emdpo --dataset_name prompts.jsonl

Samples from each type's policy, works out who regrets what, writes the weights into the run's mixture.json, and a
table and a picture into RUN/aggregate. With --distill it also trains one policy on answers of the mixture.
Give the same command again after a kill: samples and scores that are there already are kept. Several processes (DDP)
share the work and give the same weights: accelerate launch scripts/aggregate.py ... It does not shard a policy.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from transformers import HfArgumentParser

from trainers import load_preferences
from trainers.em.aggregate import Arena, Player, compare
from trainers.em.distill import distill, mixture_samples
from trainers.em.figures import regret_bars
from trainers.em.tables import MIXTURE, read_json
from trainers.loop.enhance import plain
from trainers.loop.journal import read_rows, write_atomic, write_json
from trainers.loop.sampler import SamplingConfig, encode_prompts

OVERVIEW = "aggregate.json"


@dataclass
class AggregateArguments:
    """What to mix, and on which prompts."""

    run: str = field(metadata={"help": "output_dir of a finished EM-DPO run."})
    dataset_name: str = field(metadata={"help": "Prompts: hub id, folder, or file of rows with a `prompt`."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a hub data set or a folder."})
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


def main(argv: list[str]) -> None:
    (args,) = HfArgumentParser(AggregateArguments).parse_args_into_dataclasses(argv)
    run, accelerator = Path(args.run), Accelerator()
    folder = run / "aggregate"
    config = SamplingConfig(num_generations=args.num_generations, max_new_tokens=args.max_new_tokens, temperature=1.0,
                            top_p=1.0, batch_size=args.batch_size, seed=args.seed)  # fmt: skip
    arena = Arena(run, read_prompts(args), config, folder, accelerator)
    players = [*arena.types, *(extra_player(text) for text in args.extra)]
    report = judge(arena, players, args)
    if args.distill:
        one = folder / "distilled"
        if not one.exists():
            train_one(arena, report["mixture"], one, args)
        report = judge(arena, [*players, Player("distilled", one)], args)
    if accelerator.is_main_process:
        mixture = read_json(run / MIXTURE)
        mixture |= {"weights": report["mixture"], "weights_are": "min-max weights of aggregate/aggregate.json"}
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
    report["settings"] = {"prompts": len(arena.prompts), "num_generations": args.num_generations, "seed": args.seed,
                          "max_new_tokens": args.max_new_tokens}  # fmt: skip
    if arena.processes.is_main_process:
        write_json(arena.folder / OVERVIEW, report)
        write_atomic(arena.folder / "table.md", table(report).encode())
        rows = {name: row for name, row in report["table"].items() if "low" in row}
        bars = regret_bars({n: np.array(r["regret"]) for n, r in rows.items()},
                           {n: (np.array(r["low"]), np.array(r["high"])) for n, r in rows.items()})  # fmt: skip
        write_atomic(arena.folder / "regret.svg", bars.encode())
    arena.processes.wait_for_everyone()
    return report


def train_one(arena: Arena, weights: list[float], folder: Path, args: AggregateArguments) -> None:
    """Distils the mixture into one policy that starts where the types started."""
    prompt_ids = encode_prompts(arena.tokenizer, arena.prompts)
    rows = mixture_samples([arena.samples(p) for p in arena.types], prompt_ids, np.array(weights), seed=args.seed)
    distill(
        arena.load(Player("reference", None)), arena.tokenizer, rows, folder,
        learning_rate=args.distill_learning_rate, num_train_epochs=args.distill_epochs,
        per_device_train_batch_size=args.distill_batch_size, seed=args.seed,
        use_cpu=arena.accelerator.device.type == "cpu", disable_tqdm=False,
    )  # fmt: skip


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
        found.setdefault(str(row["prompt"]), plain(row["prompt"]))
        if len(found) == args.max_prompts:
            break
    return list(found.values())


def extra_player(text: str) -> Player:
    name, _, path = text.partition("=")
    if not path or not Path(path).is_dir():
        raise ValueError(f"--extra {text!r} is not name=folder: name a folder with a model or an adapter.")
    return Player(name, Path(path))


def table(report: dict) -> str:
    """Markdown: weights, and one row per aggregate with each type's regret and the largest."""
    types = range(len(report["mixture"]))
    low, high = report["interval"]["low"], report["interval"]["high"]
    weights = ", ".join(f"type {k}: {report['mixture'][k]:.3f} [{low[k]:.3f}, {high[k]:.3f}]" for k in types)
    lines = [
        f"Min-max weights: {weights} (95 % bootstrap over {report['prompts']} prompts).",
        "",
        "| policy | largest regret | " + " | ".join(f"type {k}" for k in types) + " |",
        "|---|---|" + "---|" * len(types),
    ]
    for name, row in report["table"].items():
        if not row:
            continue
        interval = f" [{row['max_low']:.3f}, {row['max_high']:.3f}]" if "max_low" in row else ""
        cells = " | ".join(f"{value:.3f}" for value in row["regret"])
        lines.append(f"| {name} | {row['max']:.3f}{interval} | {cells} |")
    cut = ", ".join(f"{name} {s['truncated_share']:.0%}" for name, s in report["samples"].items())
    lines += [
        "",
        f"Regret of a type in nats per response (its implicit reward / beta): the mean over "
        f"{report['settings']['num_generations']} answers at temperature 1 to each prompt, of at most "
        f"{report['settings']['max_new_tokens']} tokens. Answers cut there: {cut}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
