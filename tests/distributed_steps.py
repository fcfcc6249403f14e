"""Some steps of one trainer after the other on ragged rows, on as many processes as torchrun started.

torchrun --nproc_per_node 2 tests/distributed_steps.py '{"engine": "zero3", "folder": FOLDER, "cells": [{...}, ...]}'

A cell names a `trainer`; its other keys are those of `arguments` and `cut`; `cut` and `probe` say what runs. Each cell
leaves one line of JSON in FOLDER/results.jsonl as soon as it is done: {"cell": its name, and "found": numbers by name,
or "refused": message}.
"""

import gc
import json
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from datasets import Dataset, load_dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.utils.data import Sampler  # noqa: E402
from transformers import AutoModelForCausalLM, TrainerCallback  # noqa: E402

import trainers  # noqa: E402
from emdpo_runs import em_config, opposed_rows  # noqa: E402
from helpers import build_tokenizer, leave_processes, tiny_gemma3, tiny_llama  # noqa: E402
from sgpo_rows import write_inputs  # noqa: E402
from test_trainer import LORA, rows  # noqa: E402
from trainers.cli.arguments import ModelArguments  # noqa: E402
from trainers.cli.probe import probe  # noqa: E402
from trainers.emdpo import trainer as em_trainer  # noqa: E402
from trainers.emdpo.m_step import TypePolicyTrainer  # noqa: E402
from trainers.forward import cache  # noqa: E402
from trainers.forward.run import Runner  # noqa: E402
from trainers.sgpo import stages  # noqa: E402

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
# Adam's first step is the sign of the gradient: with its usual 1e-8, a gradient of 0 but for rounding is a whole step.
EPSILON = 1e-5
UNCOMPARED = ("runtime", "per_second", "preparation_time", "epoch", "learning_rate", "flos")
# At the first step rewards are 0 but for rounding (a cached reference was scored in other batches): no ranking there.
FIRST = ("step 1 ranking/", "step 1 rewards/accuracies", "step 1 dpo_rewards/accuracies")


def engine_arguments(engine: str, *, gather: bool = True) -> dict:
    """TrainingArguments that select the engine; `gather` says whether ZeRO-3 and FSDP save whole weights."""
    if engine.startswith("zero"):
        stage = int(engine[-1])
        return {"deepspeed": {
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto", "train_batch_size": "auto",
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0,
                                  "stage3_gather_16bit_weights_on_model_save": gather},
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        }}  # fmt: skip
    if engine == "fsdp2":
        return {"fsdp": True, "fsdp_config": {
            "version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True,
            "state_dict_type": "FULL_STATE_DICT" if gather else "SHARDED_STATE_DICT",
        }}  # fmt: skip
    return {"ddp_find_unused_parameters": False} if engine == "ddp" else {}


def prepare(args, engine: str):
    """Let an engine start without a GPU."""
    if engine == "fsdp2":
        # accelerate offers FSDP to processes with an accelerator only; nothing of what it then does needs one.
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    return args


def check_engine(trainer, engine: str) -> None:
    """A run under another engine than the one that was asked for would prove nothing."""
    state = trainer.accelerator.state
    found = {"single": DistributedType.NO, "ddp": DistributedType.MULTI_CPU, "fsdp2": DistributedType.FSDP}
    assert state.distributed_type == found.get(engine, DistributedType.DEEPSPEED), state.distributed_type
    if engine == "fsdp2":
        assert state.fsdp_plugin.fsdp_version == 2
        assert all(isinstance(p, DTensor) for p in trainer.model_wrapped.parameters())
    if engine.startswith("zero"):
        assert trainer.model_wrapped.zero_optimization_stage() == int(engine[-1])
    if engine == "ddp":
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)


def adapter(wanted: bool | list[str] | None, **options) -> LoraConfig | None:
    """LoRA on all linear layers, or on those that are named."""
    targets = {"target_modules": wanted} if isinstance(wanted, list) else {}
    return LoraConfig(**LORA | targets | options) if wanted else None


def saved_model(folder: Path, vocabulary: int, args, *, tied: bool = False) -> str:
    """The path of the tiny model: ZeRO-3 reads references and M-steps read starts from disk."""
    path = folder / ("tied" if tied else "model")
    if int(os.environ.get("RANK", "0")) == 0 and not path.exists():
        tiny_llama(vocabulary, tie_word_embeddings=tied).save_pretrained(path)
        build_tokenizer().save_pretrained(path)
    args.distributed_state.wait_for_everyone()
    args.model_init_kwargs = {"dtype": "float32"}
    return str(path)


