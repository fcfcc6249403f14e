"""Can one answer per annotator tell the types apart? EM-DPO on softmax policies whose truth is known.

python -m experiments.emdpo_identify --output runs/emdpo-identify --annotators 2000 --starts 3

Two types of annotators with opposed tastes theta = b and -b for the features of items, equally frequent. A policy is a
language model without layers: the logits of its one-token answers are theta . features(token), and theta, the only
weight that is trained, is the gain of the last norm. So beta * log-ratio is a linear reward, the model of the theory.
EM-DPO (the trainer itself) starts from random posteriors. A run that is there already is not made again.
"""

import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LNTuningConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainers import EMDPOConfig, EMDPOTrainer, ranking_logps
from trainers.cli import config_files
from trainers.config import option
from trainers.emdpo.mixture import annotator_log_likelihood, clamp_log_prior, observed_log_likelihood
from trainers.pages.text import markdown
from trainers.runs.files import write_atomic, write_json

TASTE = np.array([1.5, -1.0])
OTHER = np.array([0.3, 2.0])  # a wrong world with the same law of single binary answers
PROMPT, FIRST = 2, 3  # token of the prompt, first item
# name: (responses shown, rows per annotator, stages that are told)
FEEDBACK = {
    "one pair": (2, 1, None),
    "one best of 3": (3, 1, 1),
    "one ranking of 3": (3, 1, None),
    "two pairs": (2, 2, None),
}


@dataclass
class IdentifyArguments:
    """Size of the experiment."""

    output: str = option("runs/emdpo-identify", "Folder of the runs and of table.md.")
    annotators: int = option(2000, "Per run, and as many new ones to classify.")
    items: int = option(500, "Different items with standard normal features.")
    starts: int = option(3, "Random first posteriors per kind of feedback.")
    rounds: int = option(60, "Rounds of EM.")
    seed: int = option(0, "Of the data; starts count up from it.")


def linear_policy(features: np.ndarray) -> LlamaForCausalLM:
    """(items, d) features -> the reference, which answers with every item alike; theta is `model.norm.weight`."""
    items, d = features.shape
    config = LlamaConfig(vocab_size=FIRST + items, hidden_size=d, intermediate_size=d, num_hidden_layers=0,
                         num_attention_heads=1, max_position_embeddings=16, tie_word_embeddings=False, pad_token_id=0,
                         bos_token_id=None, eos_token_id=1, dtype=torch.float32)  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.norm.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[FIRST:] = torch.tensor(features, dtype=torch.float32)
    return model


