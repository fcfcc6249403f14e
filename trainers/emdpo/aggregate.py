"""From the policies of the types to weights that are fair to all: samples, regrets, and the game over them.

Regret of type i when policy j answers is E_{y~pi_i} - E_{y~pi_j} of log pi_i(y|x) - log pi_ref(y|x): its implicit
reward divided by beta. The expectations are means over samples at temperature 1, with their end token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer

from ..data.json_rows import digest
from ..forward.cache import score_rows
from ..generation.collect import collect_samples
from ..generation.engine import opened
from ..generation.sampler import Sample, SamplingConfig, encode_prompts
from ..generation.start import Weights
from ..runs.processes import Processes, free_memory
from ..runs.settings import model_fingerprint
from ..runs.stage import Stage
from ..statistics import FEWEST
from .game import min_max_regret, regret_matrix
from .tables import read_mixture

MIN_MAX, UNIFORM, SHARES, SINGLE = "min-max mixture", "uniform mixture", "shares of EM", "best single type"
OTHER_PROMPTS = f"{MIN_MAX}, judged on other prompts"
TOKENS_PER_BATCH = 8192


@dataclass(frozen=True)
class Player:
    """A policy that answers: `start` is a model or adapter folder, None for the reference itself."""

    name: str
    start: Path | None


class Arena:
    """Samples of some policies on some prompts, scored by the policies of a run's types; all of it on disk.

    Every process holds a whole policy, whatever engine trains, and does its share of the work; a killed run goes on
    where it stopped.

    Args:
        run: `output_dir` of a finished EM-DPO run.
        prompts: texts or message lists.
        folder: of samples and scores.
        sampling: of `SamplingConfig`, but for its cuts: samples that are not those of the policies bias the regrets.

    Raises:
        ValueError: `run` is no finished run.
    """

    def __init__(self, run: str | Path, prompts: list, folder: str | Path, **sampling):
        self.run, self.folder, self.prompts = Path(run), Path(folder), prompts
        self.config = SamplingConfig(temperature=1.0, top_p=1.0, **sampling)
        self.processes, self.mixture = Processes(), read_mixture(run)
        self.tokenizer = AutoTokenizer.from_pretrained(run, trust_remote_code=False)
        self.reference = Player("reference", None)
        self.types = [Player(f"type-{k}", self.run / path) for k, path in enumerate(self.mixture["policies"])]

    def identity(self, player: Player) -> str:
        """What a policy is known by: its files, so that a folder may be moved; a hub id by its name."""
        model = str(player.start or self.mixture["base"])
        return model_fingerprint(model) or model

    def weights(self, player: Player) -> Weights:
        """What answers and scores: the policy of a player."""
        keywords = self.mixture["model_init_kwargs"]
        return Weights(self.mixture["base"], player.start, self.tokenizer, init_kwargs=keywords)

    def samples_of(self, player: Player) -> Path:
        """The folder of a player's answers."""
        return self.folder / f"samples-{player.name}"

    def samples(self, player: Player) -> list[list[Sample]]:
        """The answers of a player to each prompt.

        Raises:
            ValueError: `folder` has answers of the player that were sampled with other settings.
        """
        settings = {
            "policy files": self.identity(player),
            "base files": self.identity(self.reference),
            "prompts": f"{len(self.prompts)} with digest {digest(self.prompts)[:16]}",
            **{n: getattr(self.config, n) for n in ("num_generations", "max_new_tokens", "seed")},
        }
        ways_out = f"name another folder with --output, or remove {self.folder} to sample anew"
        folder = Stage(self.samples_of(player), settings, ways_out=ways_out).open()

        made = collect_samples(
            folder, lambda: opened(self.config.engine, self.weights(player), folder), self.prompts, self.config
        )  # fmt: skip
        free_memory()
        return made

    def gains(self, players: list[Player]) -> tuple[np.ndarray, list[list[list[Sample]]]]:
        """(T,P,prompts) mean log-ratio of each player's answers under each type's policy, and the answers."""
        samples = [self.samples(player) for player in players]
        prompt_ids = encode_prompts(self.tokenizer, self.prompts)
        answers = [[[sample.token_ids for sample in row] for row in own] for own in samples]
        datasets = [Dataset.from_dict({"prompt_ids": prompt_ids, "response_ids": own}) for own in answers]

        def logps(player: Player) -> np.ndarray:
            scores = score_rows(
                self.weights(player).whole, datasets, self.folder / f"scores-{player.name}",
                accelerator=self.processes, pad_token_id=self.tokenizer.pad_token_id, budget=TOKENS_PER_BATCH,
                title=f"scores by {player.name}",
            )  # fmt: skip
            free_memory()
            return np.array(scores)

        reference = logps(self.reference)  # (P,prompts,samples)
        return np.stack([(logps(player) - reference).mean(-1) for player in self.types]), samples


