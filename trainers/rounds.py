"""Self-enhancement (Evolve and Iterate of LIRE, arXiv 2405.13516): sample from the policy, score, train, repeat.

Any method can be trained in rounds: the loop knows nothing of losses. Each round is a folder:

    round-00/samples/       journal of the policy's responses to the training prompts
    round-00/scores/        journal of their scores
    round-00/rows.jsonl.gz  the pool that is trained on: canonical rows
    round-00/training/      the trainer at work with its checkpoints; becomes checkpoint/ when it is done
    round-00/checkpoint/    the trained model or adapter, where the next round starts
    round-00/held-out/      the trained policy's responses to held-out prompts, and their scores
    round-00/manifest.json  what came out, written last

A killed run goes on where it stopped when the same command is given again, and ends with the same rows and the same
weights. Every round has its own optimiser state and learning-rate schedule and reads its starting weights from disk,
so it depends on nothing but the files of the round before. A method with a reference takes the policy at the start of
each round for it, not the model of the first one.
"""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers.integrations import is_deepspeed_zero3_enabled

from .data.rows import refuse_template_options
from .data.tokenization import UNFINISHED, unfinished
from .forward.policy import load_tokenizer
from .generation.backends import HuggingFace
from .generation.collect import check_settings, collect_samples, collect_scores, open_folder, summarize
from .generation.options import EnhanceOptions
from .generation.rewards import completion_text
from .generation.sampler import Sample, SamplingConfig
from .generation.scorer import check_scorer, load_scorer
from .generation.start import load_for_sampling, load_start
from .runs.checkpoints import last_checkpoint
from .runs.files import read_rows, write_json, write_rows
from .runs.processes import Processes, uses_fsdp
from .runs.settings import digest, policy_settings, training_settings
from .runs.stage import train_into
from .statistics import bootstrap_interval

ORIGIN = "sampled_in_round"  # column of a pool: the round of each response, and OWN for the data set's own ones
OWN = -1
MANY_TRUNCATED = 0.2
SETTINGS = "self_enhance.json"
WAYS_OUT = "choose another output_dir"


def run(
    trainer_class, args, model: str, train_dataset: Dataset, eval_dataset: Dataset | None = None, *,
    dataset=None, quantization_config=None, peft_config=None,
) -> None:  # fmt: skip
    """Train `model` in rounds in `args.output_dir`; `PreferenceTrainer.run` calls it where `self_enhance` is set.

    Args:
        trainer_class: subclass of `PreferenceTrainer`, of which each round has an instance of its own.
        model: path or hub id.
        dataset: name of the data for the model cards.

    Raises:
        ValueError: the folder holds a run with other settings, or something cannot be done in rounds.
    """
    refuse_unsupported(args)
    options = EnhanceOptions.parse(args.self_enhance)
    check_scorer(options.scorer)  # before anything is sampled for it
    rows, held_out = list(train_dataset or []), list(eval_dataset or [])
    for row in [*rows, *held_out]:
        refuse_template_options(row)

    def load(start: Path | None) -> tuple:
        return load_for_sampling(model, start, args, dtype=options.dtype, quantization_config=quantization_config)

    def train(rows: list[dict], index: int, start: Path | None, folder: Path) -> None:
        keywords = {"init_kwargs": args.model_init_kwargs, "quantization_config": quantization_config}
        policy = load_start(model, start, trainable=True, **keywords)
        trainer = trainer_class(
            policy,
            args=round_arguments(args, options.iterations, index, folder),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=eval_dataset,
            peft_config=peft_config if start is None else None,
            processing_class=load_tokenizer(policy),
        )
        trainer.train_and_save(last_checkpoint(folder), dataset)

    loaded = policy_settings(model, quantization_config, peft_config)
    settings = run_settings(args, rows, held_out, trainer=trainer_class.__name__, **loaded)
    Loop(options, rows, args.output_dir, settings, load, train, held_out, seed=args.seed).run()


