"""The min-max mixture of a finished run and the one policy, on as many processes as torchrun started.

torchrun --nproc_per_node 2 tests/emdpo_mixture_steps.py '{"arguments": ["--run_dir", "FOLDER", ...], ...}'
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / part) for part in ("tests", "", "scripts")]
os.environ["ACCELERATE_USE_CPU"] = "true"

import torch  # noqa: E402

import aggregate  # noqa: E402
from helpers import leave_processes  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    aggregate.distill = partial(aggregate.distill, optim="sgd")  # Adam magnifies the rounding of small gradients
    aggregate.main(json.loads(sys.argv[1])["arguments"])
    print("RESULT " + json.dumps({"processes": int(os.environ["WORLD_SIZE"])}), flush=True)
    leave_processes()
