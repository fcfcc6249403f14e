"""The recipes for UltraFeedback: each combination is read and fits its hardware, and docs/scale.md has its figures."""

from pathlib import Path

import pytest

from benchmarks.scale_table import HARDWARE, METHODS, MODELS, PAGE, parse, peak, tables
from trainers.emdpo.simulated import ultrafeedback_by_aspect

FOLDER = Path(__file__).resolve().parents[1] / "configs/ultrafeedback"
OTHERS = {"common", *MODELS, *HARDWARE}
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in OTHERS)
LIMITS = {"full-8x80gb": 80, "lora-80gb": 80, "qlora-24gb": 24}


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", RECIPES)
def test_every_combination_is_read(name, hardware, method):
    _, data, args, model = parse(name, hardware, method)
    assert data.trainer and data.dataset_name == "openbmb/UltraFeedback" and args.bf16
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert batch * (8 if hardware == "full-8x80gb" else 1) == 128
    assert model.use_peft == (hardware != "full-8x80gb") and model.load_in_4bit == (hardware == "qlora-24gb")


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("method", METHODS)
def test_it_fits_with_a_tenth_to_spare(method, hardware):
    for name in MODELS:
        sizes = [peak(name, hardware, method, engine) for engine in HARDWARE[hardware]]
        assert any(sizes)
        assert all(size / 2**30 + 1 < 0.9 * LIMITS[hardware] for size in sizes if size)  # 1 GiB of CUDA context


def test_the_page_has_the_numbers_of_today():
    assert tables() in PAGE.read_text()


def test_simulated_annotators_judge_by_their_taste():
    def row(text):
        ratings = [{"helpfulness": {"Rating": "5"}, "honesty": {"Rating": "1"}},
                   {"helpfulness": {"Rating": "2"}, "honesty": {"Rating": "N/A"}}]  # fmt: skip
        completions = [{"response": "a", "overall_score": 7.0, "annotations": r} for r in ratings]
        return ultrafeedback_by_aspect({"instruction": text, "source": "s", "completions": completions})

    rows = [row(str(i)) for i in range(400)]
    for found in rows:
        taste, number = found["annotator"].split("-")
        assert found["scores"] == ([5.0, 2.0] if taste == "helpfulness" else [1.0, None])
        assert int(number) % 2 == (taste == "honesty")
    assert rows[7] == row("7")
    assert 150 < sum("honesty" in found["annotator"] for found in rows) < 250
    assert len({found["annotator"] for found in rows}) > 200
