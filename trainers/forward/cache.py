"""Reference log-probabilities on disk, by content.

One parquet file per reference: its name is a hash of the reference's weights, configuration, dtype and of what is
stored (a sum per response, or one number per token). Its rows are keyed by the token ids of prompt and response. So
nothing else, neither learning rate nor row order nor number of processes, can make an entry stale or waste one, and
the file can be copied to another machine.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn

logger = logging.getLogger(__name__)

Value = float | list[float]

# Fields of a model config that do not change a log-probability.
IRRELEVANT = (
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id", "pad_token_id",
    "output_attentions", "output_hidden_states", "return_dict", "transformers_version", "use_cache", "problem_type",
)  # fmt: skip


class LogpsCache:
    """Entries of one reference: `{key: sum over tokens}` or `{key: values per token}`, in memory and on disk.

    A pass writes parts as it goes, so that an interrupted one loses little; `finish` makes one file of them.
    """

    def __init__(self, folder: str | Path, fingerprint: str):
        self.path = Path(folder) / f"{fingerprint}.parquet"
        self.parts = Path(folder) / f"{fingerprint}.parts"
        self.entries: dict[str, Value] = {}
        for path in [self.path, *sorted(self.parts.glob("*.parquet"))]:
            if path.is_file():
                table = pq.read_table(path, columns=["key", "logps"])
                self.entries.update(zip(table["key"].to_pylist(), table["logps"].to_pylist(), strict=True))

    def check_same_everywhere(self) -> None:
        """Every process must call this. What is missing is scored together, so all must know the same entries.

        Raises:
            ValueError: processes found different entries, as nodes do that share no file system.
        """
        digest = hashlib.sha256("".join(sorted(self.entries)).encode()).hexdigest()
        found = gather_object([(len(self.entries), digest)])
        if len(set(found)) > 1:
            counts = ", ".join(str(count) for count, _ in found)
            raise ValueError(
                f"{self.path.parent} holds different entries on different processes ({counts}): let all nodes share "
                "this folder (ref_cache_dir, or output_dir of a run in rounds), or copy its files to every node."
            )

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def add(self, entries: dict[str, Value], *, write: bool) -> None:
        """Take new entries; `write` them as a part (one process only)."""
        self.entries.update(entries)
        if write and entries:
            self.parts.mkdir(parents=True, exist_ok=True)
            # Named by content, so that a part never replaces another one of an interrupted pass.
            name = hashlib.sha256("".join(sorted(entries)).encode()).hexdigest()[:16]
            _write(self.parts / f"{name}.parquet", entries)

    def finish(self) -> None:
        """Put all entries into the one file and remove the parts (one process only)."""
        if not self.parts.is_dir():
            return
        _write(self.path, self.entries)
        for part in self.parts.iterdir():
            part.unlink()
        self.parts.rmdir()


def _write(path: Path, entries: dict[str, Value]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    pq.write_table(pa.table({"key": list(entries), "logps": list(entries.values())}), temporary)
    os.replace(temporary, path)


def response_keys(prompt_ids: Sequence[int], response_ids: Sequence[Sequence[int]]) -> list[str]:
    """A key per response: what the reference says depends on these tokens and on nothing else of the row."""
    prompt = hashlib.sha256(np.asarray([len(prompt_ids), *prompt_ids], dtype=np.int64).tobytes())
    keys = []
    for ids in response_ids:
        digest = prompt.copy()
        digest.update(np.asarray(ids, dtype=np.int64).tobytes())
        keys.append(digest.hexdigest()[:32])
    return keys


def reference_fingerprint(
    parameters: Iterable[tuple[str, nn.Parameter]], config: dict, *, compute_dtype: str, per_token: bool
) -> str:
    """Hash of everything about a reference that changes its numbers.

    `parameters` are its named weights, adapters included; ZeRO-3 shares are gathered one by one.
    """
    digest = xxhash.xxh3_128()
    for name, parameter in sorted(parameters, key=lambda item: item[0]):
        with whole(parameter):
            data = parameter.detach()
            digest.update(f"{name} {tuple(data.shape)} {data.dtype}".encode())
            digest.update(data.contiguous().flatten().view(torch.uint8).cpu().numpy())
    options = {k: v for k, v in config.items() if k not in IRRELEVANT and not k.startswith("_attn")}
    digest.update(json.dumps([options, compute_dtype, per_token], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def whole(parameter: nn.Parameter):
    """The parameter as a whole, also under ZeRO-3."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter])
    return torch.no_grad()


def reference_parameters(model: nn.Module, *, adapter: str | None) -> dict[str, nn.Parameter]:
    """Weights of a reference under the names of the bare model; `adapter` is the one that counts, None for none.

    A base model under an adapter and the same model without one get the same names, so that they share a cache.
    """
    if not isinstance(model, PeftModel):
        return dict(model.named_parameters())
    belongs = owners(model)
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if belongs.get(name) in (None, adapter)
    }


def owners(model: PeftModel) -> dict[str, str]:
    """Which adapter a weight belongs to, by the weight's name; those of the base are not in it.

    PEFT keeps the weights of all kinds of adapters in dicts of modules or parameters, by the adapter's name.
    """
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleDict | nn.ParameterDict):
            for name, _ in module.named_parameters(remove_duplicate=False):
                adapter = name.partition(".")[0]
                if adapter in model.peft_config:
                    found[f"{path}.{name}"] = adapter
    return found
