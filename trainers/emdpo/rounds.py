"""EM in rounds: train a policy for each type on posterior-weighted rows, score everything, update the posterior.

    reference/logps.parquet                  the reference's log-probabilities, scored once
    restart-0/start.csv                      the first guess of each annotator's type
    restart-0/round-00/type-0/training/      a trainer at work with its checkpoints; becomes policy/ when it is done
    restart-0/round-00/type-0/policy/        the policy of the type: a model, or an adapter
    restart-0/round-00/type-0/logps.parquet  its log-probabilities of all responses
    restart-0/round-00/annotators.csv        posterior and log-likelihood of each annotator
    restart-0/round-00/manifest.json         what came out, written last
    restart-0/round-04/final/                after the last round of `heldout_half`, whose policies have seen half of
                                             the rows: the same files, of policies that are trained on all of them

A killed run goes on where it stopped and ends with the same posterior and the same weights: an M-step depends on
nothing but the files of the round before. Policies of earlier rounds are deleted once a round is done.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..runs.files import write_json
from ..runs.stage import MANIFEST, train_into
from .annotators import Judged, halves
from .init import first_guess
from .mixture import SURE, EStep, e_step, mixture_weights
from .tables import ANNOTATORS, HELD_OUT, read_annotators, read_json, write_annotators

RESTART_SEED = 1000  # distance of the seeds of two restarts
POLICY = "policy"  # in the folder of a type


class Round(NamedTuple):
    """What a round gave: posterior (N,T), the manifest, and the policy folder of each type."""

    posterior: np.ndarray
    manifest: dict
    policies: list[Path]

    @property
    def folder(self) -> Path:
        return self.policies[0].parents[1]


class EM:
    """The rounds of an `EMDPOTrainer`, which trains, scores, logs and warns; `run` does what is not done yet."""

    def __init__(self, trainer):
        self.trainer, self.args, self.processes = trainer, trainer.args, trainer.processes
        self.folder, self.types = Path(self.args.output_dir), self.args.num_types
        self.rows, self.held_out = trainer.judged, trainer.held_out
        self.half = halves(self.rows.owner, self.args.seed) if self.args.score_on == "heldout_half" else None

    def run(self) -> list[list[Round]]:
        """All rounds of all restarts; `best` picks one, whose last round holds the policies of the run.

        Raises:
            ValueError: policies that these settings start from or end with were deleted when `folder` went further.
        """
        runs = [self._restart(restart) for restart in range(self.args.restarts)]
        rounds = best(runs)
        if self.half is not None:
            rounds[-1] = self._final(rounds[-1])
        _refuse_deleted(rounds[-1].policies)
        return runs

    def _restart(self, restart: int) -> list[Round]:
        folder = self.folder / f"restart-{restart}"
        done: list[Round] = []
        gamma = self._start(restart, folder / "start.csv")
        for index in range(self.args.rounds if self.types > 1 else 1):
            done.append(self._round(restart, folder / f"round-{index:02d}", gamma, done))
            gamma = done[-1].posterior
            self.trainer.log_round(done[-1].manifest)
            self._warn(done[-1].manifest)
            if index:
                self._delete(done[-2].policies)
            if self._stopped(done):
                break
        return done

    def _start(self, restart: int, path: Path) -> np.ndarray:
        def write() -> None:
            gamma = first_guess(self.args, self.rows, restart)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_annotators(path, self.rows.annotators.names, self.rows.items(), gamma)

        # The main process alone looks: another one that looks later would find the file, and not wait for it.
        self.processes.main(lambda: None if path.exists() else write())
        gamma = read_annotators(path)[1]
        if self.types > 1 and np.ptp(gamma, axis=0).max() < 1e-6:
            self.trainer.warn(
                "The first guess is the same for all annotators, so all types train on the same data and stay equal: "
                "give another initial_posterior or init."
            )
        return gamma

    def _round(self, restart: int, folder: Path, gamma: np.ndarray, done: list[Round]) -> Round:
        policies, index = self._policies(folder), len(done)
        if not (folder / MANIFEST).exists():
            self.processes.say(f"\nEM round {index + 1} of at most {self.args.rounds}: {folder}")
            starts = done[-1].policies if done and self.args.start_from == "previous" else None
            part = None if self.half is None else self.half == index % 2
            self._m_steps(policies, gamma, part, starts, seed=self.args.seed + RESTART_SEED * restart + index)
            manifest = {"restart": restart, "round": index}
            self._e_step(folder, manifest, gamma, policies, done[-1].policies if done else None)
        return self._read(folder)

    def _policies(self, folder: Path) -> list[Path]:
        return [folder / f"type-{k}" / POLICY for k in range(self.types)]

    def _read(self, folder: Path) -> Round:
        """A finished round."""
        return Round(read_annotators(folder / ANNOTATORS)[1], read_json(folder / MANIFEST), self._policies(folder))

    def _m_steps(
        self, policies: list[Path], gamma: np.ndarray, part: np.ndarray | None, starts: list[Path] | None, *, seed: int
    ) -> None:
        """Trains each type on all rows, or on the `part` (J,) of them, weighted by `gamma` (N,T).

        The seed is the same for all types, which are exchangeable.
        """
        _refuse_deleted(starts or [])
        for k, policy in enumerate(policies):
            weights = gamma[self.rows.owner, k]
            if part is not None:
                weights = np.where(part, weights, np.nan)  # the other half takes no part
            if not policy.exists():
                self.processes.say(f"M-step, type {k}")

            def train(folder: Path, weights=weights, start=starts and starts[k]) -> None:
                self.trainer.m_step(weights, start, folder, seed)

            train_into(policy, train)

    def _final(self, last: Round) -> Round:
        """What `last` found, with policies that are trained on all rows by its posterior."""
        folder, manifest = last.folder / "final", dict(last.manifest)
        policies = self._policies(folder)
        if not (folder / MANIFEST).exists():
            self.processes.say("\nTraining on all rows")
            seed = self.args.seed + RESTART_SEED * manifest["restart"] + manifest["round"] + 1
            self._m_steps(policies, last.posterior, None, None, seed=seed)
            table = (last.folder / ANNOTATORS).read_bytes()
            self.processes.main(lambda: (folder / ANNOTATORS).write_bytes(table))
            held_out = None if self.held_out is None else self._scores(policies, [self.held_out])[0]
            self._write(folder, manifest, policies, last.posterior, held_out)
        stale = [path for path in self.folder.glob("restart-*/round-*/final") if path != folder]
        self._delete([*last.policies, *stale])
        return self._read(folder)

    def _e_step(
        self, folder: Path, manifest: dict, gamma: np.ndarray, policies: list[Path], before: list[Path] | None
    ) -> None:
        """The posterior under new `policies`; `before` are those of the round before."""
        logps, *held_out = self._scores(policies, [self.rows, *([self.held_out] if self.held_out else [])])
        scored = np.ones(len(logps), bool) if self.half is None else self.half != manifest["round"] % 2
        if self.half is not None and before:
            # The half that these policies have seen counts as those of the round before scored it, unseen.
            logps = np.where(scored[:, None], logps, self._scores(before, [self.rows])[0])
            scored[:] = True
        prior, names, items = mixture_weights(gamma), self.rows.annotators.names, self.rows.items(scored)
        step = e_step(logps[scored], self.rows.owner[scored], prior, len(names))
        after = step.posterior
        manifest |= {
            "prior_trained_on": prior.tolist(),
            "prior": step.prior.tolist(),
            "log_likelihood": step.observed,
            **_means(step, self.rows.weights[scored]),
            "rows_scored": int(items.sum()),
            "smallest_type": float(after.mean(0).min()),
            "changed_type": float((after.argmax(1) != gamma.argmax(1)).mean()),
            "median_certainty": float(np.median(after.max(1))),
        }
        self.processes.main(lambda: write_annotators(folder / ANNOTATORS, names, items, after, step.log_likelihood))
        self._write(folder, manifest, policies, after, *held_out)

    def _write(
        self, folder: Path, manifest: dict, policies: list[Path], gamma: np.ndarray, held_out: np.ndarray | None = None
    ) -> None:
        """The files that end a round.

        `held_out` (rows,T) log-likelihoods count under the mixture: new annotators by the mixture weights, known ones
        by their posterior `gamma`.
        """
        manifest["policies"] = [str(policy.relative_to(self.folder)) for policy in policies]
        if held_out is not None:
            known = dict(zip(self.rows.annotators.names, gamma, strict=True))
            names, items = self.held_out.annotators.names, self.held_out.items()
            prior = np.stack([known.get(name, np.array(manifest["prior"])) for name in names])
            step = e_step(held_out, self.held_out.owner, prior, len(names))
            manifest["held_out"] = {
                "annotators": len(names),
                "known_annotators": sum(name in known for name in names),
                "items": int(items.sum()),
                **_means(step, self.held_out.weights),
                "per_annotator": dict(zip(map(str, names), step.per_annotator.tolist(), strict=True)),
            }
            table = (names, items, step.posterior, step.log_likelihood)
            self.processes.main(lambda: write_annotators(folder / HELD_OUT, *table))
        self.processes.main(lambda: write_json(folder / MANIFEST, manifest))

    def _scores(self, policies: list[Path], judged: list[Judged]) -> list[np.ndarray]:
        """For each data set the (J,T) log-likelihood of its rows under each policy."""
        logps = [self.trainer.score(policy.parent, judged, f"E-step, type {k}") for k, policy in enumerate(policies)]
        options = {"beta": self.args.beta, "top": self.args.top_q}
        return [
            np.stack([rows.log_likelihood(own, **options) for own in of_types], 1)
            for rows, of_types in zip(judged, zip(*logps, strict=True), strict=True)
        ]

    def _warn(self, manifest: dict) -> None:
        """Of what users of EM meet: types that empty, and an E-step that only repeats the first guess."""
        if min(manifest["prior"]) < 1 / (10 * self.types):
            self.trainer.warn(
                f"Type {int(np.argmin(manifest['prior']))} has {min(manifest['prior']):.1%} of the annotators after "
                f"round {manifest['round'] + 1}: use fewer types, another init, or more restarts."
            )
        if self.types > 1 and manifest["round"] == 0 and manifest["median_certainty"] > SURE:
            advice = "" if self.half is not None else " Set score_on to 'heldout_half' to score rows not trained on."
            self.trainer.warn(
                f"After one round half of the annotators have a type of probability above {SURE}: the policies may "
                f"have memorised the first guess, which then stays as it is.{advice}"
            )

    def _stopped(self, done: list[Round]) -> bool:
        first = 0 if self.half is None else 1  # the first round of halves scores half of the rows: no other compares
        if not self.args.stop_change or len(done) <= 1 + first:
            return False
        change = done[-1].manifest["log_likelihood"] - done[-2].manifest["log_likelihood"]
        return abs(change) / len(self.rows.annotators) < self.args.stop_change

    def _delete(self, folders: list[Path]) -> None:
        self.processes.main(lambda: [*map(partial(shutil.rmtree, ignore_errors=True), folders)])


def best(runs: list[list[Round]]) -> list[Round]:
    """The restart with the highest observed log-likelihood after its last round."""
    return max(runs, key=lambda rounds: rounds[-1].manifest["log_likelihood"])


def _means(step: EStep, weights: np.ndarray) -> dict:
    return {
        "log_likelihood_per_annotator": step.observed / len(step.per_annotator),
        "log_likelihood_per_item": step.observed / (weights.sum() or 1),
    }


def _refuse_deleted(policies: list[Path]) -> None:
    for policy in policies:
        if not policy.exists():
            raise ValueError(
                f"{policy} was deleted when this run went further than rounds, restarts and stop_change now ask, or "
                "when another restart was likelier: set them as they were, or choose another output_dir."
            )
