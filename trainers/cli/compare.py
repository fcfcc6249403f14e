"""Trains several methods on the same data, model, seeds and token budget, and compares them on held-out rows.

    polypo compare --config configs/compare/demo.yaml

The YAML has the settings that all methods share (`base`), the methods with their own options (`methods`), and what
data and samples they are judged on (`CompareArguments`). Every run is a stage, whose manifest is written last, so
a killed comparison goes on where it stopped; methods and seeds may be added later. At the end report.py
writes the page. One process; the runs follow each other.
"""

import dataclasses
import os
import re
import time
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import NamedTuple

import yaml
from datasets import Dataset
from transformers import AutoTokenizer

from polypo.recipes import refuse_missing, shipped

from .. import EMDPOTrainer, PreferenceConfig, PreferenceTrainer, load_preferences
from ..config import JSON, Truncation, check_options, option
from ..data.budget import packed_tokens, token_lengths
from ..data.json_rows import digest
from ..data.rows import refuse_template_kwargs, refuse_template_options, trained_tokens
from ..data.tokenization import prepare_dataset
from ..forward import policy as policies
from ..generation.options import read_mapping, read_options
from ..generation.sampler import plain_prompt
from ..generation.scorer import compared_scorer
from ..precision import instructions
from ..runs.files import read_json, write_json, write_rows
from ..runs.processes import free_memory
from ..runs.record import read_run
from ..runs.settings import model_fingerprint, refuse_other_settings
from ..runs.stage import WAYS_OUT, Stage
from . import config_files
from .arguments import ModelArguments
from .compare_data import RowOptions, cut_rows
from .compare_report import BASE
from .compare_samples import SampleOptions, sample_and_measure
from .report import write_report
from .train import parse

RUNS = "runs.json"
SET_HERE = ("output_dir", "seed", "data_seed", "self_enhance")
NOT_OF_ROWS = ("output_dir", "base", "methods", "seeds", "samples")  # fields of `CompareArguments`
# What makes methods comparable; a method that set it for itself would have another model or another budget.
SHARED = ("model_", "dtype", "lora_", "use_peft", "max_", "truncate_", "keep_system", "assistant_only_loss", "as_chat",
          "chat_template_kwargs", "invalid_rows", "num_train_epochs", "per_device_",
          "gradient_accumulation")  # fmt: skip


@dataclass
class CompareArguments(RowOptions):
    """What to compare.

    Raises:
        ValueError: `base` or a method sets what would make the methods incomparable.
    """

    output_dir: str = option(MISSING, "Folder of the comparison.")
    dataset_name: str = option(MISSING, "Hub id, file or folder of preference rows.")
    base: JSON = option(MISSING, "Model and training settings of all methods.")
    methods: JSON = option(MISSING, "Name -> {trainer: ..., its own options}.")
    dataset_split: str = option("train", "Split that training and held-out rows come from.")
    data_format: str | None = option(None, "Format of the rows, auto, or an adapter's dotted path.")
    seeds: list[int] = dataclasses.field(
        default_factory=lambda: [1, 2, 3], metadata={"help": "Every method is run with each."}
    )
    train_rows: int = option(200, "Training rows.", at_least=1)
    test_rows: int = option(100, "Held-out rows.", at_least=1)
    samples: JSON | None = option(None, "How trained policies are sampled on held-out prompts: see SampleOptions.")

    def __post_init__(self):
        check_options(self)
        self.base, self.methods = read_mapping("base", self.base), read_mapping("methods", self.methods)
        self.methods = {name: read_mapping(f"methods: {name}", own) for name, own in self.methods.items()}
        if not (self.methods and self.seeds):
            raise ValueError("methods and seeds: name at least one of each.")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} names one twice, which would count as two runs.")
        refuse_missing(model_name_or_path=self.base.get("model_name_or_path"), dataset_name=self.dataset_name)
        self.samples = dataclasses.asdict(read_options("samples", self.samples or {}, SampleOptions))
        refuse_template_kwargs(self.base.get("chat_template_kwargs"))
        for method, own in (("base", self.base), *self.methods.items()):
            wrong = [name for name in own if name in SET_HERE or (own is not self.base and name.startswith(SHARED))]
            if wrong:
                raise ValueError(f"{method} sets {wrong[0]}, which all methods must share: move it to base, or leave "
                                 f"it out if it is one of {', '.join(SET_HERE)}.")  # fmt: skip