class Numbers(TrainerCallback):
    """Every number that is logged, by step and name."""

    def __init__(self):
        self.found = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.found |= numbers(logs, f"step {state.global_step} ")


def numbers(logs: dict, prefix: str = "") -> dict[str, float]:
    """What is compared of the logs of a step or of an evaluation."""
    found = {prefix + name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
    return {name: value for name, value in found.items() if not any(part in name for part in UNCOMPARED + FIRST)}


def arguments(cell: dict, engine: str, folder: Path, **changes):
    """The config of a cell, whose output goes to the folder of its name, or to `out`.

    Further keys of a cell: `peft`, `pretrained` (the adapter is not a fresh one), `whole` (layers that train whole
    beside the adapter), `tied` (embeddings), `checkpointing`, `layout`, `precompute`, `rows`, `stream` (of the rows),
    `batch` of all processes together, `accumulation`, `budget`, `drawn` (rows that an own sampler draws), `tower` (a
    model with one for images) and `settings` (of the config).
    """
    fields = dict(
        output_dir=str(folder / cell.get("out", cell["name"])), use_cpu=True, report_to="none", learning_rate=0.01,
        seed=3, optim="adamw_torch", lr_scheduler_type="constant", max_grad_norm=100.0, max_steps=5, logging_steps=1,
        adam_epsilon=EPSILON,
        per_device_train_batch_size=cell.get("batch", 4) // PROCESSES, per_device_eval_batch_size=2,
        # A budget sets the size of a micro-batch, so one process needs two of them where two processes have one each.
        gradient_accumulation_steps=2 // PROCESSES if "budget" in cell else cell.get("accumulation", 1),
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=cell.get("checkpointing", False),
        layout=cell.get("layout", "shared"), precompute_ref_logps=cell.get("precompute", False),
        ref_cache_dir=str(folder / cell["name"] / "cache"), max_tokens_per_batch=cell.get("budget"),
        **engine_arguments(engine),
    )  # fmt: skip
    args = getattr(trainers, cell["trainer"]).config_class(**fields | cell.get("settings", {}) | changes)
    prepare(args, engine)
    return args


def build(cell: dict, engine: str, folder: Path, **changes):
    """The trainer of a cell (see `arguments`)."""
    tokenizer, args = build_tokenizer(), arguments(cell, engine, folder, **changes)
    size, tied = len(tokenizer), cell.get("tied", False)
    if engine == "zero3":
        model = saved_model(folder, size, args, tied=tied)
    else:
        model = tiny_gemma3(size) if cell.get("tower") else tiny_llama(size, tie_word_embeddings=tied)
    if cell.get("pretrained"):
        args.model_init_kwargs = None
        model = AutoModelForCausalLM.from_pretrained(model, dtype="float32") if isinstance(model, str) else model
        torch.manual_seed(7)
        model = get_peft_model(model, adapter(cell["pretrained"], init_lora_weights=False))
    data = Dataset.from_list(rows(cell.get("rows", 11)))
    cls = getattr(trainers, cell["trainer"])
    return (drawing(cls, cell["drawn"]) if "drawn" in cell else cls)(
        model, args=args, processing_class=tokenizer, callbacks=[Numbers()],
        peft_config=adapter(cell.get("peft"), modules_to_save=cell.get("whole")),
        train_dataset=data.to_iterable_dataset(num_shards=3) if cell.get("stream") else data,
        eval_dataset=Dataset.from_list(rows(7, seed=2)),
    )  # fmt: skip


def drawing(cls, order: list[int]):
    """A trainer whose own sampler draws these rows in each epoch."""

    class Order(list, Sampler):
        pass

    class Drawing(cls):
        def _get_train_sampler(self, train_dataset=None):
            return Order(order)

    return Drawing


def steps(cell: dict, engine: str, folder: Path) -> dict:
    """Losses, gradient norms and metrics of five steps, and of an evaluation after them."""
    trainer = build(cell, engine, folder)
    trainer.train()
    check_engine(trainer, engine)
    assert trainer.model.is_gradient_checkpointing == cell.get("checkpointing", False)
    return {"found": results(trainer)}


def cut(cell: dict, engine: str, folder: Path) -> dict:
    """What seven steps give, and what the last three give that go on from the checkpoint amid the second epoch.

    With `die`, a process is killed in that step; with `again`, a run that was killed is gone on with instead.
    """
    saving = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    if "die" in cell or "again" in cell:
        trainer = build(cell, engine, folder, **saving)
        if "die" in cell:
            trainer.add_callback(Death(cell["die"]))
        trainer.train(resume_from_checkpoint="again" in cell)
        return {"found": results(trainer, folder / f"final {cell['name']}")}
    trainer = build(cell, engine, folder, **saving)
    trainer.train()
    whole = results(trainer, folder / f"final {cell['name']}")
    trainer = build(cell, engine, folder, **saving | {"output_dir": str(folder / f"{cell['name']} again")})
    trainer.train(resume_from_checkpoint=str(folder / cell["name"] / "checkpoint-4"))
    check_engine(trainer, engine)
    found = results(trainer, folder / f"final {cell['name']} again")
    assert sum(name.endswith(" loss") for name in found) == 3
    return {"found": found, "whole": {name: whole[name] for name in found}}


def probed(cell: dict, engine: str, folder: Path) -> dict:
    """What a probe says of steps and tokens; it must leave nothing in its folder."""

    class Checked(getattr(trainers, cell["trainer"])):
        def train(self, *arguments, **keywords):
            super().train(*arguments, **keywords)
            check_engine(self, engine)
            release(self)

    args = arguments(cell, engine, folder)
    model = ModelArguments(model_name_or_path=saved_model(folder, len(build_tokenizer()), args))
    report = probe(Checked, {"train": Dataset.from_list(rows(11))}, args, model)
    assert f"{PROCESSES} process(es) on cpu" in report and not Path(args.output_dir).exists(), report
    names = ("longest batches, (.*) tokens", "typical batches, (.*) tokens", "(.*) steps: ")
    return {"found": {name: float(re.search(name, report)[1]) for name in names}}


class Death(TrainerCallback):
    """The last process dies in a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == PROCESSES - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def results(trainer, saved: Path | None = None) -> dict[str, float]:
    """The numbers of a run that is over, and those of an evaluation; with `saved`, also the weights'."""
    seen = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Numbers))
    found = seen.found | numbers(trainer.evaluate())
    if saved is not None:
        trainer.save_model(str(saved))
        trainer.accelerator.wait_for_everyone()
        for path in saved.glob("*.safetensors"):
            for name, weight in load_file(path).items():
                found[f"weights {name}"] = float(weight.double().abs().mean())
                found[f"sign {name}"] = float(weight.double().flatten() @ torch.arange(weight.numel()).double().cos())
        assert any(name.startswith("weights ") for name in found)
    release(trainer)
    return found


