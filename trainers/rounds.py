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

import dataclasses
import logging
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from datasets import Dataset

from .data.canonical import canonicalize
from .data.json_rows import digest
from .data.rows import UNFINISHED, refuse_template_kwargs, refuse_template_options, unfinished
from .forward.policy import load_tokenizer
from .generation import Backend, Sample, SamplingConfig, collect_samples, collect_scores, summarize
from .generation.collect import MADE, columns_of
from .generation.engine import opened
from .generation.options import EnhanceOptions, read_options
from .generation.rewards import as_completion, completion_text
from .generation.sampler import plain_prompt
from .generation.scorer import check_scorer, compared_scorer
from .generation.start import dtype_for_all, load_start, weights_of
from .pages.text import interval
from .runs.checkpoints import STATE
from .runs.files import read_json, read_rows, write_json, write_rows
from .runs.processes import Processes, stage_arguments
from .runs.settings import policy_settings, run_settings
from .runs.stage import Stage, refuse_fewer_rounds, train_into
from .statistics import bootstrap_interval

logger = logging.getLogger(__name__)

ORIGIN = "sampled_in_round"  # column of a pool: the round of each response, and OWN for the data set's own ones
OWN = -1
MANY_TRUNCATED = 0.2
SETTINGS = "self_enhance.json"
UNCOMPARED = ("rounds", "engine", "batch_size", "scorer_batch_size")  # options that change no round

Candidate = tuple[str, int, bool]  # text, the round that it was sampled in, and whether it was cut


def canonical(rows: Dataset | None, args) -> Dataset | None:
    """Canonical rows, as `args` want them, of rows that a trainer takes too, such as TRL pairs."""
    if rows is None:
        return None
    rows, report = canonicalize(rows, None, args.invalid_rows, args.dataset_num_proc, args.as_chat)
    report.log(logger, "Reading")
    return rows


