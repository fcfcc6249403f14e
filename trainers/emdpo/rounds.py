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
from .annotators import Annotators, halves
from .config import EMDPOConfig
from .init import is_uniform
from .m_step import NEGLIGIBLE
from .mixture import SURE, clamp_log_prior, e_step, mixture_weights, observed_log_likelihood, posterior
from .scoring import item_logps
from .tables import copy_if_there, read_annotators, read_json, write_annotators

RESTART_SEED = 1000  # distance of the seeds of two restarts
FINAL = "final"

Score = Callable[[Path, Path, str], list[list[list[float]]]]


class Judged(NamedTuple):
    """Rows that say something: who judged them, their K scores, weights and reference log-probabilities."""

    annotators: Annotators
    owner: np.ndarray  # (J,) index of the annotator of each row
    scores: list[list[float]]
    weights: np.ndarray  # (J,)
    reference: list[list[float]]

    def items(self, scored: np.ndarray | None = None) -> np.ndarray:
        """(N,) rows of each annotator that count: those with a weight, and of the `scored` ones if given."""
        counted = self.weights > 0 if scored is None else scored & (self.weights > 0)
        return np.bincount(self.owner[counted], minlength=len(self.annotators))


class Round(NamedTuple):
    """What a round gave: posterior (N,T), the manifest, and the policy folder of each type."""

    posterior: np.ndarray
    manifest: dict
    policies: list[Path]


