"""Does EM-DPO find groups of annotators with opposed tastes in the texts of a real language model?

python -m experiments.emdpo_recovery --model ../shared/models/stories260K --eos "<s>" --output runs/emdpo-recovery

Three groups rank three of the model's own continuations (1 to 4 sentences) of openings that it wrote itself: the
cheerful (VADER up), the gloomy (VADER down) and the brief (few tokens), each with Gumbel noise. Per seed, the same
number of passes over the rows for every policy:

    find, em      EM-DPO from the clusters below, scored on held-out halves; then one policy per type on all rows
    bound         the same, started at the true groups: what the noise of policies and answers leaves of them
    clusters      one policy per cluster of annotators who agree (the trainer's default first guess), no EM
    oracle        one policy per true group
    vanilla       one policy for all

Judged on new prompts: share of annotators typed right, pairwise accuracy of the rewards in each group, and the regret
of each group when a mixture answers. A finished part is not made again.
"""

import gc
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers import EMDPOConfig, EMDPOTrainer
from trainers.cli import config_files
from trainers.config import option
from trainers.emdpo import init
from trainers.emdpo.aggregate import Arena, Player, compare
from trainers.emdpo.mixture import match_types
from trainers.emdpo.tables import read_annotators, read_json
from trainers.generation import sample_responses
from trainers.generation.rewards import vader_sentiment
from trainers.generation.sampler import SamplingConfig, encode_prompts
from trainers.metrics import pairwise_accuracy
from trainers.pages.text import interval, markdown
from trainers.runs.files import read_rows, write_atomic, write_json, write_rows
from trainers.statistics import t_interval

GROUPS = ("cheerful", "gloomy", "brief")
METHODS = ("em", "clusters", "oracle", "vanilla")
LONGEST, ANSWERS, SHOWN = 4, 6, 3  # sentences of an answer; answers sampled per prompt, and those that a row shows
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "batch_size": 96}


@dataclass
class RecoveryArguments:
    """Size of the experiment."""

    model: str = option(MISSING, "Model folder or hub id.")
    output: str = option("runs/emdpo-recovery", "Folder of runs and table.")
    eos: str | None = option(None, "Token that ends a text, if not the tokenizer's.")
    seeds: int = option(3, "Repetitions: other samples, noise, starts and training orders.")
    annotators: int = option(40, "Per group.")
    items: int = option(16, "Rankings per annotator.")
    train_prompts: int = option(96, "Prompts of the training rows.")
    test_prompts: int = option(48, "New prompts for accuracy and regret.")
    max_new_tokens: int = option(64, "Of an answer.")
    rounds: int = option(3, "Rounds of EM.")
    learning_rate: float = option(3e-4, "Of every policy, full fine-tuning.")
    batch_size: int = option(16, "Rows per step.")
    noise: float = option(0.5, "Scale of the Gumbel noise, in units of a taste's spread.")


def main(argv: list[str]) -> list[dict]:
    (args,) = config_files.read(argv, RecoveryArguments)
    gc.freeze()  # EM collects garbage between policies, which are tiny here
    results = []
    for seed in range(args.seeds):
        path = Path(args.output) / f"seed-{seed}" / "result.json"
        if not path.exists():
            write_json(path, one_seed(args, seed, path.parent))
        results.append(read_json(path))
    text = table(results, args)
    write_atomic(Path(args.output) / "table.md", text.encode())
    print(text)
    return results


def one_seed(args: RecoveryArguments, seed: int, folder: Path) -> dict:
    """All methods on one draw of samples, noise and starts."""
    splits = {name: make_rows(args, seed, name, folder) for name in ("train", "test")}
    runs = {name: run_method(name, args, seed, folder / name, splits) for name in ("find", "bound", *METHODS)}
    regrets = {name: regret_of(args, folder / name, runs, seed) for name in ("em", "clusters", "oracle")}
    return {
        "typed": {name: typed_right(runs[name]) for name in ("find", "bound")},
        "methods": {
            name: {
                "typed": match_types(runs[name].posterior, true_groups(runs[name]))[0] if name != "vanilla" else None,
                "log_likelihood": runs[name].evaluate()["eval_log_likelihood_per_item"],
                "accuracy": group_accuracy(splits["test"], rewards_by_annotator(runs[name])),
            }
            for name in METHODS
        },
        "length": [max(a, 1 - a) for a in group_accuracy(splits["test"], lengths)],
        "regret": chosen_regrets(regrets),
    }


# Rows.


