"""Settings for all tests."""

import os

# Tiny models gain nothing from a second thread, and threads that wait for each other cost seconds on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
