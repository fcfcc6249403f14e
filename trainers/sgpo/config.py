"""The options of SGPO."""

import copy
import dataclasses
import importlib
import inspect
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from ..dpo import DPOConfig
from ..generation.options import read_mapping
from ..generation.sampler import SamplingConfig
from .filters import SIDES, STATISTICS
from .monitor import Limits

STAGES = ("sft", "before", "current", "targets", "filter", "improver", "pairs", "dpo", "measure")
REVISERS = ("self", "local", "external")
DATA_KEYS = ("dataset_name", "dataset_split", "max_rows")  # of `sft`, beside the fields of the training
# Fields of SGPOConfig that the DPO stage does not read: they say how far a run goes, or belong to other stages.
OF_STAGES = (
    "rounds", "stage", "sft", "improver", "sampling", "revision", "reviser", "reviser_model", "reviser_function",
    "reviser_analysis", "sft_target_source", "reference_in_input", "filter_statistic", "filter_factor", "filter_side",
    "policy_weight", "separate_improver", "preference_dataset", "preference_split", "max_preference_rows", "scorer",
    "on_alarm", "limits", "use_vllm",
)  # fmt: skip
SFT_FIELDS = [f.name for f in dataclasses.fields(SFTConfig) if f.init]
# Fields of SFTConfig that are the run's, as one process has one precision and one engine, or that a loss on the tokens
# of the answer leaves no choice about.
NOT_OF_STAGE = (
    "output_dir", "seed", "data_seed", "resume_from_checkpoint", "save_only_model", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "push_to_hub", "do_train", "do_eval", "do_predict", "use_cpu",
    "bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval", "accelerator_config", "parallelism_config",
    "deepspeed", "fsdp", "fsdp_config", "local_rank", "model_init_kwargs", "trust_remote_code", "chat_template_path",
    "pad_token", "eos_token", "remove_unused_columns", "label_names", "dataset_text_field", "dataset_kwargs",
    "completion_only_loss", "assistant_only_loss", "packing", "padding_free",
)  # fmt: skip
NOT_OF_STAGE_PREFIXES = ("eval_", "hub_", "ddp_")
CHOICES = {
    "reviser": REVISERS,
    "filter_statistic": STATISTICS,
    "filter_side": SIDES,
    "ref": ("improved", "initial"),
    "on_alarm": ("warn", "stop"),
}


