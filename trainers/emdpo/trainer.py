"""EM-DPO: find unknown types of annotators by EM, a policy for each type, and a mixture that is fair to all of them.

Paper: "Direct Preference Optimization With Unobserved Preference Heterogeneity: The Necessity of Ternary Preferences",
arXiv 2405.15065. Its full text was not available to us. The EM and the game follow the authors' code, which is for
pairs only; the likelihood of rankings is the Plackett-Luce model that the paper's abstract leads to, and the rule for
ties, the clusters of the first guess, the held-out halves, the choice of the number of types and the distilled policy
are ours. Left out: an E-step before the first M-step, and the aggregation that minimises the largest KL.

One policy is in memory at a time. The parts lie beside this file: E-step, first guess, rounds on disk, game, serving.
"""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import TrainOutput

from ..config import PreferenceConfig
from ..data.json_rows import digest, plain
from ..data.stream import refuse_stream
from ..forward.cache import score_rows
from ..forward.identity import weights_digest
from ..generation.start import load_start
from ..runs.checkpoints import last_checkpoint
from ..runs.files import read_json, write_atomic, write_json
from ..runs.processes import Processes, free_memory, refuse_partial_weights, stage_arguments
from ..runs.settings import model_fingerprint, policy_settings, rows_digest, run_settings
from ..runs.stage import Stage
from . import tables
from .annotators import Judged
from .config import EMDPOConfig, refuse_checkpoint
from .figures import log_likelihood, responsibilities
from .init import first_guess, kind_of_guess
from .m_step import TypePolicyTrainer, m_step_rows
from .mixture import mixture_weights
from .rounds import ANNOTATOR, EM, ITEM, POLICY, Round

logger = logging.getLogger(__name__)

# Fields that say how far a run goes, or where it works, and not what a round gives.
FREE = ("rounds", "restarts", "stop_change")


