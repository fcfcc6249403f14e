"""Two rounds of EM on as many processes as torchrun started; prints posterior and log-likelihoods as one JSON line.

torchrun --nproc_per_node 2 tests/emdpo_steps.py '{"engine": "zero3", "folder": "FOLDER", ...}'
"""

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402

from distributed_steps import engine_arguments  # noqa: E402
from emdpo_rows import em_config, opposed_rows  # noqa: E402
from helpers import build_tokenizer, leave_processes, tiny_llama  # noqa: E402
from test_trainer import LORA  # noqa: E402
from trainers import EMDPOTrainer  # noqa: E402


def main(options: dict) -> None:
    torch.set_num_threads(1)
    folder, engine = Path(options["folder"]), options["engine"]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = engine_arguments(engine)
    if "deepspeed" in arguments:
        zero = arguments["deepspeed"]["zero_optimization"]
        zero["stage3_gather_16bit_weights_on_model_save"] = options.get("gather", True)
    args = em_config(
        folder / "out", per_device_train_batch_size=4 // processes, ref_tokens_per_batch=60, optim="adamw_torch",
        num_train_epochs=2, model_init_kwargs={"dtype": "float32"}, score_on=options.get("score_on", "train"),
        **arguments,
    )  # fmt: skip
    if engine.startswith("zero"):
        import deepspeed

        # On GPUs accelerate does this; with use_cpu it opens plain gloo, which DeepSpeed does not see.
        deepspeed.init_distributed("gloo")
    tokenizer, path = build_tokenizer(), folder / "model"
    if int(os.environ.get("RANK", "0")) == 0 and not path.exists():
        tiny_llama(len(tokenizer)).save_pretrained(path)
    args.distributed_state.wait_for_everyone()
    # 31 rows: neither two processes nor batches of four divide them, in training or in scoring.
    rows = [*opposed_rows(), opposed_rows(seed=5)[0]][:31]
    trainer = EMDPOTrainer(
        str(path), args=args, train_dataset=Dataset.from_list(rows[:28]), processing_class=tokenizer,
        eval_dataset=Dataset.from_list(rows[28:]), peft_config=LoraConfig(**LORA) if options.get("peft") else None,
    )  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        found = json.loads((trainer.policies[0].parents[1] / "manifest.json").read_text())
        result = {"posterior": trainer.posterior.tolist(), "log_likelihood": found["log_likelihood"],
                  "held_out": found["held_out"]["log_likelihood_per_annotator"]}  # fmt: skip
        print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    leave_processes()