class Trial(NamedTuple):
    """One method with one seed, or the base model, which has no seed."""

    name: str
    seed: int | None
    stage: Stage
    trainer: type[PreferenceTrainer]
    args: PreferenceConfig
    model: ModelArguments


def main(argv: list[str]) -> None:
    (arguments,) = config_files.read(argv, CompareArguments)
    print(f"{compare(arguments)} is ready.")


def compare(arguments: CompareArguments) -> Path:
    """Runs what is missing and writes the report; returns the path of its page.

    Raises:
        ValueError: a setting that cannot be used, or a finished run of other settings or rows.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("A comparison runs in one process: start it with python.")
    data = Data(arguments)
    runs = plan(arguments, data)
    for run in runs:
        run.stage.done()  # other settings of any run end it here
    for number, run in enumerate(runs, 1):
        done = run.stage.done()
        seed = "" if run.seed is None else f", seed {run.seed}"
        print(f"\n[{number}/{len(runs)}] {run.name}{seed}{': done already' if done else ''}", flush=True)
        if not done:
            run.stage.open()
            start = time.monotonic()
            measured = measure(run, data)
            run.stage.finish(**measured, seconds=round(time.monotonic() - start, 1))
    device = runs[0].args.device.type
    report = {
        "config": dataclasses.asdict(arguments),
        "data": data.facts,
        "machine": f"{runs[0].model.dtype} on {device}{f' with {instructions()}' if device == 'cpu' else ''}",
        "scores": list(data.test["scores"]),
        "lengths": [list(map(sum, trained_tokens(row))) for row in data.test],
        "runs": [{"name": run.name, "seed": run.seed, **run.stage.manifest()} for run in runs],
    }
    write_json(data.folder / RUNS, report)
    page = write_report(data.folder)
    print((data.folder / "table.md").read_text())
    return page


class Data:
    """The rows of a comparison, tokenised once; `facts` tell what they are."""

    def __init__(self, arguments: CompareArguments):
        self.folder, base = Path(arguments.output_dir), arguments.base
        assert arguments.samples is not None  # its defaults are filled in
        self.samples = SampleOptions(**arguments.samples)
        self.tokenizer = AutoTokenizer.from_pretrained(base["model_name_or_path"], trust_remote_code=False)
        policies.set_pad_token(self.tokenizer, base.get("pad_token"))
        rows = load_preferences(
            shipped(arguments.dataset_name),
            split=arguments.dataset_split,
            data_format=arguments.data_format,
            as_chat=base.get("as_chat", False),
        )
        for row in rows:
            refuse_template_options(row)
        kept, dropped = cut_rows(
            list(rows), lambda text: len(self.tokenizer(text, add_special_tokens=False)["input_ids"]), arguments
        )
        # The held-out rows come first, so that they stay the same whatever the number of training rows.
        held_out, needed = arguments.test_rows, arguments.test_rows + arguments.train_rows
        if len(kept) < needed:
            raise ValueError(f"train_rows and test_rows need {needed} rows, but only {len(kept)} fit.")
        test, train = kept[:held_out], kept[held_out:needed]
        key = digest([train, test])
        refuse_other_rows(arguments, key)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_rows(self.folder / "train.jsonl.gz", train)
        write_rows(self.folder / "test.jsonl.gz", test)
        names = [*(f.name for f in dataclasses.fields(Truncation)), "assistant_only_loss"]
        options = {name: base[name] for name in names if name in base}
        self.prompts = [plain_prompt(row["prompt"]) for row in test]
        self.train, self.test = (
            prepare_dataset(Dataset.from_list(part), self.tokenizer, **{"max_length": 1024, **options})
            for part in (train, test)
        )
        if len(self.train) < len(train) or len(self.test) < len(test):
            raise ValueError("Some rows do not fit in max_length: raise it, or set max_prompt_tokens.")
        self.facts = {
            "rows_usable": len(kept),
            "rows_left_out": dict(dropped),
            "train_rows": len(train),
            "test_rows": len(test),
            "tokens_per_epoch": sum(packed_tokens(row) for row in token_lengths(self.train)),
            "digest": key,
        }
        print(self.facts)


def refuse_other_rows(arguments: CompareArguments, key: str) -> None:
    """Raises ValueError, naming the settings, where the finished comparison in the folder has rows of another key."""
    path = Path(arguments.output_dir) / RUNS
    if path.exists() and (before := read_json(path))["data"]["digest"] != key:
        saved, now = _of_rows(before["config"], before["data"]["digest"]), _of_rows(dataclasses.asdict(arguments), key)
        refuse_other_settings(path, saved, now, ways_out=WAYS_OUT)


def _of_rows(config: dict, key: str) -> dict:
    own = {name: value for name, value in config.items() if name not in NOT_OF_ROWS}
    return {"data": key, **own, **{f"base.{name}": value for name, value in config["base"].items()}}


def plan(arguments: CompareArguments, data: Data) -> list[Trial]:
    """All runs with their parsed configs, the base model first; a wrong option of any method ends it here.

    The YAML that says it all stays in the folder of each run.
    """
    fixed = {
        **{f"base.{name}": value for name, value in arguments.base.items()},
        **{f"samples.{name}": value for name, value in dataclasses.asdict(data.samples).items()},
        "samples.scorer": compared_scorer(data.samples.scorer),
        "data": data.facts["digest"],
        "model files": model_fingerprint(arguments.base["model_name_or_path"]),
    }
    slugs = {name: re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in arguments.methods}
    taken = {"base", "base-model"}
    if len(taken.union(slugs.values())) < len(taken) + len(slugs):
        raise ValueError(
            f"methods: two names, or one and the base model, give the same folder: {', '.join(slugs.values())}."
        )
    runs = []
    for seed in arguments.seeds:
        for name, own in arguments.methods.items():
            folder = data.folder / slugs[name] / f"seed-{seed}"
            config = {"report_to": "none", "save_strategy": "no", **arguments.base, **own}
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "config.yaml"
            path.write_text(yaml.safe_dump(config | {"seed": seed, "output_dir": str(folder)}, sort_keys=False))
            trainer, _, args, model = parse(["--config", str(path)])
            if issubclass(trainer, EMDPOTrainer):
                raise ValueError(f"{name}: EM-DPO has several policies, and what is compared is one: leave it out.")
            fixed["base.dtype"] = model.dtype  # the one that "fast" is here
            settings = {**fixed, **{f"{name}.{key}": value for key, value in own.items()}, "seed": seed}
            runs.append(Trial(name, seed, Stage(folder, settings), trainer, args, model))
    return [runs[0]._replace(name=BASE, seed=None, stage=Stage(data.folder / "base", fixed)), *runs]


def measure(run: Trial, data: Data) -> dict:
    """Trains, but for the base model, ranks the held-out rows and samples on their prompts.

    The base model is a method before its training, so that rounding is the same and falls out of the log-ratios.
    """
    start = None if run.seed is None else run.stage.folder / "model"
    trainer = run.trainer(
        run.model.model_name_or_path,
        args=run.args,
        train_dataset=data.train,
        eval_dataset=data.test,
        processing_class=data.tokenizer,
        **run.model.of_trainer,
    )
    results = {}
    if start is not None:
        results = {
            "trainer": run.trainer.__name__,
            "needs_reference": run.trainer.needs_reference,
            "train_seconds": round(trainer.train().metrics["train_runtime"], 1),
            "steps": trainer.state.global_step,
        }
        trainer.save_model(str(start))
    # Both from one pass: rewards as the method defines them, and log-probabilities, which every method has.
    output = trainer.predict(trainer.eval_dataset)
    logps = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    results |= {
        "logps": [row[: len(scores)].tolist() for row, scores in zip(logps, data.test["scores"], strict=True)],
        "own_rewards": {n: output.metrics[f"test_ranking/{n}"] for n in ("pairwise_accuracy", "ndcg")},
        "log_history": trainer.state.log_history,
        "record": {} if start is None else read_run(run.stage.folder).record,
    }
    del trainer
    free_memory()
    name, device, kwargs = run.model.model_name_or_path, run.args.device, run.args.model_init_kwargs
    samples = sample_and_measure(
        name, start, data.tokenizer, data.prompts, data.samples, device=device, init_kwargs=kwargs
    )
    return results | ({"samples": samples} if samples else {})
