"""Memory of one training step on one GPU: arithmetic on widths and lengths, without weights or a GPU.

Sources: the ZeRO paper (arXiv 1910.02054, section 3) for what is kept per weight; Korthikanti et al. (2205.05198,
section 4) for what autograd keeps of a layer, here a Llama-like one whose attention keeps no scores (SDPA); and this
package's own LM head, attention and masks. docs/scale.md says how far it is from measured peaks. Left out: about 1 GiB
of CUDA context, what the allocator cannot use, and NCCL's buffers.

Symbols: T tokens that are fed, N of them predict a response token; H hidden size, A width of all query heads, G of all
key heads, F feed-forward width, V vocabulary; s bytes per number between layers, c inside a linear layer.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from polypo.recipes import is_true

from .data.budget import Lengths
from .forward.head import CHUNK_ELEMENTS, LogitRule, head_rows, logit_rule
from .forward.policy import base_model
from .forward.tree import groups, grow, pieces

# DeepSpeed's defaults for reduce_bucket_size and stage3_max_live_parameters, in numbers.
ZERO_BUCKET, ZERO3_LIVE = 5 * 10**8, 10**9
OFFLOADED = ("optimizer", "param")  # parts of DeepSpeed's states that may lie in CPU memory


@dataclass(frozen=True)
class Plan:
    """How a run is spread over processes. `stage` counts as in ZeRO: 3 shards weights as well, as FSDP does."""

    name: str = "one process"
    processes: int = 1
    engine: str = ""  # "deepspeed", "fsdp", or "" for plain PyTorch
    stage: int = 0
    half: bool = False  # mixed precision that the launcher sets
    offload_optimizer: bool = False
    offload_weights: bool = False
    reshard: bool = True  # FSDP frees gathered weights after the forward of a layer
    recompute: bool = False  # FSDP's own activation checkpointing

    def share(self, stage: int) -> float:
        """Part of a tensor that lies on one GPU if it is sharded from `stage` on."""
        return 1 / self.processes if self.stage >= stage else 1.0


def read_plan(path: str | None = None) -> Plan:
    """The plan in an accelerate file; without one, what `accelerate launch` or torchrun has set for this process.

    Raises:
        ValueError: there is no such file, or it asks for a kind of parallelism that is not estimated.
    """
    if path is None:
        own = {name.lower().removeprefix("accelerate_"): value for name, value in os.environ.items()}
        kind = "DEEPSPEED" if is_true(own.get("use_deepspeed")) else "FSDP" if is_true(own.get("use_fsdp")) else "NO"
        processes, options = int(own.get("world_size", 1)), own if kind != "NO" else {}
        options = {name: value for name, value in options.items() if name.startswith(("deepspeed_", "fsdp_"))}
    elif Path(path).is_file():
        own = yaml.safe_load(Path(path).read_text())
        kind, processes = str(own.get("distributed_type", "NO")), int(own.get("num_processes") or 1)
        options = own.get(f"{kind.lower()}_config") or {}
    else:
        raise ValueError(f"accelerate_config={path!r} does not exist: name a file of `accelerate config`.")
    options = {name.removeprefix("deepspeed_").removeprefix("fsdp_"): value for name, value in options.items()}
    half = str(own.get("mixed_precision")) in ("bf16", "fp16")
    if kind == "DEEPSPEED":
        file, zero = str(options.get("config_file") or "none"), dict[str, Any]()
        if file == "none":
            devices = {f"offload_{part}": {"device": options.get(f"offload_{part}_device")} for part in OFFLOADED}
            zero = {"stage": options.get("zero_stage", 2), **devices}
        else:
            zero = json.loads(Path(file).read_text()).get("zero_optimization", {})
        stage, parts = int(zero.get("stage", 0)), [(zero.get(f"offload_{part}") or {}) for part in OFFLOADED]
        offloaded = [str(part.get("device") or "none") != "none" for part in parts]
        return Plan(f"DeepSpeed ZeRO-{stage}", processes, "deepspeed", stage, half, *offloaded)
    if kind == "FSDP":
        reshard = str(options.get("reshard_after_forward", True)).lower() not in ("false", "shard_grad_op")
        return Plan(f"FSDP{options.get('version') or 1}", processes, "fsdp", 3, half, reshard=reshard,
                    offload_weights=is_true(options.get("offload_params")),
                    recompute=is_true(options.get("activation_checkpointing")))  # fmt: skip
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(f"distributed_type={kind} is not estimated: use NO, MULTI_GPU, DEEPSPEED or FSDP.")
    return Plan("DDP" if processes > 1 else "one process", processes, half=half)


class Fed(NamedTuple):
    """A micro-batch as a model is fed it: tokens, those that predict a response token, slots of the attention."""

    tokens: int
    predicted: int
    queries: int
    keys: int
    mask: int  # elements; with a mask, attention has a copy of the keys above it for each node


def fed(rows: list[Lengths], layout: str = "auto", *, flex: bool = False) -> Fed:
    """Lengths of prompts P and of their responses R -> what one micro-batch of them costs.

    `shared`: the tree of sequences that have their prompt in common and no more (forward/tree.py); FlexAttention
    (`flex`) needs no tables.
    `rows`: T = responses x longest (P + R - 1), without a mask.
    `auto`: whichever feeds fewer tokens.
    """
    if layout == "auto":
        return min((fed(rows, own, flex=flex) for own in ("shared", "rows")), key=lambda batch: batch.tokens)
    responses = [r for _, lengths in rows for r in lengths]
    predicted = sum(responses)
    if layout == "rows":
        tokens = len(responses) * max(p + max(lengths) - 1 for p, lengths in rows)
        return Fed(tokens, predicted, tokens, tokens, 0)
    marks = iter(range(len(rows), len(rows) + len(responses)))  # a token for each prompt and for each response
    sequences = [np.repeat([i, next(marks)], [p, r - 1]) for i, (p, rs) in enumerate(rows) for r in rs]
    tree = grow(sequences)
    if flex:
        return Fed(tree.tokens, predicted, tree.tokens, tree.tokens, 0)
    queries = keys = mask = 0
    for group in groups(tree.nodes):
        keys += len(group) * max(node.end for node in group)
        for piece in pieces(group):
            slots = piece.rows * (piece.end - piece.begin)
            queries, mask = queries + slots, mask + slots * piece.keys * (group[0].begin > 0)
    return Fed(tree.tokens, predicted, queries, keys, mask)


class Training(NamedTuple):
    """What the arithmetic needs to know of the training arguments."""

    half: bool = False  # bf16 or fp16, from the recipe or the accelerate file
    recompute: bool = False  # activation checkpointing
    whole_gradients: bool = False  # FSDP adds up unsharded gradients over an accumulation window
    moments: int = 2  # optimizer states per trained weight
    moment_width: int | None = None  # None: as wide as the weights
    frozen_copy: bool = True  # the reference is a model of its own
    kl: bool = False  # the loss has a KL over the vocabulary, from the LM heads of policy and reference
    mask_heads: int = 0  # learned masks, which read the reference's hidden states of all layers
    chunk_elements: int = CHUNK_ELEMENTS  # logits that the LM head works on at once


class Estimate:
    """Of one model, bare or with LoRA, which may lie on the meta device.

    Args:
        bits: per weight of the layers' linear layers if bitsandbytes is to store them, None if it is not.
    """

    def __init__(self, model: nn.Module, plan: Plan, run: Training, *, bits: float | None = None):
        self.plan, self.run, base = plan, run, base_model(model)
        config, head, layers = base.config.get_text_config(), base.get_output_embeddings(), _layers(base.get_decoder())
        layer, self.layers, self.hidden = layers[0], len(layers), config.hidden_size
        embedding = base.get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        self.stream = embedding.element_size()
        trained = [p for p in model.parameters() if p.requires_grad]
        frozen = [p for p in model.parameters() if not p.requires_grad]
        self.trained, self.parameters = _count(trained), _count(trained) + _count(frozen)
        self.trained_bytes, self.frozen_bytes = (sum(p.nbytes for p in part) for part in (trained, frozen))
        linears = [m for n, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D) and "lora_" not in n]
        self.linears, self.layer_parameters = _count(m.weight for m in linears), _count(layer.parameters())
        self.quantised = 0 if bits is None else self.layers * self.linears
        self.quantised_bytes = self.quantised * (bits or 0) / 8

        adapted = [m for m in layer.modules() if isinstance(m, LoraLayer)]
        downs = [p for m in adapted for p in m.lora_A.parameters()]
        self.ranks, self.adapter = sum(len(p) for p in downs), downs[0].element_size() if downs else 0
        self.full = not downs
        self.inputs = [int(m.in_features or 0) for m in adapted] or [_widths(m)[0] for m in linears]
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or self.hidden // heads
        self.queries, self.keys = heads * size, key_heads * size
        self.feed_forward = getattr(config, "intermediate_size", None) or 4 * self.hidden
        self.gated = sum(_widths(m)[1] // self.feed_forward for m in linears) > 1
        norms = [p.numel() for n, p in layer.named_parameters() if p.dim() == 1 and n.endswith("weight")]
        # A norm as wide as one head runs over all query heads or over all key heads.
        self.norms = sum(n if n != size else size * (heads + key_heads) // 2 for n in norms)
        self.vocabulary = head_rows(head)
        self.plain_head = type(head) is nn.Linear and logit_rule(base.config) == LogitRule() and plan.engine != "fsdp"

        # DeepSpeed and FSDP in half precision compute on half-precision weights throughout. Elsewhere autocast casts
        # the input of every linear layer on its own, and PEFT casts it to the dtype of its adapter.
        self.s, self.c, self.copy = self.stream, 2 if run.half else self.stream, 0  # copy: bytes of such a cast input
        if run.half and plan.engine:
            self.s = 2
        elif self.adapter not in (0, self.stream) or self.s > self.c:
            self.copy = self.c if run.half else self.adapter
        casts = run.half and not plan.engine and self.stream > 2 and not self.quantised
        self.casts = 2 * self.linears * casts  # bytes of autocast's 16-bit copies of one layer's weights

    def memory(self, batch: Fed) -> dict[str, float]:
        """Bytes on one GPU at the peak of a step, by part: what is there all the time, and what the step adds."""
        return {**self.states(), **self.step(batch)}

    def states(self) -> dict[str, float]:
        """Weights, gradients, optimizer, reference and buffers; with AdamW, in bytes per number:

        | | weights | gradients | optimizer |
        |---|---|---|---|
        | one process, DDP | as loaded | as loaded | 2 moments as loaded |
        | DeepSpeed in bf16 | 2 | 2 | 4 (float32 weights) + 2 x 4 |
        | FSDP in bf16 | trained 4 (accelerate keeps them in float32), frozen as loaded | 4 | 2 x 4 |

        Each is divided by the processes from its stage on. Weights in 4 or 8 bits are whole everywhere, and so are
        the gradients while FSDP accumulates them. The reference is a copy as loaded, under DeepSpeed in bf16 of 2
        bytes. Buffers: DDP's are as large as the gradients; ZeRO has one of 5e8 numbers and gathers up to 1e9 weights
        in stage 3; FSDP gathers the weights outside the layers and of two layers (of all if it does not free them),
        and reduces the gradients outside the layers and of one.
        """
        plan, run, trained = self.plan, self.run, self.trained
        zero, fsdp = plan.engine == "deepspeed", plan.engine == "fsdp"
        frozen = self.parameters - trained - self.quantised
        own, rest = self.trained_bytes / max(1, trained), self.frozen_bytes / max(1, self.parameters - trained)
        copy, width = (own * trained + rest * frozen) / self.parameters, 2 if run.half else self.stream
        if run.half and plan.engine:
            own, rest, copy = (2, 2, 2) if zero else (4, rest, copy)
        moments = run.moments * (run.moment_width or (4 if zero else own))
        sizes = {
            "weights": (trained * own + frozen * rest) * plan.share(3) + self.quantised_bytes,
            "gradients": trained * own * plan.share(2) + trained * (2 if run.half else own) * run.whole_gradients,
            "optimizer": trained * (moments + 4 * zero) * plan.share(1),
            "reference": self.parameters * copy * plan.share(3) * run.frozen_copy,
        }
        if plan.offload_optimizer or plan.offload_weights and fsdp:
            sizes["optimizer"] = 0
        if plan.offload_weights:
            sizes |= {"weights": 0} if zero else {"weights": 0, "gradients": 0}
        if run.kl and plan.stage >= 3:  # of a sharded reference the KL needs the whole LM head
            sizes["reference"] += self.vocabulary * self.hidden * self.stream
        outside = self.parameters - self.layers * self.layer_parameters
        if zero:
            live = min(ZERO3_LIVE, self.parameters) if plan.stage >= 3 else 0
            sizes["buffers"] = width * (live + min(ZERO_BUCKET, trained))
        elif fsdp:
            gathered = outside + 2 * self.layer_parameters if plan.reshard else self.parameters
            sizes["buffers"] = width * (gathered + (outside + self.layer_parameters) * trained / self.parameters)
        else:
            sizes["buffers"] = trained * own * (plan.processes > 1)
        return sizes

    def step(self, batch: Fed) -> dict[str, float]:
        """Activations with the largest work on them; or the reference's forward, which is over before, if larger.

        Kept of each layer: all its activations, or s T H for its input if they are recomputed; beside them 4 T H (and
        s T H if trained) for the last norm, c N H for the LM head's input (and the reference's of a KL), and the mask.
        Work on one layer: the gradients of two tensors of the feed-forward, and its activations if recomputed; or, in
        the forward pass, autocast's copies of all trained weights.
        """
        run, tokens, inputs = self.run, batch.tokens * self.hidden, batch.predicted * self.hidden
        layer = self._layer(batch) + self.casts
        kept = self.layers * (self.s * tokens if run.recompute else layer) + batch.mask
        kept += tokens * (4 + self.s * self.full) + self.c * inputs * (1 + run.kl)
        backward = 2 * batch.tokens * self.feed_forward * max(self.c, self.copy and self.adapter)
        works = {
            "one layer": max(backward + layer * run.recompute, self.layers * self.casts * self.full * run.recompute),
            "LM head": self._lm_head(batch),
            # The reference's states of all layers at the N positions, float32 copies for each head, two more of one.
            "masks": inputs * (self.layers * (self.s + 4 * run.mask_heads) + 8) * bool(run.mask_heads),
        }
        work = max(works, key=works.__getitem__)
        # TRL's `prepare_fsdp` makes a frozen copy one unit, whose forward gathers all of its weights. Learned masks
        # want the states of all layers and of the embeddings, of which the N positions are then copied twice.
        gathered = run.frozen_copy and self.plan.engine == "fsdp"
        reference = self.parameters * (2 if run.half else self.stream) * gathered
        reference += self.s * ((self.layers + 1) * tokens + 2 * self.layers * inputs) * bool(run.mask_heads)
        if reference > kept + works[work]:
            return {"reference's forward": reference}
        return {"activations": kept, work: works[work]}

    def _layer(self, batch: Fed) -> float:
        """What autograd saves in one layer, in bytes.

        Norms: 4 T per width for the float32 input, and s T for the normalised one if the norm is trained.
        Trained or adapted linear layers: c T for each distinct input (2 H + A + F) or, if they change its dtype, a
        copy of the input of each; and T x rank for each adapter.
        Feed-forward: 3 c T F if gated (gate, its activation, up), else c T F.
        Attention: 2 c A per query (query and output), 2 c per key, c per element of the mask. On tables of branches
        keys are repeated for every query head (A wide). Elsewhere they are not (G wide), and the output goes into the
        next linear layer without a copy.
        """
        c, tables = self.c, batch.mask > 0
        distinct = 2 * self.hidden + self.queries * tables + self.feed_forward * (self.feed_forward in self.inputs)
        inputs = (self.copy * sum(self.inputs) or c * distinct) + self.ranks * (self.copy or c)
        feed_forward = (3 if self.gated else 1) * c * self.feed_forward
        keys = batch.keys * (self.queries if tables else self.keys)
        attention = 2 * c * (batch.queries * self.queries + keys) + c * batch.mask
        return batch.tokens * (self.norms * (4 + self.s * self.full) + inputs + feed_forward) + attention

    def _lm_head(self, batch: Fed) -> float:
        """The LM head in the backward pass, with the logits of one chunk of tokens (half as long with a KL).

        A plain head needs 4 bytes per logit of each model (and 2 for a 16-bit copy), c N H for the gradient of its
        input and, if trained, 4 + c per weight to sum its gradient over chunks; a KL 12 in the forward pass, next to
        the states for learned masks. Any other head (FSDP makes it one) goes through checkpointing: 16 bytes per logit
        (20 measured with a KL), and s per weight if there are several chunks. Autocast copies a float32 weight.
        """
        run, inputs, weight = self.run, batch.predicted * self.hidden, self.vocabulary * self.hidden
        chunk = min(batch.predicted, max(1, run.chunk_elements // self.vocabulary // (1 + run.kl)))
        logits, copied = chunk * self.vocabulary, 2 * weight * (1 + run.kl) * bool(self.casts)
        if not self.plain_head:
            return logits * (20 if run.kl else 16) + weight * self.s * (self.full and chunk < batch.predicted) + copied
        backward = logits * (4 * (1 + run.kl) + 2 * (self.c < 4)) + weight * (4 + self.c) * self.full + inputs * self.c
        forward = logits * 12 * run.kl + inputs * self.s * self.layers * bool(run.mask_heads)
        return max(backward, forward) + copied


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a decoder: the longest list of modules."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


def _widths(linear: nn.Linear | Conv1D) -> tuple[int, int]:
    """Input and output width."""
    return tuple(linear.weight.shape) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)