@dataclass(frozen=True)
class Sampling:
    """The keys of `sampling` and `revision`: how responses are drawn, one for each prompt.

    `dtype` is that of the weights while sampling; None is the dtype they are trained in.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int | None = None
    batch_size: int = 16
    dtype: str | None = None

    @classmethod
    def parse(cls, name: str, value: dict | str | None, **defaults) -> "Sampling":
        """Raises ValueError naming the option `name` and the key that is wrong."""
        known = [f.name for f in dataclasses.fields(cls)]
        options = cls(**(defaults | read_mapping(name, value or {}, known)))
        if options.dtype is not None and not isinstance(getattr(torch, str(options.dtype), None), torch.dtype):
            raise ValueError(f"{name}: dtype={options.dtype!r} is unknown: use float32, bfloat16 or float16.")
        try:
            options.config(0)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from error
        return options

    def config(self, seed: int, num_generations: int = 1) -> SamplingConfig:
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "dtype"}
        return SamplingConfig(num_generations=num_generations, seed=seed, **options)


@dataclass
class SGPOConfig(DPOConfig):
    """Options of SGPO. Those of the training (`learning_rate`, `beta`, ...) are of the DPO stage.

    `sft` and `improver` hold what differs in these stages from the DPO stage; what the paper says of each option, and
    that most of it is unknown, is in docs/results/sgpo.md.
    """

    learning_rate: float = field(default=5e-7, metadata={"help": "Peak learning rate of the DPO stage."})
    rounds: int = field(default=1, metadata={"help": "How often to run all stages; may be raised later."})
    stage: str | None = field(
        default=None,
        metadata={"help": "Run only this stage, the next one that is not done.", "choices": [*STAGES]},
    )
    sft: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Supervised fine-tuning before the first round: {dataset_name, dataset_split, max_rows} and "
            "fields of TRL's SFTConfig. Default: none, the model is fine-tuned already."
        },
    )
    improver: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Fields of TRL's SFTConfig that differ in the improver's training. Default: {learning_rate: "
            "1e-5, max_length: twice that of the DPO stage}."},
    )  # fmt: skip
    sampling: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "How the policy's responses are drawn: {max_new_tokens, temperature, top_p, top_k, batch_size, "
            "dtype}. Default: 1024 tokens, temperature 0.8, top_p 0.95."
        },
    )
    revision: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "The same for reviser and improver; the rest is as in `sampling`, but temperature 0.7."},
    )
    reviser: str = field(
        default="self",
        metadata={
            "help": "Who writes the improvement targets: the policy itself, a local model (`reviser_model`), or any "
            "function (`reviser_function`). Unknown for the paper; it decides what may be said of external data.",
            "choices": list(REVISERS),
        },
    )
    reviser_model: str | None = field(default=None, metadata={"help": "Folder or hub id, for reviser: local."})
    reviser_function: str | None = field(
        default=None,
        metadata={
            "help": "Dotted path of a function (prompts, drafts, references) -> list of revised texts, None where it "
            "has none, for reviser: external."
        },
    )
    reviser_analysis: bool = field(
        default=True,
        metadata={"help": "Let the reviser think aloud before a marker. False for small models: the answer alone."},
    )
    sft_target_source: str = field(
        default="chosen",
        metadata={
            "help": "Column with the reference answer: text, an assistant message, or a conversation that ends with "
            "one. `best` is the response with the best score."
        },
    )
    reference_in_input: bool = field(
        default=False, metadata={"help": "Show the reference to the improver, which then needs one for every prompt."}
    )
    filter_statistic: str = field(
        default="logp_gain",
        metadata={"help": "What the IQR filter looks at, or none.", "choices": list(STATISTICS)},
    )
    filter_factor: float = field(default=1.5, metadata={"help": "Fences lie so many interquartile ranges out."})
    filter_side: str = field(default="both", metadata={"help": "Which outliers are left out.", "choices": list(SIDES)})
    policy_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the reference's likelihood under the plain prompt in the improver's training."},
    )
    separate_improver: bool = field(
        default=False, metadata={"help": "Keep the improver apart: the policy starts where the round started."}
    )
    preference_dataset: str | None = field(
        default=None, metadata={"help": "Prompts of the preference stage; by default dataset_name."}
    )
    preference_split: str | None = field(default=None, metadata={"help": "Their split, slices included."})
    max_preference_rows: int | None = field(default=None, metadata={"help": "Use only so many of them."})
    sft_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the chosen response's negative log-likelihood per token in the DPO stage."},
    )
    ref: str = field(
        default="improved",
        metadata={
            "help": "Reference of the DPO stage: the improver's checkpoint, or the model before all rounds.",
            "choices": list(CHOICES["ref"]),
        },
    )
    scorer: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Outside scorer of pairs and held-out answers, for the report only."}
    )
    on_alarm: str = field(
        default="warn",
        metadata={"help": "What a crossed limit does: a warning, or the end of the run.", "choices": ["warn", "stop"]},
    )
    limits: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Limits of the monitor that differ from trainers/sgpo/monitor.py."}
    )
    use_vllm: bool = field(
        default=False, metadata={"help": "Sample with vLLM in this process: full models only, one process."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.self_enhance is not None:
            raise ValueError("self_enhance has no effect on SGPO, which has rounds of its own: leave it out.")
        self.sampling = dataclasses.asdict(Sampling.parse("sampling", self.sampling))
        self.revision = dataclasses.asdict(Sampling.parse("revision", self.revision, **_revision(self.sampling)))
        self.improver = self._defaults()["improver"] | _stage_options("improver", self.improver or {})
        if self.sft is not None:
            self.sft = {"learning_rate": 2e-5} | _stage_options("sft", self.sft, DATA_KEYS)
            if not self.sft.get("dataset_name"):
                raise ValueError("sft: dataset_name is missing: name the conversations to train on.")
        self.limits = dataclasses.asdict(Limits.parse(self.limits))
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(choices)}.")
        if self.stage is not None and self.stage not in STAGES:
            raise ValueError(f"stage={self.stage!r} is unknown: choose one of {', '.join(STAGES)}.")
        if not isinstance(self.rounds, int) or isinstance(self.rounds, bool) or self.rounds < 1:
            raise ValueError(f"rounds={self.rounds!r} must be a whole number of at least 1.")
        for name in ("policy_weight", "sft_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} must be finite and 0 or more.")
        if not 0 < self.filter_factor < math.inf:
            raise ValueError(f"filter_factor={self.filter_factor!r} must be finite and positive.")
        self._check_reviser()

    def _check_reviser(self) -> None:
        for kind, name in (("local", "reviser_model"), ("external", "reviser_function")):
            given = getattr(self, name) is not None
            if given != (self.reviser == kind):
                raise ValueError(f"reviser={self.reviser!r} and {name} do not fit: set {name} with reviser: {kind}.")
        if self.reviser_function is not None:
            check_keywords("reviser_function", self.reviser_function, ("prompts", "drafts", "references"))

    def _defaults(self) -> dict:
        """Values of the fields of other stages where nothing is set."""
        longest = None if self.max_length is None else 2 * self.max_length  # m(x, y) holds a response as well
        sampling = dataclasses.asdict(Sampling())
        parsed = {
            "sampling": sampling, "revision": _revision(sampling), "limits": dataclasses.asdict(Limits()),
            "improver": {"learning_rate": 1e-5, "max_length": longest},
        }  # fmt: skip
        return {f.name: f.default for f in dataclasses.fields(self) if f.name in OF_STAGES} | parsed

    def of_other_stages(self) -> list[str]:
        """Fields that are set and that the DPO stage does not read."""
        plain = self._defaults() | {"revision": _revision(self.sampling)}
        return [name for name, value in plain.items() if getattr(self, name) != value]

    def of_dpo(self, folder: str | Path | None = None, seed: int | None = None) -> "SGPOConfig":
        """Arguments of the DPO stage alone, for a policy that is loaded already; without evaluation.

        Folder and seed stay as they are where none is given.
        """
        own = copy.copy(self)
        for name, value in self._defaults().items():
            setattr(own, name, value)
        own.output_dir = self.output_dir if folder is None else str(folder)
        own.seed = self.seed if seed is None else seed
        own.model_init_kwargs, own.eval_strategy, own.do_eval = None, "no", False
        return own

    def sampling_options(self) -> Sampling:
        return Sampling(**self.sampling)

    def revision_options(self) -> Sampling:
        return Sampling(**self.revision)


def _revision(sampling: dict) -> dict:
    """What `revision` is where nothing is set."""
    return sampling | {"temperature": 0.7}


def _stage_options(option: str, value, more: tuple[str, ...] = ()) -> dict:
    """The keys of `sft` or `improver`.

    Raises:
        ValueError: no mapping, or a key that does not exist or cannot differ from the run.
    """
    found = read_mapping(option, value)
    for name in found:
        if name in NOT_OF_STAGE or name.startswith(NOT_OF_STAGE_PREFIXES):
            raise ValueError(f"{option}: {name} cannot be set for this stage alone: leave it out of {option}.")
    return read_mapping(option, found, [*more, *SFT_FIELDS])


def check_keywords(option: str, path: str, names: tuple[str, ...]) -> None:
    """Raises ValueError for a dotted path that is no function, or one that cannot be called with these keywords."""
    function = find_function(option, path)
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin, which does not say
        return
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError as error:
        raise ValueError(f"{option}={path!r} must take {', '.join(names)} by keyword: {error}.") from error


def find_function(option: str, path: str):
    """The callable at a dotted path. Raises ValueError naming the option."""
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option}={path!r} cannot be imported: {error}.") from error
    if not callable(function):
        raise ValueError(f"{option}={path!r} is not a function.")
    return function
