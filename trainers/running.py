"""How a run starts, goes on after a kill, and ends: what surrounds the steps of a trainer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from . import rounds
from .config import PreferenceConfig
from .data.drops import collected_reports
from .data.load import load_split, name_of, refuse_unknown_splits
from .data.stream import TokenStream, refuse_stream
from .forward import policy as policies
from .runs.checkpoints import (
    DEFAULT,
    EARLY_STOPPING,
    STATE,
    adapter_folder,
    begin_checkpoint,
    check_checkpoint,
    checkpoint_to_resume,
    has_ended,
    last_checkpoint,
    lost_weights,
    refuse_other_run,
    remove_outcome,
)
from .runs.files import read_json
from .runs.processes import refuse_partial_weights
from .runs.record import write_record
from .runs.settings import adapter_settings, run_settings
from .streaming import StreamingTrainer


class RunningTrainer(StreamingTrainer):
    """A `transformers.Trainer` whose checkpoints are whole and of the same run, or refused.

    A subclass sets `start`, what its run starts from (`start_of_run`).
    """

    config_class: type[PreferenceConfig] = PreferenceConfig
    method: str = "preferences"
    paper: tuple[str, str] | None = None  # title, arXiv number
    start: dict[str, str]
    args: PreferenceConfig
    model: PreTrainedModel | PeftModel
    processing_class: PreTrainedTokenizerBase
    eval_dataset: Dataset | dict[str, Dataset] | None
    start_adapter: str | None = None  # that training goes on from: a path, or words
    reference_told: str | None = None  # what the reference is, in words; None without one
    single_training = True  # whether `run` is one training, with one policy at its end
    untouched = True  # whether the policy is as it was given
    left_out: list[tuple]  # of the data, by each pass over it: title and report
    data: dict = {}  # the launcher's data arguments

    @classmethod
    def run(
        cls,
        args: PreferenceConfig,
        data,
        model: str,
        *,
        quantization_config=None,
        peft_config: PeftConfig | None = None,
    ) -> "RunningTrainer | None":
        """Train, evaluate, and write model, metrics and model card to `args.output_dir`: what the launcher calls.

        It goes on from the checkpoint that `args.resume_from_checkpoint` names (true: the last whole one, if there is
        one), and leaves a finished run as it is. With `args.self_enhance` it trains in rounds (rounds.py).

        Args:
            data: splits, `{"train": rows, "test": rows}`, of which "test" may be missing; or `DataArguments`.
            model: path or hub id, loaded with `args.model_init_kwargs`.

        Returns:
            the trainer; None for a run that was finished before, and for rounds, each of which has a trainer of its
            own. The model lies in `args.output_dir` in any case.

        Raises:
            ValueError: `output_dir` holds a run with other settings, which the message names, or checkpoints that
                nobody asked to go on from; `data` has another split.
        """
        refuse_unknown_splits(data, "train", "test")
        loading = {"quantization_config": quantization_config, "peft_config": peft_config}
        with collected_reports(of="training rows") as left_out:
            splits = {"train_dataset": load_split(data, args, "train")}
        with collected_reports(left_out, of="held-out rows"):
            splits["eval_dataset"] = load_split(data, args, "test")
        if args.self_enhance is not None:
            refuse_stream(splits["train_dataset"], "self_enhance")
            if isinstance(data, Mapping):  # data arguments have read rows as the args want them
                with collected_reports(left_out, of="all rows"):
                    splits = {name: rounds.canonical(rows, args) for name, rows in splits.items()}
            rounds.Rounds(cls, args, model, dataset=name_of(data), left_out=left_out, **splits, **loading).run()
            return None
        rounds.refuse_folder_of_rounds(args.output_dir)
        checkpoint = checkpoint_to_resume(args)
        make: Callable[..., RunningTrainer] = cls  # that of a method takes a path
        trainer = make(model, args=args, **splits, **loading)
        trainer.left_out[:0] = left_out
        trainer.data = {} if isinstance(data, Mapping) else vars(data)
        if checkpoint is not None and has_ended(args, checkpoint):
            refuse_other_run(checkpoint, trainer.run_settings())
            if args.process_index == 0:
                print(f"The run in output_dir={args.output_dir} is finished: nothing is trained.")
            return None
        trainer.train_and_save(checkpoint, name_of(data))
        return trainer

    def train_and_save(self, checkpoint: str | None = None, dataset: str | list[str] | None = None) -> None:
        """Train from `checkpoint` or from the start, evaluate, and write everything to `args.output_dir`.

        `dataset` names the data on the model card, which is written last and says that the run is finished.
        """
        result = self.train(resume_from_checkpoint=checkpoint)
        if self.is_world_process_zero():
            remove_outcome(self.args.output_dir)
        self.log_metrics("train", result.metrics)
        self.save_metrics("train", result.metrics)
        self.save_model()  # before the evaluation, which may cast the weights
        if self.eval_dataset is not None:
            metrics = self.evaluate()
            self.log_metrics("eval", metrics)
            self.save_metrics("eval", metrics)
        self.save_state()
        self.create_model_card(dataset=dataset)
        if self.args.push_to_hub:
            self.push_to_hub(dataset=dataset)

    def train_stage(self, start: Path | None, dataset, left_out, then: str) -> None:
        """`train_and_save` as one training of several, from its last whole checkpoint on, and lets go of the model.

        Args:
            start: where the policy was read from, which the trainer got loaded.
            dataset: name of the data.
            left_out: what reading the data left out, for the record.
            then: what reads the policy from disk, for the error of an engine that would leave no whole weights there.
        """
        self.left_out[:0] = left_out
        self.start_adapter = self.start_adapter and str(start)
        refuse_partial_weights(self.accelerator, then)
        self.train_and_save(last_checkpoint(self.args.output_dir), dataset)
        self.release()

    def release(self) -> None:
        """Ends the engine: another training can follow in this process."""
        self.accelerator.free_memory()

    def begin(self, checkpoint: str | None) -> None:
        """What is done before the first step of a training, which goes on from `checkpoint` if there is one."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments, **keywords):
        """As `Trainer.train`; True takes the last checkpoint in `output_dir` that was saved to its end.

        Raises:
            ValueError: there is no such checkpoint, or the one that is named is of another run (`check_checkpoint`);
                no weight of the policy is trainable; `self_enhance` is set, whose rounds `run` starts.
        """
        if self.args.self_enhance is not None:
            raise ValueError(
                "self_enhance trains in rounds, each with a trainer of its own: start them with "
                f"{type(self).__name__}.run(args, data, model), or leave it out."
            )
        policies.refuse_frozen(self.model)
        self._settings = self.run_settings()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint: there is no whole checkpoint in output_dir={self.args.output_dir}. "
                    "Leave it out to begin at step 0."
                )
        if resume_from_checkpoint:
            self.check_checkpoint(resume_from_checkpoint)
            if self.is_world_process_zero():
                print(f"Going on from {resume_from_checkpoint}.", flush=True)
            self.untouched = False
            if self._saved_adapter == DEFAULT:  # older releases pass over this one of several adapters
                self.model.load_adapter(resume_from_checkpoint, DEFAULT, is_trainable=True)
        self.write_record()
        begins = _Beginning(self, str(resume_from_checkpoint) if resume_from_checkpoint else None)
        callbacks: list[TrainerCallback] = [begins]
        if self.args.early_stopping_patience is not None:
            callbacks.append(EarlyStopping.at(resume_from_checkpoint, self.args.early_stopping_patience))
        for callback in callbacks:
            self.add_callback(callback)
        try:
            return super().train(resume_from_checkpoint or None, *arguments, **keywords)
        finally:
            for callback in callbacks:
                self.remove_callback(callback)
            if isinstance(self.train_dataset, TokenStream):
                self.write_record()  # again: what it left out is known now

    def hyperparameter_search(self, *arguments, **keywords):
        """Raises ValueError: transformers would exchange the model, and not what was made of it and the arguments."""
        raise ValueError(
            "hyperparameter_search trains a new model with the old reference, rows and checks, whose arguments may be "
            "others by then: make a trainer for each trial (docs/sweeps.md), or use polypo sweep."
        )

    def _check_finite(self, loss: Tensor, losses: Tensor, batch: dict[str, Tensor]) -> None:
        """Raises FloatingPointError for a loss that the Trainer would show as 0 and train on with."""
        if torch.isfinite(loss):
            return
        wrong = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        ends = [self.processing_class.decode(batch["prompt_ids"][b][batch["prompt_mask"][b]])[-80:] for b in wrong[:3]]
        step = self.state.global_step
        raise FloatingPointError(
            f"The loss of step {step + 1} is {float(loss)}: that of {len(wrong)} of {len(losses)} prompts is not "
            f"finite, of those that end with {', '.join(map(repr, ends))}. The weights are those of step {step}: look "
            "at these rows, lower learning_rate or set max_grad_norm, and go on from the last checkpoint."
        )

    def write_record(self) -> None:
        """run.json in `output_dir`: what `polypo report` says of this run beside its log."""
        adapter = self.model.active_peft_config if isinstance(self.model, PeftModel) else None
        facts: dict[str, Any] = {"trainer": type(self).__name__, "method": self.method, "data": self.data}
        facts |= {"model": policies.base_model(self.model).config._name_or_path, "start_adapter": self.start_adapter}
        facts |= {"adapter_name": adapter and self.model.active_adapter, "reference": self.reference_told}
        streamed = [self.train_dataset.report] if isinstance(self.train_dataset, TokenStream) else []
        left_out = [*self.left_out, *(("stream", report) for report in streamed if report.rows_in)]
        if self.is_world_process_zero():
            write_record(self.args, left_out, **facts, adapter=adapter and adapter_settings(adapter))

    def run_settings(self) -> dict:
        """What the weights depend on: a checkpoint written with other settings is refused."""
        adapter = self.model.active_peft_config if isinstance(self.model, PeftModel) else None
        start = broadcast_object_list([self.start])[0]
        own = {"trainer": type(self).__name__, **self.rows_settings(), **start}
        return run_settings(self.args, length=False, adapter=adapter, **own)

    def check_checkpoint(self, checkpoint: str) -> None:
        """Raises ValueError for a checkpoint that this run cannot go on from as it was."""
        engine = "deepspeed" if self.is_deepspeed_enabled else "fsdp" if self.is_fsdp_enabled else None
        check_checkpoint(checkpoint, self.model, self._settings, engine=engine)
        self.check_place(checkpoint)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            begin_checkpoint(folder, self._settings, self.args)
        self.save_beside(folder)
        super()._save_checkpoint(model, trial)

    def _load_best_model(self):
        """The Trainer finds an adapter that has no name only, and would else keep the last weights."""
        best, adapter = self.state.best_model_checkpoint, self._saved_adapter
        if adapter in (None, DEFAULT):
            super()._load_best_model()
        else:
            self.model.load_adapter(str(adapter_folder(best, adapter)), adapter, is_trainable=True)

    @property
    def _saved_adapter(self) -> str | None:
        """The adapter in training, where a checkpoint holds it in a file of its own."""
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        return self.model.active_adapter if isinstance(self.model, PeftModel) and not sharded else None

    def _issue_warnings_after_load(self, load_result):
        """The Trainer warns where weights of a checkpoint are missing or left over, and trains on."""
        lost = lost_weights(self.model, load_result.missing_keys)
        if wrong := lost or sorted(load_result.unexpected_keys):
            raise ValueError(
                f"The checkpoint is of another model: {len(wrong)} weights differ by name, such as {wrong[0]}."
            )

    def create_model_card(self, **kwargs):
        """The Trainer's card, tagged and headed with the method, its paper and the data."""
        given = [kwargs.pop(name, None) or [] for name in ("tags", "dataset")]
        tags, data = ([value] if isinstance(value, str) else value for value in given)
        tags = [*tags, "polypo", self.method.lower()]
        of_hub = [name for name in data if name.count("/") == 1 and not Path(name).exists()]
        own = {"tags": tags, "dataset": data, "dataset_tags": of_hub, "dataset_args": []}
        super().create_model_card(**own | kwargs)
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / "README.md"
        card = ModelCard.load(path)
        card.data.tags = sorted({*(card.data.tags or []), *tags})  # PEFT puts its own in their place
        paper = f"\nPaper: [{self.paper[0]}](https://arxiv.org/abs/{self.paper[1]})\n" if self.paper else ""
        text = card.text.replace("trained from scratch", f"trained from `{self.model.config._name_or_path}`")
        went_on = f", from the adapter `{self.start_adapter}`" if self.start_adapter else ""
        card.text = f"\nTrained with **{self.method}** by PolyPO's `{type(self).__name__}`{went_on}.\n{paper}{text}"
        card.save(path)