def em_rounds(cell: dict, engine: str, folder: Path) -> dict:
    """EM: losses and gradient norms of the M-steps of the last round, posterior, log-likelihoods.

    With `die`, a process is killed in that step of the first M-step; `out` names the folder of a run to go on with.
    """
    tokenizer = build_tokenizer()
    out = folder / cell.get("out", cell["name"])
    fields = dict(
        per_device_train_batch_size=4 // PROCESSES, ref_tokens_per_batch=60, optim="adamw_torch", max_steps=5,
        logging_steps=1, rounds=1, adam_epsilon=EPSILON, gradient_checkpointing=cell.get("checkpointing", False),
        **engine_arguments(engine, gather=cell.get("gather", True)),
    )  # fmt: skip
    args = em_config(out, **fields | cell.get("settings", {}))
    prepare(args, engine)
    # The 28 rows are dealt out evenly, their halves (`score_on`) and the batches that are scored are not.
    data = [*opposed_rows(), opposed_rows(seed=5)[0]][:31]
    trainer = trainers.EMDPOTrainer(
        saved_model(folder, len(tokenizer), args, tied=cell.get("tied", False)), args=args, processing_class=tokenizer,
        train_dataset=Dataset.from_list(data[:28]), eval_dataset=Dataset.from_list(data[28:]),
        peft_config=adapter(cell.get("peft")), callbacks=[Death(cell["die"])] if "die" in cell else None,
    )  # fmt: skip
    trainer.train()
    found = numbers(trainer.evaluate())
    for k, policy in enumerate(trainer.policies):
        for log in json.loads((policy / "trainer_state.json").read_text())["log_history"]:
            found |= numbers(log, f"type {k} step {log['step']} ") if "loss" in log else {}
    manifest = json.loads((trainer.policies[0].parents[1] / "manifest.json").read_text())
    found["log_likelihood"] = manifest["log_likelihood"]
    found |= {f"posterior {i} {k}": float(v) for i, row in enumerate(trainer.posterior) for k, v in enumerate(row)}
    release(trainer)
    return {"found": found}


