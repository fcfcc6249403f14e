"""Groups in parts: the memory of one part, and the gradient of the whole group.

A loss of the log-probabilities l(w) of a group's tokens has the gradient sum over tokens of dL/dl * dl/dw. So all
parts are first scored, without a graph but for the last one; the loss gives dL/dl; the last part goes backward with
its own of these numbers, and each other one forward again and backward. The price is one more forward pass of those.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from .layout import read_lengths
from .run import Forward

PER_RESPONSE = ("response_ids", "response_mask", "mask", "scores")  # of a batch, (B,K,...)


class Part(NamedTuple):
    """Some responses of a batch, as a batch: `rows` (b,) the prompts that have one of them, `slots` which they are."""

    batch: dict[str, Tensor]
    rows: Tensor
    slots: slice


def slots(lengths: Tensor, prompts: Tensor, budget: int) -> list[slice]:
    """Which responses go together: the next ones of every prompt, of at most `budget` tokens or one of each.

    Args:
        lengths, prompts: (B,K) and (B,) tokens of the responses, 0 where there is none, and of the prompts, each of
            which is counted once per part.
    """
    bounds, used = [0], 0
    for slot, tokens in enumerate(lengths.T):
        begun = lengths[:, bounds[-1] : slot].sum(-1) > 0
        here = int((tokens + prompts * ~begun)[tokens > 0].sum())
        if used and used + here > budget:
            bounds.append(slot)
            used, here = 0, int((tokens + prompts)[tokens > 0].sum())
        used += here
    return [slice(*pair) for pair in itertools.pairwise([*bounds, lengths.size(1)])]


def split(batch: dict[str, Tensor], budget: int) -> list[Part]:
    """The responses of a batch in parts, see `slots`."""
    lengths, prompts = read_lengths(batch["response_mask"]), batch["prompt_mask"].sum(-1)
    return [_part(batch, part) for part in slots(lengths, prompts, budget)]


def _part(batch: dict[str, Tensor], taken: slice) -> Part:
    rows = batch["mask"][:, taken].any(-1).nonzero().flatten()
    own = {name: value[rows, taken] if name in PER_RESPONSE else value[rows] for name, value in batch.items()}
    return Part(own, rows, taken)


class PartedPass:
    """One pass over a batch in parts: `score` first, then `backward` with the loss of what it gave.

    Args:
        parts: as `split` gives them; the last one is repeated, without a gradient, up to `passes` (2 at least).
        model: the policy as the engine wrapped it.
    """

    def __init__(self, parts: list[Part], passes: int, model: nn.Module, accelerator: Accelerator):
        self.model, self.accelerator, self._own = model, accelerator, len(parts)
        self.parts = parts + parts[-1:] * (passes - len(parts))
        self._states: list[tuple[Tensor, Tensor | None]] = []

    @classmethod
    def of(cls, batch: dict[str, Tensor], budget: int | None, model: nn.Module, accelerator: Accelerator):
        """None without a budget or gradients, and where all processes have a single part; else all make as many
        passes, as their engine may share weights or gradients in each."""
        if budget is None or not torch.is_grad_enabled():
            return None
        parts = split(batch, budget)
        passes = torch.tensor([len(parts)], device=accelerator.device)
        most = int(accelerator.gather(passes).max())
        return None if most == 1 else cls(parts, most, model, accelerator)

    def score(self, batch: dict[str, Tensor], forwards: Callable) -> tuple[Forward, Forward | None]:
        """Policy and reference on all parts, joined: the policy's log-probabilities are a leaf.

        Args:
            forwards: batch -> (policy, reference or None).

        Raises:
            ValueError: more than log-probabilities goes into the loss.
        """
        policies, references = [], []
        for i, part in enumerate(self.parts):
            last = i == len(self.parts) - 1
            self._states.append(_random_state(self.accelerator.device))
            with _without_sync(self.model, self.accelerator) if last else torch.no_grad():  # nothing to share
                policy, reference = forwards(part.batch)
            if policy.values or policy.aux_loss is not None:
                raise ValueError(
                    "tokens_per_backward works on log-probabilities alone, and here the loss reads more of a "
                    "forward pass (token masks, a KL, or a router): leave it out."
                )
            policies.append(policy.logps.detach())
            references += [] if reference is None else [reference.logps]
        self._states.append(_random_state(self.accelerator.device))
        self._last = policy.logps  # with its graph, which goes backward next
        leaf = Forward(self._joined(policies, batch).requires_grad_())
        return leaf, Forward(self._joined(references, batch)) if references else None

    def _joined(self, logps: list[Tensor], batch: dict[str, Tensor]) -> Tensor:
        out = logps[0].new_zeros((*batch["mask"].shape, logps[0].size(-1)))
        for part, own in zip(self.parts[: self._own], logps, strict=False):  # a repeat has another dropout
            out[part.rows, part.slots] = own
        return out

    def backward(self, loss: Tensor, policy: Forward, forward: Callable) -> Tensor:
        """Goes backward through all parts but one, and returns the value of `loss` with the graph of that one.

        Args:
            loss: of the joined forward passes.
            policy: the joined one of the policy.
            forward: batch -> the policy's.

        Raises:
            ValueError: the loss reads weights beside the log-probabilities, whose gradient would be lost.
        """
        weights = dict(self.model.named_parameters())
        trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
        numbers, *rest = torch.autograd.grad(loss, [policy.logps, *trained.values()], allow_unused=True)
        read = [name for name, gradient in zip(trained, rest, strict=True) if gradient is not None]
        if read:
            raise ValueError(
                f"tokens_per_backward: the loss itself reads the weight {read[0]}, which parts of a group would not "
                "train: leave the option out."
            )

        def share(i: int, logps: Tensor) -> Tensor:
            part = self.parts[i]
            return (logps * numbers[part.rows, part.slots] * (i < self._own)).sum()

        def again(i: int) -> Tensor:
            _set_random_state(self._states[i], self.accelerator.device)
            return share(i, forward(self.parts[i].batch).logps)

        *others, last = range(len(self.parts))
        deepspeed = {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}
        with _without_sync(self.model, self.accelerator):
            self.accelerator.backward(share(last, self._last), **deepspeed)
        for i in others[:-1]:
            with _without_sync(self.model, self.accelerator):
                self.accelerator.backward(again(i), **deepspeed)
        synced = again(others[-1])
        _set_random_state(self._states[-1], self.accelerator.device)
        return synced + (loss - synced).detach()


@contextmanager
def _without_sync(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Passes inside add to the gradients of this process alone; the next ones outside share all of them."""
    if not accelerator.sync_gradients:  # inside of an accumulation window already
        yield
        return
    accelerator.sync_gradients = False  # which DeepSpeed's engine is told
    try:
        with accelerator.no_sync(model):
            yield
    finally:
        accelerator.sync_gradients = True


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """The same dropout once more."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