class EarlyStopping(EarlyStoppingCallback):
    """Goes on counting where a checkpoint was; one that was enough to stop at ends the training again."""

    @classmethod
    def at(cls, checkpoint: str | bool | None, patience: int) -> "EarlyStopping":
        stopping = cls(patience)
        if checkpoint:
            kept = read_json(Path(str(checkpoint)) / STATE).get("stateful_callbacks", {}).get(EARLY_STOPPING, {})
            vars(stopping).update(kept.get("attributes", {}))  # of a checkpoint of an older release none
        return stopping

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        control.should_training_stop = self._has_ended

    def on_train_end(self, args, state, control, **kwargs):
        state.stateful_callbacks[EARLY_STOPPING] = self.state()  # of the run; the last checkpoint may be older
        if self._has_ended and state.is_world_process_zero:
            print(
                f"early_stopping_patience: the training ended at step {state.global_step}, as "
                f"{args.metric_for_best_model} had not become better in {self.early_stopping_patience_counter} "
                f"evaluations. The weights of step {state.best_global_step} are kept ({state.best_metric:.4f}).",
                flush=True,
            )

    @property
    def _has_ended(self) -> bool:
        return self.early_stopping_patience_counter >= self.early_stopping_patience


class _Beginning(TrainerCallback):
    """Calls `begin` before the first step, and notes that step."""

    def __init__(self, trainer: RunningTrainer, checkpoint: str | None):
        self._trainer, self._checkpoint = trainer, checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.begin(self._checkpoint)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._trainer.untouched = False
