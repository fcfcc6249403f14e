"""benchmarks/: the arithmetic of the ideals, the pairs, a real tiny run and the page. Nothing is timed."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ratios, report
from benchmarks import rows as benchmark_rows
from benchmarks import run as benchmark
from benchmarks import step as benchmark_step
from helpers import save_start
from trainers.swepo import swepo_loss

ROOT = Path(__file__).resolve().parents[1]

SHAPE = {"parameters": 1000, "layers": 2, "attention": 10, "hidden": 7, "vocabulary": 50}
GROUP = (3, [2, 4])


def run(variant, seconds, turn=0, **changes):
    """A measured run of two prompts in one step, as the JSON holds it."""
    parts = {"reference": seconds / 4, "forward": seconds / 4, "backward": seconds / 3, "optimizer": 0}
    return {
        "setting": "main", "variant": variant, "turn": turn, "model": "tiny", "dtype": "bfloat16", "lora": False,
        "prompts": 2, "micro": 2, "micro_trl": 1, "steps": [{"seconds": seconds, **parts}],
        "lengths": [GROUP, (5, [1, 6])], "best": [1, 0], "peak": 3 * 2**30, "before": 2**30, "shape": SHAPE, **changes,
    }  # fmt: skip


def test_flops_by_hand():
    # (3+2) and (3+4) tokens: weights 2*1000*12; attention 2*2*10*(25+49); head 2*7*50*(2+4)
    plain = 24000 + 40 * 74 + 700 * 6
    assert ratios.rows_flops(SHAPE, [(3, 2), (3, 4)], padding=False) == plain
    # both padded to 7
    assert ratios.rows_flops(SHAPE, [(3, 2), (3, 4)], padding=True) == 28000 + 40 * 98 + 700 * 6
    # 3+2+4 tokens; attention of the prompt 9, of the branches 25-9 and 49-9
    assert ratios.shared_flops(SHAPE, GROUP) == 18000 + 40 * (9 + 16 + 40) + 700 * 6


@pytest.mark.parametrize(
    ("variant", "times"), [("rows", (1, 1, 1)), ("trl_best_rest", (1, 2, 1)), ("trl_all_pairs_default", (2, 2, 2))]
)
def test_sequences_that_each_variant_feeds(variant, times):
    expected = [(3, response) for response, n in zip((2, 4, 5), times, strict=True) for _ in range(n)]
    assert ratios.sequences(variant, (3, [2, 4, 5]), 1) == expected


def test_padding_counts_within_a_micro_batch_only():
    together, apart = run("rows", 1.0), run("rows", 1.0, micro=1)
    batches = [(3, 2), (3, 4)], [(5, 1), (5, 6)]
    padded = sum(ratios.rows_flops(SHAPE, batch, padding=True) for batch in batches)
    assert ratios.forward_flops(apart, padding=True) == padded
    assert ratios.forward_flops(together, padding=True) == padded + 2 * (2000 * 4 + 40 * (121 - 49))
    assert ratios.forward_flops(together, padding=False) == ratios.forward_flops(apart, padding=False) < padded


def test_ratios_are_taken_within_a_turn():
    timed = [("shared", 2.0, 0), ("rows", 6.0, 0), ("shared", 8.0, 1), ("rows", 12.0, 1), ("rows", 99.0, 2)]
    runs = ratios.by_variant([run(*values) for values in timed])
    assert ratios.ratios(runs, "rows", "step") == [3.0, 1.5]
    assert runs["shared"][0]["policy part"] == pytest.approx(1.5)
    assert runs["shared"][0]["outside the model, %"] == pytest.approx(100 * (2 - 1 - 2 / 3) / 2)
    padded = "FLOP-ideal, as padded"
    ideal = ratios.ratios(runs, "rows", padded)
    assert ratios.share_reached(runs, padded) == pytest.approx([2 / (ideal[0] - 1), 0.5 / (ideal[1] - 1)])


def test_pairs_of_a_row_with_ties():
    row = {"prompt_ids": [9], "response_ids": [[1], [2], [3], [4]], "scores": [0.5, 2.0, 0.5, 1.0]}

    def pairs(which):
        return [(p["chosen_ids"][0], p["rejected_ids"][0]) for p in benchmark_step.expand_pairs(row, which)]

    assert pairs("best_rest") == [(2, 1), (2, 3), (2, 4)]
    assert sorted(pairs("all_pairs")) == [(2, 1), (2, 3), (2, 4), (4, 1), (4, 3)]  # 1 and 3 are tied
    tied_best = {**row, "scores": [2.0, 2.0, 0.5, 1.0]}
    assert len(benchmark_step.expand_pairs(tied_best, "best_rest")) == 2


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Rows drawn from a small file for a tiny Llama: a warm-up step and a timed step of the same two prompts."""
    folder = tmp_path_factory.mktemp("benchmark")
    save_start(folder / "model")
    words = "the quick brown fox jumps over a lazy dog".split()
    rows = [
        {
            "prompt": " ".join(words[: 2 + i]) + " ",
            "responses": [" ".join(words[j : j + 2 + i]) for j in range(6)],
            "scores": [3.0, 1.0, 1.0, 7.0, -2.0, 0.0],
        }
        for i in range(4)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = folder / "rows.json"
    settings = {"prompts": 2, "k": 4, "max_response": 9, "seed": 0, "outputs": [str(path)]}
    benchmark_rows.write_rows({**settings, "model": str(folder / "model"), "data": str(folder / "data.jsonl")})
    return {
        "model": str(folder / "model"), "rows": str(path), "prompts": 2, "micro": 2, "micro_trl": 1, "warm_up": 1,
        "lora": False, "checkpointing": False, "dtype": "float32", "device": "cpu",
    }  # fmt: skip


@pytest.fixture(scope="module")
def measured(job):
    return {name: benchmark_step.measure({**job, "variant": name}) for name in benchmark.COMPARED}


@pytest.mark.parametrize("variant", benchmark.COMPARED)
def test_every_variant_trains_on_the_same_rows_from_the_same_start(job, measured, variant):
    result, rows = measured[variant], json.loads(Path(job["rows"]).read_text())
    scores = torch.tensor([row["scores"] for row in rows[:2]])
    swepo = swepo_loss(torch.zeros_like(scores), scores, torch.ones_like(scores).bool(), beta=0.1, alpha=0.1)
    expected = math.log(2) if variant.startswith("trl_") else swepo.mean().item()
    assert result["losses"][0] == pytest.approx(expected, abs=1e-5)
    if not variant.startswith("trl_"):
        assert result["losses"] == pytest.approx(measured["shared"]["losses"], abs=1e-6)
    assert len(result["losses"]) == 2 and len(result["steps"]) == 1
    assert result["lengths"] == [[len(r["prompt_ids"]), [len(ids) for ids in r["response_ids"]]] for r in rows[2:]]
    assert all(max(lengths) <= 9 and len(set(lengths)) > 1 for _, lengths in result["lengths"])
    assert [rows[2 + i]["scores"][b] for i, b in enumerate(result["best"])] == [max(r["scores"]) for r in rows[2:]]
    assert result["pairs"] == {"trl_best_rest": 3, "trl_all_pairs": 6}.get(variant)
    parts = result["steps"][0]
    assert all(parts[name] > 0 for name in ("reference", "forward", "backward", "optimizer"))
    assert sum(parts.values()) - parts["seconds"] <= parts["seconds"]
    assert 0 < result["before"] <= result["peak"]


def test_the_warm_up_of_trl_keeps_the_longest_micro_batch_whole():
    rows = [{"response_ids": [[1] * n, [2] * 3]} for n in (20, 30, 10, 20, 30, 10)]
    lengths = [[len(ids) for ids in row["response_ids"]] for row in benchmark_step.short_warm_up(rows, 3, 1)]
    assert lengths == [[8, 3], [30, 3], [8, 3], [20, 3], [30, 3], [10, 3]]


def test_gpu_preset_measures_every_setting_before_any_comes_again(tmp_path):
    args = argparse.Namespace(model="random-7b", dtype="bfloat16", turns=2, only="checkpointing")
    jobs = benchmark.gpu_jobs(args, tmp_path)
    assert [job["turn"] for job in jobs] == sorted(job["turn"] for job in jobs)
    assert {job["checkpointing"] for job in jobs} == {True, False}
    for job in jobs:
        assert job["prompts"] % job["micro"] == 0 and job["prompts"] % job["micro_trl"] == 0
        assert len(json.loads(Path(job["rows"]).read_text())) % job["prompts"] == 0


def results(**changes):
    runs = [run("shared", 2.0, 0), run("rows", 6.0, 0), run("trl_all_pairs", 30.0, 0), run("shared", 4.0, 1)]
    runs += [run("rows", 6.0, 1), run("rows_full_logits", 9.0, 0, peak=5 * 2**30)]
    for variant, seconds in (("shared", 1), ("rows", 3)):
        steps = run(variant, seconds)["steps"] * 2
        runs.append(run(variant, seconds, setting="growth", steps=steps))
    machine = {"cpu": "Old CPU", "cores": 2, "memory": 24 * 2**30, "gpu": None, "versions": {"trl": "1.2.3"}}
    machine |= {"instructions": "AVX2", "fast": ["float32", "bfloat16 is slow"]}
    return {
        "preset": "cpu", "date": "2020-02-02", "command": "python benchmarks/run.py --turns 2", "machine": machine,
        "data": "some_rows", "minutes": 3.21, "runs": runs, "left_out": ["main, turn 1: trl_all_pairs"], **changes,
    }  # fmt: skip


def test_page_from_a_small_result(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results()))
    command = [sys.executable, "-m", "benchmarks.report", tmp_path / "results.json", "--output", tmp_path / "docs"]
    subprocess.run(command, check=True, cwd=ROOT)
    page = (tmp_path / "docs/benchmarks.md").read_text()
    for text in (
        "| PolyPO, padded rows | 2.25 (1.50 to 3.00) |",  # ratios 3 and 1.5
        "| TRL, all pairs | 15.0 |",
        "| PolyPO, shared prompts | 3.00 (2.00 to 4.00) | 0.750 (0.500 to 1.00) |",
        "0.60 of the peak, 0.50 of what training adds",
        "| 2 | 3 | 2 | 1.00 | 3.00 | 3.00 |",
        "Left out for lack of time: main, turn 1: trl_all_pairs.",
    ):
        assert text in page
    assert (tmp_path / "docs/benchmarks-cpu.svg").read_text().startswith("<svg")


def test_gpu_results_show_operations_per_second_and_failures():
    gpu = results(preset="gpu-7b", left_out=[], data=None)
    gpu["machine"] |= {"gpu": "NVIDIA H200", "gpu_memory": 140 * 2**30}
    gpu["runs"] = [run("shared", 1e-9), {"setting": "main", "variant": "rows", "turn": 0, "error": "out of memory"}]
    page = report.page([gpu, results()])
    assert "GPU: NVIDIA H200" in page and "Failed: rows, out of memory." in page and "Not measured yet" not in page
    # Reference, forward and a backward of two more.
    tflops = 4 * ratios.forward_flops(run("shared", 1e-9), padding=False) * 1e9 / 1e12
    assert f"| {tflops:.0f} | {tflops / 9.89:.1f} |" in page


def test_numbers_keep_their_digits():
    shown = [report.number(value) for value in (0.02434, 0, 9.994, 12.345, 5213.4)]
    assert shown == ["0.0243", "0", "9.99", "12.3", "5,213"]
