"""The options of SGPO."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl import SFTConfig

from ..config import CUT_SAMPLES, JSON, option
from ..dpo import DPOConfig
from ..generation.options import read_mapping
from ..generation.sampler import TRANSFORMERS, SamplingConfig
from ..runs.processes import stage_arguments

REVISERS = {"self": None, "local": "reviser_model", "external": "reviser_function"}  # and the option that each needs
SAMPLING = {
    "max_new_tokens": 1024, "temperature": 0.8, "top_p": 0.95, "top_k": None, "batch_size": 16, "dtype": None,
    "engine": TRANSFORMERS,
}  # fmt: skip
SFT_DATA = ("dataset_name", "dataset_split", "max_rows")  # keys of `sft` beside the fields of the training


@dataclass
class SGPOConfig(DPOConfig):
    """Options of SGPO. Those of the training (`learning_rate`, `beta`, ...) are of the DPO stage.

    `sft` and `improver` hold what differs in these stages from the DPO stage; what the paper says of each option, and
    that most of it is unknown, is in docs/sgpo.md.
    """

    learning_rate: float = option(5e-7, "Peak learning rate of the DPO stage.", at_least=0)
    rounds: int = option(1, "How often to run all stages; may be raised later.", at_least=1)
    sft: JSON | None = option(
        None,
        "Supervised fine-tuning before the first round: {dataset_name, dataset_split, max_rows} and fields of TRL's "
        "SFTConfig; learning_rate 2e-5. Default: none, the model is fine-tuned already.",
    )
    improver: JSON = option(
        None,
        "Fields of TRL's SFTConfig that differ in the improver's training. Default: {learning_rate: 1e-5, max_length: "
        "twice that of the DPO stage}.",
    )
    sampling: JSON = option(
        None,
        "How the policy's responses are drawn: {max_new_tokens, temperature, top_p, top_k, batch_size, dtype, "
        "engine}, by default 1024 tokens, temperature 0.8, top_p 0.95.",
    )
    revision: JSON = option(
        None, "The same for reviser and improver; the rest is as in `sampling`, but temperature 0.7."
    )
    reviser: str = option(
        "self",
        "Who writes the improvement targets: the policy itself, a local model (`reviser_model`), or any function "
        "(`reviser_function`). Unknown for the paper; it decides what may be said of external data.",
        choices=list(REVISERS),
    )
    reviser_model: str | None = option(None, "Folder or hub id, for reviser: local.")
    reviser_function: str | None = option(
        None,
        "Dotted path of a function (prompts, drafts, references) -> list of revised texts, None where it has none, "
        "for reviser: external.",
    )
    reviser_analysis: bool = option(
        True, "Let the reviser think aloud before a marker. False for small models: the answer alone."
    )
    sft_target_source: str = option(
        "chosen",
        "Column with the reference answer: text, an assistant message, or a conversation that ends with one. `best` "
        "is the response with the best score.",
    )
    filter_statistic: str = option(
        "logp_gain", "What the IQR filter looks at: the gain per token, or none.", choices=["logp_gain", "none"]
    )
    filter_factor: float = option(1.5, "Fences lie so many interquartile ranges out.", above=0)
    filter_side: str = option("both", "Which outliers are left out.", choices=["both", "lower", "upper"])
    policy_weight: float = option(
        0.0,
        "Weight of the reference's likelihood under the plain prompt in the improver's training; 0.3 to 1 is advised.",
        at_least=0,
    )
    preference_dataset: str | None = option(None, "Prompts of the preference stage; by default dataset_name.")
    preference_split: str | None = option(None, "Their split, slices included.")
    max_preference_rows: int | None = option(None, "Use only so many of them.", at_least=1)
    ref: str = option(
        "improved",
        "Reference of the DPO stage: the improver's checkpoint, or the model before all rounds.",
        choices=["improved", "initial"],
    )
    scorer: dict[str, Any] | str | None = option(
        None, "Outside scorer of pairs and held-out answers: for the gate before DPO and the report."
    )
    on_alarm: str = option(
        "warn", "What a crossed limit does: a warning, or the end of the run.", choices=["warn", "stop"]
    )

    def __post_init__(self):
        super().__post_init__()
        if self.self_enhance is not None:
            raise ValueError("self_enhance has no effect on SGPO, which has rounds of its own: leave it out.")
        if self.early_stopping_patience is not None:
            raise ValueError("early_stopping_patience: SGPO's trainings are not evaluated, leave it out.")
        if self.truncate_prompts == "left":
            raise ValueError(CUT_SAMPLES.format("SGPO"))
        self.sampling = SAMPLING | read_mapping("sampling", self.sampling or {}, list(SAMPLING))
        revision = read_mapping("revision", self.revision or {}, list(SAMPLING))
        self.revision = self.sampling | {"temperature": 0.7} | revision
        for name in ("sampling", "revision"):
            self.sampling_config(name)  # which refuses what is outside its range
        longest = None if self.max_length is None else 2 * self.max_length  # m(x, y) holds a response as well
        fields = [f.name for f in dataclasses.fields(SFTConfig) if f.init]
        improver = read_mapping("improver", self.improver or {}, fields)
        self.improver = {"learning_rate": 1e-5, "max_length": longest} | improver
        if self.sft is not None:
            self.sft = read_mapping("sft", self.sft, [*SFT_DATA, *fields])
        for kind, name in REVISERS.items():
            if name is not None and (getattr(self, name) is not None) != (self.reviser == kind):
                raise ValueError(f"reviser={self.reviser!r} and {name} do not fit: set {name} with reviser: {kind}.")

    def sampling_config(self, name: str) -> SamplingConfig:
        """One response for each prompt, drawn as the option `sampling` or `revision` says."""
        options = {key: value for key, value in getattr(self, name).items() if key != "dtype"}
        return SamplingConfig(num_generations=1, seed=self.seed, **options)

    def of_dpo(self, folder: str | Path, seed: int) -> "SGPOConfig":
        """Arguments of the DPO stage alone, for a policy that is loaded already; without evaluation."""
        others = {f.name: f.default for f in dataclasses.fields(self) if f.name in OF_STAGES}
        return stage_arguments(self, folder, seed, eval_strategy="no", do_eval=False, **others)


# Fields that the DPO stage does not read: they say how far a run goes, or belong to other stages.
OF_STAGES = {f.name for f in dataclasses.fields(SGPOConfig)} - {f.name for f in dataclasses.fields(DPOConfig)}
OF_STAGES -= {"ref"}