def make_rows(args: RecoveryArguments, seed: int, split: str, folder: Path) -> list[dict]:
    """Rankings of three answers by every annotator, `group-i`; `taste` is the truth, which no method but the oracle
    sees."""
    path = folder / f"{split}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return read_rows(path)
    prompts, tokenizer = openings(args, split), load_tokenizer(args)
    config = SamplingConfig(num_generations=ANSWERS, max_new_tokens=args.max_new_tokens, seed=seed, **SAMPLING)
    samples = sample_responses(AutoModelForCausalLM.from_pretrained(args.model), tokenizer, prompts, config)
    prompt_ids = encode_prompts(tokenizer, prompts)
    random, rows = np.random.default_rng((seed, split == "test")), []
    answers = [[_cut(s.token_ids, tokenizer, random.integers(1, LONGEST + 1)) for s in row] for row in samples]
    mood = np.array([vader_sentiment(None, tokenizer.batch_decode(row, skip_special_tokens=True)) for row in answers])
    length = np.array([[float(len(ids)) for ids in row] for row in answers])
    tastes = np.stack([(x - x.mean()) / x.std() for x in (mood, -mood, -length)])  # (groups,prompts,answers)
    items = args.items if split == "train" else max(2, args.items // 3)
    for group in range(len(GROUPS)):
        for i in range(args.annotators):
            for p in random.choice(len(prompts), items, replace=False):
                shown = random.choice(ANSWERS, SHOWN, replace=False)
                utility = tastes[group, p, shown] + args.noise * random.gumbel(size=SHOWN)
                rows.append({
                    "prompt_ids": prompt_ids[p], "response_ids": [answers[p][k] for k in shown],
                    "scores": utility.tolist(), "taste": tastes[group, p, shown].tolist(), "annotator": f"{group}-{i}",
                })  # fmt: skip
    rows = [rows[i] for i in random.permutation(len(rows))]
    write_rows(path, rows)
    return rows


def openings(args: RecoveryArguments, split: str) -> list[str]:
    """First sentences of stories that the model wrote, other ones for training than for judging."""
    path, count = Path(args.output) / "openings.json", args.train_prompts + args.test_prompts
    if not path.exists():
        config = SamplingConfig(num_generations=4 * count, max_new_tokens=24, **SAMPLING)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), load_tokenizer(args)
        texts = [s.text.partition(".")[0].strip() for s in sample_responses(model, tokenizer, [""], config)[0]]
        write_json(path, {"openings": list(dict.fromkeys(f"{text}." for text in texts if len(text) > 12))[:count]})
    sentences = read_json(path)["openings"]
    return sentences[: args.train_prompts] if split == "train" else sentences[args.train_prompts :]


def _cut(ids: list[int], tokenizer, sentences: int) -> list[int]:
    """The first so many sentences with an end token; the model itself would go on for hundreds of tokens."""
    stops = [i for i, token in enumerate(ids) if "." in tokenizer.decode([token])]
    return [*ids[: stops[sentences - 1] + 1], tokenizer.eos_token_id] if len(stops) >= sentences else ids


def load_tokenizer(args: RecoveryArguments):
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.eos_token = args.eos or tokenizer.eos_token
    return tokenizer


# Methods.


def run_method(name: str, args: RecoveryArguments, seed: int, folder: Path, splits: dict) -> EMDPOTrainer:
    """Every method is the same trainer with another posterior, so that the training is the same."""
    truth = {row["annotator"]: np.eye(len(GROUPS))[int(row["annotator"][0])].tolist() for row in splits["train"]}
    own = {
        "find": {"rounds": args.rounds, "init": "agreement", "score_on": "heldout_half"},
        "em": {"initial_posterior": str(folder.with_name("find") / "annotators.csv")},
        "clusters": {"init": "agreement"},
        "oracle": {"initial_posterior": truth},
        "bound": {"initial_posterior": truth, "rounds": 2, "score_on": "heldout_half"},
        "vanilla": {"num_types": 1},
    }[name]
    config = EMDPOConfig(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, seed=seed, normalize="posterior",
        learning_rate=args.learning_rate, lr_scheduler_type="constant", per_device_train_batch_size=args.batch_size,
        logging_strategy="no", save_strategy="no", dataloader_pin_memory=False,
        **{"num_types": len(GROUPS), "rounds": 1} | own,
    )  # fmt: skip
    train, test = (
        Dataset.from_list([{k: v for k, v in row.items() if k != "taste"} for row in splits[split]])
        for split in ("train", "test")
    )
    trainer = EMDPOTrainer(args.model, args=config, train_dataset=train, eval_dataset=test,
                           processing_class=load_tokenizer(args))  # fmt: skip
    trainer.train()
    if name in ("em", "clusters", "oracle"):  # the type that was given, not the one by rows that the policy has seen
        trainer.posterior = init.given(str(folder / "restart-0" / "start.csv"), trainer.annotators, len(GROUPS))
    return trainer


def true_groups(trainer: EMDPOTrainer) -> np.ndarray:
    return np.array([int(name[0]) for name in trainer.annotators.names])


def typed_right(trainer: EMDPOTrainer) -> list[float]:
    """Share of annotators typed right by the first guess and after each round."""
    folder = Path(trainer.args.output_dir) / "restart-0"
    paths = [folder / "start.csv", *sorted(folder.glob("round-*/annotators.csv"))]
    return [match_types(read_annotators(path)[1], true_groups(trainer))[0] for path in paths]


