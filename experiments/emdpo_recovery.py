"""Does EM-DPO find groups of annotators with opposed tastes in the texts of a real language model?

python scripts/emdpo_recovery.py --model ../shared/models/stories260K --eos "<s>" --output runs/emdpo-recovery

Three groups rank three of the model's own continuations (1 to 4 sentences) of openings that it wrote itself: the
cheerful (VADER up), the gloomy (VADER down) and the brief (few tokens), each with Gumbel noise. Per seed, the same
number of passes over the rows for every policy:

    em            EM-DPO from the clusters below, scored on held-out halves; then one policy per type on all rows
    clusters      one policy per cluster of annotators who agree (the trainer's default first guess), no EM
    oracle        one policy per true group
    vanilla       one policy for all

Judged on new prompts: share of annotators typed right, pairwise accuracy of the rewards in each group, and the regret
of each group when a mixture answers. What limits the types is measured too: those of an E-step under policies of the
true groups. A finished part is not made again.
"""

import gc
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from trainers import EMDPOConfig, EMDPOTrainer
from trainers.emdpo import init
from trainers.emdpo.aggregate import Arena, Player, compare
from trainers.emdpo.figures import regrets as regret_picture
from trainers.emdpo.mixture import match_types
from trainers.emdpo.tables import read_annotators, read_json
from trainers.generation import sample_responses
from trainers.generation.rewards import vader_sentiment
from trainers.generation.sampler import SamplingConfig, encode_prompts
from trainers.metrics import pairwise_accuracy
from trainers.runs.files import read_rows, write_atomic, write_json, write_rows
from trainers.statistics import t_interval

GROUPS = ("cheerful", "gloomy", "brief")
METHODS = ("em", "clusters", "oracle", "vanilla")
LONGEST = 4  # sentences of an answer, drawn from 1


