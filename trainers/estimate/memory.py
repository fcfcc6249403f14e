"""Arithmetic of the memory of one training step on one GPU.

Activations are what autograd saves in a Llama-like layer whose attention keeps no scores (SDPA); layers of other
kinds are estimated by the same formula. Left out: about 1 GiB of CUDA context, what the allocator cannot use, and
NCCL's own buffers.

Symbols: T tokens that are fed, N of them predict a response token; H hidden size, A width of all query heads, G width
of all key heads, F feed-forward width, V vocabulary; s bytes per number between layers, c bytes per number inside a
linear layer (2 under autocast).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..forward.head import CHUNK_ELEMENTS
from .plan import Plan
from .shape import Fed, ModelShape

# DeepSpeed's defaults for reduce_bucket_size and stage3_max_live_parameters, in numbers.
ZERO_BUCKET, ZERO3_LIVE = 5 * 10**8, 10**9
# Bytes per logit of a KL through checkpointing: measured.
KL_LOGITS = 20


@dataclass(frozen=True)
class Run:
    """What the arithmetic needs to know of the training arguments."""

    half: bool = False  # bf16 or fp16, from the recipe or the accelerate file
    checkpointed: int = 0  # layers whose activations are recomputed
    offload_checkpoints: bool = False
    whole_gradients: bool = False  # FSDP adds up unsharded gradients over an accumulation window
    moments: int = 2  # optimizer states per trained weight
    moment_bytes: int | None = None  # None: as wide as the weights
    frozen_copy: bool = True  # the reference is a model of its own
    chunk_elements: int = CHUNK_ELEMENTS  # logits that the LM head works on at once
    kl: bool = False  # the loss has a KL over the vocabulary, from the LM heads of policy and reference
    mask_heads: int = 0  # learned masks, which read the reference's hidden states of all layers


class Item(NamedTuple):
    """One line of an estimate in bytes. What is not `counted` is never there at the same time as what is."""

    name: str
    size: float
    how: str
    counted: bool = True


def memory(shape: ModelShape, batch: Fed, plan: Plan, run: Run) -> list[Item]:
    """The lines of the estimate for one GPU; the sum of those that are counted is the peak."""
    model = [*_states(shape, plan, run), _reference(shape, plan, run), _buffers(shape, plan, run)]
    return [*model, *_step(shape, batch, plan, run)]


def total(items: Iterable[Item]) -> float:
    """Bytes of the items that are counted."""
    return sum(item.size for item in items if item.counted)


# What is there all the time.


def _states(shape: ModelShape, plan: Plan, run: Run) -> list[Item]:
    """Weights, gradients and optimizer states, in bytes per number (AdamW):

    | | weights | gradients | optimizer |
    |---|---|---|---|
    | one process, DDP | as loaded | as loaded | 2 moments as loaded |
    | DeepSpeed in bf16 | 2 | 2 | 4 (float32 weights) + 2 x 4 |
    | FSDP in bf16 | trained 4, frozen as loaded | 4 | 2 x 4 |

    FSDP because accelerate keeps trained weights in float32. What the stage shards is divided by the number of
    processes. Weights in 4 or 8 bits are whole everywhere, and so are gradients while FSDP accumulates them.
    """
    deepspeed = plan.engine == "deepspeed"
    frozen = shape.parameters - shape.trainable - shape.quantised
    trained_width, frozen_width = shape.trainable_bytes / max(1, shape.trainable), shape.frozen_bytes / max(1, frozen)
    if run.half and plan.engine:
        trained_width, frozen_width = (2, 2) if deepspeed else (4, frozen_width)
    moments = run.moments * (run.moment_bytes or (4 if deepspeed else trained_width))
    whole = (2 if run.half else trained_width) if run.whole_gradients else 0
    quantised_width = shape.quantised_bytes / max(1, shape.quantised)
    trained = shape.trainable
    weights = _item(
        "weights",
        (trained, trained_width, plan.share(3), "trained"),
        (frozen, frozen_width, plan.share(3), "frozen"),
        (shape.quantised, quantised_width, 1, "quantised"),
    )
    gradients = _item("gradients", (trained, trained_width, plan.share(2), ""), (trained, whole, 1, "accumulated"))
    optimizer = _item(
        "optimizer",
        (trained, moments, plan.share(1), "moments"),
        (trained, 4 if deepspeed else 0, plan.share(1), "float32 weights"),
    )
    all_offloaded = plan.offload_weights and not deepspeed
    offloaded = (plan.offload_weights, all_offloaded, plan.offload_optimizer or all_offloaded)
    items = (weights, gradients, optimizer)
    return [i._replace(size=0, how="in CPU memory") if off else i for i, off in zip(items, offloaded, strict=True)]


def _reference(shape: ModelShape, plan: Plan, run: Run) -> Item:
    """A frozen copy: as loaded, or 2 bytes per weight under DeepSpeed in bf16; sharded in stage 3, its head not."""
    # The KL needs the reference's LM head whole, of which an engine that shards weights has none.
    head = (shape.vocabulary * shape.hidden, shape.stream * (run.kl and plan.stage >= 3), 1, "LM head")
    if not run.frozen_copy:
        nothing = "none" if shape.full else "none: the adapter is switched off"
        return _item("reference", head) if head[1] else Item("reference", 0, nothing)
    width = (shape.trainable_bytes + shape.frozen_bytes) / shape.parameters
    width = 2 if run.half and plan.engine == "deepspeed" else width
    return _item("reference", (shape.parameters, width, plan.share(3), "frozen copy"), head)


def _buffers(shape: ModelShape, plan: Plan, run: Run) -> Item:
    """Copies that communication needs.

    DDP: buckets as large as the gradients. ZeRO: a bucket of at most 5e8 gradients; stage 3 also gathers up to 1e9
    weights. FSDP: gathered weights of everything outside the layers and of two layers (of all layers if they are not
    freed after the forward pass), and gradients of everything outside and of one layer.
    """
    width = 2 if run.half else shape.stream
    if plan.engine == "deepspeed":
        live = min(ZERO3_LIVE, shape.parameters) if plan.stage >= 3 else 0
        bucket = min(ZERO_BUCKET, shape.trainable)
        return _item("buffers", (live, width, 1, "gathered"), (bucket, width, 1, "bucket"))
    if plan.engine == "fsdp":
        outside = shape.parameters - shape.layers * shape.layer_parameters
        gathered = outside + 2 * shape.layer_parameters if plan.reshard else shape.parameters
        reduced = (outside + shape.layer_parameters) * shape.trainable / shape.parameters
        return _item("buffers", (gathered, width, 1, "gathered"), (reduced, width, 1, "gradients"))
    width = shape.trainable_bytes / max(1, shape.trainable) if plan.processes > 1 else 0
    return _item("buffers", (shape.trainable, width, 1, "DDP's buckets"))


# What a step adds.


def _step(shape: ModelShape, batch: Fed, plan: Plan, run: Run) -> list[Item]:
    """Activations with the largest of the works on them; the reference's forward is over before there are any."""
    kept, layer = _activations(shape, batch, plan, run)
    works = [_lm_head(shape, batch, plan, run), layer, _masks(shape, batch, plan, run)]
    reference = _reference_forward(shape, batch, plan, run)
    work = max(works, key=lambda item: item.size)
    first = reference.size > kept.size + work.size
    items = [kept._replace(counted=not first)]
    items += [item._replace(counted=not first and item is work) for item in works]
    return [item for item in (*items, reference._replace(counted=first)) if item.size]


