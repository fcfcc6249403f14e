"""Rows of a stream for a training: tokenised as they are read, mixed within blocks, gone on with in the middle.

A stream is a `datasets.IterableDataset`. It is read in blocks; the rows of a block come in an order that depends on
the seed and the number of the block, and are tokenised in this order, a batch at a time. So what a run needs in order
to go on is small: where the source was when a block began, and how many rows of that block are done.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, Features, IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from ..config import PreferenceConfig
from .drops import EVENTS, GIVE_UP, KEPT, DropReport, collected_reports, is_first_process, none_usable
from .json_rows import digest, plain
from .rows import NOT_TEXT, TEMPLATE, UNFINISHED, Row, describe
from .tokenization import BATCH, CUT, IDS, RowTokenizer, warn_of_cut

logger = logging.getLogger(__name__)

OWN = ("prompt", "responses", "scores", "chosen", "rejected", "weight", "annotator", UNFINISHED, *TEMPLATE, *NOT_TEXT)
# Options that a stream cannot follow: whether one is as it must be, and what to do.
REFUSED: dict[str, tuple[Callable[[PreferenceConfig], bool], str]] = {
    "max_steps": (
        lambda args: args.max_steps > 0,
        "says nothing: set it, as a stream has no length and so no epochs.",
    ),
    "max_tokens_per_batch": (
        lambda args: args.max_tokens_per_batch is None,
        "cannot group all rows before the first step: set per_device_train_batch_size in its place.",
    ),
    "precompute_ref_logps": (
        lambda args: not args.precompute_ref_logps,
        "cannot score all rows before the first step: leave it out.",
    ),
    "train_sampling_strategy": (
        lambda args: args.train_sampling_strategy in ("random", "sequential"),
        "needs the lengths of all rows: leave it out, or set it to 'sequential' for the order of the stream.",
    ),
    "dataloader_num_workers": (
        lambda args: args.dataloader_num_workers == 0,
        "would put the place in the stream where no checkpoint is written: set it to 0.",
    ),
    "accelerator_config": (
        lambda args: not args.accelerator_config.split_batches,  # type: ignore[union-attr]
        "does not work: leave split_batches out.",
    ),
}


class Block(NamedTuple):
    """Where a block of rows begins. The numbers count what comes before it."""

    number: int = 0
    rows: int = 0  # usable ones
    passes: int = 0  # over the source
    read: int = 0  # rows of the source, in this pass
    state: dict | None = None  # of the source; None: only going through the pass from its beginning leads there
    digest: str | None = None  # of its first rows
    report: dict[str, Any] | None = None  # what was dropped


class TokenStream(torch.utils.data.IterableDataset):
    """Tokenised rows of a source: where it ends, it is read again, without an end unless `needed` is set.

    Args:
        source: canonical rows, TRL pairs or tokenised rows, as for `tokenize_dataset`.
        columns: further columns to carry along.
        buffer: rows of a block.
        mixed: whether the rows of a block come in a random order.
        options: of `tokenize_dataset`.

    Raises:
        ValueError: there is no row, or none that can be used; also while it is read, and for a row as
            `tokenize_dataset`.
    """

    def __init__(
        self,
        source: IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        columns: tuple[str, ...] = (),
        buffer: int = 1024,
        mixed: bool = True,
        seed: int = 0,
        **options,
    ):
        self.source, self.buffer, self.mixed, self.seed = source.with_format(None), buffer, mixed, seed
        self.check: Callable[[Dataset], None] = lambda rows: None  # raises for tokenised rows that cannot be used
        self.needed: int | None = None  # rows of the whole training, behind which nothing is read
        self.blocks: deque[Block] = deque()
        self.report, self.passes, self.unusable = DropReport(), 0, 0
        with collected_reports():  # a source that counts what it drops itself is not read to its end here
            rows = _records(self.source)
            some = list(islice(rows, BATCH))
            if not some:
                raise ValueError("the stream has no rows.")
            first, kinds = some[:buffer], source.features or dict.fromkeys(some[0])
            self.known = {*OWN, *IDS, *columns}
            self.names = [name for name in kinds if name in self.known]
            kinds = {name: kinds[name] for name in self.names}
            self.how = RowTokenizer(tokenizer, kinds, columns, **options)
            self.how.features.pop("prompt", None)  # of no use without an index
            while not (kept := self._tokenized(some, range(self.report.rows_in, self.report.rows_in + len(some)))):
                some = list(islice(rows, BATCH))
                if not some:
                    raise none_usable(self.unusable, self.report)
            self.head = self._table(kept)  # the first rows, where rows are looked at before the first step
            self.first = Block(digest=self._digest(first))
            del rows
        self.report = DropReport()
        self.go_on(None)

    def go_on(self, state: dict | None) -> None:
        """Iterating gives the rows that follow on this `state`; None: all rows."""
        self.trained: int = 0 if state is None else state["trained"]
        self.start = self.first if state is None else Block(**state["block"])

    def state(self, trained: int) -> dict:
        """What leads to the rows after the first `trained` ones, as JSON. Blocks before them are forgotten."""
        while len(self.blocks) > 1 and self.blocks[1].rows <= trained:
            self.blocks.popleft()
        return {"trained": trained, "block": self.blocks[0]._asdict()}

    def first_rows(self, count: int) -> Dataset:
        """Those of the first `count` rows of the source that can be used."""
        self.report, rows = DropReport(), list(islice(_records(self.source), count))
        parts = [range(len(rows))[at : at + BATCH] for at in range(0, len(rows), BATCH)]
        kept = [row for part in parts for row in self._tokenized([rows[i] for i in part], part)]
        if not kept:
            raise none_usable(self.unusable, self.report)
        return self._table(kept)

    def counts(self) -> dict[str, int]:
        """For the log: rows of the source that were read, those of them that were dropped, and passes begun."""
        dropped = self.report.rows_in - self.report.rows_out
        return {"stream/rows": self.report.rows_in, "stream/dropped": dropped, "stream/passes": self.passes + 1}

    def __iter__(self) -> Iterator[Row]:
        before = self.start.rows
        return islice(self._rows(), self.trained - before, None if self.needed is None else self.needed - before)

    def _rows(self) -> Iterator[Row]:
        """The usable rows from the beginning of a block on."""
        block, self.passes, self.unusable = self.start, self.start.passes, 0
        counts: dict[str, Any] = {
            name: Counter(n) if isinstance(n, dict) else n for name, n in (block.report or {}).items()
        }
        self.report = DropReport(**counts)
        self.blocks.clear()
        block, source, rows = self._go_to(block)
        while True:
            if rows:
                self.blocks.append(block._replace(digest=self._digest(rows), report=plain(vars(self.report))))
                count = block.rows
                for places in self._order(len(rows), block.number):
                    kept = self._tokenized([rows[i] for i in places], [block.read + i for i in places])
                    count += len(kept)
                    yield from kept
                state = plain(self.source.state_dict())
                block = Block(block.number + 1, count, block.passes, block.read + len(rows), state)
            else:
                self._end_pass(block)
                block = block._replace(passes=block.passes + 1, read=0, state=None)
                self.passes = block.passes
                source = self._source_at(block)
            rows = list(islice(source, self.buffer))

    def _go_to(self, block: Block) -> tuple[Block, Iterator[Row], list[Row]]:
        """The block with a state that leads there, its rows, and the iterator over those after them."""
        for state in [block.state, None] if block.state else [None]:
            block = block._replace(state=state)
            source = self._source_at(block)
            try:
                rows = list(islice(source, self.buffer))
            except (KeyError, IndexError, TypeError):
                if not state:
                    raise
                rows = []  # it was written by another release of `datasets`
            if self._digest(rows) == block.digest:
                return block, source, rows
            if state and is_first_process():
                logger.warning(
                    "What the checkpoint keeps of the stream does not lead to its next rows (a buffer of its own "
                    "shuffle is not kept): it is read again from the beginning of pass %d, %d rows.",
                    block.passes + 1,
                    block.read,
                )
        raise ValueError(
            f"pass {block.passes + 1} over the stream has other rows than before, from row {block.read} on: give one "
            "that reads the same rows each time, such as IterableDataset.from_generator(function) of a function that "
            "opens its files anew."
        )

    def _source_at(self, block: Block) -> Iterator[Row]:
        self.source.set_epoch(block.passes)  # a stream with a shuffle of its own goes by it
        self.source.load_state_dict(block.state or {})
        return _records(self.source if block.state else islice(self.source, block.read, None), block.read)

    def _order(self, count: int, number: int) -> Iterator[list[int]]:
        """The places of a block in their order, as many at a time as are tokenised together."""
        order = np.random.default_rng((self.seed, number)).permutation(count) if self.mixed else np.arange(count)
        return (order[start : start + BATCH].tolist() for start in range(0, count, BATCH))

    def _tokenized(self, rows: list[Row], indices: Sequence[int]) -> list[Row]:
        """Those that can be used, tokenised; the others are counted."""
        for row, index in zip(rows, indices, strict=True):
            if other := {*self.names} ^ (row.keys() & self.known):
                filler = (
                    "1 where a row counts as others do" if min(other) == "weight" else "null where there is nothing"
                )
                raise ValueError(
                    f"row {index}: column {min(other)!r} is in some rows of the stream and not in others: give it in "
                    f"all of them, with {filler}."
                )
        given = [(row, index) for row, index in zip(rows, indices, strict=True) if row.get(KEPT, True)]
        columns = {name: [row[name] for row, _ in given] for name in self.names}
        none: dict[str, list] = {KEPT: [], EVENTS: [], CUT: []}
        batch = self.how.counted_batch(columns, [index for _, index in given]) if given else none
        warn_of_cut(batch[CUT])
        for row in rows:
            if not row.get(KEPT, True):  # of a source that leaves counting to its reader
                self.report.add(False, row[EVENTS])
        for (row, _), keep, reasons in zip(given, batch[KEPT], batch[EVENTS], strict=True):
            self.report.add(keep, [*row.get(EVENTS, []), *reasons])
        kept = [i for i, keep in enumerate(batch[KEPT]) if keep]
        self.unusable = 0 if kept else self.unusable + len(rows)
        if self.unusable >= GIVE_UP:
            raise none_usable(self.unusable, self.report)
        usable = [{name: batch[name][i] for name in self.how.features} for i in kept]
        if usable:
            self.check(self._table(usable))
        return usable

    def _table(self, rows: list[Row]) -> Dataset:
        kinds = self.how.features  # None where the source has no types
        return Dataset.from_list(rows, features=Features(kinds) if None not in kinds.values() else None)

    def _end_pass(self, block: Block) -> None:
        if not block.read:
            raise ValueError(f"pass {block.passes + 1} over the stream gives no rows: it must begin anew each time.")
        if not self.report.rows_out:
            raise none_usable(self.unusable, self.report)
        if is_first_process():
            level = logging.INFO if block.passes else logging.WARNING
            logger.log(level, "The stream ends after %d rows and is read again. %s", block.read, self.report)

    def _digest(self, rows: list[Row]) -> str:
        """Of the first rows of a block."""
        values = [[row.get(name) for name in self.names] for row in rows[:BATCH]]
        return digest(values)


def _records(source: Iterable, begin: int = 0) -> Iterator[Row]:
    """What a source gives, as long as these are rows."""
    for index, row in enumerate(source, begin):
        if not isinstance(row, dict):
            raise ValueError(f"row {index} of the stream is {describe(row)}; give a dict of its columns.")
        yield row


def token_stream(
    source: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: PreferenceConfig,
    columns: tuple[str, ...],
    **options,
) -> TokenStream:
    """The stream of a training; `options` are those of `tokenize_dataset`.

    Raises:
        ValueError: an option of the training that a stream cannot follow.
    """
    for name, (follows, fix) in REFUSED.items():
        if not follows(args):
            raise ValueError(f"With a stream {name}={getattr(args, name)!r} {fix}")
    seed = args.seed if args.data_seed is None else args.data_seed
    mixed = args.train_sampling_strategy != "sequential"
    return TokenStream(
        source, tokenizer, columns=columns, buffer=args.stream_buffer, mixed=mixed, seed=seed, **options
    )


def refuse_stream(rows, who: str) -> None:
    """Raises ValueError where `who` is given a stream and needs all rows at once."""
    if isinstance(rows, IterableDataset):
        raise ValueError(
            f"{who} needs all rows at once, and a stream has no end that is known: give a part of it as a table, "
            "Dataset.from_list(list(stream.take(1000)))."
        )


def stream_loader(stream: TokenStream, collate: Callable, args: PreferenceConfig, *, batch_size: int) -> DataLoader:
    """Batches of a stream: every process reads all rows and takes its share of each global batch."""
    # A loader is one batch ahead: of the last one it would read and announce another pass for nothing.
    stream.needed = args.max_steps * args.gradient_accumulation_steps * batch_size * args.world_size
    loader = DataLoader(
        stream,
        batch_size=batch_size,
        collate_fn=collate,
        pin_memory=args.dataloader_pin_memory,
        generator=torch.Generator(),  # else a start draws from the random numbers that a checkpoint restored
    )
    return prepare_data_loader(
        loader, args.device, args.world_size, args.process_index, put_on_device=True, dispatch_batches=False
    )