class Rounds:
    """Sampling, scoring and training in rounds, in `args.output_dir`; `PreferenceTrainer.run` does it where asked for.

    Args:
        trainer_class: subclass of `PreferenceTrainer`, of which each round has an instance of its own.
        model: path or hub id.
        train_dataset: canonical rows; columns other than prompt, responses and scores go to the scorer.
        eval_dataset: canonical rows; their prompts measure the policy.
        dataset: name of the data for the model cards.
        left_out: what reading the data left out, for the record of each round.

    Raises:
        ValueError: something cannot be done in rounds.
    """

    def __init__(
        self, trainer_class, args, model: str, train_dataset: Dataset, eval_dataset: Dataset | None = None, *,
        dataset=None, left_out=(), quantization_config=None, peft_config=None,
    ):  # fmt: skip
        refuse_unsupported(args, "self_enhance")
        options = read_options("self_enhance", args.self_enhance, EnhanceOptions)
        if options.dtype is not None:  # one that holds on another machine too
            options = dataclasses.replace(options, dtype=dtype_for_all(options.dtype, args.device))
        self.trainer_class, self.args, self.model, self.options = trainer_class, args, model, options
        self.eval_dataset, self.dataset, self.peft_config = eval_dataset, dataset, peft_config
        self.quantization_config, self.left_out, self.processes = quantization_config, left_out, Processes()
        self.rows, self.held_out = ([*map(_with_plain_prompt, rows or [])] for rows in (train_dataset, eval_dataset))
        if options.own_responses:
            _refuse_turns(self.rows)
        check_scorer(options.scorer, columns_of(self.rows))  # before anything is sampled for it
        own = {f"self_enhance.{k}": v for k, v in dataclasses.asdict(options).items() if k not in UNCOMPARED}
        own |= {"self_enhance.scorer": compared_scorer(options.scorer)}
        own |= {"trainer": trainer_class.__name__, "training rows": digest(self.rows)}
        own |= {"held-out prompts": digest([row["prompt"] for row in self.held_out])}
        if columns := columns_of(self.held_out):  # which the scorer reads
            own |= {"held-out columns": digest([[row[name] for name in columns] for row in self.held_out])}
        own |= policy_settings(model, quantization_config, args.model_init_kwargs)
        self.stage = Stage(args.output_dir, run_settings(args, adapter=peft_config, **own), settings_name=SETTINGS)

    def run(self) -> None:
        """Does what is not done yet, and copies the last policy to the run's folder.

        Raises:
            ValueError: the folder holds a run with other settings, or more rounds.
        """
        folder, rounds = self.stage.open(), self.options.rounds
        refuse_fewer_rounds(folder, rounds, self._at(rounds) / "manifest.json")
        rewards, history = [self._measure(folder / "before", None)], []
        for index in range(rounds):
            history.append(self._round(index, rewards))
            self.processes.say(describe(history[-1]))
        self.processes.main(lambda: self._publish(history))

    def _open(self, start: Path | None, folder: Path) -> AbstractContextManager[Backend]:
        loading = {"dtype": self.options.dtype, "quantization_config": self.quantization_config}
        return opened(self.options.engine, weights_of(self.model, start, self.args, **loading), folder)

    def _train(self, rows: list[dict], index: int, start: Path | None, folder: Path) -> None:
        policy = load_start(
            self.model, start, trainable=True, init_kwargs=self.args.model_init_kwargs,
            quantization_config=self.quantization_config,
        )  # fmt: skip
        args, times = self.args, self.options.iterations
        length = {"num_train_epochs": args.num_train_epochs * times, "max_steps": max(args.max_steps * times, -1)}
        trainer = self.trainer_class(
            policy,
            args=stage_arguments(args, folder, args.seed + index, self_enhance=None, **length),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=self.eval_dataset,
            peft_config=self.peft_config if start is None else None,
            processing_class=load_tokenizer(policy, self.args.model_init_kwargs),
        )
        trainer.train_stage(start, self.dataset, self.left_out, "the next round")

    def _round(self, index: int, rewards: list) -> dict:
        """Does what is missing of a round, and adds the rewards of its policy; returns the manifest."""
        folder, start = self._at(index), self._at(index - 1) / "checkpoint" if index else None
        self.processes.say(f"\nRound {index + 1} of {self.options.rounds}: {folder}")
        path = folder / "manifest.json"
        done = path.exists()
        if not done:
            pool, statistics = self._pool(index, folder, start)
            self.processes.main(lambda: write_rows(folder / "rows.jsonl.gz", pool))
            train_into(folder / "checkpoint", lambda at: self._train(pool, index, start, at))
        rewards.append(self._measure(folder / "held-out", folder / "checkpoint"))
        if not done:
            self.processes.main(lambda: write_json(path, self._manifest(index, statistics, rewards)))
        return read_json(path)

    def _publish(self, history: list[dict]) -> None:
        shutil.copytree(self._at(len(history) - 1) / "checkpoint", self.stage.folder, dirs_exist_ok=True)
        write_json(self.stage.folder / "rounds.json", {"rounds": history})

    def _at(self, index: int) -> Path:
        return self.stage.folder / f"round-{index:02d}"

    def _pool(self, index: int, folder: Path, start: Path | None) -> tuple[list[dict], dict]:
        """The rows to train on, and the statistics of the samples. A text is scored once in the whole run."""
        samples = self._sample(folder / "samples", self.rows, self.options.config(self.args.seed), index, start)
        old = read_rows(self._at(index - 1) / "rows.jsonl.gz") if index else [None] * len(self.rows)
        pools = [self._candidates(*parts, index) for parts in zip(self.rows, samples, old, strict=True)]
        known = [_scored(row) if row else {} for row in old]
        new = [list(dict.fromkeys(t for t, *_ in pool if t not in k)) for pool, k in zip(pools, known, strict=True)]
        for values, texts, scores in zip(known, new, self._score(folder / "scores", self.rows, new), strict=True):
            values.update(zip(texts, scores, strict=True))
        rows = [_row(*parts) for parts in zip(self.rows, pools, known, strict=True)]
        fresh = [[k[sample.text] for sample in row] for row, k in zip(samples, known, strict=True)]
        statistics = summarize(samples, fresh)
        if statistics["truncated_share"] > MANY_TRUNCATED:
            self.processes.say(
                f"WARNING: {statistics['truncated_share']:.0%} of the samples were cut at max_new_tokens. They are "
                "trained on without an end, and say nothing of how to stop: raise max_new_tokens."
            )
        pooled = [value for row in rows for value in row["scores"]]
        return rows, statistics | {"pool_responses": len(pooled), "pool_mean_score": sum(pooled) / len(pooled)}

    def _candidates(self, row: dict, samples: list[Sample], old: dict | None, index: int) -> list[Candidate]:
        own, kept = [], []
        if self.options.own_responses:
            own = [(completion_text(r), OWN, cut) for r, cut in zip(row["responses"], unfinished(row), strict=True)]
        if self.options.keep_old and old:
            parts = zip(old["responses"], old[ORIGIN], unfinished(old), strict=True)
            kept = [(completion_text(r), origin, cut) for r, origin, cut in parts if origin != OWN]
        return [*own, *kept, *((sample.text, index, sample.truncated) for sample in samples)]

    def _measure(self, folder: Path, start: Path | None) -> list[list[float]] | None:
        """Rewards of the policy in `start` on held-out prompts; the same random streams for every policy."""
        if not self.options.held_out_generations or not self.held_out:
            return None
        config = self.options.config(self.args.seed, num_generations=self.options.held_out_generations)
        samples = self._sample(folder / "samples", self.held_out, config, 0, start)
        texts = [[sample.text for sample in row] for row in samples]
        return self._score(folder / "scores", self.held_out, texts)

    def _sample(self, folder: Path, rows: list[dict], config: SamplingConfig, index: int, start: Path | None):
        Stage(folder, {"run": self.stage.key}).open()
        prompts = [row["prompt"] for row in rows]
        return collect_samples(folder, lambda: self._open(start, folder), prompts, config, round=index)

    def _score(self, folder: Path, rows: list[dict], texts: list[list[str]]) -> list[list[float]]:
        Stage(folder, {"run": self.stage.key}).open()
        return collect_scores(folder, self.options.scorer, rows, texts, batch_size=self.options.scorer_batch_size)[0]

    def _manifest(self, index: int, statistics: dict, rewards: list) -> dict:
        """What a round gave."""
        manifest = {
            "round": index,
            "settings_hash": self.stage.key,
            "started_from": f"round-{index - 1:02d}/checkpoint" if index else "the model of the settings",
            "samples": statistics,
            "training": _last_log(self._at(index) / "checkpoint"),
        }
        if rewards[-1] is None:
            return manifest
        now, last, first = ([sum(row) / len(row) for row in rewards[i]] for i in (-1, -2, 0))
        values = {
            "before_the_first_round": first,
            "reward": now,
            "gain_of_this_round": [a - b for a, b in zip(now, last, strict=True)],
            "gain_of_all_rounds": [a - b for a, b in zip(now, first, strict=True)],
        }
        return manifest | {"held_out": {name: bootstrap_interval(own) for name, own in values.items()}}


