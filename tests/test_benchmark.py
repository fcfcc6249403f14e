"""benchmarks/: the arithmetic, the pairs, real tiny runs and the page. Nothing is timed."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import machine, ratios, report, rows
from benchmarks import run as benchmark
from benchmarks import step as benchmark_step
from helpers import save_start
from trainers.swepo import swepo_loss

ROOT = Path(__file__).resolve().parents[1]

SHAPE = {"parameters": 1000, "layers": 2, "attention": 10, "hidden": 7, "vocabulary": 50}
GROUP = (3, [2, 4])
# 3+2+4 tokens: weights 2*1000*9; attention of the prompt 9, of the branches 25-9 and 49-9; head 2*7*50*(2+4)
FLOPS = 18000 + 40 * (9 + 16 + 40) + 700 * 6


def run(variant, seconds, turn=0, **changes):
    """A measured run of one prompt, as the JSON holds it."""
    parts = {"reference": seconds / 4, "forward": seconds / 4, "backward": seconds / 4, "optimizer": 0.5, "fed": 9}
    return {
        "setting": "K = 2", "variant": variant, "turn": turn, "lora": False, "steps": [{"seconds": seconds, **parts}],
        "lengths": [GROUP], "pairs": 1, "fed_pairs": 1, "filling": 0, "peak": 3 * 2**30, "before": 2**30,
        "shape": SHAPE, "kinds": None, **changes,
    }  # fmt: skip


def test_numbers_keep_their_digits():
    shown = [report.number(value) for value in (0.02434, 0, 9.994, 12.345, 5213.4)]
    assert shown == ["0.0243", "0", "9.99", "12.3", "5,213"]


def test_share_of_the_matrix_product():
    found = ratios.figures(run("shared", 4.0), product=2.0 * FLOPS)
    assert (found["share"], found["share in the model"]) == pytest.approx((50, 100 * 4 / 3 / 2))
    cached, lora = run("cached", 4.0), run("shared", 4.0, lora=True)  # neither reference, nor gradients of weights
    assert ratios.figures(cached, product=2.0 * FLOPS)["share"] == pytest.approx(100 * 3 / 8)
    assert ratios.figures(lora, product=2.0 * FLOPS)["share"] == pytest.approx(100 * 3 / 8)
    assert found["outside"] == pytest.approx(0.5) and found["per 1,000"] == pytest.approx(4000 / 6)


def test_some_pairs_stand_for_all_but_in_the_optimizer():
    found = ratios.figures(run("trl_all_pairs", 2.5, pairs=28, fed_pairs=4, filling=3))
    assert found["s per step"] == pytest.approx(0.5 + 7 * 2.0)
    assert found["reference"] == pytest.approx(7 * 2.5 / 4) and found["optimizer"] == 0.5
    assert (found["fed"], found["filling"]) == (63, 21)


def test_ratios_are_taken_within_a_turn():
    timed = [("shared", 2.0, 0), ("rows", 6.0, 0), ("shared", 8.0, 1), ("rows", 12.0, 1), ("rows", 99.0, 2)]
    products = [{"turn": turn, "products": {"a": 1.0, "b": 2.0}} for turn in range(3)]
    assert ratios.ratios(ratios.by_variant([run(*values) for values in timed], products), "rows") == [3.0, 1.5]


def test_pairs_of_a_row_with_ties():
    row = {"prompt_ids": [9], "response_ids": [[1], [2], [3], [4]], "scores": [0.5, 2.0, 0.5, 1.0]}

    def pairs(which):
        return [(p["chosen_ids"][0], p["rejected_ids"][0]) for p in benchmark_step.expand_pairs(row, which)]

    assert pairs("best_rest") == [(2, 1), (2, 3), (2, 4)]
    assert sorted(pairs("all_pairs")) == [(2, 1), (2, 3), (2, 4), (4, 1), (4, 3)]  # 1 and 3 are tied
    tied_best = {**row, "scores": [2.0, 2.0, 0.5, 1.0]}
    assert len(benchmark_step.expand_pairs(tied_best, "best_rest")) == 2


def test_pairs_that_stand_for_all_are_as_long_as_all():
    pairs = [{"chosen_ids": [1] * n, "rejected_ids": []} for n in (5, 1, 4, 2, 3, 6)]

    def kept(count):
        return [len(pair["chosen_ids"]) for pair in benchmark_step.spread_out(pairs, count)]

    assert (kept(1), kept(2), kept(3), kept(9)) == ([4], [2, 5], [2, 4, 6], [1, 2, 3, 4, 5, 6])


def test_drafts_begin_their_improved_answers(tmp_path):
    path = tmp_path / "rows.json"
    rows.write_synthetic(path, [(3, [10, 20, 10])], 1000, draft=0.6)
    draft, improved, other = json.loads(path.read_text())[0]["response_ids"]
    assert improved[:6] == draft[:6] and len(improved) == 6 + 8 and len(draft) == len(other) == 10
    assert improved[6] != draft[6] and other[0] != draft[0]
    rows.write_synthetic(path, [(3, [10, 20, 10])], 1000)
    assert list(map(len, json.loads(path.read_text())[0]["response_ids"])) == [10, 20, 10]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A row twice, to warm up and to be timed, for a tiny Llama."""
    folder = tmp_path_factory.mktemp("benchmark")
    save_start(folder / "model")
    path = rows.write_synthetic(folder / "rows.json", [(40, [30, 35, 40, 25])] * 2, 300, draft=0.6)
    return {
        "model": str(folder / "model"), "rows": path, "prompts": 1, "micro": 1, "warm_up": 1, "pairs_at_once": 1,
        "pairs": 2, "short": True, "lora": False, "checkpointing": False, "dtype": "float32", "device": "cpu",
        "options": {},
    }  # fmt: skip