def rewards_by_annotator(trainer: EMDPOTrainer):
    """(row, its index) -> log-ratios of its responses under the policy of its annotator's type."""
    logps = [trainer.score(policy.parent, [trainer.held_out], "")[0] for policy in trainer.policies]
    type_of = dict(zip(trainer.annotators.names, trainer.posterior.argmax(1), strict=True))
    return lambda row, i: np.array(logps[type_of[row["annotator"]]][i]) - trainer.held_out.reference[i]


def lengths(row: dict, i: int) -> np.ndarray:
    return np.array([float(len(ids)) for ids in row["response_ids"]])


def group_accuracy(rows: list[dict], rewards) -> list[float]:
    """Per group, the share of pairs of new answers that `rewards(row, index)` puts in the order of its taste."""
    shares = [[] for _ in GROUPS]
    for i, row in enumerate(rows):
        values, taste = torch.tensor(rewards(row, i)[None]), torch.tensor([row["taste"]], dtype=torch.float64)
        accuracy = pairwise_accuracy(values, taste, torch.ones_like(taste).bool())
        shares[int(row["annotator"][0])].append(float(accuracy))
    return [float(np.nanmean(values)) for values in shares]


# Regret.


def regret_of(args: RecoveryArguments, judge: Path, runs: dict, seed: int) -> dict:
    """The game whose types are the policies in `judge`: those of EM, of the clusters, or of the true groups."""
    sampling = {"num_generations": 4, "max_new_tokens": args.max_new_tokens, "seed": 1000 + seed, "batch_size": 96}
    arena = Arena(judge, openings(args, "test"), judge / "aggregate", **sampling)
    players = [*arena.types, Player("vanilla", runs["vanilla"].policies[0]), Player("reference", None)]
    if judge.name == "oracle":
        players += [Player(f"{n}-{k}", p) for n in ("em", "clusters") for k, p in enumerate(runs[n].policies)]
    gains, _ = arena.gains(players)
    return compare(gains, [p.name for p in players], arena.mixture["prior"], seed=seed)


def chosen_regrets(by: dict) -> dict:
    """Regret of the true groups under mixtures that EM and the clusters chose by their own policies, and others."""
    regret, names, groups = np.array(by["oracle"]["regret"]), by["oracle"]["policies"], len(GROUPS)
    em, clusters = (regret[:, [names.index(f"{n}-{k}") for k in range(groups)]] for n in ("em", "clusters"))
    single = int(np.array(by["em"]["regret"])[:, :groups].max(0).argmin())
    chosen = {
        "EM-DPO, min-max weights": em @ by["em"]["mixture"],
        "EM-DPO, uniform weights": em.mean(1),
        "EM-DPO, best single type": em[:, single],
        "clusters, min-max weights": clusters @ by["clusters"]["mixture"],
        "oracle, min-max weights": regret[:, :groups] @ by["oracle"]["mixture"],
        "vanilla DPO": regret[:, names.index("vanilla")],
        "untrained model": regret[:, names.index("reference")],
    }
    return {name: values.tolist() for name, values in chosen.items()}


# Report: means over seeds with t intervals.


def cells(values) -> list[str]:
    """(seeds,columns) -> the mean of each column with its interval."""
    return [interval(t_interval(column)) for column in np.array(values).T]


def table(results: list[dict], args: RecoveryArguments) -> str:
    rows = []
    for name in METHODS:
        runs = [r["methods"][name] for r in results]
        typed = [""] if name == "vanilla" else cells([[run["typed"]] for run in runs])
        more = cells([[*run["accuracy"], min(run["accuracy"]), run["log_likelihood"]] for run in runs])
        rows.append([name, *typed, *more])
    rows.append(["*length alone*", "", *cells([[*r["length"], min(r["length"])] for r in results]), ""])
    columns = [*(f"accuracy, {g}" for g in GROUPS), "worst group", "held-out log-likelihood per ranking"]
    parts = [markdown(["method", "annotators typed right", *columns], rows)]
    labels = {"find": "EM-DPO", "bound": "started at the true groups"}
    rows = [[label, *cells([r["typed"][name] for r in results])] for name, label in labels.items()]
    titles = ["annotators typed right", "first guess", *(f"round {i + 1}" for i in range(args.rounds))]
    parts.append(markdown(titles, [row + [""] * (len(titles) - len(row)) for row in rows]))
    rows = [[n, *cells([[max(r["regret"][n]), *r["regret"][n]] for r in results])] for n in results[0]["regret"]]
    parts.append(markdown(["who answers", "largest regret", *GROUPS], rows))
    parts.append(
        f"Means over {len(results)} seeds with 95 % t intervals. {args.annotators} annotators per group with "
        f"{args.items} rankings of 3 answers each, learning rate {args.learning_rate:g}. Accuracy: pairs of answers "
        f"to {args.test_prompts} new prompts in the order of the group's taste without noise, by the policy of the "
        "annotator's type; length alone puts longer or shorter answers first, whichever suits the group. Regret in "
        "nats per answer: loss of the oracle policy's log-ratio against its own answers, 4 to each new prompt.\n"
    )
    return "\n".join(parts)


if __name__ == "__main__":
    main(sys.argv[1:])