@dataclass
class EM:
    """Rounds of EM in `folder`; `run` does what is not done yet.

    Args:
        rows: to train on; `held_out` rows are only scored.
        train: (weights (J,) of the rows, start folder or None, folder, seed) trains a policy and leaves it in folder.
            It must resume from `last_checkpoint(folder)`.
        score: (folder of the result, folder of the policy, title) -> K sums per row, of rows and of held-out rows.
        starts: (restart) -> first posterior (N,T).
        log: called with each manifest; `warn` with each warning.
    """

    args: EMDPOConfig
    folder: Path
    rows: Judged
    held_out: Judged | None
    train: Callable[[np.ndarray, Path | None, Path, int], None]
    score: Score
    starts: Callable[[int], np.ndarray]
    log: Callable[[dict], None]
    warn: Callable[[str], None]
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self):
        self.folder, self.types = Path(self.folder), self.args.num_types
        self.half = halves(self.rows.owner, self.args.seed) if self.args.score_on == "heldout_half" else None

    def run(self) -> list[list[Round]]:
        """All rounds of all restarts; `best` picks one, whose last round holds the policies of the run.

        Raises:
            ValueError: `folder` went further before, and the policies that these settings end with were deleted; or
                they are needed to go on.
        """
        for restart in range(self.args.restarts):
            self._refuse_what_is_gone(restart)
        runs = [self._restart(restart) for restart in range(self.args.restarts)]
        rounds = best(runs)
        if self.half is not None:
            rounds[-1] = self._final(rounds[-1])
        gone = [policy for policy in rounds[-1].policies if not policy.exists()]
        if gone:
            raise ValueError(
                f"{gone[0]} was deleted when this run went further than rounds, restarts and stop_change now ask: set "
                "them as they were, or choose another output_dir."
            )
        self._warn_of_a_fall(rounds)
        return runs

    def _refuse_what_is_gone(self, restart: int) -> None:
        """Raises ValueError if further rounds would start from policies that were deleted, before any is trained."""
        done = self._done(restart)
        if self.args.start_from != "previous" or not done or len(done) == self._most or self._stopped(done):
            return
        gone = [policy for policy in done[-1].policies if not policy.exists()]
        if gone:
            raise ValueError(
                f"{gone[0]} was deleted because another restart was likelier, and start_from='previous' would go on "
                f"from it: set rounds to {len(done)} as it was, or choose another output_dir."
            )

    def _done(self, restart: int) -> list[Round]:
        """The rounds of a restart that lie in the folder, as far as these settings go."""
        done: list[Round] = []
        for index in range(self._most):
            folder = self.folder / f"restart-{restart}" / f"round-{index:02d}"
            if not (folder / "manifest.json").exists() or self._stopped(done):
                break
            done.append(self._read(folder))
        return done

    @property
    def _most(self) -> int:
        return self.args.rounds if self.types > 1 else 1

    def _restart(self, restart: int) -> list[Round]:
        folder = self.folder / f"restart-{restart}"
        gamma = self._start(restart, folder / "start.csv")
        done: list[Round] = []
        for index in range(self._most):
            done.append(self._round(restart, index, folder / f"round-{index:02d}", gamma, done))
            gamma = done[-1].posterior
            if index:
                self.processes.main(lambda: self._prune(done[-2].policies))
            self._check(done)
            if self._stopped(done):
                break
        return done

    def _start(self, restart: int, path: Path) -> np.ndarray:
        def write() -> None:
            gamma, annotators = self.starts(restart), self.rows.annotators
            counts = self.rows.items()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_annotators(path, annotators.names, counts, gamma)

        # The main process alone looks: another one that looks later would find the file, and not wait for it.
        self.processes.main(lambda: path.exists() or write())
        gamma = read_annotators(path)[1]
        if is_uniform(gamma):
            self.warn(
                "The first guess is the same for all annotators, so all types train on the same data and stay equal: "
                "give another initial_posterior or init."
            )
        return gamma

    def _round(self, restart: int, index: int, folder: Path, gamma: np.ndarray, done: list[Round]) -> Round:
        policies = self._policies(folder)
        if not (folder / "manifest.json").exists():
            self.processes.say(f"\nEM round {index + 1} of at most {self.args.rounds}: {folder}")
            previous = done[-1].policies if done and self.args.start_from == "previous" else [None] * self.types
            for k in range(self.types):
                if not policies[k].exists():
                    self.processes.say(f"M-step, type {k}")
                self._warn_of_no_rows(gamma[self.rows.owner, k], k, index)
                weights = gamma[self.rows.owner, k]
                if self.half is not None:
                    weights = np.where(self.half == index % 2, weights, np.nan)  # the other half takes no part
                self._m_step(weights, restart, index, previous[k], policies[k])
            self._e_step(restart, index, folder, gamma, policies, done[-1].policies if done else None)
        found = self._read(folder)
        self.log(found.manifest)
        return found

    def _policies(self, folder: Path) -> list[Path]:
        return [folder / f"type-{k}" / "policy" for k in range(self.types)]

    def _read(self, folder: Path) -> Round:
        """A finished round."""
        posterior = read_annotators(folder / "annotators.csv")[1]
        return Round(posterior, read_json(folder / "manifest.json"), self._policies(folder))

    def _warn_of_no_rows(self, gamma: np.ndarray, k: int, index: int) -> None:
        """A type that has nothing to learn from stays where it starts, which its likelihood does not tell."""
        weights = gamma * self.rows.weights
        if self.half is not None:
            weights = weights[self.half == index % 2]
        if weights.max(initial=0) < NEGLIGIBLE:
            half = " in the half that this round trains on" if self.half is not None else ""
            self.warn(
                f"Type {k} has no training row in round {index + 1}: no annotator with a row{half} has a posterior of "
                f"{NEGLIGIBLE:g} or more for it. Its policy is no type: use fewer types, another init, or more rows."
            )

    def _m_step(self, weights: np.ndarray, restart: int, index: int, start: Path | None, policy: Path) -> None:
        seed = self.args.seed + RESTART_SEED * restart + index  # the same for all types: they are exchangeable
        train_into(policy, lambda training: self.train(weights, start, training, seed), self.processes)

    def _final(self, last: Round) -> Round:
        """What `last` found, with policies that are trained on all rows by its posterior."""
        folder = last.policies[0].parents[1] / FINAL
        policies, manifest = self._policies(folder), dict(last.manifest)
        if not (folder / "manifest.json").exists():
            for k, policy in enumerate(policies):
                self.processes.say(f"Training on all rows, type {k}")
                weights = last.posterior[self.rows.owner, k]
                self._m_step(weights, manifest["restart"], manifest["round"] + 1, None, policy)
            manifest["policies"] = [str(policy.relative_to(self.folder)) for policy in policies]
            self.processes.main(lambda: copy_if_there(folder.parent / "annotators.csv", folder / "annotators.csv"))
            held_out = None if self.held_out is None else self._scores(policies)[1]
            self._write(folder, manifest, last.posterior, held_out)
        stale = [path for path in self.folder.glob(f"restart-*/round-*/{FINAL}") if path != folder]
        self.processes.main(lambda: self._prune([*last.policies, *stale]))
        return self._read(folder)

    def _e_step(
        self, restart: int, index: int, folder: Path, gamma: np.ndarray, policies: list[Path],
        previous: list[Path] | None,
    ) -> None:  # fmt: skip
        logps, held_out = self._scores(policies)
        scored = np.ones(len(logps), bool) if self.half is None else self.half != index % 2
        if self.half is not None and previous:
            # The half that these policies have seen counts as those of the round before scored it, unseen.
            logps = np.where(scored[:, None], logps, self._scores(previous)[0])
            scored[:] = True
        prior = mixture_weights(gamma)
        names, items = self.rows.annotators.names, self.rows.items(scored)
        found = e_step(logps[scored], self.rows.owner[scored], prior, len(names))
        manifest = {
            "restart": restart,
            "round": index,
            "prior_trained_on": prior.tolist(),
            "prior": found.prior.tolist(),
            "log_likelihood": found.observed,
            "log_likelihood_per_annotator": found.observed / len(names),
            "log_likelihood_per_item": found.observed / (self.rows.weights[scored].sum() or 1),
            "rows_scored": int(items.sum()),
            **_certainty(found.posterior, gamma),
            "policies": [str(policy.relative_to(self.folder)) for policy in policies],
        }
        self.processes.main(
            lambda: write_annotators(folder / "annotators.csv", names, items, found.posterior, found.log_likelihood)
        )
        self._write(folder, manifest, found.posterior, held_out)

    def _write(self, folder: Path, manifest: dict, gamma: np.ndarray, held_out: np.ndarray | None) -> None:
        """The files that end a round; `held_out` are the (rows,T) log-likelihoods of its policies."""
        if held_out is not None:
            after, manifest["held_out"] = self._held_out(held_out, gamma, np.array(manifest["prior"]))

        def write() -> None:
            if held_out is not None:
                others = self.held_out
                write_annotators(folder / "held_out.csv", others.annotators.names, others.items(), *after)
            write_json(folder / "manifest.json", manifest)

        self.processes.main(write)

    def _scores(self, policies: list[Path]) -> tuple[np.ndarray, np.ndarray | None]:
        """(J,T) log-likelihood of each row under each policy, and that of the held-out rows."""
        found = [self.score(policy.parent, policy, f"E-step, type {k}") for k, policy in enumerate(policies)]
        return tuple(
            None if rows is None else np.stack([self._item_logps(rows, logps[i]) for logps in found], 1)
            for i, rows in enumerate((self.rows, self.held_out))
        )

    def _item_logps(self, rows: Judged, logps: list[list[float]]) -> np.ndarray:
        found = item_logps(logps, rows.reference, rows.scores, beta=self.args.beta, top=self.args.top_q)
        return found * rows.weights

    def _held_out(self, logps: np.ndarray, gamma: np.ndarray, prior: np.ndarray) -> tuple[tuple, dict]:
        """Held-out rows under the mixture: new annotators by the mixture weights, known ones by their posterior."""
        known = {name: i for i, name in enumerate(self.rows.annotators.names)}
        names, owner = self.held_out.annotators.names, self.held_out.owner
        prior_of = np.stack([gamma[known[name]] if name in known else prior for name in names])
        total = np.zeros((len(names), self.types))
        np.add.at(total, owner, logps)
        log_prior = clamp_log_prior(prior_of)
        observed = observed_log_likelihood(total, log_prior)
        return (posterior(total, log_prior), total), {
            "annotators": len(names),
            "known_annotators": sum(name in known for name in names),
            "items": int(self.held_out.items().sum()),
            "log_likelihood_per_annotator": float(observed.mean()),
            "log_likelihood_per_item": float(observed.sum() / (self.held_out.weights.sum() or 1)),
            "per_annotator": dict(zip(map(str, names), observed.tolist(), strict=True)),
        }

    def _check(self, done: list[Round]) -> None:
        """Warn of what users of EM meet: types that empty, and an E-step that only repeats the first guess."""
        manifest = done[-1].manifest
        if self.types > 1 and min(manifest["prior"]) < 1 / (10 * self.types):
            self.warn(
                f"Type {int(np.argmin(manifest['prior']))} has {min(manifest['prior']):.1%} of the annotators after "
                f"round {manifest['round'] + 1}: use fewer types, another init, or more restarts."
            )
        if self.types > 1 and len(done) == 1 and manifest["median_certainty"] > SURE:
            advice = "" if self.half is not None else " Set score_on to 'heldout_half' to score rows not trained on."
            self.warn(
                f"After one round half of the annotators have a type of probability above {SURE}: the policies may "
                f"have memorised the first guess, which then stays as it is.{advice}"
            )

    def _warn_of_a_fall(self, done: list[Round]) -> None:
        """Policies that stop short of their optimum may lose likelihood in a round; the last round counts anyhow."""
        found = [r.manifest["log_likelihood"] / len(self.rows.annotators) for r in done[self._first_comparable :]]
        if found and found[-1] < max(found):
            highest = self._first_comparable + int(np.argmax(found))
            self.warn(
                f"The log-likelihood per annotator was {max(found):.4g} after round {highest + 1} and is "
                f"{found[-1]:.4g} after the last, whose policies are the result: see rounds.csv, and set rounds to "
                f"{highest + 1} in another output_dir, or train longer in each round."
            )

    @property
    def _first_comparable(self) -> int:
        """With held-out halves the first round scores half of the rows, and compares with no other."""
        return 0 if self.half is None else 1

    def _stopped(self, done: list[Round]) -> bool:
        if not self.args.stop_change or len(done) <= 1 + self._first_comparable:
            return False
        change = done[-1].manifest["log_likelihood"] - done[-2].manifest["log_likelihood"]
        return abs(change) / len(self.rows.annotators) < self.args.stop_change

    def _prune(self, policies: list[Path]) -> None:
        for policy in policies:
            shutil.rmtree(policy, ignore_errors=True)


def best(runs: list[list[Round]]) -> list[Round]:
    """The restart with the highest observed log-likelihood after its last round."""
    return max(runs, key=lambda rounds: rounds[-1].manifest["log_likelihood"])


def _certainty(after: np.ndarray, before: np.ndarray) -> dict:
    sure = after.max(1)
    entropy = -(after * np.log(np.maximum(after, 1e-300))).sum(1)
    return {
        "smallest_type": float(after.mean(0).min()),
        "changed_type": float((after.argmax(1) != before.argmax(1)).mean()),
        "median_certainty": float(np.median(sure)),
        "mean_entropy": float(entropy.mean()),
        "certainty_histogram": np.histogram(sure, bins=10, range=(0, 1))[0].tolist(),
    }
