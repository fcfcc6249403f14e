"""How many types of annotators there are: the command that holds annotators out."""

import math

import pytest
from datasets import Dataset

from emdpo_runs import OPTIONS, opposed_rows, quick_collection  # noqa: F401
from helpers import flags
from trainers.cli import types as choose_types


def test_choosing_the_number_of_types_holds_out_whole_annotators(start, tmp_path):
    Dataset.from_list(opposed_rows()).to_json(tmp_path / "rows.jsonl")
    report = choose_types.main(flags(
        model_name_or_path=start, dataset_name=tmp_path / "rows.jsonl", output_dir=tmp_path, max_types=2,
        held_out=0.34, **OPTIONS | {"learning_rate": 0.01, "init": "agreement"},
    ))  # fmt: skip
    assert report["held_out_annotators"] == 2 and report["held_out_items"] == 10
    inside, outside = (
        {line.split(",")[0] for line in (tmp_path / f"types-2/{name}.csv").read_text().splitlines()[1:]}
        for name in ("annotators", "held_out")
    )
    assert len(inside) == 4 and len(outside) == 2 and not inside & outside
    one, two = report["types"]
    gain = two["log_likelihood"]["mean"] - one["log_likelihood"]["mean"]
    assert two["gain_over_one_less"]["mean"] == pytest.approx(gain)
    # Opposed annotators share no policy: one type cannot say more than chance, log 3! per ranking.
    assert one["log_likelihood_per_item"] < -1.7 and two["log_likelihood_per_item"] > one["log_likelihood_per_item"]
    assert report["coin_log_likelihood"] == pytest.approx(-5 * math.log(6))
    assert one["gain_over_coin"]["mean"] == pytest.approx(one["log_likelihood"]["mean"] + 5 * math.log(6))
    assert "| *a coin* | -8.959 |" in (tmp_path / "table.md").read_text()
    assert "a coin" in (tmp_path / "plot.svg").read_text() and two["gain_over_one_less"]["low"] is None


def test_choosing_the_number_of_types_trains_nothing_where_a_description_is_asked_for(start, tmp_path):
    for asked in ("dry_run", "probe"):
        with pytest.raises(ValueError, match="no dry_run and no probe"):
            choose_types.main(
                flags(model_name_or_path=start, dataset_name="none", output_dir=tmp_path, **{asked: True})
            )


@pytest.mark.parametrize("trainer", ["SWEPOTrainer", "trainers.DPOTrainer"])
def test_the_types_of_another_trainer_are_not_looked_for(trainer, start, tmp_path):
    with pytest.raises(ValueError, match=f"not of {trainer.rpartition('.')[2]}"):
        choose_types.main(flags(model_name_or_path=start, dataset_name="none", output_dir=tmp_path, trainer=trainer))