def tokenizer(items: int) -> PreTrainedTokenizerFast:
    """A word per item; the rows hold token ids, so that it only names the padding."""
    words = ["<pad>", "</s>", "<ask>", *(f"item{i}" for i in range(items))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def draw(
    features: np.ndarray, annotators: int, kind: str, random: np.random.Generator
) -> tuple[list[dict], np.ndarray]:
    """Token rows with the answers of annotators of two opposed types, and the type of each annotator."""
    shown, repeats, top = FEEDBACK[kind]
    types, rows = random.integers(0, 2, annotators), []
    for annotator, kind_of in enumerate(types):
        theta = TASTE if kind_of == 0 else -TASTE
        for _ in range(repeats):
            items = random.choice(len(features), shown, replace=False)
            utility = features[items] @ theta + random.gumbel(size=shown)
            scores = np.argsort(np.argsort(utility)).astype(float)
            if top == 1:  # only who won is told
                scores = (scores == shown - 1).astype(float)
            rows.append({"prompt_ids": [PROMPT], "response_ids": [[FIRST + int(i)] for i in items],
                         "scores": scores.tolist(), "annotator": annotator})  # fmt: skip
    return rows, types


def annotator_logps(rows: list[dict], features: np.ndarray, thetas: list[np.ndarray], annotators: int) -> np.ndarray:
    """(N,T) exact log-likelihood of each annotator's answers under linear rewards."""
    items = np.array([[ids[0] - FIRST for ids in row["response_ids"]] for row in rows])
    scores = torch.tensor([row["scores"] for row in rows], dtype=torch.float64)
    mask = torch.ones_like(scores).bool()
    columns = [ranking_logps(torch.tensor(features[items] @ theta), scores, mask).numpy() for theta in thetas]
    return annotator_log_likelihood(np.stack(columns, 1), np.array([row["annotator"] for row in rows]), annotators)


def train(rows: list[dict], features: np.ndarray, folder: Path, *, rounds: int, seed: int) -> tuple[list, dict]:
    """EM-DPO from a random start: theta of each type, and the manifest of the last round."""
    size = len(rows)
    args = EMDPOConfig(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, seed=seed, num_types=2,
        rounds=rounds, init="dirichlet", start_from="previous", normalize="posterior", beta=1.0, optim="sgd",
        learning_rate=2.0, lr_scheduler_type="constant", max_grad_norm=0.0, num_train_epochs=6,
        per_device_train_batch_size=size, logging_strategy="no", save_strategy="no", layout="rows",
        ref_tokens_per_batch=4 * size, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = EMDPOTrainer(linear_policy(features), args=args, train_dataset=Dataset.from_list(rows),
                           processing_class=tokenizer(len(features)),
                           peft_config=LNTuningConfig(target_modules=["norm"], task_type="CAUSAL_LM"))  # fmt: skip
    trainer.train()
    thetas = [
        next(iter(load_file(path / "adapter_model.safetensors").values())).double().numpy()
        for path in trainer.policies
    ]
    return thetas, json.loads((trainer.policies[0].parents[1] / "manifest.json").read_text())


def measure(kind: str, features: np.ndarray, args: IdentifyArguments) -> dict:
    """Errors over the starts, against the truth that made the rows."""
    random = np.random.default_rng((args.seed, list(FEEDBACK).index(kind)))
    rows, _ = draw(features, args.annotators, kind, random)
    new, new_types = draw(features, args.annotators, kind, random)

    def observed(theta) -> float:
        logps = annotator_logps(rows, features, [theta, -theta], args.annotators)
        return float(observed_log_likelihood(logps, np.log([0.5, 0.5])).sum())

    truth, runs = np.stack([TASTE, -TASTE]), []
    for start in range(args.starts):
        folder = Path(args.output) / f"{kind.replace(' ', '-')}-{start}"
        thetas, manifest = train(rows, features, folder, rounds=args.rounds, seed=args.seed + start)
        errors = [float(np.linalg.norm(thetas - truth[names]) / np.linalg.norm(truth)) for names in ([0, 1], [1, 0])]
        logps = annotator_logps(new, features, thetas, args.annotators) + clamp_log_prior(manifest["prior"])
        names = np.array([[0, 1], [1, 0]][int(np.argmin(errors))])  # types have no names
        runs.append({"thetas": np.array(thetas).tolist(), "error": min(errors), "prior": manifest["prior"],
                     "log_likelihood": manifest["log_likelihood"],
                     "accuracy": float((names[logps.argmax(1)] == new_types).mean())})  # fmt: skip
    return {"gap": observed(TASTE) - observed(OTHER), "truth": observed(TASTE), "runs": runs}


def table(results: dict, args: IdentifyArguments) -> str:
    """Markdown: mean over the starts, and the smallest and the largest."""

    def spread(values: list[float], form: str) -> str:
        return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    head = ["answers per annotator", "log-likelihood, truth minus wrong world", "relative error of theta",
            "log-likelihood reached, minus truth", "new annotators typed right"]  # fmt: skip
    rows = [
        [kind, f"{result['gap'] if abs(result['gap']) > 1e-6 else 0:.3g}",
         spread([run["error"] for run in result["runs"]], ".3f"),
         spread([run["log_likelihood"] - result["truth"] for run in result["runs"]], "+.2f"),
         spread([run["accuracy"] for run in result["runs"]], ".3f")]
        for kind, result in results.items()
    ]  # fmt: skip
    return markdown(head, rows) + (
        f"\n{args.annotators} annotators, half of taste b = (1.5, -1), half of -b; {args.items} items with standard "
        f"normal features; {args.rounds} rounds; data seed {args.seed}. Mean and range of {args.starts} random first "
        "guesses. The wrong world is half c, half -c, c = (0.3, 2). An error of 1 is that of theta = 0.\n"
    )


def main(argv: list[str]) -> dict:
    (args,) = config_files.read(argv, IdentifyArguments)
    gc.freeze()  # EM collects garbage between policies, which are tiny here
    features = np.random.default_rng((args.seed, 99)).normal(size=(args.items, 2))
    results = {kind: measure(kind, features, args) for kind in FEEDBACK}
    write_json(Path(args.output) / "identify.json", {"settings": vars(args), "results": results})
    write_atomic(Path(args.output) / "table.md", table(results, args).encode())
    print(table(results, args))
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