@dataclass
class RecoveryArguments:
    """Size of the experiment."""

    model: str = field(metadata={"help": "Model folder or hub id."})
    output: str = field(default="runs/emdpo-recovery", metadata={"help": "Folder of runs, table and pictures."})
    eos: str | None = field(default=None, metadata={"help": "Token that ends a text, if not the tokenizer's."})
    seeds: int = field(default=3, metadata={"help": "Repetitions: other samples, noise, starts and training orders."})
    annotators: int = field(default=40, metadata={"help": "Per group."})
    items: int = field(default=16, metadata={"help": "Rankings per annotator."})
    train_prompts: int = field(default=96, metadata={"help": "Prompts of the training rows."})
    test_prompts: int = field(default=48, metadata={"help": "New prompts for accuracy and regret."})
    answers: int = field(default=6, metadata={"help": "Answers sampled per prompt; each row shows three."})
    max_new_tokens: int = field(default=64, metadata={"help": "Of an answer."})
    rounds: int = field(default=3, metadata={"help": "Rounds of EM."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Of every policy, full fine-tuning."})
    beta: float = field(default=0.1, metadata={"help": "Of every policy."})
    batch_size: int = field(default=16, metadata={"help": "Rows per step."})
    epochs: int = field(default=1, metadata={"help": "Passes over the rows for each policy (in EM: each round)."})
    noise: float = field(default=0.5, metadata={"help": "Scale of the Gumbel noise, in units of a taste's spread."})


def main(argv: list[str]) -> dict:
    (args,) = HfArgumentParser(RecoveryArguments).parse_args_into_dataclasses(argv)
    gc.freeze()  # EM collects garbage between policies, which are tiny here
    results = []
    for seed in range(args.seeds):
        path = Path(args.output) / f"seed-{seed}" / "result.json"
        if not path.exists():
            write_json(path, one_seed(args, seed, path.parent))
        found = json.loads(path.read_text())
        results.append(found | {"length": length_accuracy(read_rows(path.with_name("test.jsonl.gz")))})
    text = table(results, args)
    write_json(Path(args.output) / "recovery.json", {"settings": vars(args), "results": results})
    write_atomic(Path(args.output) / "table.md", text.encode())
    write_atomic(Path(args.output) / "regret.svg", picture(results).encode())
    print(text)
    return results


def one_seed(args: RecoveryArguments, seed: int, folder: Path) -> dict:
    """All methods on one draw of samples, noise and starts."""
    splits = {name: make_rows(args, seed, name, folder) for name in ("train", "test")}
    group_of = {row["annotator"]: row["group"] for row in splits["train"]}
    result, policies = {"seed": seed, "methods": {}}, {}
    result["typed"] = {name: typed_right(run_method(name, args, seed, folder / name, splits, group_of), group_of)
                       for name in ("find", "bound")}  # fmt: skip
    for name in METHODS:
        trainer = run_method(name, args, seed, folder / name, splits, group_of)
        labels = np.array([group_of[a] for a in trainer.annotators.names])
        accuracy, names = match_types(trainer.posterior, labels)
        policies[name] = trainer.policies
        result["methods"][name] = {
            "typed_right": accuracy if trainer.args.num_types == len(GROUPS) else None,
            "group_of_type": names.tolist(),
            "log_likelihood": trainer.evaluate()["eval_log_likelihood_per_item"],
            "accuracy": group_accuracy(trainer, splits["test"], group_of),
        }
    result["regret"] = {name: regrets(args, folder / name, policies, seed) for name in ("em", "clusters", "oracle")}
    return result


# Rows.


def make_rows(args: RecoveryArguments, seed: int, split: str, folder: Path) -> list[dict]:
    """Rankings of three answers by every annotator; `group` is the truth, which no method but the oracle sees."""
    path = folder / f"{split}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return read_rows(path)
    prompts = openings(args, split)
    tokenizer = load_tokenizer(args)
    config = SamplingConfig(num_generations=args.answers, max_new_tokens=args.max_new_tokens, temperature=1.0,
                            top_p=1.0, batch_size=96, seed=seed)  # fmt: skip
    samples = sample_responses(AutoModelForCausalLM.from_pretrained(args.model), tokenizer, prompts, config)
    prompt_ids = encode_prompts(tokenizer, prompts)
    random, rows = np.random.default_rng((seed, split == "test")), []
    answers = [[_cut(s.token_ids, tokenizer, random.integers(1, LONGEST + 1)) for s in row] for row in samples]
    tastes = _tastes([[tokenizer.decode(ids, skip_special_tokens=True) for ids in row] for row in answers], answers)
    items = args.items if split == "train" else max(2, args.items // 3)
    for group in range(len(GROUPS)):
        for i in range(args.annotators):
            for p in random.choice(len(prompts), items, replace=False):
                shown = random.choice(args.answers, 3, replace=False)
                utility = tastes[group, p, shown] + args.noise * random.gumbel(size=3)
                rows.append({
                    "prompt_ids": prompt_ids[p], "response_ids": [answers[p][k] for k in shown],
                    "scores": utility.tolist(), "taste": tastes[group, p, shown].tolist(),
                    "annotator": f"{group}-{i}", "group": group,
                })  # fmt: skip
    rows = [rows[i] for i in random.permutation(len(rows))]
    write_rows(path, rows)
    return rows


def openings(args: RecoveryArguments, split: str) -> list[str]:
    """First sentences of stories that the model wrote, other ones for training than for judging."""
    path, count = Path(args.output) / "openings.json", args.train_prompts + args.test_prompts
    if not path.exists():
        config = SamplingConfig(
            num_generations=4 * count, max_new_tokens=24, temperature=1.0, top_p=1.0, batch_size=96
        )
        model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), load_tokenizer(args)
        texts = [s.text.partition(".")[0].strip() for s in sample_responses(model, tokenizer, [""], config)[0]]
        found = list(dict.fromkeys(f"{text}." for text in texts if len(text) > 12))
        if len(found) < count:
            raise ValueError(f"the model wrote {len(found)} different openings, fewer than the {count} prompts.")
        write_json(path, {"openings": found[:count]})
    found = json.loads(path.read_text())["openings"]
    return found[: args.train_prompts] if split == "train" else found[args.train_prompts : count]


def _cut(ids: list[int], tokenizer, sentences: int) -> list[int]:
    """The first so many sentences with an end token; the model itself would go on for hundreds of tokens."""
    stops = [i for i, token in enumerate(ids) if "." in tokenizer.decode([token])]
    return [*ids[: stops[sentences - 1] + 1], tokenizer.eos_token_id] if len(stops) >= sentences else ids


def _tastes(texts: list[list[str]], answers: list[list[list[int]]]) -> np.ndarray:
    """(groups, prompts, answers) utilities, each with spread 1 over all answers."""
    mood = np.array([vader_sentiment(None, row) for row in texts])
    length = np.array([[float(len(ids)) for ids in row] for row in answers])
    return np.stack([(x - x.mean()) / x.std() for x in (mood, -mood, -length)])


def load_tokenizer(args: RecoveryArguments):
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.eos is not None:
        tokenizer.eos_token = args.eos
    return tokenizer


# Methods.


def run_method(name: str, args: RecoveryArguments, seed: int, folder: Path, splits: dict, group_of: dict):
    """Every method is the same trainer with another posterior, so that the training is the same."""
    options = {"num_types": len(GROUPS), "rounds": 1}
    rows = [{k: v for k, v in row.items() if k not in ("group", "taste")} for row in splits["train"]]
    if name == "find":
        options |= {"rounds": args.rounds, "init": "agreement", "score_on": "heldout_half"}
    elif name == "em":
        options["initial_posterior"] = str(folder.with_name("find") / "annotators.csv")
    elif name == "clusters":
        options["init"] = "agreement"
    elif name in ("oracle", "bound"):
        options["initial_posterior"] = {a: np.eye(len(GROUPS))[g].tolist() for a, g in group_of.items()}
        options |= {"rounds": 2, "score_on": "heldout_half"} if name == "bound" else {}
    else:
        options["num_types"] = 1
    config = EMDPOConfig(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, seed=seed, beta=args.beta,
        learning_rate=args.learning_rate, lr_scheduler_type="constant", per_device_train_batch_size=args.batch_size,
        num_train_epochs=args.epochs, normalize="posterior", logging_strategy="no", save_strategy="no",
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    held_out = [{k: v for k, v in row.items() if k not in ("group", "taste")} for row in splits["test"]]
    trainer = EMDPOTrainer(
        args.model, args=config, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(held_out),
        processing_class=load_tokenizer(args),
    )  # fmt: skip
    trainer.train()
    # The type that was given, not the one by rows that the policy has seen.
    if name in ("em", "clusters", "oracle"):
        start = folder / "restart-0" / "start.csv"
        trainer.posterior = init.given(str(start), trainer.annotators, len(GROUPS))
    return trainer


def typed_right(trainer, group_of: dict) -> list[float]:
    """Share of annotators typed right by the first guess and after each round."""
    labels = np.array([group_of[a] for a in trainer.annotators.names])
    tables = sorted((Path(trainer.args.output_dir) / "restart-0").glob("round-*/annotators.csv"))
    first = tables[0].parents[1] / "start.csv"
    return [match_types(read_annotators(path)[1], labels)[0] for path in (first, *tables)]


def group_accuracy(trainer, rows: list[dict], group_of: dict) -> list[float]:
    """Per group, the share of pairs of new answers that the policy of the annotator's type puts in the true order."""
    rewards = policy_rewards(trainer)
    type_of = dict(zip(trainer.annotators.names, trainer.posterior.argmax(1), strict=True))
    found = [[] for _ in GROUPS]
    for i, row in enumerate(rows):
        values = torch.tensor([rewards[type_of[row["annotator"]]][i]])
        taste = torch.tensor([row["taste"]], dtype=torch.float64)
        accuracy = pairwise_accuracy(values.double(), taste, torch.ones_like(taste).bool())
        found[group_of[row["annotator"]]].append(float(accuracy))
    return [float(np.nanmean(values)) for values in found]


def length_accuracy(rows: list[dict]) -> list[float]:
    """Per group, the accuracy of length alone, longer or shorter answers first, whichever suits the group."""
    found = [[] for _ in GROUPS]
    for row in rows:
        lengths = torch.tensor([[float(len(ids)) for ids in row["response_ids"]]], dtype=torch.float64)
        taste = torch.tensor([row["taste"]], dtype=torch.float64)
        found[row["group"]].append(float(pairwise_accuracy(lengths, taste, torch.ones_like(taste).bool())))
    return [max(value, 1 - value) for value in (float(np.nanmean(values)) for values in found)]


def policy_rewards(trainer) -> list[list[list[float]]]:
    """Log-ratios of the held-out rows under each type's policy, read from the files of the run."""
    out = []
    for policy in trainer.policies:
        logps = trainer.score(policy.parent, None, [trainer.held_out], "")[0]
        pairs = zip(logps, trainer.held_out.reference, strict=True)
        out.append([[a - b for a, b in zip(x, y, strict=True)] for x, y in pairs])
    return out


# Regret.


def regrets(args: RecoveryArguments, judge: Path, policies: dict, seed: int) -> dict:
    """The game whose types are the policies in `judge`: those of EM, of the clusters, or of the true groups."""
    prompts = openings(args, "test")
    config = SamplingConfig(num_generations=4, max_new_tokens=args.max_new_tokens, temperature=1.0, top_p=1.0,
                            batch_size=96, seed=1000 + seed)  # fmt: skip
    arena = Arena(judge, prompts, config, judge / "aggregate")
    extra = [Player("vanilla", policies["vanilla"][0]), Player("reference", None)]
    if judge.name == "oracle":
        extra += [Player(f"em-{k}", policy) for k, policy in enumerate(policies["em"])]
        extra += [Player(f"clusters-{k}", policy) for k, policy in enumerate(policies["clusters"])]
    players = [*arena.types, *extra]
    gains, samples = arena.gains(players)
    report = compare(gains, [p.name for p in players], arena.mixture["prior"], seed=seed)
    report["truncated"] = float(np.mean([s.truncated for answers in samples for row in answers for s in row]))
    if judge.name != "oracle":
        write_json(judge / "aggregate" / "aggregate.json", report)
        return report
    # The mixtures that EM and the clusters chose by their own policies, judged by the true groups.
    own = {name: read_json(judge.parent / name / "aggregate" / "aggregate.json") for name in ("em", "clusters")}
    regret, groups = np.array(report["regret"]), len(GROUPS)
    columns = {name: regret[:, [report["policies"].index(f"{name}-{k}") for k in range(groups)]]
               for name in ("em", "clusters")}  # fmt: skip
    single = int(np.array(own["em"]["regret"])[:, :groups].max(0).argmin())
    report["chosen"] = {
        "EM-DPO, min-max weights": columns["em"] @ own["em"]["mixture"],
        "EM-DPO, uniform weights": columns["em"].mean(1),
        "EM-DPO, shares of EM": columns["em"] @ own["em"]["shares"],
        "EM-DPO, best single type": columns["em"][:, single],
        "clusters, min-max weights": columns["clusters"] @ own["clusters"]["mixture"],
        "clusters, uniform weights": columns["clusters"].mean(1),
        "oracle, min-max weights": regret[:, :groups] @ report["mixture"],
        "vanilla DPO": regret[:, report["policies"].index("vanilla")],
        "untrained model": regret[:, report["policies"].index("reference")],
    }
    report["chosen"] = {name: values.tolist() for name, values in report["chosen"].items()}
    return report


# Report.

ANSWERERS = {"em": "EM-DPO, min-max weights", "clusters": "clusters, min-max weights",
             "oracle": "oracle, min-max weights", "vanilla": "vanilla DPO"}  # fmt: skip
OWN = {"EM-DPO, min-max weights": "min-max mixture", "EM-DPO, uniform weights": "uniform mixture",
       "EM-DPO, shares of EM": "shares of EM", "EM-DPO, best single type": "best single type",
       "vanilla DPO": "vanilla", "untrained model": "reference"}  # fmt: skip
CONTRASTS = {
    "annotators typed right": lambda r, name: r["methods"][name]["typed_right"],
    "accuracy, worst group": lambda r, name: min(r["methods"][name]["accuracy"]),
    "accuracy, mean of groups": lambda r, name: float(np.mean(r["methods"][name]["accuracy"])),
    "largest regret": lambda r, name: max(r["regret"]["oracle"]["chosen"][ANSWERERS[name]]),
}


def table(results: list[dict], args: RecoveryArguments) -> str:
    def cell(values) -> str:
        found = t_interval(values)
        if found["low"] is None or found["low"] == found["high"]:
            return f"{found['mean']:.3f}"
        return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"

    columns = ["annotators typed right", *(f"accuracy, {g}" for g in GROUPS), "worst group",
               "held-out log-likelihood per ranking"]  # fmt: skip
    lines = ["| method | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name in METHODS:
        runs = [r["methods"][name] for r in results]
        typed = [run["typed_right"] for run in runs]
        groups = np.array([run["accuracy"] for run in runs])
        lines.append(f"| {name} | {cell(typed) if typed[0] is not None else ''} | "
                     + " | ".join(cell(groups[:, g]) for g in range(len(GROUPS)))
                     + f" | {cell(groups.min(1))} | {cell([run['log_likelihood'] for run in runs])} |")  # fmt: skip
    length = np.array([r["length"] for r in results])
    lines.append("| *length alone* |  | " + " | ".join(cell(length[:, g]) for g in range(len(GROUPS)))
                 + f" | {cell(length.min(1))} |  |")  # fmt: skip
    titles = ["annotators typed right", "first guess", *(f"round {i + 1}" for i in range(args.rounds))]
    lines += ["", "| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for name, label in (("find", "EM-DPO"), ("bound", "started at the true groups")):
        typed = np.array([r["typed"][name] for r in results])
        cells = [cell(column) for column in typed.T] + [""] * (args.rounds + 1 - typed.shape[1])
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    titles = ["who answers", "largest regret", *GROUPS, "largest, by EM's own types"]
    lines += ["", "| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for name in results[0]["regret"]["oracle"]["chosen"]:
        rows = np.array([r["regret"]["oracle"]["chosen"][name] for r in results])
        lines.append(f"| {name} | {cell(rows.max(1))} | " + " | ".join(cell(rows[:, g]) for g in range(len(GROUPS)))
                     + f" | {cell(own_regret(results, name)) if name in OWN else ''} |")  # fmt: skip
    lines += ["", "| EM-DPO minus, paired by seed | vanilla DPO | clusters | oracle |", "|---|---|---|---|"]
    for label, value in CONTRASTS.items():
        own = np.array([value(r, "em") for r in results])
        others = [[value(r, name) for r in results] for name in ("vanilla", "clusters", "oracle")]
        cells = ["" if other[0] is None else cell(own - np.array(other)) for other in others]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Means over {len(results)} seeds with 95 % t intervals. {args.annotators} annotators per group with "
        f"{args.items} rankings of 3 answers each; {args.epochs} passes per policy at learning rate "
        f"{args.learning_rate:g}, beta {args.beta:g}; EM: {args.rounds} rounds on halves, "
        "of which the first scores one half only. Accuracy: "
        f"share of pairs of new answers to {args.test_prompts} new prompts in the order of the group's taste without "
        "noise, by the policy of the annotator's type; length alone puts longer or shorter answers first, whichever "
        "suits the group. Regret in nats per answer: loss of the oracle "
        "policy's log-ratio against its own answers, 4 answers to each new prompt.",
    ]
    return "\n".join(lines) + "\n"


def own_regret(results: list[dict], name: str) -> list[float]:
    """Per seed, the largest regret of the types of EM, which is what a user without the truth sees."""
    tables = [r["regret"]["em"]["table"] for r in results]
    return [next(row["max"] for label, row in table.items() if label.startswith(OWN[name])) for table in tables]


def picture(results: list[dict]) -> str:
    """Regret of each true group under every answerer: mean over seeds and its t interval."""
    found = {name: np.array([r["regret"]["oracle"]["chosen"][name] for r in results])
             for name in results[0]["regret"]["oracle"]["chosen"]}  # fmt: skip
    table = {}
    for name, rows in found.items():
        ends = [t_interval(column) for column in rows.T]
        table[name] = {"regret": rows.mean(0).tolist()} | {end: [e[end] for e in ends] for end in ("low", "high")}
    return regret_picture(table, labels=GROUPS)


if __name__ == "__main__":
    main(sys.argv[1:])
