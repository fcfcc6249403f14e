"""How a training goes over a stream of rows: its steps, its place in every checkpoint, and its counts in the log."""

import logging
from pathlib import Path

from accelerate.utils import gather_object
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from .config import PreferenceConfig
from .data.stream import Block, TokenStream, stream_loader
from .runs.files import read_json, write_json
from .runs.settings import rows_digest

logger = logging.getLogger(__name__)

PLACE = "stream.json"  # in a checkpoint


class StreamingTrainer(Trainer):
    """A `transformers.Trainer` whose `train_dataset` may be a `TokenStream`."""

    args: PreferenceConfig
    train_dataset: Dataset | TokenStream | None

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, TokenStream):
            return stream_loader(self.train_dataset, self.data_collator, self.args, batch_size=self._train_batch_size)
        return super().get_train_dataloader()

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments, **keywords):
        """As `Trainer.train`; a stream goes on where the checkpoint says, without the batches before it."""
        stream = self.train_dataset
        if not isinstance(stream, TokenStream):
            return super().train(resume_from_checkpoint, *arguments, **keywords)
        stream.go_on(read_json(f"{resume_from_checkpoint}/{PLACE}") if resume_from_checkpoint else None)
        # Else the Trainer would pass over as many batches again.
        asked, self.args.ignore_data_skip = self.args.ignore_data_skip, True
        callback = _Steps(self)
        self.add_callback(callback)
        try:
            return super().train(resume_from_checkpoint, *arguments, **keywords)
        finally:
            self.remove_callback(callback)
            self.args.ignore_data_skip = asked
            stream.report.log(logger, "The stream")

    def get_batch_samples(self, *arguments, **keywords):
        """As the Trainer's.

        Raises:
            ValueError: a batch of a stream holds another number of rows than `place` counts.
        """
        batches, count = super().get_batch_samples(*arguments, **keywords)
        if isinstance(self.train_dataset, TokenStream):
            for size in {len(batch["scores"]) for batch in batches} - {self._train_batch_size}:
                raise ValueError(
                    f"A batch of the stream holds {size} rows where per_device_train_batch_size is "
                    f"{self._train_batch_size}, so a checkpoint would go on from another row: let the loader or "
                    "collator of your own give as many."
                )
        return batches, count

    def set_initial_training_values(self, *arguments, **keywords):
        """As the Trainer's; a stream is one epoch of `max_steps`, so that no step follows on the last one."""
        epochs, *others = super().set_initial_training_values(*arguments, **keywords)
        return 1 if isinstance(self.train_dataset, TokenStream) else epochs, *others

    def place(self, stream: TokenStream) -> dict:
        """What leads to the rows of the next step; what led to earlier ones is forgotten."""
        per_step = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return stream.state(self.state.global_step * per_step)

    def rows_settings(self) -> dict:
        """What a run depends on of its rows; of a stream, which has no end, the first ones.

        Raises:
            ValueError: the processes read different rows.
        """
        if not isinstance(self.train_dataset, TokenStream):
            return {"training rows": None if self.train_dataset is None else rows_digest(self.train_dataset)}
        found = gather_object([rows_digest(self.train_dataset.head)])
        if len({*found}) > 1:
            raise ValueError(
                "The processes read different rows from the stream, of which each takes its share anyway: leave out "
                "split_dataset_by_node, and what else goes by the process."
            )
        return {"training rows": found[0], "stream_buffer": self.args.stream_buffer}

    def check_place(self, checkpoint: str) -> None:
        """Raises ValueError for a checkpoint without the place in the stream."""
        if not isinstance(self.train_dataset, TokenStream):
            return
        try:
            place = read_json(Path(checkpoint) / PLACE)
            whole = 0 <= Block(**place["block"]).rows <= place["trained"]
        except (OSError, KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise ValueError(
                f"resume_from_checkpoint: {checkpoint} has no {PLACE} with a place in the stream, which would begin "
                "anew: put the file back, or take another checkpoint."
            )

    def save_beside(self, checkpoint: Path) -> None:
        """What a checkpoint must hold beside what the Trainer writes; every process calls it."""
        if self.args.should_save and isinstance(self.train_dataset, TokenStream):
            write_json(checkpoint / PLACE, self.place(self.train_dataset))

    def log(self, logs, start_time=None):
        if "loss" in logs and isinstance(self.train_dataset, TokenStream):
            logs = logs | self.train_dataset.counts()
        super().log(logs, start_time)


class _Steps(TrainerCallback):
    """What the end of a step means for a stream."""

    def __init__(self, trainer: StreamingTrainer):
        self._trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self._trainer.place(self._trainer.train_dataset)
        state.epoch = state.global_step / state.max_steps  # the Trainer counts from where it went on
