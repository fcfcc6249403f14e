"""Settings for all tests."""

import os

import psutil
import pytest

# Tiny models gain nothing from a second thread, and threads that wait for each other cost seconds on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One worker more than cores, as some always wait for their processes, and 2 GiB of memory for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores + 1, psutil.virtual_memory().total // 2**31))


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """A cache of data sets for this test alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def exact_softmax(monkeypatch):
    """Eager attention takes its softmax in float32 also in a float64 model, where the rounding of the sum depends on
    the width of the batch and on the CPU. Here it stays in float64, so that exact values can be compared."""
    import torch  # after the settings above

    softmax = torch.nn.functional.softmax

    def exact(values, dim=None, dtype=None, **kwargs):
        return softmax(values, dim=dim, dtype=None if values.dtype == torch.float64 else dtype, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "softmax", exact)


@pytest.fixture(scope="module")
def tokenizer():
    from helpers import build_tokenizer  # torch, after the settings above

    return build_tokenizer()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a tiny model and its tokenizer, for runs that read their start from disk."""
    from helpers import save_start  # torch, after the settings above

    return save_start(tmp_path_factory.mktemp("start"))


@pytest.fixture
def adapters(tmp_path, tokenizer):
    """Folders of two adapters of different rank, on the same base."""
    import torch
    from peft import LoraConfig, get_peft_model

    from helpers import tiny_llama

    for seed, (name, rank) in enumerate({"first": 4, "second": 8}.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, init_lora_weights=False)
        get_peft_model(tiny_llama(len(tokenizer)), config).save_pretrained(tmp_path / name)
    return tmp_path


@pytest.fixture
def revisions(monkeypatch):
    """Those of all tokenizers that are read from now on."""
    from transformers import AutoTokenizer

    read, found = AutoTokenizer.from_pretrained, set()

    def noted(*args, revision=None, **kwargs):
        found.add(revision)
        return read(*args, **kwargs)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", noted)
    return found
