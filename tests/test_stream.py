"""Streams: the rows of a table in another order, whole after a kill, the same on all processes, and never a hang."""

import json
import signal
from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset, interleave_datasets
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers.trainer_utils import SaveStrategy

import processes
from helpers import leave_processes, tiny_llama
from test_resume import die_at, finish, in_child
from test_trainer import config, logged, rows
from trainers import EMDPOTrainer, SGPOTrainer, SparsePOTrainer, SWEPOTrainer
from trainers.data import stream as streams
from trainers.data import tokenize_dataset
from trainers.data.rows import chat_row
from trainers.data.stream import TokenStream
from trainers.runs.checkpoints import last_checkpoint

ROWS = rows(11)
UNUSABLE = {"prompt": "a ", "responses": ["b", "c"], "scores": [None, 1.0]}


def table(content=ROWS, shards=3):
    return Dataset.from_list(content).to_iterable_dataset(num_shards=shards)


def generated(shards):
    for shard in shards:
        yield from ROWS[shard::3]


SOURCES = {
    "table": table,
    "shards": lambda: IterableDataset.from_generator(generated, gen_kwargs={"shards": [0, 1, 2]}),
    "generator": lambda: IterableDataset.from_generator(lambda: iter(ROWS)),
    "shuffled": lambda: table().shuffle(seed=1, buffer_size=4),
    "interleaved": lambda: interleave_datasets(
        [table(ROWS[:5]), table(ROWS[5:])], [0.5, 0.5], seed=1, stopping_strategy="all_exhausted"
    ),
    "mapped": lambda: table().map(lambda row: row | {"prompt": row["prompt"].upper()}).filter(lambda row: True),
}


def token_stream(source, tokenizer, **options):
    defaults = {"buffer": 4, "seed": 3, "max_length": 1024, "invalid": "drop", "as_chat": False}
    return TokenStream(source, tokenizer, **defaults | options)


def gone_on(make, stream, trained):
    """What follows in `make()` on the first rows of `stream`, whose place was kept as JSON."""
    again = make()
    again.go_on(json.loads(json.dumps(stream.state(trained))))
    return again


def trainer(folder, tokenizer, source, cls=SWEPOTrainer, **options):
    options = {"stream_buffer": 5, "max_steps": 8, "weight_decay": 0.1} | options
    args, held_out = config(folder, cls, **options), Dataset.from_list(rows(3, seed=2))
    data = {"train_dataset": source, "eval_dataset": None if cls is EMDPOTrainer else held_out}
    return cls(tiny_llama(len(tokenizer)), args=args, processing_class=tokenizer, **data)


@pytest.mark.parametrize("mixed", [True, False])
def test_a_pass_has_the_rows_of_the_table_and_the_next_one_has_them_again(mixed, tokenizer):
    expected, _ = tokenize_dataset(Dataset.from_list(ROWS), tokenizer)
    expected = [row["response_ids"] for row in expected]
    stream = token_stream(table(), tokenizer, mixed=mixed)
    found = [row["response_ids"] for row in islice(stream, 22)]
    assert sorted(found[:11]) == sorted(found[11:]) == sorted(expected)
    assert (found[:11] == expected) is not mixed and (found[:11] == found[11:]) is not mixed
    assert sorted(found[:4]) == sorted(expected[:4])  # mixed within blocks


@pytest.mark.parametrize("kind", SOURCES)
def test_every_place_of_a_stream_is_found_again(kind, tokenizer):
    stream = token_stream(SOURCES[kind](), tokenizer)
    ahead, expected, states = iter(stream), [], []
    for trained in range(26):
        expected.append(next(ahead))
        states.append(json.dumps(stream.state(max(0, trained - 1))))  # a loader is ahead of what was trained on
    for trained in range(25):
        again = token_stream(SOURCES[kind](), tokenizer)
        again.go_on(json.loads(states[trained]))
        assert [*islice(again, 26 - again.trained)] == expected[again.trained :], trained
    assert again.report == stream.report


