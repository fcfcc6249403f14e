"""The stages of SGPO in their order. Each is a folder (trainers/runs/stage.py says what every one holds):

    round-00/sft/        supervised fine-tuning of the start, if asked for
    round-00/current/    the policy's responses to the improver's prompts
    round-00/targets/    what the reviser makes of them
    round-00/filter/     rows.jsonl.gz: what the improver is trained on; dropped.jsonl.gz: the rest, with reasons
    round-00/improver/   model/: one model that answers prompts and improves answers
    round-00/pairs/      rows.jsonl.gz: improved responses over the responses they were made of
    round-00/gate/       held-out answers before all rounds, and of the improver in both modes; scores, of pairs too
    round-00/dpo/        model/: the policy that the round ends with
    round-00/measure/    held-out answers of the policy, in both modes; scores

A killed run goes on where it stopped when the same command is given again, and ends with the same pairs and the same
weights: a stage depends on nothing but its settings and the files of earlier stages. Every sample has a random stream
of its own, seeded by (seed, round, prompt), and every training starts from weights on disk.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import PeftConfig

from ..data.json_rows import digest
from ..forward.policy import set_pad_token, tokenizer_at
from ..generation.collect import collect_scores
from ..generation.rewards import as_completion
from ..generation.scorer import compared_scorer
from ..generation.start import load_start
from ..runs.checkpoints import STATE
from ..runs.files import read_json, read_rows, write_rows
from ..runs.processes import Processes
from ..runs.settings import model_fingerprint, policy_settings, run_settings
from ..runs.stage import Stage, refuse_fewer_rounds, train_into
from ..statistics import bootstrap_interval
from . import filters, text
from .config import SFT_DATA, SGPOConfig
from .data import Rows, count_drops
from .improver import Example, fits, improvement, sft_config, train_sft
from .monitor import alarms, dpo_metrics, edit_metrics, rewrite_metrics
from .sampling import Sampler

STAGES = ("sft", "current", "targets", "filter", "improver", "pairs", "gate", "dpo", "measure")
FREE = ("batch_size", "engine")  # keys of `sampling` that the draws do not depend on
ASIDE = ("gate", "measure")  # which no later stage depends on
ROWS, DROPPED, MODEL = "rows.jsonl.gz", "dropped.jsonl.gz", "model"
WAYS_OUT = "delete the folders of this stage and of later ones, or choose another output_dir"
WAYS_OUT_ASIDE = "delete the folders gate and measure of every round, or choose another output_dir"


@dataclass
class Run:
    """A run of SGPO in `args.output_dir`.

    Args:
        trainer_class: makes the trainer of the DPO stage.
        model: path or hub id of the model before all rounds.
        dataset: name of the data, for model cards.
    """

    trainer_class: type
    args: SGPOConfig
    model: str
    rows: Rows
    quantization_config: object = None
    peft_config: PeftConfig | None = None
    dataset: str | list[str] | None = None
    left_out: Sequence = ()  # what reading the data left out, for the record of the DPO stage

    def __post_init__(self):
        self.processes = Processes()
        self.folder = Path(self.args.output_dir)
        self.tokenizer = tokenizer_at(self.model, self.args.model_init_kwargs)
        set_pad_token(self.tokenizer, self.args.pad_token)
        self.sampler = Sampler(self.args, self.model, self.tokenizer, self.quantization_config)

    def run(self) -> None:
        """Does what is not done yet, and copies the last policy to the run's folder.

        Raises:
            ValueError: a stage was made with other settings, no row is left to train on, a limit is crossed and
                `args.on_alarm` is stop, or the folder holds more rounds.
        """
        refuse_fewer_rounds(self.folder, self.args.rounds, self.at("", self.args.rounds))
        earlier, settings, stages = None, self.settings(), []
        for index, name in [(i, n) for i in range(self.args.rounds) for n in settings if n != "sft" or i == 0]:
            own = settings[name] | {"stage": name, "round": index, "earlier stages": earlier}
            ways_out = WAYS_OUT_ASIDE if name in ASIDE else WAYS_OUT
            stage = Stage(self.at(name, index), own, ways_out=ways_out)
            if name not in ASIDE:
                earlier = stage.key
            stages.append((stage, name, index))
        for stage, _, _ in stages:
            stage.done()  # refuses other settings before hours of work, as of an `sft` that was not there before
        for stage, name, index in stages:
            self._run_stage(stage, name, index)
        end = self.at("dpo", self.args.rounds - 1) / MODEL
        self.processes.main(lambda: shutil.copytree(end, self.folder, dirs_exist_ok=True))
        self.processes.say(f"\nAll stages are done: the policy is in {self.folder}.")

    def _run_stage(self, stage: Stage, name: str, index: int) -> None:
        if not stage.done():
            self.processes.say(f"\nRound {index + 1} of {self.args.rounds}, {name}: {stage.folder}")
            work: dict[str, Callable[[int, Path], dict]] = {
                "sft": self._sft, "current": self._current, "targets": self._targets, "filter": self._filter,
                "improver": self._improver, "pairs": self._pairs, "gate": self._gate, "dpo": self._dpo,
                "measure": self._measure,
            }  # fmt: skip
            with self.sampler:
                counts = work[name](index, stage.open())
            # A figure that is not a number is left out, as JSON has no such thing.
            stage.finish(counts={key: value for key, value in counts.items() if value == value})
            self.processes.say(json.dumps(counts, indent=2, default=str))
        sentences = alarms(name, stage.manifest()["counts"])
        for sentence in sentences:
            self.processes.say(f"  WARNING: {sentence}")
        if sentences and self.args.on_alarm == "stop":
            raise ValueError(f"on_alarm is stop, and the monitor says: {' '.join(sentences)}")

    def settings(self) -> dict[str, dict]:
        """What each stage of a round depends on beside the stages before it."""
        args, rows, adapter = self.args, self.rows, self.peft_config

        def options(*names: str) -> dict:
            return {name: getattr(args, name) for name in names}

        common = policy_settings(self.model, self.quantization_config) | options(
            "seed", "model_init_kwargs", "pad_token"
        )  # fmt: skip
        sampling, revision = (
            {f"{name}.{key}": value for key, value in getattr(args, name).items() if key not in FREE}
            for name in ("sampling", "revision")
        )
        improver = {"template": digest(text.IMPROVER_V1), "improver.max_length": args.improver["max_length"]}
        reviser = {
            "template": digest(text.REVISER_V1 if args.reviser_analysis else text.REVISER_DIRECT_V1),
            "reviser files": args.reviser_model and model_fingerprint(args.reviser_model),
        }
        measured = {"held-out rows": digest(rows.held_out), "scorer": compared_scorer(args.scorer)}
        own = {
            "sft": rows.conversations is not None
            and run_settings(self._sft_config("sft", 0), adapter=adapter, conversations=digest(rows.conversations)),
            "current": sampling | {"improver prompts": digest(rows.improver)},
            "targets": revision | reviser | options("reviser", "reviser_model", "reviser_function"),
            "filter": improver | {"guarded": args.policy_weight > 0}
            | options("filter_statistic", "filter_factor", "filter_side", "max_length"),
            "improver": run_settings(self._sft_config("improver", 0), adapter=adapter) | options("policy_weight"),
            "pairs": sampling | revision | {"preference prompts": digest(rows.preferences)},
            "gate": (rows.held_out or args.scorer) and measured,
            "dpo": run_settings(args.of_dpo(self.folder, args.seed), adapter=adapter),
            "measure": rows.held_out and measured,
        }  # fmt: skip
        return {name: common | depends for name, depends in own.items() if depends}

    # Where files lie.

    def at(self, name: str, index: int) -> Path:
        """Folder of a stage."""
        return self.folder / f"round-{index:02d}" / name

    def start(self, index: int) -> Path | None:
        """The model where a round starts; None is the model of the settings."""
        if index:
            return self.at("dpo", index - 1) / MODEL
        return self.at("sft", 0) / MODEL if self.rows.conversations is not None else None

    def _write(self, path: Path, rows: list[dict]) -> None:
        self.processes.main(lambda: write_rows(path, rows))

    def _write_kept(self, folder: Path, rows: list[dict], reasons: list[str | None]) -> dict:
        """Rows without a reason go to rows.jsonl.gz, the others to dropped.jsonl.gz with theirs; returns the counts.

        Raises:
            ValueError: no row is left; rows.jsonl.gz is then empty.
        """
        marked = list(zip(rows, reasons, strict=True))
        kept, counts = [row for row, reason in marked if reason is None], count_drops(reasons)
        self._write(folder / DROPPED, [row | {"reason": reason} for row, reason in marked if reason is not None])
        self._write(folder / ROWS, kept)
        if not kept:
            raise ValueError(
                f"{folder.name}: no row is left, so there is nothing to train on. Dropped: {counts['dropped']}; "
                f"{folder / DROPPED} holds them."
            )
        return counts

    # Trainings.

    def _sft_config(self, name: str, index: int, folder: Path | None = None):
        of_sft = {"learning_rate": 2e-5, "max_length": self.args.max_length} | (self.args.sft or {})
        options = self.args.improver if name == "improver" else of_sft
        options = {key: value for key, value in options.items() if key not in SFT_DATA}
        return sft_config(self.args, options, folder or self.folder, self.args.seed + index)

    def _load(self, start: Path | None, **options):
        return load_start(
            self.model, start, init_kwargs=self.args.model_init_kwargs, quantization_config=self.quantization_config,
            **options,
        )  # fmt: skip

    def _sft(self, index: int, folder: Path) -> dict:
        assert self.rows.conversations is not None
        examples = [(row["prompt"], row["reference"]) for row in self.rows.conversations]
        kept = fits(examples, self.tokenizer, self._sft_config("sft", index).max_length)
        long = filters.TOO_LONG.format("sft.max_length" if "max_length" in (self.args.sft or {}) else "max_length")
        counts = count_drops([None if fit else long for fit in kept])
        examples = [example for example, fit in zip(examples, kept, strict=True) if fit]
        if not examples:
            raise ValueError(f"no conversation is left for sft. Dropped: {counts['dropped']}.")
        return counts | self._train("sft", index, folder, None, examples)

    def _improver(self, index: int, folder: Path) -> dict:
        rows = read_rows(self.at("filter", index) / ROWS)
        examples = [improvement(row) for row in rows]
        policy = [(row["prompt"], row["reference"]) for row in rows]
        trained = self._train("improver", index, folder, self.start(index), examples, policy_examples=policy,
                              policy_weight=self.args.policy_weight)  # fmt: skip
        return {"examples": len(rows)} | trained

    def _train(self, name: str, index: int, folder: Path, start: Path | None, examples: list[Example], **more) -> dict:
        def train(training: Path) -> None:
            adapter = self.peft_config if start is None else None
            train_sft(self._load(start, trainable=True), self.tokenizer, self._sft_config(name, index, training),
                      examples, peft_config=adapter, **more)  # fmt: skip

        train_into(folder / MODEL, train)
        state = read_json(folder / MODEL / STATE)
        losses = [log["loss"] for log in state["log_history"] if "loss" in log]
        return {"steps": state["global_step"]} | ({"first_loss": losses[0], "last_loss": losses[-1]} if losses else {})

    def _dpo(self, index: int, folder: Path) -> dict:
        rows = [pair(row) for row in read_rows(self.at("pairs", index) / ROWS)]
        start = self.at("improver", index) / MODEL
        improved = self.args.ref == "improved"

        def train(training: Path) -> None:
            trainer = self.trainer_class(
                self._load(start, trainable=True),
                ref_model=None if improved else self._load(self.start(0)),
                args=self.args.of_dpo(training, self.args.seed + index),
                train_dataset=Dataset.from_list(rows),
                processing_class=self.tokenizer,
            )
            trainer.train_stage(start, self.dataset, self.left_out, "the next stage")

        train_into(folder / MODEL, train)
        state = read_json(folder / MODEL / STATE)
        metrics = dpo_metrics(state["log_history"], self.args.beta, starts_at_reference=improved)
        return {"pairs": len(rows), "steps": state["global_step"]} | metrics

    # Texts.

    def _current(self, index: int, folder: Path) -> dict:
        start = self.start(index)
        rows = self.sampler.draw(folder / "samples", self.rows.improver, "current", start, "sampling", index)
        self._write(folder / ROWS, rows)
        made = [row for row in rows if row["current"] is not None]
        cut = {"truncated": float(np.mean([row["current_truncated"] for row in made]))} if made else {}
        return {"prompts": len(rows), "no_room": len(rows) - len(made)} | cut

    def _targets(self, index: int, folder: Path) -> dict:
        rows = read_rows(self.at("current", index) / ROWS)
        # A draft that cannot be used is kept in the rows, so that the filter counts it with its reason.
        at = [i for i, row in enumerate(rows) if filters.column_fault(row, "current") is None]
        usable = self.sampler.revise(folder / "samples", [rows[i] for i in at], self.start(index), index)
        for i, row in zip(at, usable, strict=True):
            rows[i] = row
        rows = [{"target": None, "target_truncated": False} | row for row in rows]
        self._write(folder / ROWS, rows)
        revised = [row for row in rows if row["target"] and row["target"].strip()]
        ratios = [
            [edit_metrics(row[name], row["target"]).ratio for name in ("reference", "current")] for row in revised
        ]
        counts: dict[str, float] = {"drafts": len(rows), "usable_drafts": len(usable), "revised": len(revised)}
        counts |= {"closer_to_reference": float(np.mean([a < b for a, b in ratios]))} if ratios else {}
        return counts | rewrite_metrics(rows, "current", "target")

    def _filter(self, index: int, folder: Path) -> dict:
        args, rows = self.args, read_rows(self.at("targets", index) / ROWS)
        reasons = [
            filters.column_fault(row, "current") or filters.column_fault(row, "target", "current") for row in rows
        ]
        self._mark_long(rows, reasons, "improver.max_length", improvement)
        self._mark_long(rows, reasons, "max_length", lambda row: (row["prompt"], row["target"]))
        if args.policy_weight:
            self._mark_long(rows, reasons, "improver.max_length", lambda row: (row["prompt"], row["reference"]))
        at, counts = [i for i, reason in enumerate(reasons) if reason is None], {}
        if args.filter_statistic != "none" and at:
            usable = [rows[i] for i in at]
            logps = self.sampler.logps(folder, self.start(index), usable, ("target", "current"))
            values = filters.filter_statistic(args.filter_statistic, *zip(*logps, strict=True))
            keep = filters.iqr_keep(values, args.filter_factor, args.filter_side)
            for i, value, kept in zip(at, values, keep, strict=True):
                rows[i] = rows[i] | {"statistic": value if math.isfinite(value) else None}
                if not kept:
                    reasons[i] = filters.OUTLIER if math.isfinite(value) else filters.NOT_FINITE
            fences = filters.iqr_fences(values, args.filter_factor, args.filter_side)._asdict()
            counts = {"fences": {k: None if v in (-math.inf, math.inf) else v for k, v in fences.items()}}
        return self._write_kept(folder, rows, reasons) | counts

    def _mark_long(self, rows: list[dict], reasons: list, option: str, example: Callable[[dict], Example]) -> None:
        """Gives a reason to rows without one whose example is longer than `option` says."""
        limit = self.args.max_length if option == "max_length" else self.args.improver["max_length"]
        at = [i for i, reason in enumerate(reasons) if reason is None]
        for i, fit in zip(at, fits([example(rows[i]) for i in at], self.tokenizer, limit), strict=True):
            reasons[i] = None if fit else filters.TOO_LONG.format(option)

    def _pairs(self, index: int, folder: Path) -> dict:
        rows = self._rewrite(folder, self.at("improver", index) / MODEL, self.rows.preferences, index)
        reasons = [
            filters.column_fault(row, "rejected") or filters.column_fault(row, "chosen", "rejected") for row in rows
        ]
        self._mark_long(rows, reasons, "max_length", lambda row: (row["prompt"], row["chosen"]))
        self._mark_long(rows, reasons, "max_length", lambda row: (row["prompt"], row["rejected"]))
        return self._write_kept(folder, rows, reasons) | rewrite_metrics(rows, "rejected", "chosen")

    def _rewrite(self, folder: Path, model: Path | None, rows: list[dict], index: int) -> list[dict]:
        """Rows with `rejected`, a plain response of the model, and `chosen`, what it makes of that as improver."""
        rows = self.sampler.draw(folder / "rejected", rows, "rejected", model, "sampling", index)

        def asked(row: dict):
            return None if row["rejected"] is None else text.improver_prompt(row["prompt"], row["rejected"])

        return self.sampler.draw(folder / "chosen", rows, "chosen", model, "revision", index, ask=asked)

    # What a round did to held-out prompts. Their random streams are those of round 0 for every model, so that answers
    # can be compared prompt by prompt.

    def _gate(self, index: int, folder: Path) -> dict:
        """Whether what the improver makes of answers is better than they are: DPO on pairs that are not does harm."""
        counts = self._scores(folder, "pairs", read_rows(self.at("pairs", index) / ROWS))
        if not self.rows.held_out:
            return counts
        # Answers of the model before all rounds: in later rounds these are there already.
        before = self.at("gate", 0) / "before"
        rows = self.sampler.draw(before, self.rows.held_out, "answer", self.start(0), "sampling", 0)
        counts |= self._held_out(folder, "improver", self.at("improver", index), rows)
        if self.args.scorer is None:
            return counts
        # And against the most likely plain answers, which teach a model without any improver.
        model, rows = self.at("improver", index) / MODEL, read_rows(folder / "improver.jsonl.gz")
        rows = self.sampler.draw(folder / "greedy", rows, "greedy", model, "sampling", 0, greedy=True)
        self._write(folder / "greedy.jsonl.gz", rows)
        usable = [row | {"rejected": row["greedy"]} for row in rows if row["greedy"] is not None]
        return counts | self._scores(folder, "over_greedy", usable)

    def _measure(self, index: int, folder: Path) -> dict:
        rows = read_rows(self.at("gate", index) / "improver.jsonl.gz")
        return self._held_out(folder, "policy", self.at("dpo", index), rows)

    def _held_out(self, folder: Path, name: str, stage: Path, rows: list[dict]) -> dict:
        """What the model of `stage` answers, and makes of that, goes to `<name>.jsonl.gz`; returns its figures."""
        rows = self._rewrite(folder / name, stage / MODEL, rows, 0)
        self._write(folder / f"{name}.jsonl.gz", rows)
        metrics = rewrite_metrics(rows, "rejected", "chosen")
        if against := rewrite_metrics(rows, "answer", "rejected"):
            metrics["length_ratio"] = against["mean_word_ratio"]
            metrics["distinct_2_fall"] = 1 - against["rejected_distinct_2"] / against["answer_distinct_2"]
        return {f"{name}_{key}": value for key, value in metrics.items()} | self._scores(folder, name, rows)

    def _scores(self, folder: Path, name: str, rows: list[dict]) -> dict:
        """Mean score of chosen minus rejected with its interval over prompts; empty without a scorer."""
        rows, scorer = [row for row in rows if row["chosen"] is not None], self.args.scorer
        if scorer is None or not rows:
            return {}
        folder = folder / f"{name}-scores"
        folder.mkdir(exist_ok=True)
        own = [{name: row[name] for name in ("prompt", "reference")} for row in rows]
        scores, _ = collect_scores(folder, scorer, own, [[row["chosen"], row["rejected"]] for row in rows])
        gain = bootstrap_interval([chosen - rejected for chosen, rejected in scores])
        wins = [float(chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in scores]
        return {
            f"{name}_scorer_gain": gain["mean"],
            f"{name}_scorer_gain_interval": [gain["low"], gain["high"]],
            f"{name}_scorer_win_rate": float(np.mean(wins)),
        }


def pair(row: dict) -> dict:
    """A canonical row: chosen over rejected, both under the plain prompt."""
    responses = [as_completion(row["prompt"], row[name]) for name in ("chosen", "rejected")]
    return {"prompt": row["prompt"], "responses": responses, "scores": [1.0, 0.0]}
