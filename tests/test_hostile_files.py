"""Broken and hostile files, options, models and checkpoints: a clear error, no hang, and no code of theirs runs."""

import gzip
import io
import json
import os
import pickle
import shutil
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file

import helpers
from helpers import save_start
from test_trainer import rows as make_rows
from trainers.data import load_preferences
from trainers.forward.policy import load_policy
from trainers.generation.start import load_start

pytestmark = pytest.mark.usefixtures("own_cache")
GOOD = [{"prompt": "a", "responses": ["x", "y"], "scores": [1.0, 2.0]}] * 3
LINES = "".join(json.dumps(row) + "\n" for row in GOOD).encode()


def parquet(rows):
    file = io.BytesIO()
    rows.to_parquet(file)
    return file.getvalue()


class Payload:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# Files of data.


JSON_LINES = {  # content of data.jsonl, and what the message must say
    "binary": (bytes(range(256)) * 4, "data.jsonl"),
    "latin-1": (LINES + '{"prompt": "\u00e9"}\n'.encode("latin-1"), "row 3"),
    "cut in a row": (LINES[:-20], "row 2"),
    "one bracket": (b"[", "data.jsonl"),
    "numbers": (b"1\n2\n", "row 0 of .* no JSON object"),
    "nothing": (b"", "data.jsonl' is empty"),
    "a brace too many": (LINES + b"}\n", "row 3"),
    "nested lists": (b'{"prompt": "a", "responses": ' + b"[" * 3000 + b"]" * 3000 + b', "scores": [1, 2]}\n', "row 0"),
    "text for a list": (LINES + b'{"prompt": "a", "responses": "x", "scores": [1, 2]}\n', "row 3.*'responses'"),
    "half a character": (
        LINES + b'{"prompt": "\\ud800", "responses": ["x", "y"], "scores": [1, 2]}\n',
        "row 3",
    ),
    "other columns": (b'{"question": "a", "answer": "b"}\n', "question"),
}
PARQUET = parquet(Dataset.from_list(GOOD))
BROKEN = {name: ("data.jsonl", *case) for name, case in JSON_LINES.items()} | {
    f"{file} cut at {cut}": (file, content[:cut], "data")
    for file, content, cuts in (
        ("data.jsonl.gz", gzip.compress(LINES), (0, 5, -9)),
        ("data.parquet", PARQUET, (0, 100, -8)),
        ("data.parquet.gz", gzip.compress(PARQUET), (0, 100, -8)),
    )
    for cut in cuts
}
BROKEN["no rows"] = ("data.parquet", parquet(Dataset.from_list(GOOD).select([])), "no (usable row|data)|columns")


def refused(path, match="", **options):
    with pytest.raises((ValueError, FileNotFoundError), match=match or "data") as caught:
        list(load_preferences(path, **options))
    message = str(caught.value)
    assert len(message) < 2500 and "Traceback" not in message
    return message


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named(case, streaming, tmp_path):
    name, content, match = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, match, streaming=streaming)


def test_a_list_over_many_lines_is_streamed(tmp_path):
    for indent in (1, None):
        (tmp_path / "data.json").write_text(json.dumps(GOOD, indent=indent))
        assert list(load_preferences(tmp_path / "data.json", streaming=True)) == GOOD
    refused(
        tmp_path / "data.json", "has whole splits: give one of .'train'., not 'test'", streaming=True, split="test"
    )


def pickled(ran):
    return pickle.dumps(Payload(ran))


OTHERS = {  # what is given -> the file that is there, and its content
    "data.pkl": ("data.pkl", pickled),
    "data": ("data", pickled),
    "data.gz": ("data.gz", pickled),
    "empty": None,
    "with a pickle": ("with a pickle/train.pkl", pickled),
    "with a script": ("with a script/data.py", lambda ran: f"import os\nos.mkdir({str(ran)!r})\n".encode()),
    "broken saved": ("broken saved/state.json", lambda ran: b"{"),
    "empty saved": ("empty saved/dataset_dict.json", lambda ran: b"{}"),
}


@pytest.mark.parametrize("given", OTHERS)
def test_what_holds_no_data_is_named_and_not_run(given, tmp_path):
    name, content = OTHERS[given] or (f"{given}/none", None)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    if content:
        (tmp_path / name).write_bytes(content(tmp_path / "ran"))
    refused(tmp_path / given, "cannot read .* ending in .jsonl" if given.startswith("data") else given)
    assert not (tmp_path / "ran").exists()


# Options.


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_start(folder / "model")
    Dataset.from_list(make_rows(4)).to_json(folder / "rows.jsonl")
    return folder


launch = partial(helpers.launch, max_steps=1)


@pytest.mark.parametrize("wanted", ["absent", "file", "empty", "a\x00b", "maybe"])
def test_a_checkpoint_that_is_none_is_named(wanted, inputs, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="resume_from_checkpoint|checkpoint"):
        launch(inputs, tmp_path / "out", resume_from_checkpoint=tmp_path / wanted)


# Models and checkpoints with code in them.


@pytest.fixture(scope="module")
def checkpoint(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    launch(inputs, folder, save_steps=1, max_steps=2, save_strategy="steps")
    return folder / "checkpoint-1"


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "training_args.bin"]
)
def test_what_would_run_code_in_a_checkpoint_is_refused_or_not_opened(name, inputs, checkpoint, tmp_path):
    copy = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoint, copy)
    if name == "pytorch_model.bin":
        (copy / "model.safetensors").unlink()
    torch.save({"state": Payload(tmp_path / "ran")}, copy / name)
    refusal = pytest.raises((pickle.UnpicklingError, ValueError, RuntimeError))
    with nullcontext() if name == "training_args.bin" else refusal:
        launch(inputs, tmp_path / "out", resume_from_checkpoint=copy, max_steps=2)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_a_model_whose_weights_are_a_pickle_is_refused(name, inputs, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(inputs / "model", folder)
    (folder / "model.safetensors").rename(tmp_path / "kept")
    if name == "adapter_model.bin":
        config = {"peft_type": "LORA", "base_model_name_or_path": str(inputs / "model"), "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"weight": Payload(tmp_path / "ran")}, folder / name)
    with pytest.raises((OSError, pickle.UnpicklingError)):
        load_start(str(inputs / "model"), folder, init_kwargs={})
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_missing_are_not_drawn_at_random(inputs, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(inputs / "model", folder)
    save_file({"other": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights of .*model"):
        load_policy(str(folder))


@pytest.mark.parametrize("model_type", ["llama", "mine"])
def test_code_beside_a_model_does_not_run(model_type, inputs, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(inputs / "model", folder)
    code = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n"
    (folder / "mine.py").write_text(code)
    for name, auto_map in (
        ("config.json", {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["mine.Tokenizer", None]}),
    ):
        config = json.loads((folder / name).read_text()) | {"auto_map": auto_map}
        if name == "config.json":
            config["model_type"] = model_type
        (folder / name).write_text(json.dumps(config))
    if model_type == "llama":  # the library has its own code for it
        load_policy(str(folder))
    else:
        for dry_run in (False, True):
            with pytest.raises(ValueError, match="trust_remote_code"):
                launch(inputs, tmp_path / "out", model_name_or_path=folder, dry_run=dry_run)
    assert not (tmp_path / "ran").exists()