class EMDPOTrainer(TypePolicyTrainer):
    """Finds `num_types` types of annotators; `train()` runs all rounds and goes on where a killed run stopped.

    `annotator` is a column of `train_dataset`. What a run leaves in `output_dir` is listed in rounds.py; beside it
    lie annotators.csv (who is of which type), rounds.csv, mixture.json and two pictures. After `train()`, `posterior`
    (N,T) and `annotators` hold the result, `manifest` what the last round gave, `policies` the folders, and `model`
    the policy of the most common type.

    Args:
        model: a path or hub id; a model that is already loaded is saved to `output_dir`, because each M-step reads its
            start from disk.
        ref_model: the one reference of all types, by default `model`.
        eval_dataset: rows of held-out annotators (or further rows of known ones), scored in every round.
        others: as for `PreferenceTrainer`; callbacks are handed to the M-steps as well.

    Raises:
        ValueError: what EM cannot do, before anything is trained.
    """

    single_training = False

    def __init__(self, model, ref_model=None, args: EMDPOConfig | None = None, train_dataset=None, eval_dataset=None,
                 processing_class=None, callbacks=None, quantization_config=None, peft_config=None):  # fmt: skip
        if isinstance(eval_dataset, dict):
            raise ValueError("eval_dataset must be one data set of held-out annotators, not a dict.")
        refuse_stream(train_dataset, "EM-DPO")
        if train_dataset is None:
            raise ValueError("train_dataset is missing: EM-DPO looks for the types of its annotators.")
        super().__init__(
            model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, callbacks=callbacks,
            processing_class=processing_class, quantization_config=quantization_config, peft_config=peft_config,
        )  # fmt: skip
        if peft_config is None and isinstance(self.model, PeftModel):
            raise ValueError(
                "model is an adapter, but EM-DPO starts each type from a plain model: merge it, and pass peft_config."
            )
        self._name: str | None = model if isinstance(model, str) else None
        self._given_weights: str | None = None
        self._init_kwargs, self._quantization_config = self.args.model_init_kwargs, quantization_config
        self._ref_model, self._peft_config, self._callbacks = ref_model, peft_config, callbacks
        self.processes = Processes()
        refuse_partial_weights(self.accelerator, self.method)
        if is_deepspeed_zero3_enabled() and self._name is None:
            raise ValueError("Under ZeRO-3 each M-step reads the policy from its path: pass the model as a path.")
        parts = {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
        self.parts = {name: Judged.of(rows, self.args.top_q, name) for name, rows in parts.items() if rows}
        self.judged, self.held_out = self.parts["train_dataset"], self.parts.get("eval_dataset")
        for name, judged in self.parts.items():
            if judged.silent:
                self.warn(
                    f"{name}: {judged.silent} of {judged.silent + len(judged.rows)} rows have a tie for the best and "
                    "say nothing about a ranking; they are left out."
                )
        self.annotators = self.judged.annotators
        if len(self.annotators) < self.args.num_types:
            raise ValueError(f"num_types={self.args.num_types} is more than the {len(self.annotators)} annotators.")
        if self.args.num_types > 1 and self.judged.single_pairs:
            self.warn(
                "Every annotator has judged one pair, which cannot tell types apart, however many annotators there "
                "are: give each a ranking of three responses, or several pairs (docs/results/emdpo.md)."
            )
        self.posterior: np.ndarray | None = None
        self.policies: list[Path] = []
        self.manifest: dict = {}

    # What the user calls.

    def train(self, resume_from_checkpoint=None, *arguments, **keywords) -> TrainOutput:
        """Runs the rounds that are not done yet. `resume_from_checkpoint` is not needed: the folder says what is done.

        Raises:
            ValueError: `output_dir` belongs to a run with other settings, and the message names what differs; policies
                that these rounds and restarts need were deleted when it went further; a checkpoint is named.
        """
        refuse_checkpoint(resume_from_checkpoint)
        folder = Path(self.args.output_dir)
        guess = first_guess(self.args, self.judged)  # what is wrong with it shall be said before anything is written
        self.processes.say(f"First guess of the types: {kind_of_guess(self.args, self.judged)}.")
        self._save_start(folder / tables.START)
        Stage(folder, self._whole_settings(), settings_name="emdpo.json").open()
        self.write_record()
        self.model = self.model_wrapped = self.callback_handler.model = None  # type: ignore[assignment]
        free_memory()  # each policy that is read from disk is alone in memory
        parts = [*self.parts.values()]
        reference = self.score(folder / "reference", parts, "Reference log-probabilities", self._load_reference)
        for judged, logps in zip(parts, reference, strict=True):
            judged.reference = logps
        self._ref_model = None
        runs, rounds = EM(self, guess).run()
        _, self.posterior, self.manifest = rounds[-1]
        self.policies = rounds[-1].policies
        self.processes.main(lambda: self._publish(folder, runs, rounds))
        self.model = self._load(self.policies[int(mixture_weights(self.posterior).argmax())])
        metrics = {"train_loss": -self.manifest[ITEM], "train_rounds": len(rounds)}
        metrics |= {f"train_{name}": self.manifest[name] for name in (ANNOTATOR, "smallest_type", "changed_type")}
        return TrainOutput(len(rounds), metrics["train_loss"], metrics)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Log-likelihood of the held-out rows given to the constructor, under the mixture after the last round.

        Raises:
            ValueError: another data set is given, there is none, or `train` has not run.
        """
        if eval_dataset is not None or self.held_out is None or self.posterior is None:
            raise ValueError("EM-DPO scores held-out rows while it trains: give them as eval_dataset, and call train.")
        judged = self.manifest["held_out"]
        metrics = {f"{metric_key_prefix}_{name}": v for name, v in judged.items() if name != "per_annotator"}
        metrics[f"{metric_key_prefix}_loss"] = -judged[ITEM]
        self.log(metrics)
        return metrics

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """Raises ValueError: there is a policy for each type, and none of them speaks for all."""
        raise ValueError(
            "EM-DPO has a policy for each type, and no single one to predict with: give rows as eval_dataset to score "
            "them under the mixture, or take MixturePolicy.from_pretrained(output_dir).logps."
        )

    def save_model(self, output_dir=None, _internal_call=False):
        """The policies are saved by `train`, each in its folder; this writes the tokenizer beside mixture.json."""
        if self.is_world_process_zero():
            self.processing_class.save_pretrained(output_dir or self.args.output_dir)

    def log(self, logs, start_time=None):
        self.state.epoch = None  # each M-step has its own
        Trainer.log(self, logs, start_time)

    @classmethod
    def check_rows(cls, rows, args, *, training):
        Judged.of(rows, args.top_q, "train_dataset" if training else "eval_dataset")

    @classmethod
    def probed(cls, args: PreferenceConfig, rows: Dataset):
        """An M-step on all rows, whose posterior and reference are made up: they change no shape."""
        assert isinstance(args, EMDPOConfig)
        gamma, weights = np.full(len(rows), 1 / args.num_types), np.ones(len(rows))
        reference = [[0.0] * len(scores) for scores in rows["scores"]]
        return TypePolicyTrainer, args, m_step_rows(rows, gamma, weights, reference, args.normalize)

    # Steps of EM.

    def m_step(self, weights: np.ndarray, start: Path | None, seed: int, folder: Path) -> None:
        """An ordinary training in its own folder and order of the rows; it neither evaluates nor loads a model."""
        changes, judged = {"eval_strategy": "no", "do_eval": False, "precompute_ref_logps": False}, self.judged
        assert judged.reference is not None
        trainer = TypePolicyTrainer(
            self._load(start, trainable=True), args=stage_arguments(self.args, folder, seed, **changes),
            callbacks=copy.copy(self._callbacks),
            train_dataset=m_step_rows(judged.rows, weights, judged.weights, judged.reference, self.args.normalize),
            processing_class=self.processing_class,
            peft_config=self._peft_config if start is None else None,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        trainer.save_state()
        trainer.save_model()
        trainer.release()

    def score(self, folder: Path, judged: list[Judged], title: str, load: Callable | None = None) -> list[list]:
        """For each of `judged` the K log-probabilities of every row, read from `folder` or made now, by the policy in
        `folder` or by what `load` gives."""
        scores = score_rows(
            load or (lambda: self._load(folder / POLICY)), [part.rows for part in judged], folder,
            accelerator=self.accelerator, layout=self.args.layout, pad_token_id=self.collate.pad_token_id,
            budget=self.args.ref_tokens_per_batch, title=title,
        )  # fmt: skip
        free_memory()
        return scores

    # Policies.

    def _load(self, start: Path | None, *, model: str | None = None, trainable: bool = False):
        kwargs = {"init_kwargs": self._init_kwargs, "quantization_config": self._quantization_config}
        assert self._name is not None  # a model that was given loaded is saved first
        return load_start(model or self._name, start, trainable=trainable, **kwargs)

    def _load_reference(self):
        given = self._ref_model
        return self._load(None, model=given) if given is None or isinstance(given, str) else given

    # The folder.

    def _save_start(self, start: Path) -> None:
        """A model that was given loaded is saved, because it has no path to read it from again."""
        if self._name is not None or self.model is None:
            return
        base = self.model.unload() if isinstance(self.model, PeftModel) else self.model
        self._given_weights = weights_digest(base, adapter=None)
        self._name, self._init_kwargs = str(start), {"dtype": str(base.dtype).removeprefix("torch.")}

        def save() -> None:
            if not start.exists():
                base.save_pretrained(start.with_name("start-unfinished"))
                start.with_name("start-unfinished").rename(start)

        self.processes.main(save)

    def _whole_settings(self) -> dict:
        assert self._name is not None
        rows: dict[str, Any] = {
            f"{kind} rows": judged
            and digest([rows_digest(judged.rows), list(map(str, judged.annotators.names)), judged.owner.tolist()])
            for kind, judged in (("training", self.judged), ("held-out", self.held_out))
        }
        reference = self._ref_model
        if reference is not None:
            path = isinstance(reference, str)
            reference = model_fingerprint(reference) or reference if path else weights_digest(reference, adapter=None)
        start = policy_settings(self._name, self._quantization_config, self._init_kwargs) | {"reference": reference}
        if self._given_weights is not None:
            start["model files"] = self._given_weights
        return run_settings(self.args, free=FREE, adapter=self._peft_config, **start, **rows)

    def _publish(self, folder: Path, runs: list[list[Round]], rounds: list[Round]) -> None:
        """The files that a user opens first, at the top of the folder."""
        last = rounds[-1]
        for name in (tables.ANNOTATORS, *([tables.HELD_OUT] if self.held_out else [])):
            write_atomic(folder / name, (last.folder / name).read_bytes())
        tables.write_rounds(folder / "rounds.csv", [r.manifest for run in runs for r in run])
        self._write_mixture(folder / tables.MIXTURE, last.manifest)
        self.processing_class.save_pretrained(folder)
        histories = [[r.manifest for r in run] for run in runs]
        write_atomic(folder / "responsibilities.svg", responsibilities([r.posterior for r in rounds]).encode())
        write_atomic(folder / "log_likelihood.svg", log_likelihood(histories).encode())

    def _write_mixture(self, path: Path, manifest: dict) -> None:
        """What MixturePolicy reads; weights that were worked out for the same policies are kept."""
        before = read_json(path) if path.exists() else {"policies": None, "weights": None, "prior": None}
        if before["policies"] == manifest["policies"]:
            return
        if before["weights"] != before["prior"]:
            self.warn(
                f"{path} had weights ({before['weights_are']}) for the policies of an earlier round: they were set "
                "back to the shares of the annotators. Call polypo aggregate with a new --output for new ones."
            )
        mixture = {
            "base": self._name if self._given_weights is None else tables.START,
            "model_init_kwargs": self._init_kwargs,
            "adapters": self._peft_config is not None,
            **{name: manifest[name] for name in ("policies", "prior")},
            "weights": manifest["prior"],
            "weights_are": "shares of the annotators; polypo aggregate replaces them by the min-max weights",
            "beta": self.args.beta,
        }
        write_json(path, plain(mixture))

    def log_round(self, manifest: dict) -> None:
        self.state.global_step = manifest["round"] + 1
        logs = {f"em/{name}": manifest[name] for name in (ITEM, "changed_type", "median_certainty")}
        logs |= {f"em/type_{k}": share for k, share in enumerate(manifest["prior"])}
        self.log(logs | ({f"em/held_out_{ITEM}": manifest["held_out"][ITEM]} if self.held_out else {}))

    def warn(self, text: str) -> None:
        if self.args.process_index == 0:
            logger.warning(text)