def _activations(shape: ModelShape, batch: Fed, plan: Plan, run: Run) -> tuple[Item, Item]:
    """What waits for the backward pass, and the work on one layer in the backward pass.

    Kept: all activations of a layer, or s T H for its input if they are recomputed; 4 T H (and s T H if trained) for
    the last norm, c N H for the input of the LM head and as much for the reference's of a KL, one byte per element of
    the mask.
    Work: the gradients of two tensors of the feed-forward, and the layer's activations if they are recomputed.
    """
    s, c, copies = _widths(shape, plan, run)
    tokens, whole = batch.tokens, shape.layers - run.checkpointed
    casts = _autocast_copies(shape, plan, run)
    layer = layer_activations(shape, batch, s, c, copies) + casts
    inputs = 0 if run.offload_checkpoints else s * tokens * shape.hidden
    ends = tokens * shape.hidden * (4 + s * shape.full) + batch.mask
    ends += c * batch.predicted * shape.hidden * (1 + run.kl)
    kept = _item(
        "activations",
        (whole, layer, 1, "layers whole"),
        (run.checkpointed, inputs, 1, "layer inputs"),
        (1, ends, 1, "ends"),
    )
    gradients = 2 * tokens * shape.feed_forward * max(c, copies and shape.adapter_bytes)
    recomputed = layer if run.checkpointed else 0
    work = _item("one layer", (1, recomputed, 1, "recomputed"), (1, gradients, 1, "gradients"))
    # In the forward pass autocast holds its copies of all trained weights, also of layers that are recomputed later.
    held = _item("autocast", (shape.layers, casts * shape.full * (recomputed > 0), 1, "copies of weights"))
    return kept, max(work, held, key=lambda item: item.size)