def in_stages(cell: dict, engine: str, folder: Path) -> dict:
    """A whole run in rounds or stages: what its trainings log, the weights it ends with, and held-out scores."""

    class Checked(getattr(trainers, cell["trainer"])):
        def train(self, *arguments, **keywords):
            result = super().train(*arguments, **keywords)
            check_engine(self, engine)
            return result

    args, inputs = arguments(cell, engine, folder), folder / "inputs"
    if int(os.environ.get("RANK", "0")) == 0 and not inputs.exists():
        write_inputs(inputs)
    args.distributed_state.wait_for_everyone()
    answered = load_dataset("json", data_files=str(inputs / "rows.jsonl"), split="train")
    if cell["trainer"] == "SGPOTrainer":
        parts = {"train": range(5), "preferences": range(5, 10), "test": range(10, 12)}
        data = {name: answered.select(at) for name, at in parts.items()}
    else:
        answers = [
            {"prompt": row["prompt"], "responses": [row["chosen"], "it rains"], "scores": [1.0, 0.0], "reference": ""}
            for row in answered
        ]
        data = {"train": Dataset.from_list(answers[:6]), "test": Dataset.from_list(answers[6:9])}
    sft_config = stages.sft_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "sft_config", lambda *given: prepare(sft_config(*given), engine))
        Checked.run(args, data, str(inputs / "model"), peft_config=adapter(cell.get("peft")))
    out, found = Path(args.output_dir), {}
    for path in sorted(out.glob("round-*/**/trainer_state.json")):
        for log in json.loads(path.read_text())["log_history"]:
            found |= numbers(log, f"{path.parent.relative_to(out)} step {log['step']} ") if "loss" in log else {}
    [weights] = out.glob("*.safetensors")
    found |= {f"weights {name}": float(w.double().abs().mean()) for name, w in load_file(weights).items()}
    for path in sorted(out.glob("round-*/**/scores-*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            where = f"{path.parent.relative_to(out)} prompt {line['prompt']}"
            found |= {f"{where} score {k}": score for k, score in enumerate(line["scores"])}
    return {"found": found}


@contextmanager
def check_em(engine: str):
    """M-steps must run under the engine, and policies that score be sharded by an engine that shards."""

    class MStep(TypePolicyTrainer):
        def train(self, *arguments, **keywords):
            super().train(*arguments, **keywords)
            check_engine(self, engine)

    class Scoring(Runner):
        def check(self, model, *arguments):
            sharded = {"fsdp2": lambda p: isinstance(p, DTensor), "zero3": lambda p: hasattr(p, "ds_id")}
            if not self._checked and engine in sharded:
                assert all(map(sharded[engine], model.parameters()))
            super().check(model, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(em_trainer, "TypePolicyTrainer", MStep)
        patch.setattr(cache, "Runner", Scoring)
        yield


def release(trainer) -> None:
    """End the engines of a trainer, so that the next one finds the process as at its start."""
    trainer.release()


def begin(engine: str) -> None:
    """Let DeepSpeed start without a GPU, where this is its engine."""
    torch.set_num_threads(1)
    if not engine.startswith("zero"):
        return
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Uncompiled(CPU_Accelerator):
        """Without the operator for inference that DeepSpeed would compile first: not everyone has a compiler."""

        def create_op_builder(self, name):
            return None if name == "ShareMemCommBuilder" else super().create_op_builder(name)

    set_accelerator(Uncompiled())
    # On GPUs accelerate does this; with use_cpu it opens plain gloo, which DeepSpeed does not see.
    deepspeed.init_distributed("gloo")


def main(options: dict) -> None:
    folder, engine = Path(options["folder"]), options["engine"]
    begin(engine)
    for cell in options["cells"]:
        started = time.monotonic()
        try:
            run = cut if cell.get("cut") else probed if cell.get("probe") else steps
            run = em_rounds if cell["trainer"] == "EMDPOTrainer" else in_stages if cell.get("stages") else run
            with check_em(engine) if run is em_rounds else nullcontext():
                line = {"cell": cell["name"], **run(cell, engine, folder)}
        except ValueError as refusal:  # on every process alike, before its first step
            line = {"cell": cell["name"], "refused": str(refusal)}
        gc.collect()
        if int(os.environ.get("RANK", "0")) == 0:
            with open(folder / "results.jsonl", "a") as file:
                file.write(json.dumps(line | {"seconds": round(time.monotonic() - started, 1)}) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    leave_processes()
