"""From the policies of the types to weights that are fair to all: samples, regrets, and the game over them.

Regret of type i when policy j answers is E_{y~pi_i} - E_{y~pi_j} of log pi_i(y|x) - log pi_ref(y|x): its implicit
reward divided by beta. The expectations are means over samples at temperature 1, with their end token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import AutoTokenizer

from ..generation.backends import HuggingFace
from ..generation.collect import collect_samples, open_folder
from ..generation.sampler import Sample, SamplingConfig, encode_prompts
from ..generation.start import load_start
from ..runs.processes import Processes, free_memory
from ..runs.settings import digest, model_fingerprint
from ..statistics import FEWEST
from .game import Solution, bootstrap_mixture, min_max_regret, regret_matrix
from .scoring import PolicyScorer
from .tables import MIXTURE, base_of, read_json

MIN_MAX, UNIFORM, SHARES, SINGLE = "min-max mixture", "uniform mixture", "shares of EM", "best single type"
OTHER_PROMPTS = f"{MIN_MAX}, judged on other prompts"


@dataclass(frozen=True)
class Player:
    """A policy that answers: `start` is a model or adapter folder, None for the reference itself."""

    name: str
    start: Path | None


def refuse_sharding(distributed_type: DistributedType) -> None:
    """Raises ValueError for the engines that share a policy among processes, which none here is prepared for."""
    if distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise ValueError(
            f"the aggregation holds one whole policy per process and does not run under {distributed_type.value}: "
            "start it with plain python, or with accelerate launch and no DeepSpeed or FSDP in its configuration."
        )


def identity(model: str | Path) -> str:
    """What a policy is known by: its files, so that a folder may be moved; a hub id by its name."""
    return model_fingerprint(str(model)) or str(model)


class Arena:
    """Samples of some policies on some prompts, scored by the policies of a run's types; all of it on disk.

    Args:
        run: `output_dir` of a finished EM-DPO run.
        prompts: texts or message lists.
        config: at temperature 1 and without cuts, or the regrets are biased.
        folder: of samples and scores; a killed run goes on where it stopped.

    Raises:
        ValueError: `run` is no finished run, the prompts are none, the samples would not be those of the policies, or
            the policies would be sharded.
    """

    def __init__(self, run: Path, prompts: list, config: SamplingConfig, folder: Path, accelerator: Accelerator):
        if not (Path(run) / MIXTURE).is_file():
            raise ValueError(f"{run} has no {MIXTURE}: give the output_dir of a finished EM-DPO run.")
        if not prompts:
            raise ValueError("there are no prompts to sample from: name a data set with at least one row.")
        if config.temperature != 1 or config.top_p != 1 or config.top_k:
            raise ValueError("regrets need samples of the policies themselves: temperature 1, top_p 1 and no top_k.")
        refuse_sharding(accelerator.distributed_type)
        self.run, self.folder, self.prompts, self.config = Path(run), Path(folder), prompts, config
        self.accelerator, self.processes = accelerator, Processes()
        self.mixture = read_json(self.run / MIXTURE)
        self.base = base_of(self.run, self.mixture)
        self.tokenizer = AutoTokenizer.from_pretrained(run, trust_remote_code=False)
        self.types = [Player(f"type-{k}", self.run / path) for k, path in enumerate(self.mixture["policies"])]

    def load(self, player: Player):
        """The policy of a player, on the device."""
        kwargs = self.mixture["model_init_kwargs"] or {}
        return load_start(self.base, player.start, init_kwargs=kwargs).to(self.accelerator.device).eval()

    def samples(self, player: Player) -> list[list[Sample]]:
        """The answers of a player to each prompt."""
        settings = {
            "policy files": identity(player.start or self.base),
            "base files": identity(self.base),
            "prompts": f"{len(self.prompts)} with digest {digest(self.prompts)[:16]}",
            **{n: getattr(self.config, n) for n in ("num_generations", "max_new_tokens", "seed")},
        }
        folder = open_folder(
            self.samples_of(player), settings, self.processes,
            ways_out=f"name another folder with --output, or remove {self.folder} to sample anew",
        )  # fmt: skip
        load = lambda: HuggingFace(self.load(player), self.tokenizer)  # noqa: E731
        found = collect_samples(folder, load, self.prompts, self.config, accelerator=self.processes)
        free_memory()
        return found

    def samples_of(self, player: Player) -> Path:
        """The folder of a player's answers."""
        return self.folder / f"samples-{player.name}"

    def gains(self, players: list[Player]) -> tuple[np.ndarray, list[list[list[Sample]]]]:
        """(T,P,prompts) mean log-ratio of each player's answers under each type's policy, and the answers."""
        samples = [self.samples(player) for player in players]
        prompt_ids = encode_prompts(self.tokenizer, self.prompts)
        datasets = [
            Dataset.from_list([
                {"prompt_ids": ids, "response_ids": [s.token_ids for s in row]}
                for ids, row in zip(prompt_ids, answers, strict=True)
            ])
            for answers in samples
        ]  # fmt: skip
        score = PolicyScorer(datasets, self.accelerator, self.tokenizer.pad_token_id, "auto", 8192)

        def logps(player: Player) -> np.ndarray:
            out = self.folder / f"scores-{player.name}"
            return np.array(score(out, lambda: self.load(player), f"scores by {player.name}"))  # (P,prompts,samples)

        reference = logps(Player("reference", None))
        return np.stack([(logps(player) - reference).mean(-1) for player in self.types]), samples