def refuse_unsupported(args, method: str) -> None:
    """Raises ValueError for what a loop over samples of the policy cannot do."""
    if args.push_to_hub:
        raise ValueError(f"push_to_hub does not work with {method}: upload output_dir when the run is done.")
    refuse_template_kwargs(args.chat_template_kwargs)


def refuse_folder_of_rounds(folder: str | Path) -> None:
    """Raises ValueError for a plain run whose output folder holds a run in rounds, whose model it would replace."""
    if (Path(folder) / SETTINGS).exists():
        raise ValueError(f"output_dir={str(folder)!r} holds a run with self_enhance: choose another output_dir.")


def describe(manifest: dict) -> str:
    """What a round gave, in a few lines."""
    samples = manifest["samples"]
    lines = [
        f"  mean reward of {samples['responses']} samples on training prompts: {samples['mean_score']:.3f} "
        f"({samples['mean_response_tokens']:.0f} tokens, {samples['truncated_share']:.1%} cut off)"
    ]
    for name, value in manifest.get("held_out", {}).items():
        lines.append(f"  held-out prompts, {name.replace('_', ' ')}: {interval(value)}")
    return "\n".join(lines)


def _with_plain_prompt(row: dict) -> dict:
    refuse_template_options(row)
    return row | {"prompt": plain_prompt(row["prompt"])}


def _refuse_turns(rows: list[dict]) -> None:
    """A pool holds texts: it would make one text of several messages, a tool's among them, and lose tool calls."""
    for i, row in enumerate(rows):
        messages = [response for response in row["responses"] if not isinstance(response, str)]
        firsts = [response[0] for response in messages if len(response) == 1]
        texts = [isinstance(first["content"], str) and not first.get("tool_calls") for first in firsts]
        if sum(texts) < len(messages):
            raise ValueError(
                f"self_enhance: training row {i} has a response of several messages, with tool calls or without text, "
                "which is no candidate beside sampled texts: set own_responses to false."
            )


def _row(row: dict, pool: list[Candidate], scores: dict[str, float]) -> dict:
    """A row of a pool. Lists may belong to the data set's own responses, which are not the responses of this row."""
    texts, origins, cut = (list(part) for part in zip(*pool, strict=True))
    rest = {k: v for k, v in row.items() if k not in MADE and not isinstance(v, list | dict)}
    responses = [as_completion(row["prompt"], text) for text in texts]
    scored = {"prompt": row["prompt"], "responses": responses, "scores": [scores[text] for text in texts]}
    return {**scored, ORIGIN: origins, UNFINISHED: cut, **rest}


def _scored(row: dict) -> dict[str, float]:
    """Text -> score of a pool's row."""
    return {completion_text(r): s for r, s in zip(row["responses"], row["scores"], strict=True)}


def _last_log(folder: Path) -> dict:
    state = read_json(folder / STATE)
    logs = [log for log in state["log_history"] if "loss" in log]
    return {"steps": state["global_step"], **(logs[-1] if logs else {})}
