"""What EM-DPO says of its inputs: options, rows, first guesses, and a start that leads nowhere."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from emdpo_runs import LORA, em, em_config, groups, opposed_rows, quick_collection, same, trained, weights  # noqa: F401
from trainers.emdpo import EMDPOTrainer, init
from trainers.emdpo.mixture import match_types
from trainers.emdpo.rounds import EM, Round
from trainers.emdpo.tables import read_annotators


@pytest.mark.parametrize(
    "kwargs, word",
    [
        ({"num_types": 0}, "num_types=0"),
        ({"init": "given"}, "initial_posterior belong together"),
        ({"init": "kmeans", "initial_posterior": {"a": [1.0]}}, "belong together"),
        ({"push_to_hub": True}, "push_to_hub"),
        ({"resume_from_checkpoint": "runs/a/checkpoint-3"}, "goes on from all that is done in output_dir"),
        ({"start_from": "previous", "score_on": "heldout_half"}, "set start_from to 'reference'"),
    ],
)
def test_wrong_options_name_themselves(tmp_path, kwargs, word):
    with pytest.raises(ValueError, match=word):
        em_config(tmp_path, **kwargs)


def test_single_pairs_are_said_to_identify_nothing(tmp_path, start, caplog):
    one_each = [row | {"annotator": f"b{i}"} for i, row in enumerate(opposed_rows())]
    pairs = [row | {name: row[name][:2] for name in ("responses", "scores")} for row in one_each]
    for rows, said in ((pairs, True), (one_each, False), ([*pairs, pairs[0] | {"annotator": "b1"}], False)):
        caplog.clear()
        em(tmp_path, start, rows)
        assert ("has judged one pair" in caplog.text) == said, rows[0]
    caplog.clear()
    em(tmp_path, start, pairs, num_types=1)
    assert "has judged one pair" not in caplog.text


def test_rows_that_em_cannot_use_are_named(tmp_path, start):
    rows = opposed_rows()
    nobody = [{n: v for n, v in row.items() if n != "annotator"} for row in rows]
    for data, word in (
        (nobody, "train_dataset has no column 'annotator'.*: row 0"),
        ([*rows[:3], rows[3] | {"annotator": None}], "row 3 is nobody's"),
        ([row | {"scores": [1.0, 1.0, 0.0]} for row in rows], "no row of train_dataset says who was best"),
    ):
        with pytest.raises(ValueError, match=word):
            em(tmp_path, start, data)
    with pytest.raises(ValueError, match="train_dataset is missing"):
        EMDPOTrainer(str(start), args=em_config(tmp_path))
    with pytest.raises(ValueError, match="num_types=9 is more than the"):
        em(tmp_path, start, rows, num_types=9)
    for table, word in (
        ({"a0": [0.5, 0.5]}, "no row for annotator"),
        ({f"a{i}": [0.5, 0.6] for i in range(6)}, "give 2 probabilities"),
    ):
        with pytest.raises(ValueError, match=word):
            em(tmp_path, start, initial_posterior=table).train()
    get_peft_model(AutoModelForCausalLM.from_pretrained(start), LoraConfig(**LORA)).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(ValueError, match="is an adapter, but EM-DPO starts each type from a plain model"):
        em(tmp_path, tmp_path / "adapter")
    assert not (tmp_path / "emdpo.json").exists()  # before anything is written


def test_what_em_does_not_do_says_what_to_do_instead(tmp_path, start):
    trainer = em(tmp_path, start)
    with pytest.raises(ValueError, match="give rows as eval_dataset .* MixturePolicy"):
        trainer.predict(trainer.train_dataset)
    with pytest.raises(ValueError, match="from no single checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_ties_for_the_best_are_counted_and_left_out(tmp_path, start, caplog):
    rows = opposed_rows()
    rows += [row | {"scores": [1.0, 1.0, 0.0], "annotator": "undecided"} for row in rows[:4]]
    with caplog.at_level(logging.WARNING):
        trainer = em(tmp_path, start, rows)
    assert "4 of 34 rows have a tie for the best" in caplog.text
    assert len(trainer.judged.rows) == 30 and "undecided" in trainer.annotators.names


def test_a_uniform_start_an_empty_type_and_a_sure_e_step_are_warned_of(tmp_path, start, caplog):
    uniform = {f"a{i}": [0.5, 0.5] for i in range(6)}
    trainer = trained(tmp_path / "a", start, initial_posterior=uniform, rounds=1)
    assert "The first guess is the same for all annotators" in caplog.text
    np.testing.assert_allclose(trainer.posterior, 0.5, atol=1e-12)
    caplog.clear()
    one = {f"a{i}": [0.999, 0.001] if i else [0.9985, 0.0015] for i in range(6)}
    em(tmp_path / "b", start, initial_posterior=one, rounds=1, learning_rate=1e-6).train()
    assert "Type 1 has 0.1% of the annotators after round 1" in caplog.text
    assert "above 0.99" in caplog.text and "heldout_half" in caplog.text


@pytest.mark.parametrize("normalize", ["batch", "posterior"])
def test_a_type_without_rows_is_named_and_stays_where_it_starts(tmp_path, start, caplog, normalize):
    nobody = {f"a{i}": [1.0, 0.0] for i in range(6)}
    trainer = trained(tmp_path, start, initial_posterior=nobody, rounds=1, normalize=normalize)
    for text in ("Type {} has 0.0% of the annotators", "round-00: type {} has no row to train on"):
        assert text.format(1) in caplog.text and text.format(0) not in caplog.text
    same(weights(trainer.policies[1]), weights(start))


@pytest.mark.parametrize("score_on, first", [("train", []), ("heldout_half", [-0.5])])  # of halves the first is half
def test_a_fall_of_the_likelihood_is_warned_of(tmp_path, score_on, first):
    said = []
    owner = SimpleNamespace(owner=np.zeros(4, int))
    args = em_config(tmp_path, score_on=score_on)
    trainer = SimpleNamespace(args=args, processes=None, judged=owner, held_out=None, warn=said.append)
    run = EM(trainer, np.ones((1, 2)))
    for levels in ([-3, -2, -1], [-3, -1, -2]):
        manifests = [{"log_likelihood_per_annotator": level} for level in first + levels]
        run._warn_of_a_fall([Round(tmp_path, np.ones((1, 2)), manifest) for manifest in manifests])
    assert len(said) == 1 and f"was -1 after round {2 + len(first)} and is -2 after the last" in said[0]


def test_an_annotator_without_a_scored_row_has_the_mixture_weights(tmp_path, start):
    """Whatever the first guess said of them: nothing is known."""
    guess = {f"a{i}": [float(i % 2 == 0), float(i % 2)] for i in range(6)} | {"silent": [1.0, 0.0]}
    rows = opposed_rows()
    rows += [row | {"annotator": "silent", "weight": 0.0} for row in rows if row["annotator"] == "a0"]
    em(tmp_path, start, [{"weight": 1.0} | row for row in rows], initial_posterior=guess, rounds=2).train()
    for index in (0, 1):
        folder = tmp_path / f"restart-0/round-0{index}"
        names, posterior, likelihood = read_annotators(folder / "annotators.csv")
        prior = json.loads((folder / "manifest.json").read_text())["prior_trained_on"]
        at = names.index("silent")
        np.testing.assert_allclose(posterior[at], prior)
        assert not likelihood[at].any() and max(prior) < 0.8


# First guesses.


@pytest.mark.parametrize("kind", ["agreement", "kmeans"])
def test_clusters_find_opposed_annotators(tmp_path, start, kind):
    judged = em(tmp_path, start).judged
    found = getattr(init, kind)(judged.rows, judged.annotators, 2, np.random.default_rng(0))
    assert set(found.ravel()) == {0.0, 1.0}
    assert match_types(found, groups(judged.annotators.names))[0] == 1


def test_agreement_needs_shared_items_and_auto_falls_back(tmp_path, start, capsys):
    rows = [row for row in opposed_rows(annotators=5) if row["item"] == int(row["annotator"][1])]
    with pytest.raises(ValueError, match="several annotators judged"):
        em(tmp_path, start, rows, init="agreement", rounds=1).train()
    for name, data, kind in (("alone", rows, "dirichlet"), ("shared", None, "agreement")):
        em(tmp_path / name, start, data, init="auto", rounds=1).train()
        assert f"First guess of the types: {kind}" in capsys.readouterr().out


def test_a_table_of_a_run_is_a_first_guess_and_annotators_may_be_numbers(tmp_path, start):
    rows = [row | {"annotator": int(row["annotator"][1])} for row in opposed_rows()]
    first = trained(tmp_path / "a", start, rows, rounds=1)
    assert first.annotators.names[0] in range(6)
    em(tmp_path / "b", start, rows, rounds=1, initial_posterior=str(tmp_path / "a/annotators.csv")).train()
    begun, unknown = read_annotators(tmp_path / "b/restart-0/start.csv")[1:]
    np.testing.assert_array_equal(begun, first.posterior)
    assert np.isnan(unknown).all()  # a first guess has no likelihood
