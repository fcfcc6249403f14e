"""What all stages of a run share: its data, its models, where things lie, and what settings hold."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer

from ..forward.policy import set_pad_token
from ..generation.sampler import Prompt
from ..runs.files import read_rows, write_rows
from ..runs.processes import Processes
from ..runs.settings import fingerprint, model_fingerprint, training_settings
from .config import OF_STAGES, SGPOConfig
from .data import count_drops
from .sampling import Sampler
from .stages import Stage
from .text import improver_prompt, improver_template, template_hash

ROWS, DROPPED, MODEL = "rows.jsonl.gz", "dropped.jsonl.gz", "model"

# Fields that are no part of what a training depends on, or that stages name among their own settings: in the training
# arguments' own words the pad token is masked like a secret.
FREE = (*OF_STAGES, "pad_token")
OF_DPO = ("sft_weight", "ref", "beta", "pairs", "label_smoothing", "learning_rate", "num_train_epochs", "max_length")


@dataclass
class Run:
    """A run of SGPO in `args.output_dir`.

    Args:
        model: path or hub id of the model before all rounds.
        rows: `prompt` and `reference` to train the improver on; `prompts` are for the pairs, `held_out` to measure on.
        conversations: rows for `sft`, or None.
        load: (start folder or None) -> the policy to be trained, and the configuration of a fresh adapter or None.
        train_dpo: (pairs, start folder or None, reference, folder, seed) trains and leaves the model in folder;
            `reference` is () for the start itself, or (folder or None,) for a model of its own. It must resume from
            `last_checkpoint(folder)`.
        model_settings: what else decides about weights: quantisation, which decides about samples as well, and the
            adapter's options.
    """

    args: SGPOConfig
    model: str
    rows: list[dict]
    prompts: list[dict]
    held_out: list[dict]
    conversations: list[dict] | None
    load: Callable[[Path | None], tuple]
    train_dpo: Callable[[list[dict], Path | None, tuple, Path, int], None]
    model_settings: dict = field(default_factory=dict)
    quantization_config: object = None

    def __post_init__(self):
        self.folder, self.processes = Path(self.args.output_dir), Processes()
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        set_pad_token(self.tokenizer, self.args.pad_token)
        self.sampler = Sampler(self.args, self.model, self.processes, self.quantization_config)
        self.model_files = model_fingerprint(self.model)

    # Where things lie.

    def at(self, name: str, index: int) -> Path:
        """Folder of a stage."""
        return self.folder / f"round-{index:02d}" / name

    def read(self, name: str, index: int) -> list[dict]:
        return read_rows(self.at(name, index) / ROWS)

    def start(self, index: int) -> Path | None:
        """The model where a round starts; None is the model of the settings."""
        if index:
            return self.at("dpo", index - 1) / MODEL
        return self.at("sft", 0) / MODEL if self.conversations is not None else None

    def improver(self, index: int) -> Path:
        return self.at("improver", index) / MODEL

    def policy(self, index: int) -> Path | None:
        """The model whose responses are rejected, and where the DPO stage starts."""
        return self.start(index) if self.args.separate_improver else self.improver(index)

    # What settings hold.

    def inputs(self, index: int, *names: str) -> dict:
        """Hashes of what earlier stages of the round left; `start` is the model where it starts."""
        paths = {
            name: self.start(index) if name == "start"
            else self.at(name, index) / (MODEL if name in ("sft", "improver", "dpo") else ROWS)
            for name in names
        }  # fmt: skip
        return {"inputs": {name: None if path is None else fingerprint(path) for name, path in paths.items()}}

    def loaded(self) -> dict:
        """Settings of how models and tokenizer are read."""
        return {
            "quantization_config": self.model_settings["quantization_config"],
            "model_init_kwargs": self.args.model_init_kwargs,
            "padding token": self.args.pad_token,
        }

    def sampled(self, *names: str) -> dict:
        """Settings of `sampling` or `revision`, or both; the batch size changes no sample."""
        found = self.loaded() | {"use_vllm": self.args.use_vllm}
        for name in names:
            found |= {f"{name}.{k}": v for k, v in getattr(self.args, name).items() if k != "batch_size"}
        return found

    def trained(self, name: str | None = None) -> dict:
        """Settings of a training; `name` is the option with what differs from the DPO stage."""
        settings = training_settings(self.args, ignore=FREE if name is None else (*FREE, *OF_DPO))
        own = {f"{name}.{k}": v for k, v in getattr(self.args, name).items()} if name else {}
        return settings | own | self.model_settings | self.loaded() | {"processes": self.args.world_size}

    def template(self) -> str:
        return template_hash(improver_template(with_reference=self.args.reference_in_input))

    # Texts and files.

    def ask_improver(self, row: dict, response: str) -> Prompt:
        """m(x, y) for the response in the column `response`."""
        return improver_prompt(
            row["prompt"], row[response], row["reference"] if self.args.reference_in_input else None
        )

    def write(self, path: Path, rows: list[dict]) -> None:
        self.processes.main(lambda: write_rows(path, rows))

    def write_kept(self, folder: Path, rows: list[dict], reasons: list[str | None]) -> None:
        """Rows without a reason go to rows.jsonl.gz, the others to dropped.jsonl.gz with theirs.

        Raises:
            ValueError: no row is left; rows.jsonl.gz is then empty.
        """
        marked = list(zip(rows, reasons, strict=True))
        self.write(folder / DROPPED, [row | {"reason": reason} for row, reason in marked if reason is not None])
        kept = [row for row, reason in marked if reason is None]
        self.write(folder / ROWS, kept)
        if not kept:
            raise ValueError(
                f"{folder.name}: no row is left, so there is nothing to train on. Dropped: "
                f"{count_drops(reasons)['dropped']}; {folder / DROPPED} holds them."
            )


class Step(NamedTuple):
    """How a stage is made: what it depends on, what makes it, and what later stages read of it."""

    needs: Callable[[Run, int], dict]
    work: Callable[[Run, Stage, int], dict]  # -> counts
    outputs: tuple[str, ...]