VARIANTS = [name for name in ratios.NAMES if name != "trunk"]


@pytest.fixture(scope="module")
def measured(job):
    options = {"parts": {"options": {"tokens_per_backward": 120}}, "shared": {"profiled": True}}
    return {name: benchmark_step.measure({**job, "variant": name, **options.get(name, {})})[0] for name in VARIANTS}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_on_the_same_row_from_the_same_start(job, measured, variant):
    result, [row, _] = measured[variant], json.loads(Path(job["rows"]).read_text())
    scores = torch.tensor([row["scores"]])
    swepo = swepo_loss(torch.zeros_like(scores), scores, torch.ones_like(scores).bool(), beta=0.1, alpha=0.1)
    trl, cached = variant.startswith("trl_"), variant.endswith("cached")
    assert result["losses"][0] == pytest.approx(math.log(2) if trl else swepo.item(), abs=1e-5)
    if not trl:
        assert result["losses"][:2] == pytest.approx(measured["shared"]["losses"][:2], abs=1e-5)
    lengths = [len(ids) for ids in row["response_ids"]]
    assert result["lengths"] == [[40, lengths]] and len(result["steps"]) == 1
    pairs = {"trl_best_rest": (3, 2), "trl_all_pairs": (6, 2), "trl_all_pairs_cached": (6, 2)}
    assert (result["pairs"], result["fed_pairs"]) == pairs.get(variant, (1, 1))
    step = result["steps"][0]
    assert (step["reference"] > 0) != cached and (result["filling"] > 0) == cached
    assert min(step["forward"], step["backward"], step["optimizer"]) > 0
    assert sum(step[part] for part in ratios.PARTS) <= step["seconds"]
    assert 0 < result["before"] <= result["peak"]


def test_tokens_fed_are_counted(job, measured):
    [row, _] = json.loads(Path(job["rows"]).read_text())
    lengths = [len(ids) for ids in row["response_ids"]]
    fed = {name: result["steps"][0]["fed"] for name, result in measured.items()}
    assert fed["rows"] == fed["rows_full_logits"] == 4 * (40 + max(lengths) - 1)
    trunk = benchmark_step.measure({**job, "variant": "trunk"})[0]
    assert trunk["steps"][0]["fed"] == 40 + sum(n - 1 for n in lengths)
    assert trunk["lengths"] == measured["shared"]["lengths"]
    assert fed["cached"] == fed["shared"] == trunk["steps"][0]["fed"] - 18 - 24  # what two drafts have in common
    assert fed["parts"] > fed["shared"]
    assert fed["trl_best_rest"] == sum(2 * (40 + max(lengths[i], lengths[3])) for i in (0, 2))


def test_a_profiled_step_is_split_by_part_and_kind(measured):
    kinds = measured["shared"]["kinds"]
    for part in ("reference", "forward", "backward"):
        assert min(kinds[part][kind] for kind in report.KINDS) > 0
    assert kinds["optimizer"] == {} and measured["rows"]["kinds"] is None