def compare(
    gains: np.ndarray, names: list[str], shares: np.ndarray, weights: Sequence[float] | None = None, *,
    resamples: int = 1000, seed: int = 0,
) -> dict:  # fmt: skip
    """The game over the types' policies, and how every aggregate and every further policy does in it.

    Args:
        gains: (T,P,prompts), the first T columns the types' own policies.
        names: of the P columns.
        shares: (T,) mixture weights of EM.
        weights: (T,) factors on the types' regrets, in the game only.

    Returns:
        "regret" (T,P), "mixture" (T,) with "interval", "value", and "table": for each aggregate its regret per type,
        the largest one ("max"), and the largest one after the factors ("weighted_max"), which the mixture minimises
        and which "value" is. All but the last two are in nats per response. Intervals are 95 % bootstrap intervals
        over prompts; fewer prompts than `statistics.FEWEST` give none, and "interval" is None.
    """
    types, prompts = len(gains), gains.shape[-1]
    factors = np.ones(types) if weights is None else np.asarray(weights, dtype=float)
    regret, single_policies = regret_matrix(gains.mean(-1)), np.eye(len(names))
    own = single_policies[:types]
    mixture, value = min_max_regret(regret[:, :types], factors)
    single = int((factors[:, None] * regret[:, :types]).max(0).argmin())
    aggregates = {
        MIN_MAX: mixture @ own,
        UNIFORM: own.mean(0),
        SHARES: np.asarray(shares) @ own,
        f"{SINGLE} ({names[single]})": own[single],
        **dict(zip(names[types:], single_policies[types:], strict=True)),
    }
    table = {name: _row(regret @ aggregate, factors) for name, aggregate in aggregates.items()}
    interval = None
    if prompts >= FEWEST:
        random = np.random.default_rng(seed)
        drawn = np.stack([
            regret_matrix(gains[..., random.integers(0, prompts, prompts)].mean(-1)) for _ in range(resamples)
        ])  # fmt: skip
        for name, aggregate in aggregates.items():
            low, high = _ends(drawn @ aggregate)
            max_low, max_high = _ends((drawn @ aggregate).max(1))
            table[name] |= {"low": low, "high": high, "max_low": max_low, "max_high": max_high}
        low, high = _ends([np.r_[min_max_regret(one[:, :types], factors)] for one in drawn])
        interval = {"low": low[:-1], "high": high[:-1], "value": [low[-1], high[-1]]}
    if prompts > 1:
        table[OTHER_PROMPTS] = _row(_cross_fitted(gains, factors), factors)
    return {
        "policies": names,
        "prompts": prompts,
        "regret": regret.tolist(),
        "mixture": mixture.tolist(),
        "interval": interval,
        "value": value,
        "shares": np.asarray(shares).tolist(),
        "type_weights": factors.tolist(),
        "table": table,
    }


def _row(regrets: np.ndarray, factors: np.ndarray) -> dict:
    return {
        "regret": regrets.tolist(), "max": float(regrets.max()), "weighted_max": float((factors * regrets).max()),
    }  # fmt: skip


def _ends(values) -> list:
    return np.quantile(values, [0.025, 0.975], axis=0).tolist()


def _cross_fitted(gains: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """(T,) regrets: weights of each half of the prompts judged on the other half, which does not favour them."""
    half, types = np.arange(gains.shape[-1]) % 2, len(gains)
    own = [regret_matrix(gains[:, :types, half == side].mean(-1)) for side in (0, 1)]
    return np.mean([own[1 - side] @ min_max_regret(own[side], factors).mixture for side in (0, 1)], 0)