def round_arguments(args, iterations: int, index: int, folder: Path):
    """The training arguments of a round: its own folder and order of the rows, `iterations` times the length."""
    own = copy.copy(args)
    own.output_dir, own.seed, own.model_init_kwargs = str(folder), args.seed + index, None
    own.self_enhance = None
    own.num_train_epochs = args.num_train_epochs * iterations
    own.max_steps = args.max_steps * iterations if args.max_steps > 0 else args.max_steps
    return own


@dataclass
class Loop:
    """Rounds of sampling, scoring and training in `folder`; `run` does what is not done yet.

    Args:
        rows: canonical rows to train on; columns other than prompt, responses and scores go to the scorer.
        settings: everything that the weights depend on, from `run_settings`.
        load: start folder or None (the model of round 0) -> policy to sample from, tokenizer.
        train: (rows of the pool, round, start folder or None, folder) trains and leaves model and results in folder.
            It must resume from `last_checkpoint(folder)`.
        held_out: canonical rows whose prompts measure the policy.
    """

    options: EnhanceOptions
    rows: list[dict]
    folder: Path
    settings: dict
    load: Callable[[Path | None], tuple]
    train: Callable[[list[dict], int, Path | None, Path], None]
    held_out: list[dict] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self):
        self.folder, self.processes = Path(self.folder), Processes()
        self.key = digest(self.settings)

    def run(self) -> Path:
        """Returns the folder of the last round's model, whose files are also copied to `folder`.

        Raises:
            ValueError: `folder` belongs to a run with other settings; the message names what differs.
        """
        path = self.folder / SETTINGS
        self.processes.main(lambda: path.exists() or self._create(path))
        check_settings(path, self.settings, ways_out=WAYS_OUT)
        if (self.folder / f"round-{self.options.rounds:02d}" / "manifest.json").exists():
            raise ValueError(
                f"self_enhance: rounds={self.options.rounds}, but {self.folder} holds more: rounds can only be added. "
                f"Raise it, or {WAYS_OUT}."
            )
        start, rewards, history = None, [self._measure(self.folder / "before", None)], []
        for index in range(self.options.rounds):
            folder = self.folder / f"round-{index:02d}"
            self.processes.say(f"\nRound {index + 1} of {self.options.rounds}: {folder}")
            statistics = self._round(index, folder, start)
            start = folder / "checkpoint"
            rewards.append(self._measure(folder / "held-out", start))
            manifest = self._manifest(index, folder, statistics, rewards)
            history.append(manifest)
            self.processes.say(describe(manifest))
        self.processes.main(lambda: self._publish(start, history))
        return start

    def _create(self, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"settings": self.settings, "hash": self.key})

    def _round(self, index: int, folder: Path, start: Path | None) -> dict:
        """Makes the pool and trains on it, as far as that is not done; returns the statistics of the samples."""
        pool, statistics = self._make_pool(index, folder, start)
        path = folder / "rows.jsonl.gz"
        self.processes.main(lambda: path.exists() or write_rows(path, pool))
        train_into(folder / "checkpoint", lambda training: self.train(pool, index, start, training), self.processes)
        return statistics

    def _make_pool(self, index: int, folder: Path, start: Path | None) -> tuple[list[dict], dict]:
        prompts = [plain(row["prompt"]) for row in self.rows]
        sampling = self.options.config(self.seed)
        samples = self._sample(folder / "samples", prompts, sampling, index, start)
        old = read_rows(folder.parent / f"round-{index - 1:02d}" / "rows.jsonl.gz") if index else None
        pools = [self._candidates(i, index, samples[i], old and old[i]) for i in range(len(prompts))]
        known = [_scored(old[i]) if old else {} for i in range(len(prompts))]
        # A text is scored once in the whole run.
        new = [list(dict.fromkeys(t for t, *_ in pool if t not in k)) for pool, k in zip(pools, known, strict=True)]
        scores = self._score(folder / "scores", self.rows, new, index)
        for known_row, texts, values in zip(known, new, scores, strict=True):
            known_row.update(zip(texts, values, strict=True))
        rows = [self._row(*parts) for parts in zip(self.rows, prompts, pools, known, strict=True)]
        fresh = [[k[s.text] for s in row] for row, k in zip(samples, known, strict=True)]
        statistics = summarize(samples, fresh)
        if statistics["truncated_share"] > MANY_TRUNCATED:
            self.processes.say(
                f"WARNING: {statistics['truncated_share']:.0%} of the samples were cut at max_new_tokens. They are "
                "trained on without an end, and say nothing of how to stop: raise max_new_tokens."
            )
        pooled = [value for row in rows for value in row["scores"]]
        return rows, statistics | {"pool_responses": len(pooled), "pool_mean_score": sum(pooled) / len(pooled)}

    def _candidates(self, i: int, index: int, samples: list[Sample], old: dict | None) -> list[tuple[str, int, bool]]:
        """Texts of a prompt's pool, each with its origin and whether it was cut."""
        own, kept = [], []
        if self.options.own_responses:
            row = self.rows[i]
            own = [(completion_text(r), OWN, cut) for r, cut in zip(row["responses"], unfinished(row), strict=True)]
        if self.options.keep_old and old:
            parts = zip(old["responses"], old[ORIGIN], unfinished(old), strict=True)
            kept = [(completion_text(r), origin, cut) for r, origin, cut in parts if origin != OWN]
        return [*own, *kept, *((sample.text, index, sample.truncated) for sample in samples)]

    def _row(self, row: dict, prompt, pool: list[tuple[str, int, bool]], scores: dict[str, float]) -> dict:
        texts, origins, cut = (list(part) for part in zip(*pool, strict=True))
        responses = texts if isinstance(prompt, str) else [[{"role": "assistant", "content": text}] for text in texts]
        own = ("prompt", "responses", "scores", UNFINISHED)
        rest = {name: value for name, value in row.items() if name not in own}
        return {
            "prompt": prompt,
            "responses": responses,
            "scores": [scores[text] for text in texts],
            ORIGIN: origins,
            UNFINISHED: cut,
            # Lists may belong to the data set's own responses, which are not the responses of this row.
            **{name: value for name, value in rest.items() if not isinstance(value, list | dict)},
        }

    def _measure(self, folder: Path, start: Path | None) -> list[list[float]] | None:
        """Rewards of the policy in `start` on held-out prompts; the same random streams for every policy."""
        count = self.options.held_out_generations
        if not count or not self.held_out:
            return None
        prompts = [plain(row["prompt"]) for row in self.held_out]
        samples = self._sample(
            folder / "samples", prompts, self.options.config(self.seed, num_generations=count), 0, start
        )
        texts = [[sample.text for sample in row] for row in samples]
        return self._score(folder / "scores", self.held_out, texts, 0)

    def _sample(self, folder: Path, prompts: list, config: SamplingConfig, index: int, start: Path | None):
        open_folder(folder, {"run": self.key}, self.processes)
        load = lambda: HuggingFace(*self.load(start))  # noqa: E731
        return collect_samples(folder, load, prompts, config, round=index, accelerator=self.processes)

    def _score(self, folder: Path, rows: list[dict], texts: list[list[str]], index: int) -> list[list[float]]:
        open_folder(folder, {"run": self.key}, self.processes)
        names = sorted({n for row in rows for n in row} - {"prompt", "prompts", "completions", "responses", "scores"})
        device = self.processes.device
        return collect_scores(
            folder,
            lambda: load_scorer(self.options.scorer, batch_size=self.options.scorer_batch_size, device=device),
            [plain(row["prompt"]) for row in rows],
            texts,
            columns={name: [row.get(name) for row in rows] for name in names},
            accelerator=self.processes,
        )

    def _manifest(self, index: int, folder: Path, statistics: dict, rewards: list) -> dict:
        """What a round gave; written when it is missing, which ends the round."""
        path = folder / "manifest.json"
        manifest = {
            "round": index,
            "settings_hash": self.key,
            "started_from": f"round-{index - 1:02d}/checkpoint" if index else "the model of the settings",
            "samples": statistics,
            "training": _last_log(folder / "checkpoint"),
        }
        if rewards[-1] is not None:
            now, last, first = ([sum(row) / len(row) for row in rewards[i]] for i in (-1, -2, 0))
            manifest["held_out"] = {
                "before_the_first_round": bootstrap_interval(first),
                "reward": bootstrap_interval(now),
                "gain_of_this_round": bootstrap_interval([a - b for a, b in zip(now, last, strict=True)]),
                "gain_of_all_rounds": bootstrap_interval([a - b for a, b in zip(now, first, strict=True)]),
            }
        self.processes.main(lambda: path.exists() or write_json(path, manifest))
        return manifest

    def _publish(self, start: Path, history: list[dict]) -> None:
        shutil.copytree(start, self.folder, dirs_exist_ok=True)
        write_json(self.folder / "rounds.json", {"rounds": history})