def test_a_state_that_another_release_wrote_is_read_from_the_beginning(tokenizer, caplog):
    stream = token_stream(table(), tokenizer)
    expected = [*islice(stream, 26)]
    state = stream.state(20)
    assert state["block"]["read"]
    state["block"]["state"] = {"epoch": 1, "examples_iterable": {"place": 4}}
    again = token_stream(table(), tokenizer)
    again.go_on(state)
    assert [*islice(again, 6)] == expected[20:]
    assert "is read again from the beginning of pass 2, 8 rows" in caplog.text
    again.go_on(state | {"block": state["block"] | {"digest": "another"}})
    with pytest.raises(ValueError, match="pass 2 over the stream has other rows than before, from row 8 on"):
        next(iter(again))


def test_going_on_opens_no_shard_that_is_done(tokenizer):
    seen = []

    def read(shards):
        for shard in shards:
            for row in ROWS[shard::3]:
                seen.append(row["prompt"])
                yield row

    def make():
        source = IterableDataset.from_generator(read, gen_kwargs={"shards": [0, 1, 2]})
        return token_stream(source, tokenizer, buffer=2, mixed=False)

    stream = make()
    rows = [*islice(stream, 11)]
    again = gone_on(make, stream, 6)  # amid the second shard
    seen.clear()
    assert [*islice(again, 5)] == rows[6:]
    assert seen == [row["prompt"] for row in ROWS[1::3] + ROWS[2::3]]


@pytest.mark.parametrize("kind", ["table", "shuffled"])
def test_a_killed_run_ends_like_one_that_was_left_alone(kind, tokenizer, tmp_path):
    whole, again, out = tmp_path / "whole", tmp_path / "again", tmp_path / "out"

    def make():
        random = {"mask": "random"} if kind == "table" else {}  # draws random numbers at every step
        cls = SparsePOTrainer if random else SWEPOTrainer
        saving = {
            "save_strategy": "steps",
            "save_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "optim": "adamw_torch",
            "lr_scheduler_type": "linear",
        }
        batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        content = [*ROWS[:6], UNUSABLE, *ROWS[6:]]
        source = table(content) if kind == "table" else table(content).shuffle(seed=1, buffer_size=4)
        return trainer(out, tokenizer, source, cls, **saving, **batch, **random)

    assert in_child(lambda: finish(make(), whole, None)) == 0
    last = json.loads((out / "checkpoint-8" / "stream.json").read_text())
    assert last["trained"] == 32 and last["block"]["passes"] == 2
    for path in out.glob("checkpoint-*"):
        path.rename(tmp_path / path.name)

    def killed():
        die_at("step", 5)
        make().train()

    assert in_child(killed) == -signal.SIGKILL
    assert last_checkpoint(out).endswith("checkpoint-4")
    assert in_child(lambda: finish(make(), again, True)) == 0
    found, expected = (load_file(f"{path}.safetensors") for path in (again, whole))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert again.read_text() == whole.read_text()
    history = json.loads(again.read_text())
    dropped = [log["stream/dropped"] for log in history if "loss" in log]
    # Releases of `datasets` shuffle in unlike orders.
    assert dropped == [1, 1, 1, 2, 2, 2, 2, 2] if kind == "table" else 2 <= dropped[-1] <= 3
    *_, told = json.loads((out / "run.json").read_text())["left_out"]
    assert told["reasons"] == {"fewer than 2 usable responses left": dropped[-1]}
    make().train(resume_from_checkpoint=True)  # nothing is left to be done
    assert json.loads((out / "checkpoint-8" / "trainer_state.json").read_text())["global_step"] == 8


def test_a_stream_in_its_own_order_trains_like_its_table(tokenizer, tmp_path, caplog):
    options = {"train_sampling_strategy": "sequential", "max_steps": 2}  # of four rows each
    found, expected = (
        trainer(tmp_path, tokenizer, data, **options) for data in (table(ROWS[:8]), Dataset.from_list(ROWS[:8]))
    )
    found.train(), expected.train()
    assert logged(found) == logged(expected) and len(set(logged(found))) == 2
    # It ends with the training: no other pass is begun, announced or counted.
    assert logged(found, "stream/passes") == [1, 1] and found.train_dataset.report.rows_in == 8
    assert "is read again" not in caplog.text


