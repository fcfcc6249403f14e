"""How a run is spread over processes, read from an accelerate file or from what `accelerate launch` has set."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Plan:
    """How a run is spread over processes.

    `stage` counts as in ZeRO: 1 shards optimizer states, 2 gradients as well, 3 weights as well. FSDP is stage 3.
    """

    name: str = "one process"
    processes: int = 1
    engine: str = ""  # "deepspeed", "fsdp", or "" for plain PyTorch
    stage: int = 0
    mixed_precision: str = "no"
    offload_optimizer: bool = False
    offload_weights: bool = False
    reshard: bool = True  # FSDP frees gathered weights after the forward of a layer
    recompute: bool = False  # FSDP's own activation checkpointing

    def share(self, stage: int) -> float:
        """Part of a tensor that lies on one GPU if it is sharded from `stage` on."""
        return 1 / self.processes if self.stage >= stage else 1.0


def read_plan(path: str) -> Plan:
    """Read an accelerate file.

    Raises:
        ValueError: there is no such file, or it asks for a kind of parallelism that is not estimated.
    """
    if not Path(path).is_file():
        raise ValueError(f"accelerate_config={path!r} does not exist: name a file of `accelerate config`.")
    config = yaml.safe_load(Path(path).read_text())
    kind, processes = str(config.get("distributed_type", "NO")), int(config.get("num_processes") or 1)
    precision = str(config.get("mixed_precision") or "no")
    if kind == "DEEPSPEED":
        return _deepspeed(_zero_options(config.get("deepspeed_config") or {}), processes, precision)
    if kind == "FSDP":
        options = config.get("fsdp_config") or {}
        return _fsdp({name.removeprefix("fsdp_"): value for name, value in options.items()}, processes, precision)
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(f"distributed_type={kind} is not estimated: use NO, MULTI_GPU, DEEPSPEED or FSDP.")
    return _plain(processes, precision)


def plan_from_environment(environ: Mapping[str, str]) -> Plan:
    """Read the variables that `accelerate launch` or torchrun sets."""
    processes, precision = int(environ.get("WORLD_SIZE", 1)), environ.get("ACCELERATE_MIXED_PRECISION", "no")

    def starting_with(prefix: str) -> dict[str, str]:
        return {key.removeprefix(prefix).lower(): environ[key] for key in environ if key.startswith(prefix)}

    if _yes(environ.get("ACCELERATE_USE_DEEPSPEED")):
        options = starting_with("ACCELERATE_DEEPSPEED_")
        file = (
            {} if options.get("config_file", "none") == "none" else {"deepspeed_config_file": options["config_file"]}
        )
        return _deepspeed(_zero_options(options | file), processes, precision)
    if _yes(environ.get("ACCELERATE_USE_FSDP")):
        return _fsdp(starting_with("FSDP_"), processes, precision)
    return _plain(processes, precision)


def _zero_options(options: Mapping) -> Mapping:
    """accelerate's own options, or the same ones from the DeepSpeed file that they point to."""
    path = options.get("deepspeed_config_file")
    if not path:
        return options
    zero = json.loads(Path(path).read_text()).get("zero_optimization", {})
    devices = {part: (zero.get(f"offload_{part}") or {}).get("device") for part in ("optimizer", "param")}
    return {"zero_stage": zero.get("stage", 0), **{f"offload_{part}_device": d for part, d in devices.items()}}


def _plain(processes: int, precision: str) -> Plan:
    return Plan("DDP" if processes > 1 else "one process", processes, mixed_precision=precision)


def _deepspeed(options: Mapping, processes: int, precision: str) -> Plan:
    stage = int(options.get("zero_stage", 2))
    on_cpu = {part: str(options.get(f"offload_{part}_device") or "none") != "none" for part in ("optimizer", "param")}
    return Plan(
        f"DeepSpeed ZeRO-{stage}",
        processes,
        engine="deepspeed",
        stage=stage,
        mixed_precision=precision,
        offload_optimizer=on_cpu["optimizer"],
        offload_weights=on_cpu["param"],
    )


def _fsdp(options: Mapping, processes: int, precision: str) -> Plan:
    return Plan(
        f"FSDP{options.get('version') or 1}",
        processes,
        engine="fsdp",
        stage=3,
        mixed_precision=precision,
        offload_weights=_yes(options.get("offload_params")),
        reshard=str(options.get("reshard_after_forward", True)).lower() not in ("false", "shard_grad_op"),
        recompute=_yes(options.get("activation_checkpointing")),
    )


def _yes(value) -> bool:
    return str(value).lower() in ("true", "1", "yes")
