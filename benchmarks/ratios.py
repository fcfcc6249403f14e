"""The arithmetic of benchmarks.run: what a step costs in floating point operations, and ratios of runs.

A matrix product of a token costs two per weight; causal attention of T tokens costs 2 T^2 times its width per layer.
"""

from collections.abc import Callable
from statistics import median

Group = tuple[int, list[int]]  # tokens of a prompt and of each of its responses

NAMES = {
    "shared": "PolyPO, shared prompts",
    "rows": "PolyPO, padded rows",
    "rows_full_logits": "padded rows with all logits",
    "trl_best_rest": "TRL, best against each other",
    "trl_all_pairs": "TRL, all pairs",
    "trl_best_rest_default": "TRL, best against each other, its defaults",
    "trl_all_pairs_default": "TRL, all pairs, its defaults",
}
# Dense bf16 peak in TFLOP/s of the SXM cards; PCIe and NVL cards of the same names have other peaks.
PEAKS = {"H100 80GB HBM3": 989, "H100 SXM": 989, "H200": 989, "A100": 312}


def flops(shape: dict, fed: int, attended: int, predicted: int) -> float:
    """Forward of `fed` tokens with the LM head on `predicted` of them; `attended` is twice the pairs that attend."""
    return (
        2 * shape["parameters"] * fed
        + 2 * shape["layers"] * shape["attention"] * attended
        + 2 * shape["hidden"] * shape["vocabulary"] * predicted
    )


def sequence_flops(shape: dict, prompt: int, response: int, fed: int | None = None) -> float:
    """One causal sequence, fed `fed` tokens with padding."""
    fed = prompt + response if fed is None else fed
    return flops(shape, fed, fed**2, response)


def padded_flops(shape: dict, batch: list[tuple[int, int]]) -> float:
    """(prompt, response) sequences that are all padded to the longest."""
    longest = max(p + r for p, r in batch)
    return sum(sequence_flops(shape, p, r, longest) for p, r in batch)


def shared_flops(shape: dict, group: Group) -> float:
    """One prompt and its responses as branches: every token is fed once."""
    p, responses = group
    attended = p**2 + sum((p + r) ** 2 - p**2 for r in responses)
    return flops(shape, p + sum(responses), attended, sum(responses))


def sequences(variant: str, group: Group, best: int) -> list[tuple[int, int]]:
    """The (prompt, response) sequences that a variant feeds for one prompt."""
    p, responses = group
    times = [1] * len(responses)
    if "all_pairs" in variant:
        times = [len(responses) - 1] * len(responses)
    elif "best_rest" in variant:
        times[best] = len(responses) - 1
    return [(p, r) for r, n in zip(responses, times, strict=True) for _ in range(n)]


def forward_flops(run: dict, *, padding: bool) -> float:
    """FLOPs of one forward over all timed steps of a run, with the padding of its micro-batches or without."""
    shape, groups = run["shape"], zip(run["lengths"], run["best"], strict=True)
    if run["variant"] == "shared":
        return sum(shared_flops(shape, group) for group in run["lengths"])
    fed = [sequences(run["variant"], group, best) for group, best in groups]
    if not padding:
        return sum(sequence_flops(shape, *s) for group in fed for s in group)
    micro = run["micro_trl"] if run["variant"].startswith("trl_") else run["micro"]
    return sum(padded_flops(shape, sum(fed[i : i + micro], [])) for i in range(0, len(fed), micro))


def step_flops(run: dict) -> float:
    """FLOPs that the steps of a run need: reference, forward and backward, without padding and recomputation.

    With LoRA the frozen weights get no gradient, so that the backward costs one forward instead of two.
    """
    return forward_flops(run, padding=False) * (3 if run["lora"] else 4)


def peak_flops(gpu: str | None) -> float | None:
    """Peak of a GPU by its name, None if it is not known."""
    known = (peak * 1e12 for name, peak in PEAKS.items() if gpu and name in gpu)
    return None if gpu is None or "PCIe" in gpu or "NVL" in gpu else next(known, None)


def against_shared(runs: list[dict], variant: str, cost: Callable[[dict], float]) -> list[float]:
    """`cost` of the runs of a variant over that of `shared`, turn by turn."""
    groups = by_variant(runs)
    ours = {run["turn"]: cost(run) for run in groups.get("shared", [])}
    return [cost(run) / ours[run["turn"]] for run in groups.get(variant, []) if run["turn"] in ours]


def ratios(runs: list[dict], variant: str, part: str) -> list[float]:
    """How many times as long as `shared` a variant took."""
    return against_shared(runs, variant, lambda run: total(run, part))


def ideals(runs: list[dict], variant: str, *, padding: bool) -> list[float]:
    """FLOPs of a variant over those of `shared`, for the same rows."""
    return against_shared(runs, variant, lambda run: forward_flops(run, padding=padding))


def total(run: dict, part: str) -> float:
    """Seconds of all timed steps: "seconds", one of their parts, "policy" (all but the reference) or "overhead"."""
    parts = ("reference", "forward", "backward", "optimizer")
    if part == "policy":
        return total(run, "seconds") - total(run, "reference")
    if part == "overhead":
        return total(run, "seconds") - sum(total(run, name) for name in parts)
    return sum(step[part] for step in run["steps"])


def by_variant(runs: list[dict]) -> dict[str, list[dict]]:
    """Runs that succeeded, in the order of NAMES."""
    good = [run for run in runs if "error" not in run]
    found = {name: [run for run in good if run["variant"] == name] for name in NAMES}
    return {name: group for name, group in found.items() if group}


def share_reached(runs: list[dict], *, padding: bool) -> list[float]:
    """Of the gain of `shared` over `rows` that FLOPs allow, how much was reached in each turn."""
    pairs = zip(ratios(runs, "rows", "seconds"), ideals(runs, "rows", padding=padding), strict=True)
    return [(found - 1) / (ideal - 1) for found, ideal in pairs if ideal > 1]


def growth_points(runs: list[dict], variant: str) -> list[tuple[int, int, float]]:
    """(K, prompt tokens, median seconds) of each step of the growth runs of a layout."""
    group = by_variant(runs).get(variant, [])
    return [
        (len(responses), prompt, median(run["steps"][i]["seconds"] for run in group))
        for i, (prompt, responses) in enumerate(group[0]["lengths"] if group else [])
    ]