def _lm_head(shape: ModelShape, batch: Fed, plan: Plan, run: Run) -> Item:
    """The LM head in the backward pass, with the logits of one chunk of tokens.

    A plain head needs 4 bytes per logit (and 2 for a 16-bit copy), c N H for the gradient of its input and, if it is
    trained, 4 + c per weight to sum its gradient over chunks. Any other head (FSDP makes it one) goes through
    checkpointing: 16 bytes per logit, for logits, softmax and two gradients, and s per weight if there are several
    chunks. Autocast copies a float32 weight.

    A KL has chunks half as long. A plain head then needs 12 bytes per logit in the forward pass, for both models and
    the sum of exponentials, next to the states for learned masks, and 8 in the backward pass (10 with a 16-bit copy);
    any other head needs KL_LOGITS.
    """
    s, c, _ = _widths(shape, plan, run)
    chunk = min(batch.predicted, max(1, run.chunk_elements // shape.vocabulary // (1 + run.kl)))
    logits, weight = chunk * shape.vocabulary, shape.vocabulary * shape.hidden
    copied = (weight * (1 + run.kl), 2 if _autocast_copies(shape, plan, run) else 0, 1, "copy")
    if shape.plain_head and plan.engine != "fsdp":
        gradient = (weight, (4 + c) * shape.full, 1, "gradient")
        inputs = (batch.predicted * shape.hidden, c, 1, "inputs")
        each = 4 * (1 + run.kl) + 2 * (c < 4)
        backward = _item("LM head chunk", (logits, each, 1, "logits"), gradient, inputs, copied)
        states = (batch.predicted * shape.hidden, s * shape.layers * (run.mask_heads > 0), 1, "states")
        forward = _item("LM head chunk", (logits, 12 * run.kl, 1, "logits"), states, copied)
        return max(backward, forward, key=lambda item: item.size)
    gradient = (weight, s * (shape.full and chunk < batch.predicted), 1, "gradient")
    return _item("LM head chunk", (logits, KL_LOGITS if run.kl else 16, 1, "logits"), gradient, copied)


def _masks(shape: ModelShape, batch: Fed, plan: Plan, run: Run) -> Item:
    """Learned masks at the end of the forward pass.

    The reference's hidden states at the N positions of all layers, for each head their normalised float32 copies, and
    two more of one layer.
    """
    if not run.mask_heads:
        return Item("masks", 0, "none")
    states, (s, _, _) = batch.predicted * shape.hidden, _widths(shape, plan, run)
    layers, copies = (shape.layers * states, s, 1, "states"), (shape.layers * states, 4 * run.mask_heads, 1, "copies")
    return _item("masks", layers, copies, (2 * states, 4, 1, "one layer"))


def _reference_forward(shape: ModelShape, batch: Fed, plan: Plan, run: Run) -> Item:
    """What a forward of the reference needs, as far as it can be more than a step of the policy.

    TRL's `prepare_fsdp` makes a frozen copy one FSDP unit, so that its forward gathers all of its weights. Learned
    masks want the hidden states of all layers (and of the embeddings), of which the N positions are then copied twice.
    """
    gathers = run.frozen_copy and plan.engine == "fsdp"
    width, s = 2 if run.half else shape.stream, _widths(shape, plan, run)[0]
    states = (shape.hidden, s * bool(run.mask_heads))
    every, chosen = (shape.layers + 1) * batch.tokens, 2 * shape.layers * batch.predicted
    return _item(
        "reference forward",
        (shape.parameters, width * gathers, 1, "gathered at once"),
        (every * states[0], states[1], 1, "hidden states"),
        (chosen * states[0], states[1], 1, "chosen ones"),
    )


def layer_activations(shape: ModelShape, batch: Fed, s: int, c: int, copies: int) -> float:
    """What autograd saves in one layer, in bytes.

    Norms: 4 T per width for the float32 input, and s T for the normalised one if the norm is trained.
    Trained or adapted linear layers: c T for each distinct input (2 H + A + F) or, if they change its dtype, `copies`
    T for the input of each; and T x rank for each adapter.
    Feed-forward: 3 c T F if gated (gate, its activation, up), else c T F.
    Attention: 2 c A per query (query and output) and 4 per query and head, 2 c per key, c per element of the mask.
    On tables of branches, keys are repeated for every query head (A wide). Elsewhere they are not (G wide), and the
    output goes into the next linear layer without a copy.
    """
    tokens = batch.tokens
    norms = shape.norms * tokens * (4 + s * shape.full)
    distinct = (
        2 * shape.hidden
        + shape.attention * batch.copies_keys
        + shape.feed_forward * (shape.feed_forward in shape.inputs)
    )
    inputs = tokens * (copies * sum(shape.inputs) or c * distinct) + tokens * shape.ranks * (copies or c)
    feed_forward = (3 if shape.gated else 1) * c * tokens * shape.feed_forward
    keys = batch.keys * (shape.attention if batch.copies_keys else shape.key_values)
    attention = 2 * c * (batch.queries * shape.attention + keys) + 4 * batch.queries * shape.heads + c * batch.mask
    return norms + inputs + feed_forward + attention


def _widths(shape: ModelShape, plan: Plan, run: Run) -> tuple[int, int, int]:
    """(s, c, bytes per number of the copy that a linear layer makes of its input to change its dtype, 0 if none).

    DeepSpeed and FSDP in half precision compute on half-precision weights throughout. Elsewhere autocast casts the
    input of every linear layer on its own, and PEFT casts it to the dtype of its adapter.
    """
    if run.half and plan.engine:
        return 2, 2, 0
    s, c = shape.stream, 2 if run.half else shape.stream
    differs = shape.adapter_bytes not in (0, s)
    if run.half:
        return s, c, c if s > c or differs else 0
    return s, c, shape.adapter_bytes if differs else 0


def _autocast_copies(shape: ModelShape, plan: Plan, run: Run) -> int:
    """Bytes of the 2-byte copies that autocast makes of one layer's float32 weights."""
    casts = run.half and not plan.engine and shape.stream > 2 and not shape.quantised
    return 2 * shape.layer_linears if casts else 0


# Words.


def _item(name: str, *terms: tuple[float, float, float, str]) -> Item:
    """(how many, bytes each, part on this GPU, name) -> their sum, and the sum in words."""
    used = [term for term in terms if term[0] and term[1]]
    size = sum(count * width * part for count, width, part, _ in used)
    return Item(name, size, " + ".join(_words(*term) for term in used) or "none")


def _words(count: float, width: float, part: float, name: str) -> str:
    """7.24B x 2 / 8 trained; a width above 1 KiB is given in MiB."""
    number = f"{count / 1e9:.2f}B" if count >= 1e8 else f"{count / 1e6:.2f}M" if count >= 1e5 else f"{count:g}"
    each = f"{width:.3g} B" if width < 1024 else f"{width / 2**20:.1f} MiB"
    shown = each if count == 1 else f"{number} x {each}"
    return f"{shown}{f' / {round(1 / part)}' if part < 1 else ''} {name}".rstrip()
