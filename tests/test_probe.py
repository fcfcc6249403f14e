"""`scripts/train.py --probe`: which steps it makes, what it reckons from them, and that nothing stays behind."""

import json
import re

import pytest
from datasets import Dataset
from safetensors.torch import load_file

from helpers import launch, save_start
from test_trainer import rows
from trainers import SWEPOConfig, SWEPOTrainer
from trainers.cli.arguments import ModelArguments, set_model_options
from trainers.cli.dry_run import plan_batches
from trainers.cli.probe import GIB, LONGEST, TYPICAL, Measured, advise, choose_batches, fed_tokens
from trainers.data.budget import packed_tokens

# Of 60 rows, one is much longer than all others.
LENGTHS = [(5, [3 + i % 7, 4 + i % 5]) for i in range(59)] + [(5, [40, 40])]


def options(**changes):
    return SWEPOConfig(output_dir="unused", use_cpu=True, report_to="none", **changes)


@pytest.mark.parametrize("budget", [None, 60])
def test_the_longest_batches_and_then_typical_ones(budget):
    args = options(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_tokens_per_batch=budget)
    steps = choose_batches(plan_batches(LENGTHS, args, 2), 4)
    sizes = [packed_tokens(row) for row in LENGTHS]
    tokens = [sum(sizes[i] for batch in step for i in batch) for step in steps]
    assert len(steps) == LONGEST + TYPICAL and all(len(step) == 2 * 2 for step in steps)
    assert len({str(step) for step in steps[:LONGEST]}) == 1 and 59 in steps[0][0]
    assert min(tokens[:LONGEST]) > max(tokens[LONGEST:])
    if budget is None:
        assert all(len(batch) == 4 for step in steps for batch in step)
        assert sorted(i for batch in steps[0] for i in batch) == sorted(sorted(range(60), key=sizes.__getitem__)[-16:])
        assert sum(tokens[LONGEST:]) / (16 * TYPICAL) == pytest.approx(sum(sizes) / 60, rel=0.01)
    few = choose_batches(plan_batches(LENGTHS[:3], options(per_device_train_batch_size=4), 2), 2)
    assert all(len(batch) == 4 for step in few for batch in step)


def measured(peak, resting, limit):
    tokens = [400, 400, 100, 100, 200, 100]
    memory = (round(size * GIB) for size in (peak, peak, resting, limit))
    return Measured([9.0, 6.0, 1.2, 1.3, 2.0, 1.1], tokens, *memory, "shared")


def test_time_is_that_of_typical_tokens_between_the_fastest_and_the_slowest_typical_step():
    assert measured(1, 1, 1).extrapolate(1000) == pytest.approx((11.2, 10.0, 13.0))


def test_tokens_are_those_that_are_fed():
    lengths, batches = [(20, [3, 7]), (2, [4, 4])], [[0, 1], [1]]
    alone = 2 * (2 + 3)  # a prompt of two tokens is not worth sharing
    assert fed_tokens(lengths, batches, "shared") == (20 + 2 + 6) + alone + alone
    assert fed_tokens(lengths, batches, "rows") == 4 * 26 + 2 * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("start")
    save_start(path / "model")
    judged = [row | {"annotator": f"a{i % 5}"} for i, row in enumerate(rows(16))]
    Dataset.from_list(judged).to_json(path / "rows.jsonl")
    answers = [{"prompt": f"say {i}", "responses": ["the fox " * k for k in (1, 2)], "scores": [0.0, 1.0]}
               for i in range(30)]  # fmt: skip
    Dataset.from_list(answers).to_json(path / "answers.jsonl")
    return path


