"""Settings for all tests."""

import os

import pytest

# Tiny models gain nothing from a second thread, and threads that wait for each other cost seconds on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a tiny model and its tokenizer, for runs that read their start from disk."""
    from helpers import build_tokenizer, tiny_llama  # torch, after the settings above

    folder, tokenizer = tmp_path_factory.mktemp("start"), build_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    return folder
