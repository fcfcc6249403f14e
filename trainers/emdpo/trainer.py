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
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import TrainOutput

from ..data.load import load_split, name_of
from ..forward.identity import weights_digest
from ..generation.collect import check_settings
from ..generation.start import load_start
from ..likelihood import ranking_logps
from ..runs.checkpoints import last_checkpoint
from ..runs.files import write_json
from ..runs.processes import Processes, free_memory
from ..runs.settings import digest, model_fingerprint, plain, training_settings
from . import init, tables
from .annotators import Annotators
from .config import EMDPOConfig
from .figures import draw_run
from .game import min_max_regret
from .m_step import TypePolicyTrainer, m_step_rows
from .mixture import mixture_weights, observed_log_likelihood, posterior
from .rounds import EM, Judged, Round, best
from .scoring import PolicyScorer, usable

__all__ = [
    "EMDPOConfig",
    "EMDPOTrainer",
    "min_max_regret",
    "mixture_weights",
    "observed_log_likelihood",
    "posterior",
    "ranking_logps",
]

logger = logging.getLogger(__name__)

# Fields that say how far a run goes, or where it works, and not what a round gives.
FREE = ("rounds", "restarts", "stop_change", "precompute_ref_logps")


class EMDPOTrainer(TypePolicyTrainer):
    """Finds `num_types` types of annotators; `train()` runs all rounds and goes on where a killed run stopped.

    `annotator` is a column of `train_dataset`. What a run leaves in `output_dir` is listed in rounds.py; beside it
    lie annotators.csv (who is of which type), rounds.csv, mixture.json and two pictures. After `train()`, `posterior`
    (N,T) and `annotators` hold the result, `policies` the folders, and `model` the policy of the most common type.

    Args:
        model: a path or hub id; a model that is already loaded is saved to `output_dir`, because each M-step reads its
            start from disk.
        ref_model: the one reference of all types, by default `model`.
        eval_dataset: rows of held-out annotators (or further rows of known ones), scored in every round.
        others: as for `PreferenceTrainer`; callbacks are handed to the M-steps as well.

    Raises:
        ValueError: what EM cannot do, before anything is trained.
    """

    unsupported_engines = ("fsdp",)

    def __init__(self, model, ref_model=None, args: EMDPOConfig | None = None, train_dataset=None, eval_dataset=None,
                 processing_class=None, compute_metrics=None, callbacks=None, optimizers=(None, None),
                 quantization_config=None, peft_config=None):  # fmt: skip
        for name, value in (("optimizers", any(optimizers)), ("compute_metrics", compute_metrics)):
            if value:
                raise ValueError(f"{name} cannot be used with EM-DPO, which trains several policies: omit it.")
        if isinstance(model, PeftModel):
            raise ValueError("EM-DPO starts each type from a plain model: merge the adapter, and pass peft_config.")
        if isinstance(eval_dataset, dict):
            raise ValueError("eval_dataset must be one data set of held-out annotators, not a dict.")
        super().__init__(
            model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, callbacks=callbacks,
            processing_class=processing_class, quantization_config=quantization_config, peft_config=peft_config,
        )  # fmt: skip
        if peft_config is None and isinstance(self.model, PeftModel):
            raise ValueError(
                f"model={model!r} is an adapter, but EM-DPO starts each type from a plain model: merge it."
            )
        self._name, self._weights_of_start = model if isinstance(model, str) else None, None
        self._init_kwargs = self.args.model_init_kwargs
        self._ref_model, self._peft_config, self._callbacks = ref_model, peft_config, callbacks
        self._quantization_config = quantization_config
        self.processes = Processes()
        self._refuse_unsupported()
        self.rows, judged = self._judged(self.train_dataset, "train_dataset")
        self.annotators, self._owner, self._weights_of_rows = judged
        self.held_out = None if self.eval_dataset is None else self._judged(self.eval_dataset, "eval_dataset")
        self.posterior: np.ndarray | None = None
        self.policies: list[Path] = []

    # What the user calls.

    @classmethod
    def run(cls, args: EMDPOConfig, data, model: str, *, quantization_config=None, peft_config=None) -> "EMDPOTrainer":
        """As `PreferenceTrainer.run`; what is done is found in `args.output_dir`, so no checkpoint need be named."""
        train_dataset, eval_dataset = (load_split(data, args, name) for name in ("train", "test"))
        loading = {"quantization_config": quantization_config, "peft_config": peft_config}
        trainer = cls(model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **loading)
        trainer.train_and_save(dataset=name_of(data))
        return trainer

    def train(self, resume_from_checkpoint=None, **kwargs) -> TrainOutput:
        """Runs the rounds that are not done yet. `resume_from_checkpoint` is not needed: the folder says what is done.

        Raises:
            ValueError: `output_dir` belongs to a run with other settings, and the message names what differs; or
                policies that these rounds and restarts need were deleted when it went further.
        """
        folder = Path(self.args.output_dir)
        self._first_guess(0)  # what is wrong with it shall be said before anything is written
        self.processes.say(f"First guess of the types: {self._kind_of_guess()}.")
        self._warn_of_strangers()
        self._save_start(folder / tables.START)
        path, settings = folder / "emdpo.json", self._settings()
        self._release()
        self.processes.main(lambda: path.exists() or self._create(path, settings))
        check_settings(path, settings, ways_out="choose another output_dir")
        score = self._scorer()
        reference = score(folder / "reference", self._load_reference, "Reference log-probabilities")
        self._ref_model = None
        em = EM(
            self.args, folder, self._with_reference(self.rows, self.annotators, self._owner, self._weights_of_rows,
                                                    reference[0]),
            self.held_out and self._with_reference(self.held_out[0], *self.held_out[1], reference[1]),
            train=self._m_step, score=lambda out, policy, title: score(out, lambda: self._load(policy), title),
            starts=self._first_guess, log=self._log_round, warn=self._warn, processes=self.processes,
        )  # fmt: skip
        runs = em.run()
        rounds = best(runs)
        self.posterior, self.policies = rounds[-1].posterior, rounds[-1].policies
        self.processes.main(lambda: self._publish(folder, runs, rounds))
        self.model = self._load(self.policies[int(mixture_weights(self.posterior).argmax())])
        return self._output(rounds)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Log-likelihood of the held-out rows given to the constructor, under the mixture after the last round.

        Raises:
            ValueError: another data set is given, there is none, or `train` has not run.
        """
        if eval_dataset is not None or self.held_out is None or self.posterior is None:
            raise ValueError("EM-DPO scores held-out rows while it trains: give them as eval_dataset, and call train.")
        found = tables.read_json(self.policies[0].parents[1] / "manifest.json")["held_out"]
        metrics = {f"{metric_key_prefix}_{name}": v for name, v in found.items() if name != "per_annotator"}
        metrics[f"{metric_key_prefix}_loss"] = -found["log_likelihood_per_item"]
        self.log(metrics)
        return metrics

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """Not defined for several policies.

        Raises:
            ValueError: always.
        """
        raise ValueError("EM-DPO has one policy per type: load a folder of `policies`, or a MixturePolicy.")

    def save_model(self, output_dir=None, _internal_call=False):
        """The policies are saved by `train`, each in its folder; this writes the tokenizer beside mixture.json."""
        if self.is_world_process_zero():
            self.processing_class.save_pretrained(output_dir or self.args.output_dir)

    def log(self, logs, start_time=None):
        self.state.epoch = None  # each M-step has its own
        Trainer.log(self, logs, start_time)

    # Steps of EM.

    def _m_step(self, weights: np.ndarray, start: Path | None, folder: Path, seed: int) -> None:
        rows = m_step_rows(self.rows, weights, self._weights_of_rows, self._reference, self.args.normalize)
        args = self._round_arguments(folder, seed)
        trainer = TypePolicyTrainer(
            self._load(start, trainable=True), args=args, train_dataset=rows, processing_class=self.processing_class,
            peft_config=self._peft_config if start is None else None, callbacks=copy.copy(self._callbacks),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        trainer.save_state()
        trainer.save_model()
        if trainer.is_deepspeed_enabled:
            trainer.accelerator.free_memory()  # ends the engine

    def _first_guess(self, restart: int) -> np.ndarray:
        """(N,T) first posterior of a restart."""
        args, random = self.args, np.random.default_rng((self.args.seed, restart))
        rows, kind = Annotators(self.annotators.names, self._owner), self._kind_of_guess()
        if args.num_types == 1:
            return np.ones((len(self.annotators), 1))
        if kind == "given":
            return init.given(args.initial_posterior, self.annotators, args.num_types)
        if kind == "dirichlet":
            return init.dirichlet(len(self.annotators), args.num_types, random)
        return getattr(init, kind)(self.rows, rows, args.num_types, random)

    def _warn_of_strangers(self) -> None:
        if self._kind_of_guess() != "given":
            return
        if names := init.strangers(self.args.initial_posterior, self.annotators):
            self._warn(
                f"initial_posterior has rows for {len(names)} annotators that train_dataset does not have, which are "
                f"not used: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}."
            )

    def _kind_of_guess(self) -> str:
        if self.args.init != "auto":
            return self.args.init
        if self.args.initial_posterior is not None:
            return "given"
        shared = init.shares_items(self.rows, Annotators(self.annotators.names, self._owner))
        return "agreement" if shared else "dirichlet"

    def _round_arguments(self, folder: Path, seed: int) -> EMDPOConfig:
        """An M-step's own folder and order of the rows; it neither evaluates nor loads a model."""
        own = copy.copy(self.args)
        own.output_dir, own.seed, own.model_init_kwargs = str(folder), seed, None
        own.eval_strategy, own.do_eval, own.precompute_ref_logps = "no", False, False
        own.deepspeed_plugin = None  # the first Accelerator of a process has it; a second one takes it from there
        return own

    # Policies.

    def _load(self, start: Path | None, *, trainable: bool = False):
        return load_start(
            self._name, start, init_kwargs=self._init_kwargs, quantization_config=self._quantization_config,
            trainable=trainable,
        )  # fmt: skip

    def _load_reference(self):
        if self._ref_model is None or isinstance(self._ref_model, str):
            return load_start(self._ref_model or self._name, None, init_kwargs=self._init_kwargs,
                              quantization_config=self._quantization_config)  # fmt: skip
        return self._ref_model

    def _scorer(self) -> PolicyScorer:
        datasets = [self.rows, *([self.held_out[0]] if self.held_out else [])]
        args = self.args
        return PolicyScorer(
            datasets, self.accelerator, self.data_collator.pad_token_id, args.layout, args.ref_tokens_per_batch
        )

    def _release(self) -> None:
        """Lets go of the start, so that each policy that is read from disk is alone in memory."""
        self.model = self.model_wrapped = self.callback_handler.model = None
        free_memory()

    # The data.

    @classmethod
    def check_rows(cls, rows, args, *, training):
        label = "train_dataset" if training else "eval_dataset"
        annotators = Annotators.of(rows, label)
        if not np.any(usable(list(rows["scores"]), args.top_q)):
            raise ValueError(f"no row of {label} says who was best: the best scores of each row tie.")
        if training and len(annotators) < args.num_types:
            raise ValueError(f"num_types={args.num_types} is more than the {len(annotators)} annotators of {label}.")

    def _judged(self, dataset: Dataset, label: str) -> tuple[Dataset, tuple]:
        """Rows that say anything, and (all annotators, owner of each row, weight of each row)."""
        annotators = Annotators.of(dataset, label)
        kept = np.flatnonzero(usable(list(dataset["scores"]), self.args.top_q))
        if len(kept) < len(dataset):
            self._warn(
                f"{label}: {len(dataset) - len(kept)} of {len(dataset)} rows have a tie for the best and say nothing "
                "about a ranking; they are left out."
            )
        rows = dataset.select(kept)
        weights = np.asarray(rows["weight"], float) if "weight" in rows.column_names else np.ones(len(rows))
        return rows, (annotators, annotators.owner[kept], weights)

    def _with_reference(self, rows: Dataset, annotators: Annotators, owner, weights, reference) -> Judged:
        if rows is self.rows:
            self._reference = reference
        return Judged(annotators, owner, list(rows["scores"]), weights, reference)

    # The folder.

    def _save_start(self, start: Path) -> None:
        """A model that was given loaded is saved, because it has no path to read it from again."""
        if self._name is not None or self.model is None:
            return
        base = self.model.unload() if isinstance(self.model, PeftModel) else self.model
        self._weights_of_start = weights_digest(base, adapter=None)
        self._name, self._init_kwargs = str(start), {"dtype": str(base.dtype).removeprefix("torch.")}

        def save() -> None:
            if not start.exists():
                base.save_pretrained(start.with_name("start-unfinished"))
                start.with_name("start-unfinished").rename(start)

        self.processes.main(save)

    def _settings(self) -> dict:
        settings = {
            **training_settings(self.args, ignore=FREE),
            "model": self._name if self._weights_of_start is None else "given loaded",
            "model files": self._weights_of_start or model_fingerprint(self._name),
            "peft_config": self._peft_config.to_dict() if self._peft_config is not None else None,
            "processes": self.args.world_size,
            "training rows": digest([self._hashed(self.rows), list(map(str, self.annotators.names))]),
            "held-out rows": digest([self._hashed(self.held_out[0])] if self.held_out else []),
        }
        return plain(settings)

    def _hashed(self, rows: Dataset) -> list:
        return [[row[c] for c in ("prompt_ids", "response_ids", "scores", "annotator")] for row in rows]

    def _create(self, path: Path, settings: dict) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"settings": settings, "hash": digest(settings)})

    def _publish(self, folder: Path, runs: list[list[Round]], rounds: list[Round]) -> None:
        """The files that a user opens first, at the top of the folder; policies of other restarts are deleted."""
        for run in runs:
            if run is not rounds:
                for policy in run[-1].policies:
                    tables.remove(policy)
        last = rounds[-1]
        for name in ("annotators.csv", "held_out.csv"):
            tables.copy_if_there(last.policies[0].parents[1] / name, folder / name)
        tables.write_rounds(folder / "rounds.csv", [r.manifest for run in runs for r in run])
        self._write_mixture(folder / tables.MIXTURE, last.manifest)
        self.processing_class.save_pretrained(folder)
        draw_run(folder, [r.posterior for r in rounds], [[r.manifest for r in run] for run in runs])

    def _write_mixture(self, path: Path, manifest: dict) -> None:
        """What MixturePolicy reads; weights that were worked out for the same policies are kept."""
        before = tables.read_json(path) if path.exists() else None
        if before and before["policies"] == manifest["policies"]:
            return
        if before and before["weights"] != before["prior"]:
            self._warn(
                f"{path} had weights ({before['weights_are']}) for the policies of an earlier round: they were set "
                "back to the shares of the annotators. Call scripts/aggregate.py with a new --output for new ones."
            )
        write_json(path, plain({
            "base": self._name if self._weights_of_start is None else tables.START,
            "model_init_kwargs": self._init_kwargs,
            "adapters": self._peft_config is not None,
            "policies": manifest["policies"],
            "prior": manifest["prior"],
            "weights": manifest["prior"],
            "weights_are": "shares of the annotators; scripts/aggregate.py replaces them by the min-max weights",
            "beta": self.args.beta,
        }))  # fmt: skip

    def _output(self, rounds: list[Round]) -> TrainOutput:
        last = rounds[-1].manifest
        metrics = {"train_loss": -last["log_likelihood_per_item"], "train_rounds": len(rounds)}
        metrics |= {f"train_{n}": last[n] for n in ("log_likelihood_per_annotator", "smallest_type", "changed_type")}
        return TrainOutput(len(rounds), metrics["train_loss"], metrics)

    def _log_round(self, manifest: dict) -> None:
        self.state.global_step = manifest["round"] + 1
        logs = {f"em/{n}": manifest[n] for n in ("log_likelihood_per_item", "changed_type", "median_certainty")}
        logs |= {f"em/type_{k}": share for k, share in enumerate(manifest["prior"])}
        if "held_out" in manifest:
            name = "log_likelihood_per_item"
            logs[f"em/held_out_{name}"] = manifest["held_out"][name]
        self.log(logs)

    def _warn(self, text: str) -> None:
        if self.args.process_index == 0:
            logger.warning(text)

    def _refuse_unsupported(self) -> None:
        """Raises ValueError for what EM cannot do under this engine."""
        if self.is_fsdp_enabled:
            raise ValueError("EM-DPO does not run under FSDP: use one process, DDP, ZeRO-2 or ZeRO-3.")
        if not is_deepspeed_zero3_enabled():
            return
        if self._name is None:
            raise ValueError("Under ZeRO-3 each M-step reads the policy from its path: pass the model as a path.")
        gathered = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
        if not self.args.hf_deepspeed_config.is_true(gathered):
            raise ValueError(
                "Under ZeRO-3 EM-DPO needs whole weights on disk: set zero3_save_16bit_model (in the DeepSpeed file "
                "stage3_gather_16bit_weights_on_model_save) to true."
            )
