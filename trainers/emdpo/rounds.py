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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..runs.files import write_json
from ..runs.processes import Processes
from ..runs.stage import train_into
from .annotators import Judged, halves
from .config import EMDPOConfig
from .m_step import NEGLIGIBLE
from .mixture import SURE, annotator_log_likelihood, clamp_log_prior, e_step, mixture_weights, observed_log_likelihood
from .mixture import posterior as posterior_of
from .tables import read_annotators, read_json, write_annotators

RESTART_SEED = 1000  # distance of the seeds of two restarts
ANNOTATORS, HELD_OUT, MANIFEST = "annotators.csv", "held_out.csv", "manifest.json"


class Round(NamedTuple):
    """What a round gave: posterior (N,T), the manifest, and the policy folder of each type."""

    posterior: np.ndarray
    manifest: dict
    policies: list[Path]

    @property
    def folder(self) -> Path:
        return self.policies[0].parents[1]


@dataclass
class EM:
    """Rounds of EM in `folder`; `run` does what is not done yet.

    Args:
        rows: to train on; `held_out` rows are only scored. Both know what the reference says of them.
        train: (weights (J,) of the rows, start folder or None, folder, seed) trains a policy and leaves it in folder.
            It must resume from `last_checkpoint(folder)`.
        score: (folder of the policy, judged rows, title) -> K log-probabilities per row.
        starts: (restart) -> first posterior (N,T).
        log: called with each manifest; `warn` with each warning.
    """

    args: EMDPOConfig
    folder: Path
    rows: Judged
    held_out: Judged | None
    train: Callable[[np.ndarray, Path | None, Path, int], None]
    score: Callable[[Path, list[Judged], str], list[list[list[float]]]]
    starts: Callable[[int], np.ndarray]
    log: Callable[[dict], None]
    warn: Callable[[str], None]
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self):
        self.folder, self.types = Path(self.folder), self.args.num_types
        self.half = halves(self.rows.owner, self.args.seed) if self.args.score_on == "heldout_half" else None
        # With held-out halves the first round scores half of the rows, and compares with no other.
        self.first_comparable = 0 if self.half is None else 1

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
        self._warn_of_a_fall(rounds)
        return runs

    def _restart(self, restart: int) -> list[Round]:
        gamma = self._start(restart, self.folder / f"restart-{restart}" / "start.csv")
        done: list[Round] = []
        for index in range(self.args.rounds if self.types > 1 else 1):
            done.append(self._round(restart, index, gamma, done[-1] if done else None))
            gamma = done[-1].posterior
            self.log(done[-1].manifest)
            if index:
                self._delete(done[-2].policies)
            self._warn_of_types(done[-1].manifest)
            if self._stopped(done):
                break
        return done

    def _start(self, restart: int, path: Path) -> np.ndarray:
        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_annotators(path, self.rows.annotators.names, self.rows.items(), self.starts(restart))

        # The main process alone looks: another one that looks later would find the file, and not wait for it.
        self.processes.main(lambda: path.exists() or write())
        gamma = read_annotators(path)[1]
        if self.types > 1 and np.ptp(gamma, axis=0).max() < 1e-6:
            self.warn(
                "The first guess is the same for all annotators, so all types train on the same data and stay equal: "
                "give another initial_posterior or init."
            )
        return gamma

    def _round(self, restart: int, index: int, gamma: np.ndarray, before: Round | None) -> Round:
        folder = self.folder / f"restart-{restart}" / f"round-{index:02d}"
        policies = self._policies(folder)
        if not (folder / MANIFEST).exists():
            self.processes.say(f"\nEM round {index + 1} of at most {self.args.rounds}: {folder}")
            previous = self.args.start_from == "previous" and before is not None
            starts = before.policies if previous else [None] * self.types
            _refuse_deleted(starts if previous else [])
            part = None if self.half is None else self.half == index % 2
            self._m_steps(restart, index, gamma, part, starts, policies)
            self._e_step(restart, index, gamma, policies, before)
        return self._read(folder)

    def _policies(self, folder: Path) -> list[Path]:
        return [folder / f"type-{k}" / "policy" for k in range(self.types)]

    def _read(self, folder: Path) -> Round:
        """A finished round."""
        return Round(read_annotators(folder / ANNOTATORS)[1], read_json(folder / MANIFEST), self._policies(folder))

    def _m_steps(
        self, restart: int, index: int, gamma: np.ndarray, part: np.ndarray | None, starts: list, policies: list[Path]
    ) -> None:
        """Trains each type on all rows, or on the `part` (J,) of them, weighted by `gamma` (N,T)."""
        seed = self.args.seed + RESTART_SEED * restart + index  # the same for all types: they are exchangeable
        for k, (start, policy) in enumerate(zip(starts, policies, strict=True)):
            weights = gamma[self.rows.owner, k]
            if part is not None:
                weights = np.where(part, weights, np.nan)  # the other half takes no part
            if np.nan_to_num(weights * self.rows.weights).max(initial=0) < NEGLIGIBLE:
                self.warn(
                    f"Type {k} has no training row in round {index + 1}: no annotator with a row there has a "
                    f"posterior of {NEGLIGIBLE:g} or more for it. Use fewer types, another init, or more rows."
                )
            if not policy.exists():
                self.processes.say(f"M-step, type {k}")
            train_into(policy, lambda folder, w=weights, s=start: self.train(w, s, folder, seed), self.processes)

    def _final(self, last: Round) -> Round:
        """What `last` found, with policies that are trained on all rows by its posterior."""
        folder = last.folder / "final"
        policies, manifest = self._policies(folder), dict(last.manifest)
        if not (folder / MANIFEST).exists():
            self.processes.say("\nTraining on all rows")
            starts = [None] * self.types
            self._m_steps(manifest["restart"], manifest["round"] + 1, last.posterior, None, starts, policies)
            table = (last.folder / ANNOTATORS).read_bytes()
            self.processes.main(lambda: (folder / ANNOTATORS).write_bytes(table))
            held_out = None if self.held_out is None else self._scores(policies, [self.held_out])[0]
            self._write(folder, manifest, policies, last.posterior, held_out)
        stale = [path for path in self.folder.glob("restart-*/round-*/final") if path != folder]
        self._delete([*last.policies, *stale])
        return self._read(folder)

    def _e_step(self, restart: int, index: int, gamma: np.ndarray, policies: list[Path], before: Round | None) -> None:
        folder = policies[0].parents[1]
        logps, *held_out = self._scores(policies, [self.rows, *([self.held_out] if self.held_out else [])])
        scored = np.ones(len(logps), bool) if self.half is None else self.half != index % 2
        if self.half is not None and before:
            # The half that these policies have seen counts as those of the round before scored it, unseen.
            logps = np.where(scored[:, None], logps, self._scores(before.policies, [self.rows])[0])
            scored[:] = True
        prior = mixture_weights(gamma)
        names, items = self.rows.annotators.names, self.rows.items(scored)
        step = e_step(logps[scored], self.rows.owner[scored], prior, len(names))
        manifest = {
            "restart": restart,
            "round": index,
            "prior_trained_on": prior.tolist(),
            "prior": step.prior.tolist(),
            "log_likelihood": step.observed,
            "log_likelihood_per_annotator": step.observed / len(names),
            "log_likelihood_per_item": step.observed / (self.rows.weights[scored].sum() or 1),
            "rows_scored": int(items.sum()),
            **_certainty(step.posterior, gamma),
        }
        self.processes.main(
            lambda: write_annotators(folder / ANNOTATORS, names, items, step.posterior, step.log_likelihood)
        )
        self._write(folder, manifest, policies, step.posterior, held_out[0] if held_out else None)

    def _write(
        self, folder: Path, manifest: dict, policies: list[Path], gamma: np.ndarray, held_out: np.ndarray | None
    ) -> None:
        """The files that end a round; `held_out` are the (rows,T) log-likelihoods of its policies."""
        manifest["policies"] = [str(policy.relative_to(self.folder)) for policy in policies]
        if held_out is not None:
            after, manifest["held_out"] = self._judge_held_out(held_out, gamma, np.array(manifest["prior"]))
            names, items = self.held_out.annotators.names, self.held_out.items()
            self.processes.main(lambda: write_annotators(folder / HELD_OUT, names, items, *after))
        self.processes.main(lambda: write_json(folder / MANIFEST, manifest))

    def _scores(self, policies: list[Path], judged: list[Judged]) -> list[np.ndarray]:
        """For each data set the (J,T) log-likelihood of its rows under each policy."""
        logps = [self.score(policy, judged, f"E-step, type {k}") for k, policy in enumerate(policies)]
        options = {"beta": self.args.beta, "top": self.args.top_q}
        return [
            np.stack([rows.log_likelihood(own, **options) for own in of_types], 1)
            for rows, of_types in zip(judged, zip(*logps, strict=True), strict=True)
        ]

    def _judge_held_out(self, logps: np.ndarray, gamma: np.ndarray, prior: np.ndarray) -> tuple[tuple, dict]:
        """Held-out rows under the mixture: new annotators by the mixture weights, known ones by their posterior."""
        known = dict(zip(self.rows.annotators.names, gamma, strict=True))
        names, items = self.held_out.annotators.names, self.held_out.items()
        total = annotator_log_likelihood(logps, self.held_out.owner, len(names))
        log_prior = clamp_log_prior(np.stack([known.get(name, prior) for name in names]))
        observed = observed_log_likelihood(total, log_prior)
        return (posterior_of(total, log_prior), total), {
            "annotators": len(names),
            "known_annotators": sum(name in known for name in names),
            "items": int(items.sum()),
            "log_likelihood_per_annotator": float(observed.mean()),
            "log_likelihood_per_item": float(observed.sum() / (self.held_out.weights.sum() or 1)),
            "per_annotator": dict(zip(map(str, names), observed.tolist(), strict=True)),
        }

    def _warn_of_types(self, manifest: dict) -> None:
        """What users of EM meet: types that empty, and an E-step that only repeats the first guess."""
        if self.types > 1 and min(manifest["prior"]) < 1 / (10 * self.types):
            self.warn(
                f"Type {int(np.argmin(manifest['prior']))} has {min(manifest['prior']):.1%} of the annotators after "
                f"round {manifest['round'] + 1}: use fewer types, another init, or more restarts."
            )
        if self.types > 1 and manifest["round"] == 0 and manifest["median_certainty"] > SURE:
            advice = "" if self.half is not None else " Set score_on to 'heldout_half' to score rows not trained on."
            self.warn(
                f"After one round half of the annotators have a type of probability above {SURE}: the policies may "
                f"have memorised the first guess, which then stays as it is.{advice}"
            )

    def _warn_of_a_fall(self, done: list[Round]) -> None:
        """Policies that stop short of their optimum may lose likelihood in a round; the last round counts anyhow."""
        values = [r.manifest["log_likelihood"] / len(self.rows.annotators) for r in done[self.first_comparable :]]
        if values and values[-1] < max(values):
            highest = self.first_comparable + int(np.argmax(values)) + 1
            self.warn(
                f"The log-likelihood per annotator was {max(values):.4g} after round {highest} and is "
                f"{values[-1]:.4g} after the last, whose policies are the result: see rounds.csv, and set rounds to "
                f"{highest} in another output_dir, or train longer in each round."
            )

    def _stopped(self, done: list[Round]) -> bool:
        if not self.args.stop_change or len(done) <= 1 + self.first_comparable:
            return False
        change = done[-1].manifest["log_likelihood"] - done[-2].manifest["log_likelihood"]
        return abs(change) / len(self.rows.annotators) < self.args.stop_change

    def _delete(self, folders: list[Path]) -> None:
        self.processes.main(lambda: [shutil.rmtree(folder, ignore_errors=True) for folder in folders])


def best(runs: list[list[Round]]) -> list[Round]:
    """The restart with the highest observed log-likelihood after its last round."""
    return max(runs, key=lambda rounds: rounds[-1].manifest["log_likelihood"])


def _refuse_deleted(policies: list[Path]) -> None:
    for policy in policies:
        if not policy.exists():
            raise ValueError(
                f"{policy} was deleted when this run went further than rounds, restarts and stop_change now ask, or "
                "when another restart was likelier: set them as they were, or choose another output_dir."
            )


def _certainty(after: np.ndarray, before: np.ndarray) -> dict:
    sure = after.max(1)
    return {
        "smallest_type": float(after.mean(0).min()),
        "changed_type": float((after.argmax(1) != before.argmax(1)).mean()),
        "median_certainty": float(np.median(sure)),
    }