@pytest.mark.parametrize(
    ("memory", "changes", "told"),
    [
        ((10, 6, 40), {}, ["size: 16, gradient_accumulation_steps: 1 keeps .* about 22.00 of 40.00"]),
        ((10, 6, 20), {}, ["size: 8, gradient_accumulation_steps: 2 keeps .* about 14.00 of 20.00"]),
        ((10, 6, 12), {}, []),
        ((10, 6, 10.5), {}, ["nearly full: half of per_device_train_batch_size, .* about 8.00 of 10.50"]),
        ((10, 6, 12), {"max_tokens_per_batch": 99}, []),
        ((10, 6, 20), {"max_tokens_per_batch": 99}, ["max_tokens_per_batch: 198, gradient_acc"]),
    ],
)
def test_advice_scales_what_a_step_adds(memory, changes, told, folder):
    args = options(**{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, **changes})
    lines = advise(measured(*memory), SWEPOTrainer, args, None, LENGTHS[:59], [0, 1])
    assert len(lines) == len(told) and all(map(re.search, told, lines))


def test_advice_to_recompute_nothing_and_to_cut_the_longest_row(folder):
    args, model = options(gradient_checkpointing=True), ModelArguments(model_name_or_path=str(folder / "model"))
    set_model_options(args, model)
    off, cut = advise(measured(10, 6, 40), SWEPOTrainer, args, model, LENGTHS, [59])
    factor, needs = re.search(r"needs about ([\d.]+) of 40.00 GiB; the factor ([\d.]+)", off).group(2, 1)
    assert float(factor) > 1 and float(needs) == pytest.approx(6 + 4 * float(factor), rel=0.05)
    # The longest of the others has 5 + 9 tokens, so the two of 45 become 14 each: 4 + 9 + 9 of 4 + 40 + 40.
    assert cut == f"max_length: 14 would cut 2 responses and needs about {6 + 4 * 22 / 84:.2f} of 40.00 GiB."


def run(folder, out, **changes):
    options = {"per_device_train_batch_size": 2, "max_steps": 3, "seed": 3, "learning_rate": 0.01}
    launch(folder, out, **options | changes)


SGPO = {"trainer": "SGPOTrainer", "sft_target_source": "best", "preference_split": "train[10:]",
        "dataset_train_split": "train[:10]"}  # fmt: skip
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "3 steps: "),
        (LORA | {"precompute_ref_logps": True, "max_tokens_per_batch": 90}, "the reference's scores of all rows"),
        ({"trainer": "SparsePOTrainer", "gradient_checkpointing": True}, "gradient_checkpointing: false saves"),
        ({"trainer": "LIRETrainer", "self_enhance": json.dumps({"scorer": "builtins.len"})}, "sampling"),
        ({"trainer": "EMDPOTrainer", "max_steps": -1, "rounds": 2}, "8 steps in each of 4 trainings: "),
        (SGPO | {"ref": "initial"}, "the DPO stage of one of"),
    ],
)
def test_every_method_is_probed_and_nothing_stays(changes, told, folder, tmp_path, capsys):
    if "sft_target_source" in changes:
        changes = changes | {"dataset_name": folder / "answers.jsonl"}
    run(folder, tmp_path / "out", ref_cache_dir=tmp_path / "cache", probe=True, **changes)
    report = capsys.readouterr().out
    assert told in report and "GiB at the peak" in report and "typical batches" in report
    assert not list(tmp_path.iterdir())


def test_a_run_after_a_probe_is_the_run_without_it(folder, tmp_path):
    run(folder, tmp_path / "before")
    run(folder, tmp_path / "after", probe=True)
    run(folder, tmp_path / "after")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("before", "after")]
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])


class Columns(SWEPOTrainer):
    """A method whose loss reads a column of its own."""

    columns = ("factor",)

    def loss(self, batch, policy, reference):
        losses, metrics = super().loss(batch, policy, reference)
        return losses * batch["factor"], metrics


def test_a_method_with_columns_of_its_own_is_probed(folder, tmp_path, capsys):
    dataset = Dataset.from_list([row | {"factor": 2.0} for row in rows(8)])
    dataset.to_json(tmp_path / "rows.jsonl")
    run(folder, tmp_path / "out", probe=True, eval_on_start=True, trainer="test_probe.Columns",
           dataset_name=tmp_path / "rows.jsonl")  # fmt: skip
    assert "GiB at the peak" in capsys.readouterr().out