def run_settings(args, rows: list[dict], held_out: list[dict], **more) -> dict:
    """What the result of a loop depends on, flat, so that a difference can be named.

    `args` are the training arguments with their `self_enhance`; `more` is what else matters, such as the model. The
    number of rounds is no part of it, and neither are batch sizes of sampling and scoring.
    """
    options = dataclasses.asdict(EnhanceOptions.parse(args.self_enhance))
    for name in ("rounds", "batch_size", "scorer_batch_size"):
        del options[name]
    settings = {
        **training_settings(args),
        **{f"self_enhance.{name}": value for name, value in options.items()},
        **more,
        "processes": args.world_size,
        "training rows": digest(rows),
        "held-out prompts": digest([row["prompt"] for row in held_out]),
    }
    return json.loads(json.dumps(settings, default=str))  # as it reads back from a file


def refuse_unsupported(args, what: str = "self_enhance") -> None:
    """Raises ValueError for what a loop over samples of the policy cannot do; `what` is its name."""
    if is_deepspeed_zero3_enabled() or uses_fsdp(args):
        raise ValueError(f"{what} samples from a whole policy on each GPU: use one process, DDP or ZeRO-2.")
    if args.push_to_hub:
        raise ValueError(f"push_to_hub does not work with {what}: upload output_dir when the run is done.")
    if args.chat_template_kwargs:
        raise ValueError("chat_template_kwargs have no effect on sampling: set them in the tokenizer's chat template.")


