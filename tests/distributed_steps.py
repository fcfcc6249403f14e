"""Five steps of a trainer on ragged rows, on as many processes as torchrun started; prints losses as one JSON line.

torchrun --nproc_per_node 2 tests/distributed_steps.py '{"engine": "zero3", "peft": true, ...}'

`trainer` names the method, `settings` are fields of its config, `resume` is a checkpoint to go on from.
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
from transformers import TrainerCallback  # noqa: E402

import trainers  # noqa: E402
from helpers import build_tokenizer, leave_processes, tiny_llama  # noqa: E402
from test_trainer import LORA, rows  # noqa: E402


def engine_arguments(engine: str) -> dict:
    """TrainingArguments that select the engine; `ddp` needs none."""
    if engine.startswith("zero"):
        stage = int(engine[-1])
        return {"deepspeed": {
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto", "train_batch_size": "auto",
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0,
                                  "stage3_gather_16bit_weights_on_model_save": True},
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        }}  # fmt: skip
    if engine == "fsdp2":
        return {"fsdp": True, "fsdp_config": {
            "version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True,
            "state_dict_type": "FULL_STATE_DICT",
        }}  # fmt: skip
    return {"ddp_find_unused_parameters": False} if engine == "ddp" else {}


def adapter(wanted: bool | list[str] | None) -> LoraConfig | None:
    """LoRA on all linear layers, or on those that are named."""
    targets = {"target_modules": wanted} if isinstance(wanted, list) else {}
    return LoraConfig(**LORA | targets) if wanted else None


class Norms(TrainerCallback):
    """Gradient norms as the engine reports them."""

    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" in logs:
            self.values.append(float(logs["grad_norm"]))


def main(options: dict) -> None:
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    folder = Path(options["folder"])
    model = tiny_llama(len(tokenizer))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    trainer_class = getattr(trainers, options.get("trainer", "SWEPOTrainer"))
    fields = dict(
        output_dir=str(folder / "out"), use_cpu=True, report_to="none", learning_rate=0.01, optim="adamw_torch",
        per_device_train_batch_size=options.get("batch", 4) // processes, per_device_eval_batch_size=2, max_steps=5,
        # A budget sets the size of a micro-batch, so one process needs two of them where two processes have one each.
        gradient_accumulation_steps=2 // processes if "budget" in options else options.get("accumulation", 1),
        logging_steps=1, save_strategy="no", seed=3,
        lr_scheduler_type="constant", disable_tqdm=True, max_grad_norm=100.0,
        activation_checkpointing=options.get("checkpointing", False), layout=options.get("layout", "shared"),
        precompute_ref_logps=options.get("precompute", False), ref_cache_dir=str(folder / "cache"),
        max_tokens_per_batch=options.get("budget"), **engine_arguments(options["engine"]),
    )  # fmt: skip
    args = trainer_class.config_class(**fields | options.get("settings", {}))
    if options["engine"].startswith("zero"):
        import deepspeed

        # On GPUs accelerate does this; with use_cpu it opens plain gloo, which DeepSpeed does not see.
        deepspeed.init_distributed("gloo")
    norms = Norms()
    if options["engine"] == "zero3":  # a ZeRO-3 reference is read from a path
        path = folder / "model"
        if int(os.environ.get("RANK", "0")) == 0 and not path.exists():
            model.save_pretrained(path)
        args.distributed_state.wait_for_everyone()
        model = str(path)
        args.model_init_kwargs = {"dtype": "float32"}
    trainer = trainer_class(
        model, args=args, train_dataset=Dataset.from_list(rows(12)), eval_dataset=Dataset.from_list(rows(7, seed=2)),
        processing_class=tokenizer, callbacks=[norms],
        peft_config=adapter(options.get("peft")),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=options.get("resume"))
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        result = {
            "losses": [log["loss"] for log in history if "loss" in log],
            "margins": [log["rewards/margins"] for log in history if "rewards/margins" in log],
            "norms": norms.values,
            "eval": {k: metrics[k] for k in ("eval_loss", "eval_rewards/margins", "eval_ranking/pairwise_accuracy")},
            "masks": {k: v for k, v in metrics.items() if "mask_mean" in k or "mask_sparsity" in k},
        }
        print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    leave_processes()