def compare(
    gains: np.ndarray, names: list[str], shares: np.ndarray, weights: np.ndarray | None = None, *,
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
    regret = regret_matrix(gains.mean(-1))
    solution = min_max_regret(regret[:, :types], factors)
    interval = None
    if prompts >= FEWEST:
        interval = bootstrap_mixture(gains[:, :types], weights=factors, resamples=resamples, seed=seed)
        interval = {name: value.tolist() for name, value in interval.items()}
    single = int((factors[:, None] * regret[:, :types]).max(0).argmin())

    def pad(mixture) -> np.ndarray:
        return np.r_[np.asarray(mixture, dtype=float), np.zeros(len(names) - types)]

    mixtures = {
        MIN_MAX: pad(solution.mixture),
        UNIFORM: pad(np.full(types, 1 / types)),
        SHARES: pad(shares),
        f"{SINGLE} ({names[single]})": pad(np.eye(types)[single]),
        **{names[j]: np.eye(len(names))[j] for j in range(types, len(names))},
    }
    table = {name: _row(regret @ mixture, factors) for name, mixture in mixtures.items()}
    if interval is not None:
        for name, mixture in mixtures.items():
            table[name] |= _intervals(gains, mixture, resamples, seed)
    if prompts > 1:
        table[OTHER_PROMPTS] = _row(_cross_fitted(gains, factors, pad), factors)
    return {
        "policies": names,
        "prompts": prompts,
        "regret": regret.tolist(),
        "mixture": solution.mixture.tolist(),
        "interval": interval,
        "value": solution.value,
        "shares": np.asarray(shares).tolist(),
        "type_weights": factors.tolist(),
        "table": table,
    }


def _row(regrets: np.ndarray, factors: np.ndarray) -> dict:
    return {
        "regret": regrets.tolist(), "max": float(regrets.max()), "weighted_max": float((factors * regrets).max()),
    }  # fmt: skip


def _intervals(gains: np.ndarray, mixture: np.ndarray, resamples: int, seed: int) -> dict:
    random, prompts = np.random.default_rng(seed), gains.shape[-1]
    drawn = np.array([
        regret_matrix(gains[..., random.integers(0, prompts, prompts)].mean(-1)) @ mixture for _ in range(resamples)
    ])  # fmt: skip
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    worst = np.quantile(drawn.max(1), [0.025, 0.975])
    return {"low": low.tolist(), "high": high.tolist(), "max_low": float(worst[0]), "max_high": float(worst[1])}


def _cross_fitted(gains: np.ndarray, factors: np.ndarray, pad: Callable) -> np.ndarray:
    """(T,) regrets: weights of each half of the prompts judged on the other half, which does not favour them."""
    half = np.arange(gains.shape[-1]) % 2
    found = []
    for side in (0, 1):
        own = regret_matrix(gains[..., half == side].mean(-1))[:, : len(gains)]
        mixture: Solution = min_max_regret(own, factors)
        found.append(regret_matrix(gains[..., half != side].mean(-1)) @ pad(mixture.mixture))
    return np.mean(found, 0)
