"""The figures of a run of benchmarks.run: times, ratios, and what a step needs in floating point operations.

A matrix product of a token costs two per weight; causal attention of T tokens costs 2 T^2 times its width per layer.
"""

GIB = 2**30
Group = tuple[int, list[int]]  # tokens of a prompt and of each of its responses
Runs = dict[str, dict[int, dict]]  # figures by variant and turn

NAMES = {
    "shared": "shared prompts",
    "trunk": "shared prompts, no response begins as another",
    "parts": "shared prompts, in parts",
    "cached": "shared prompts, cached reference",
    "rows": "padded rows",
    "rows_full_logits": "padded rows with all logits",
    "trl_best_rest": "TRL, best against each other",
    "trl_all_pairs": "TRL, all pairs",
    "trl_all_pairs_cached": "TRL, all pairs, cached reference",
}
PARTS = ("reference", "forward", "backward", "optimizer")
# Dense bf16 peak in TFLOP/s of the SXM cards; PCIe and NVL cards of the same names have other peaks.
PEAKS = {"H100 80GB HBM3": 989, "H100 SXM": 989, "H200": 989, "A100": 312}


def shared_flops(shape: dict, group: Group) -> float:
    """Forward of one prompt and its responses as branches: each token is fed once, the LM head sees responses only."""
    p, responses = group
    attended = p**2 + sum((p + r) ** 2 - p**2 for r in responses)  # twice the pairs of tokens that attend
    return (
        2 * shape["parameters"] * (p + sum(responses))
        + 2 * shape["layers"] * shape["attention"] * attended
        + 2 * shape["hidden"] * shape["vocabulary"] * sum(responses)
    )


def figures(run: dict, product: float | None = None) -> dict:
    """What the tables show of a run, by the head of its column; per step, with its times in seconds.

    Where TRL was fed some pairs of a prompt, seconds and tokens are those of all: a pair is a micro-batch, and only
    the optimizer does not grow with them. A step needs reference, forward and backward, the last of which costs two
    forwards; with LoRA, whose frozen weights get no gradient, one. Padding and recomputation are no need. With the
    speed of a `product`, in operations per second, the shares of it are told.
    """
    steps, factor = len(run["steps"]), run["pairs"] / run["fed_pairs"]
    totals = {name: sum(step[name] for step in run["steps"]) / steps for name in ("seconds", *PARTS, "fed")}
    grown = {name: value * (1 if name == "optimizer" else factor) for name, value in totals.items()}
    seconds = totals["optimizer"] + (totals["seconds"] - totals["optimizer"]) * factor
    in_model = grown["reference"] + grown["forward"] + grown["backward"]
    passes = (1 if run["lora"] else 2) + (1 if run["variant"].endswith("cached") else 2)
    needed = passes * sum(shared_flops(run["shape"], group) for group in run["lengths"]) / steps
    found = {
        **grown,
        "s per step": seconds,
        "outside": seconds - in_model - grown["optimizer"],
        "prompts/s": len(run["lengths"]) / steps / seconds,
        "per 1,000": 1000 * seconds * steps / sum(sum(responses) for _, responses in run["lengths"]),
        "filling": run["filling"] * factor,
        "peak, GiB": run["peak"] / GIB,
        "of it training": (run["peak"] - run["before"]) / GIB,
        "TFLOP/s": needed / seconds / 1e12,
    }
    if product is not None:
        found |= {"share": 100 * needed / seconds / product, "share in the model": 100 * needed / in_model / product}
    return found


def fastest(products: list[dict], turn: int) -> float:
    """Operations per second of the fastest product of a turn, before or after its measurements."""
    return max(speed for entry in products if entry["turn"] == turn for speed in entry["products"].values())


def by_variant(runs: list[dict], products: list[dict]) -> Runs:
    """The figures of the runs of a setting, in the order of NAMES."""
    kept = {
        name: {run["turn"]: figures(run, fastest(products, run["turn"])) for run in runs if run["variant"] == name}
        for name in NAMES
    }
    return {name: turns for name, turns in kept.items() if turns}


def column(runs: Runs, variant: str, figure: str) -> list[float]:
    """A figure of a variant in all turns."""
    return [turn[figure] for turn in runs.get(variant, {}).values()]


def ratios(runs: Runs, variant: str) -> list[float]:
    """The time of a step of a variant over that of `shared`, turn by turn."""
    ours = runs.get("shared", {})
    return [turn["s per step"] / ours[n]["s per step"] for n, turn in runs.get(variant, {}).items() if n in ours]


def peak_flops(gpu: str | None) -> float | None:
    """Peak of a GPU in TFLOP/s by its name, None if it is not known."""
    known = (peak for name, peak in PEAKS.items() if gpu and name in gpu)
    return None if gpu is None or "PCIe" in gpu or "NVL" in gpu else next(known, None)