def refuse_folder_of_rounds(folder: str | Path) -> None:
    """Raises ValueError for a plain run whose output folder holds a run in rounds, whose model it would replace."""
    if (Path(folder) / SETTINGS).exists():
        raise ValueError(f"output_dir={str(folder)!r} holds a run with self_enhance: choose another output_dir.")


def plain(prompt: str | list[dict]) -> str | list[dict]:
    """Arrow gives every message all keys that any message has; chat templates ask whether a key is defined."""
    if isinstance(prompt, str):
        return prompt
    return [{k: v for k, v in message.items() if v is not None or k == "content"} for message in prompt]


def describe(manifest: dict) -> str:
    """What a round gave, in a few lines."""
    samples = manifest["samples"]
    lines = [
        f"  mean reward of {samples['responses']} samples on training prompts: {samples['mean_score']:.3f} "
        f"({samples['mean_response_tokens']:.0f} tokens, {samples['truncated_share']:.1%} cut off)"
    ]
    for name, value in manifest.get("held_out", {}).items():
        interval = f"[{value['low']:.3f}, {value['high']:.3f}]"
        lines.append(f"  held-out prompts, {name.replace('_', ' ')}: {value['mean']:.3f} {interval}")
    return "\n".join(lines)


def _last_log(folder: Path) -> dict:
    state = json.loads((folder / "trainer_state.json").read_text())
    logs = [log for log in state["log_history"] if "loss" in log]
    return {"steps": state["global_step"], **(logs[-1] if logs else {})}


def _scored(row: dict) -> dict[str, float]:
    """Text -> score of a pool's row."""
    return {completion_text(r): s for r, s in zip(row["responses"], row["scores"], strict=True)}