def test_kinds_go_by_what_calls_an_operation():
    def event(name, above=None):
        return SimpleNamespace(name=name, cpu_parent=above, self_cpu_time_total=1e6)

    forward = event("forward")
    head, sdpa = event("_LinearLogps", forward), event("aten::scaled_dot_product_attention", forward)
    events = [
        event("aten::mm", head),
        event("aten::mm", forward),
        event("aten::copy_", sdpa),
        event("aten::mm"),
        forward,
    ]
    expected = {"LM head and softmax": 1, "matrix products": 1, "attention": 1, "other": 1}
    assert machine.by_kind(events, ("forward",)) == {"forward": expected}


def test_measurements_that_do_not_fit_are_left_out_by_name(tmp_path):
    args = SimpleNamespace(only="256", output=tmp_path, vocabulary=100, pairs=None)
    planned = benchmark.measurements(0, args)
    assert [wanted["variant"] for wanted in planned if wanted.get("profiled")] == ["shared"]
    assert [wanted.get("short", True) for wanted in planned[:2]] == [False, True]
    assert all(wanted.get("short", True) for wanted in benchmark.measurements(1, args))
    cost = {(wanted["setting"], wanted["variant"]): 10.0 for wanted in planned}
    taken, left_out = benchmark.within(planned, cost, 25.0)
    assert taken == planned[:2] and len(left_out) == len(planned) - 2
    assert left_out[0] == f"{planned[2]['setting']}, {planned[2]['variant']}"


def results():
    runs = [run("shared", 2.0, 0), run("rows", 6.0, 0), run("shared", 4.0, 1), run("rows", 6.0, 1)]
    runs[0]["kinds"] = {part: {"matrix products": 2.0, "other": 1.0} for part in ratios.PARTS}
    runs += [run("trl_all_pairs", 2.5, 0, pairs=28, fed_pairs=4), run("shared", 3.0, setting=report.DRAFTS)]
    gib = [(4, 3), (64, 9)]
    memory = [run(variant, 1.0, k=k, peak=size * 2**30) for k, size in gib for variant in ("shared", "parts")]
    fast = ["float32", "bfloat16 is slow"]
    return {
        "date": "2020-02-02", "command": "python -m benchmarks.run", "model": "tiny", "dtype": "float32",
        "machine": {"cpu": "Old CPU", "cores": 2, "threads": 2, "memory": 24 * 2**30, "gpu": None, "fast": fast,
                    "instructions": "AVX2", "versions": {"trl": "1.2.3"}},
        "products": [{"turn": turn, "products": {"1 x 2 x 3": FLOPS * 4.0}} for turn in (0, 1)],
        "memory": memory, "minutes": 3.21, "runs": runs, "left_out": ["K = 2, rows_full_logits"],
    }  # fmt: skip


def test_page_from_a_small_result(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results()))
    command = [sys.executable, "-m", "benchmarks.report", tmp_path / "results.json", "--output", tmp_path / "docs"]
    subprocess.run(command, check=True, cwd=ROOT)
    page = (tmp_path / "docs/benchmarks.md").read_text()
    for text in (
        "| padded rows | 6.00 (6.00 to 6.00) | 0.167 (0.167 to 0.167) | 2.25 (1.50 to 3.00) | 9 |",
        "| TRL, all pairs | 14.5 | 0.0690 | 7.25 | 63 | 6.90 |",
        "| 0.375 (0.250 to 0.500) | 1.00 (1.00 to 1.00) | 9 | 37.5 (25.0 to 50.0) |",
        "| matrix products | 2.00 | 2.00 | 2.00 | 66.7 |",
        "| 64 | 9.00 | 8.00 | 1.00 | 9.00 | 8.00 | 1.00 |",
        "Left out for lack of time: K = 2, rows_full_logits.",
    ):
        assert text in page
    assert (tmp_path / "docs/benchmarks.svg").read_text().startswith("<svg")
    assert (tmp_path / "docs/benchmarks-memory.svg").read_text().startswith("<svg")


def test_page_has_what_a_gpu_found_and_no_try_on_a_cpu():
    found = {
        "sections": {"7B LoRA": {"status": "ok", "figures": {"prompts/s": 3.5}}},
        "date": "2020-03-03",
        "minutes": 7,
    }
    assert "| 7B LoRA | ok | prompts/s | 3.5 |" in report.page(results(), {**found, "command": "benchmarks.gpu"})
    for gpu in (None, {**found, "command": "benchmarks.gpu --device cpu --quick"}):
        assert "**Not measured yet.**" in report.page(results(), gpu)
