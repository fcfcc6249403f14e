"""The figures of a run of benchmarks.run: times, memory, and what it costs in floating point operations.

A matrix product of a token costs two per weight; causal attention of T tokens costs 2 T^2 times its width per layer.
"""

GIB = 2**30
Group = tuple[int, list[int]]  # tokens of a prompt and of each of its responses
Runs = dict[str, dict[int, dict[str, float]]]  # figures by variant and turn

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


def shared_flops(shape: dict, group: Group) -> float:
    """One prompt and its responses as branches: every token is fed once."""
    p, responses = group
    attended = p**2 + sum((p + r) ** 2 - p**2 for r in responses)
    return flops(shape, p + sum(responses), attended, sum(responses))


def rows_flops(shape: dict, batch: list[tuple[int, int]], *, padding: bool) -> float:
    """(prompt, response) sequences, each as long as it is or padded to the longest."""
    lengths = [p + r for p, r in batch]
    fed = [max(lengths)] * len(batch) if padding else lengths
    return sum(flops(shape, n, n**2, r) for n, (_, r) in zip(fed, batch, strict=True))


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
    shape, variant = run["shape"], run["variant"]
    if variant == "shared":
        return sum(shared_flops(shape, group) for group in run["lengths"])
    fed = [sequences(variant, group, best) for group, best in zip(run["lengths"], run["best"], strict=True)]
    micro = run["micro_trl"] if variant.startswith("trl_") else run["micro"]
    batches = [sum(fed[i : i + micro], []) for i in range(0, len(fed), micro)]
    return sum(rows_flops(shape, batch, padding=padding) for batch in batches)


def figures(run: dict) -> dict[str, float]:
    """What the tables show of a run, by the head of its column; times in seconds, over all timed steps.

    A step needs reference, forward and backward, the last of which costs two forwards; with LoRA, whose frozen weights
    get no gradient, one. Padding and recomputation are no need.
    """
    seconds, reference, *others = (
        sum(step[part] for step in run["steps"])
        for part in ("seconds", "reference", "forward", "backward", "optimizer")
    )
    steps, needed = len(run["steps"]), forward_flops(run, padding=False)
    return {
        "s per step": seconds / steps,
        "prompts/s": len(run["lengths"]) / seconds,
        "response tokens/s": sum(sum(responses) for _, responses in run["lengths"]) / seconds,
        "reference, s": reference / steps,
        "outside the model, %": 100 * (seconds - reference - sum(others)) / seconds,
        "peak, GiB": run["peak"] / GIB,
        "of it training": (run["peak"] - run["before"]) / GIB,
        "TFLOP/s": needed * (3 if run["lora"] else 4) / seconds / 1e12,
        "step": seconds,
        "policy part": seconds - reference,
        "reference pass": reference,
        "FLOP-ideal, no padding": needed,
        "FLOP-ideal, as padded": forward_flops(run, padding=True),
    }


def by_variant(runs: list[dict]) -> Runs:
    """The figures of the runs that succeeded, in the order of NAMES."""
    good = [run for run in runs if "error" not in run]
    kept = {name: {run["turn"]: figures(run) for run in good if run["variant"] == name} for name in NAMES}
    return {name: turns for name, turns in kept.items() if turns}


def ratios(runs: Runs, variant: str, figure: str) -> list[float]:
    """A figure of a variant over that of `shared`, turn by turn."""
    ours = runs.get("shared", {})
    return [turn[figure] / ours[number][figure] for number, turn in runs[variant].items() if number in ours]


def share_reached(runs: Runs, ideal: str) -> list[float]:
    """Of the gain of `shared` over `rows` that FLOPs allow, how much was reached in each turn."""
    pairs = zip(ratios(runs, "rows", "step"), ratios(runs, "rows", ideal), strict=True)
    return [(ratio - 1) / (allowed - 1) for ratio, allowed in pairs if allowed > 1]


def growth(runs: list[dict]) -> list[tuple[Group, Runs]]:
    """Each step of the growth runs as a setting of its own, with the lengths of its prompt and responses."""
    good = [run for run in runs if "error" not in run]
    kept = ("steps", "lengths", "best")
    return [
        (group, by_variant([{**run, **{name: run[name][i : i + 1] for name in kept}} for run in good]))
        for i, group in enumerate(good[0]["lengths"] if good else [])
    ]


def peak_flops(gpu: str | None) -> float | None:
    """Peak of a GPU in TFLOP/s by its name, None if it is not known."""
    known = (peak for name, peak in PEAKS.items() if gpu and name in gpu)
    return None if gpu is None or "PCIe" in gpu or "NVL" in gpu else next(known, None)
