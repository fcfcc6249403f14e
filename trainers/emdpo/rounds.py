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

from ..runs.files import read_json, write_json
from ..runs.stage import MANIFEST, train_into
from .annotators import Judged, halves
from .init import first_guess
from .m_step import NEGLIGIBLE
from .mixture import SURE, EStep, e_step, mixture_weights
from .tables import ANNOTATORS, HELD_OUT, read_annotators, write_annotators

RESTART_SEED = 1000  # distance of the seeds of two restarts
POLICY = "policy"  # in the folder of a type
ITEM, ANNOTATOR = "log_likelihood_per_item", "log_likelihood_per_annotator"


class Round(NamedTuple):
    """What a finished round left in its folder: the posterior (N,T) and the manifest."""

    folder: Path
    posterior: np.ndarray
    manifest: dict

    @classmethod
    def read(cls, folder: Path) -> "Round":
        return cls(folder, read_annotators(folder / ANNOTATORS)[1], read_json(folder / MANIFEST))

    @property
    def policies(self) -> list[Path]:
        """The policy folder of each type."""
        return _policies(self.folder, self.posterior.shape[1])


class EM:
    """The rounds of an `EMDPOTrainer`, which trains, scores, logs and warns; `run` does what is not done yet.

    `guess` (N,T) is the first guess of the first restart.
    """

    def __init__(self, trainer, guess: np.ndarray):
        self.guess = guess
        self.trainer, self.args, self.processes = trainer, trainer.args, trainer.processes
        self.folder, self.types = Path(self.args.output_dir), self.args.num_types
        self.rows, self.held_out = trainer.judged, trainer.held_out
        self.half = halves(self.rows.owner, self.args.seed) if self.args.score_on == "heldout_half" else None
        self.all = np.ones(len(self.rows.owner), bool)
        # The first round of halves scores half of the rows: its likelihood compares with no other.
        self.first = 0 if self.half is None else 1

    def run(self) -> tuple[list[list[Round]], list[Round]]:
        """All rounds of all restarts, and those of the likeliest one, whose last round holds the policies of the run.

        Raises:
            ValueError: policies that these settings start from or end with were deleted when `folder` went further.
        """
        runs = [self._restart(restart) for restart in range(self.args.restarts)]
        best = max(runs, key=lambda rounds: rounds[-1].manifest["log_likelihood"])
        self._warn_of_a_fall(best)
        if self.half is not None:
            best[-1] = self._final(best[-1])
        _refuse_deleted(best[-1].policies)
        self._delete([policy for rounds in runs if rounds is not best for policy in rounds[-1].policies])
        return runs, best

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
            gamma = first_guess(self.args, self.rows, restart) if restart else self.guess
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
        index = len(done)
        if not (folder / MANIFEST).exists():
            self.processes.say(f"\nEM round {index + 1} of at most {self.args.rounds}: {folder}")
            starts = done[-1].policies if done and self.args.start_from == "previous" else None
            part = self.all if self.half is None else self.half == index % 2
            policies = self._m_steps(folder, gamma, part, starts, self._seed(restart, index))
            scored = part if self.half is None else ~part
            manifest = {"restart": restart, "round": index}
            self._e_step(folder, manifest, gamma, policies, scored, done)
        return Round.read(folder)

    def _seed(self, restart: int, index: int) -> int:
        """Of the trainings of a round; all types, which are exchangeable, have the same."""
        return self.args.seed + RESTART_SEED * restart + index

    def _m_steps(
        self, folder: Path, gamma: np.ndarray, part: np.ndarray, starts: list[Path] | None, seed: int
    ) -> list[Path]:
        """Trains each type on the `part` (J,) of the rows, weighted by `gamma` (N,T), and returns the policies."""
        _refuse_deleted(starts or [])
        policies = _policies(folder, self.types)
        for k, policy in enumerate(policies):
            weights = np.where(part, gamma[self.rows.owner, k], np.nan)
            if not policy.exists():
                self.processes.say(f"M-step, type {k}")
                if (np.nan_to_num(weights) * self.rows.weights).max() < NEGLIGIBLE:
                    self.trainer.warn(
                        f"{folder}: type {k} has no row to train on, and its policy stays where it starts: use fewer "
                        "types, another init, or more rows."
                    )
            train = partial(self.trainer.m_step, weights, starts[k] if starts else None, seed)
            train_into(policy, train)
        return policies

    def _final(self, last: Round) -> Round:
        """What `last` gave, with policies that are trained on all rows by its posterior."""
        folder, manifest = last.folder / "final", dict(last.manifest)
        if not (folder / MANIFEST).exists():
            _refuse_deleted(last.policies)  # those of a round that is not the folder's last, whose own would go
            self.processes.say("\nTraining on all rows")
            seed = self._seed(manifest["restart"], manifest["round"] + 1)
            policies = self._m_steps(folder, last.posterior, self.all, None, seed)
            self.processes.main(partial(shutil.copyfile, last.folder / ANNOTATORS, folder / ANNOTATORS))
            held_out = self._scores(policies, [self.held_out]) if self.held_out else []
            self._write(folder, manifest, policies, last.posterior, *held_out)
        stale = [path for path in self.folder.glob("restart-*/round-*/final") if path != folder]
        self._delete([*last.policies, *stale])
        return Round.read(folder)

    def _e_step(
        self, folder: Path, manifest: dict, gamma: np.ndarray, policies: list[Path], scored: np.ndarray,
        done: list[Round],
    ) -> None:  # fmt: skip
        """The posterior under new `policies` on `scored` (J,) rows, and on others as the round before scored them."""
        logps, *held_out = self._scores(policies, [*self.trainer.parts.values()])
        if done and not scored.all():  # these policies have seen the others, and those of the round before have not
            logps = np.where(scored[:, None], logps, self._scores(done[-1].policies, [self.rows])[0])
            scored = self.all
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

    def _warn_of_a_fall(self, done: list[Round]) -> None:
        """Policies that stop short of their optimum may lose likelihood, and the last round counts anyhow."""
        levels = [one.manifest[ANNOTATOR] for one in done[self.first :]]
        if levels and levels[-1] < max(levels) - 1e-6:
            highest = self.first + int(np.argmax(levels)) + 1
            self.trainer.warn(
                f"The log-likelihood per annotator was {max(levels):.4g} after round {highest} and is "
                f"{levels[-1]:.4g} after the last, whose policies are the result: see rounds.csv, and set rounds to "
                f"{highest} in another output_dir, or train longer in each round."
            )

    def _stopped(self, done: list[Round]) -> bool:
        if not self.args.stop_change or len(done) <= 1 + self.first:
            return False
        change = done[-1].manifest["log_likelihood"] - done[-2].manifest["log_likelihood"]
        return abs(change) / len(self.rows.annotators) < self.args.stop_change

    def _delete(self, folders: list[Path]) -> None:
        self.processes.main(lambda: [*map(partial(shutil.rmtree, ignore_errors=True), folders)])


def _policies(folder: Path, types: int) -> list[Path]:
    return [folder / f"type-{k}" / POLICY for k in range(types)]


def _means(step: EStep, weights: np.ndarray) -> dict:
    return {ANNOTATOR: step.observed / len(step.per_annotator), ITEM: step.observed / (weights.sum() or 1)}


def _refuse_deleted(policies: list[Path]) -> None:
    for policy in policies:
        if not policy.exists():
            raise ValueError(
                f"{policy} was deleted when this run went further than rounds, restarts and stop_change now ask, or "
                "when another restart was likelier: set them as they were, or choose another output_dir."
            )