REFUSED = {
    "max_steps": {"max_steps": -1},
    "max_tokens_per_batch": {"max_tokens_per_batch": 100},
    "precompute_ref_logps": {"precompute_ref_logps": True},
    "train_sampling_strategy": {"train_sampling_strategy": "group_by_length"},
    "dataloader_num_workers": {"dataloader_num_workers": 1},
    "split_batches": {"accelerator_config": {"split_batches": True}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_stream_cannot_follow_is_refused(name, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=f"With a stream .*{name}.*(set|leave)"):
        trainer(tmp_path, tokenizer, table(), **REFUSED[name])


def test_what_needs_all_rows_says_so(tokenizer, tmp_path):
    fix = r" needs all rows at once.*list\(stream.take"
    with pytest.raises(ValueError, match="EM-DPO" + fix):
        trainer(tmp_path, tokenizer, table(), EMDPOTrainer)
    with pytest.raises(ValueError, match="Anything but training" + fix):
        trainer(tmp_path, tokenizer, Dataset.from_list(ROWS)).evaluate(table())
    rounds = {"rounds": 1, "scorer": "sgpo_rows.vowels", "num_generations": 2}
    with pytest.raises(ValueError, match="self_enhance" + fix):
        SWEPOTrainer.run(config(tmp_path, max_steps=1, self_enhance=rounds), {"train": table()}, "nowhere")
    with pytest.raises(ValueError, match="SGPO" + fix):
        SGPOTrainer.run(config(tmp_path, SGPOTrainer, max_steps=1), {"train": table()}, "nowhere")


# Hostile streams.


def endless(row):
    while True:
        yield row


def used_up():
    left = iter(ROWS)
    return IterableDataset.from_generator(lambda: left)


def breaks_off(left):
    def read():
        for row in ROWS:
            left[0] -= 1
            if left[0] == 0:
                raise ConnectionError("the hub is gone")
            yield row

    return IterableDataset.from_generator(read)


def only_once(passes):
    def read():
        passes.append(None)
        yield from ROWS if len(passes) < 3 else []

    return IterableDataset.from_generator(read)


def changing(*more):
    return IterableDataset.from_generator(lambda: iter([*ROWS, *more]))


HOSTILE = {
    "nothing in it": (lambda: IterableDataset.from_generator(lambda: iter([])), "the stream has no rows"),
    "only unusable rows": (lambda: table([UNUSABLE] * 9, 1), "no usable row is in the last 9 rows.*missing score"),
    "unusable without an end": (
        lambda: IterableDataset.from_generator(endless, gen_kwargs={"row": UNUSABLE}),
        "no usable row is in the last 384 rows",
    ),
    "unusable from a row on": (
        lambda: IterableDataset.from_generator(lambda: (yield from [*ROWS, *[UNUSABLE] * 400])),
        "no usable row is in the last 300 rows",
    ),
    "used up": (used_up, "pass 1 over the stream has other rows than before, from row 0 on: .*opens"),
    "empty when it is read again": (lambda: only_once([]), "pass 2 over the stream gives no rows"),
    "raises in the middle": (lambda: breaks_off([25]), "the hub is gone"),
    "no row at first": (lambda: IterableDataset.from_generator(lambda: iter(["abc"])), "row 0 of .* is the str 'abc'"),
    "no row later": (lambda: changing("abc"), "row 11 of the stream is the str 'abc'; give a dict"),
    "messages come": (
        lambda: changing(chat_row(ROWS[0])),
        "row 11 has messages but the tokenizer has no chat template",
    ),
    "a column goes": (lambda: changing({"prompt": "a ", "responses": ["b", "c"]}), "row 11: column 'scores'"),
    "a column comes": (lambda: changing(ROWS[0] | {"weight": 2.0}), "row 11: column 'weight' is in .*, with 1 where"),
    "an annotator comes": (lambda: changing(ROWS[0] | {"annotator": "eve"}), "row 11: column 'annotator' .*with null"),
    "a score becomes text": (lambda: changing(ROWS[0] | {"scores": ["1", "2"]}), "row 11: 'scores.0.' is the str '1'"),
    "tokens that the model lacks": (
        lambda: changing(*[row | {"prompt_ids": [5]} for row in ROWS]),
        "column 'prompt_ids' is in some rows",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_stream_ends_with_an_error(name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "GIVE_UP", 300)
    make, told = HOSTILE[name]
    with pytest.raises((ValueError, ConnectionError), match=f"(?s){told}"):
        trainer(tmp_path, tokenizer, make(), max_steps=200, logging_steps=50, stream_buffer=20).train()


def test_a_token_that_the_model_lacks_is_refused_where_it_comes(tokenizer, tmp_path):
    good = {"prompt_ids": [5, 6], "response_ids": [[7], [8, 9]], "scores": [1.0, 0.0]}
    content = [good] * 150 + [good | {"prompt_ids": [5, 9999]}]
    found = trainer(tmp_path, tokenizer, table(content), max_steps=50, stream_buffer=140)
    with pytest.raises(ValueError, match="token ids from 0 to 9999"):
        found.train()
    assert 30 <= found.state.global_step < 38


def test_a_run_whose_stream_broke_off_goes_on(tokenizer, tmp_path):
    def make(left):
        return trainer(tmp_path / "out", tokenizer, breaks_off([left]), save_strategy="steps", save_steps=1)

    whole = make(10**6)
    whole.train()
    for path in (tmp_path / "out").glob("checkpoint-*"):
        path.rename(tmp_path / path.name)
    broken = make(11 + 20)
    with pytest.raises(ConnectionError):
        broken.train()
    assert 0 < broken.state.global_step < 8
    again = make(10**6)
    again.train(resume_from_checkpoint=True)
    assert logged(again) == logged(whole)


def test_another_stream_or_a_lost_place_is_refused(tokenizer, tmp_path):
    def make(source, **options):
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2} | options
        return trainer(tmp_path, tokenizer, source, **options)

    make(table()).train()
    with pytest.raises(ValueError, match="training rows are others"):
        make(table(ROWS[::-1])).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="stream_buffer was 5 and is 6"):
        make(table(), stream_buffer=6).train(resume_from_checkpoint=True)
    whole, longer = (make(table(), max_steps=3) for _ in range(2))
    longer.train(resume_from_checkpoint=True)
    whole.args.save_strategy = SaveStrategy.NO
    whole.train()
    assert logged(longer) == logged(whole) and len(logged(whole)) == 3
    path = Path(last_checkpoint(tmp_path), "stream.json")
    behind = json.dumps(json.loads(path.read_text()) | {"trained": -1})
    for damaged in (path.read_text()[:-9], "{}", '{"trained": 8}', behind, None):
        path.unlink() if damaged is None else path.write_text(damaged)
        with pytest.raises(ValueError, match="has no stream.json with a place.* put the file back"):
            make(table()).train(resume_from_checkpoint=True)


class Threes(SWEPOTrainer):
    def get_train_dataloader(self):
        loader = DataLoader(self.train_dataset, batch_size=3, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


def test_a_loader_of_the_users_goes_on_where_it_was_or_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="holds 3 rows where per_device_train_batch_size is 4"):
        trainer(tmp_path, tokenizer, table(), Threes).train()
    threes = {"per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole, again = (trainer(tmp_path, tokenizer, table(), Threes, **threes) for _ in range(2))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(again) == logged(whole)


def split_by_process(folder):
    from datasets.distributed import split_dataset_by_node

    from helpers import build_tokenizer

    args = config(folder, max_steps=1)
    source = split_dataset_by_node(table(ROWS[:10], 2), args.process_index, args.world_size)
    tokenizer = build_tokenizer()
    one = SWEPOTrainer(tiny_llama(len(tokenizer)), args=args, train_dataset=source, processing_class=tokenizer)
    with pytest.raises(ValueError, match="different rows.*leave out split_dataset_by_node"):
        one.train()
    print("refused")
    leave_processes()


@pytest.mark.distributed
def test_a_stream_that_was_split_already_is_refused(tmp_path):
    codes, log = processes.run(split_by_process, tmp_path, count=2)
    assert codes == [0, 0] and log.count("refused") == 2, log
