"""EM-DPO runs: what a run finds and leaves, its identities with DPO, resuming, refusals and warnings."""

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file

from emdpo_rows import em_config, opposed_rows, quick_collection  # noqa: F401
from helpers import build_tokenizer, tiny_llama
from test_emdpo_parts import CASES, close
from trainers import DPOConfig, DPOTrainer, EMDPOTrainer, PlackettLuceConfig, PlackettLuceTrainer
from trainers.em import init
from trainers.em.annotators import Annotators
from trainers.em.m_step import TypePolicyTrainer, m_step_rows
from trainers.em.mixture import match_types
from trainers.em.tables import read_annotators
from trainers.forward.run import Forward

ROOT = Path(__file__).resolve().parents[1]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer):
    """A folder with the model that all runs start from."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer.save_pretrained(folder)
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    return folder


def em(folder, start, rows=None, eval_rows=None, peft=False, callbacks=None, **kwargs):
    return EMDPOTrainer(
        str(start) if isinstance(start, Path) else start,
        args=em_config(folder, **kwargs),
        train_dataset=Dataset.from_list(opposed_rows() if rows is None else rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=build_tokenizer(),
        peft_config=LoraConfig(**LORA) if peft else None,
        callbacks=callbacks,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, start):
    folder = tmp_path_factory.mktemp("finished")
    trainer = em(folder, start, eval_rows=opposed_rows(seed=1), rounds=3)
    trainer.train()
    return trainer


def round_folder(trainer, index):
    return Path(trainer.args.output_dir) / "restart-0" / f"round-{index:02d}"


def groups(names):
    return np.array([int(str(name)[-1]) % 2 for name in names])


def weights(folder):
    return load_file(next(Path(folder).glob("*model.safetensors")))


def same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance or {"rtol": 0, "atol": 0})


def test_opposed_annotators_are_told_apart_and_the_files_say_so(finished):
    assert match_types(finished.posterior, groups(finished.annotators.names))[0] == 1
    folder = Path(finished.args.output_dir)
    names, posterior, likelihood = read_annotators(folder / "annotators.csv")
    assert names == list(map(str, finished.annotators.names)) and sorted(names) == [f"a{i}" for i in range(6)]
    np.testing.assert_array_equal(posterior, finished.posterior)
    rounds = list(csv.DictReader((folder / "rounds.csv").open()))
    assert len(rounds) == 3 and float(rounds[2]["log_likelihood"]) > float(rounds[0]["log_likelihood"]) + 5
    mixture = json.loads((folder / "mixture.json").read_text())
    assert mixture["prior"] == pytest.approx([0.5, 0.5], abs=1e-6)
    assert [folder / p for p in mixture["policies"]] == finished.policies
    for name in ("responsibilities.svg", "log_likelihood.svg", "held_out.csv", "tokenizer.json"):
        assert (folder / name).stat().st_size
    # The log-likelihood of the file is that of a fresh policy on the annotator's rows.
    rows = [row for row in opposed_rows() if row["annotator"] == "a1"]
    args = PlackettLuceConfig(output_dir=str(folder / "check"), use_cpu=True, report_to="none")
    judge = PlackettLuceTrainer(str(finished.policies[0]), ref_model=finished._name, args=args,
                                eval_dataset=Dataset.from_list(rows), processing_class=build_tokenizer())  # fmt: skip
    mean = judge.evaluate()["eval_loss"]
    assert likelihood[names.index("a1"), 0] == pytest.approx(-5 * mean, abs=1e-3)


def test_policies_of_earlier_rounds_are_deleted_and_their_scores_kept(finished):
    folder = Path(finished.args.output_dir) / "restart-0"
    assert not list(folder.glob("round-0[01]/*/policy")) and len(list(folder.glob("round-02/*/policy"))) == 2
    assert len(list(folder.glob("round-*/*/logps.parquet"))) == 6 and not list(folder.glob("**/training"))


def test_held_out_rows_are_scored_under_the_mixture(finished):
    metrics = finished.evaluate()
    folder = Path(finished.args.output_dir)
    names, _, likelihood = read_annotators(folder / "held_out.csv")
    known = dict(zip(map(str, finished.annotators.names), finished.posterior, strict=True))
    expected = [
        np.logaddexp.reduce(np.log(np.maximum(known[n], 1e-12)) + row)
        for n, row in zip(names, likelihood, strict=True)
    ]
    assert metrics["eval_log_likelihood_per_annotator"] == pytest.approx(np.mean(expected))
    assert metrics["eval_items"] == 30 and metrics["eval_known_annotators"] == 6
    assert metrics["eval_loss"] == pytest.approx(-np.sum(expected) / 30)


def test_new_annotators_are_met_with_the_mixture_weights(tmp_path, start):
    others = [row | {"annotator": "b" + row["annotator"]} for row in opposed_rows(annotators=3, seed=1)]
    trainer = em(tmp_path, start, eval_rows=others)
    trainer.train()
    names, posterior, likelihood = read_annotators(tmp_path / "held_out.csv")
    prior = np.log(np.maximum(trainer.posterior.mean(0), 1e-12))
    joint = prior + likelihood
    np.testing.assert_allclose(posterior, np.exp(joint - np.logaddexp.reduce(joint, 1)[:, None]), atol=1e-9)
    assert trainer.evaluate()["eval_known_annotators"] == 0


def shared_options(folder, **changes):
    """The options of an EM run that DPO has too."""
    names = (
        "output_dir", "use_cpu", "report_to", "learning_rate", "per_device_train_batch_size", "logging_steps",
        "num_train_epochs", "save_strategy", "seed", "lr_scheduler_type", "disable_tqdm", "max_grad_norm",
    )  # fmt: skip
    return {name: getattr(em_config(folder), name) for name in names} | changes


@pytest.mark.parametrize("peft", [False, True])
def test_one_type_is_dpo(tmp_path, start, peft):
    rows = opposed_rows(k=2)
    # With Adam an entry whose gradient is 0 but for rounding would move as far as any other.
    options = {"optim": "sgd", "learning_rate": 0.1}
    trainer = em(tmp_path / "em", start, rows, peft=peft, num_types=1, rounds=4, num_train_epochs=2, **options)
    trainer.train()
    assert len(list((tmp_path / "em/restart-0").iterdir())) == 2  # the start and one round
    assert (trainer.posterior == 1).all()
    args = DPOConfig(**shared_options(tmp_path / "dpo", **options, num_train_epochs=2))
    dpo = DPOTrainer(str(start), args=args, train_dataset=Dataset.from_list(rows), processing_class=build_tokenizer(),
                     peft_config=LoraConfig(**LORA) if peft else None)  # fmt: skip
    dpo.train()
    dpo.save_model()
    same(weights(trainer.policies[0]), weights(tmp_path / "dpo"), rtol=1e-4, atol=2e-6)
    moved = [float((a - b).abs().max()) for a, b in zip(weights(tmp_path / "dpo").values(),
             (torch.zeros(()) if peft else v for v in weights(start).values()), strict=False)]  # fmt: skip
    assert max(moved) > 0.01


def test_one_hot_posteriors_are_dpo_on_each_cluster(tmp_path, start):
    """With normalize='posterior' the rows of the others are left out, so even the batches are the same."""
    rows = opposed_rows(k=2)
    clusters = {"a0": 0, "a1": 1, "a2": 1, "a3": 0, "a4": 1, "a5": 0}
    given = {name: [1.0 - k, float(k)] for name, k in clusters.items()}
    options = {"optim": "sgd", "learning_rate": 0.1}
    trainer = em(tmp_path / "em", start, rows, rounds=1, init="given", initial_posterior=given, normalize="posterior",
                 **options)  # fmt: skip
    trainer.train()
    for k in (0, 1):
        args = DPOConfig(**shared_options(tmp_path / f"dpo{k}", **options))
        own = Dataset.from_list([row for row in rows if clusters[row["annotator"]] == k])
        dpo = DPOTrainer(str(start), args=args, train_dataset=own, processing_class=build_tokenizer())
        dpo.train()
        dpo.save_model()
        same(weights(trainer.policies[k]), weights(tmp_path / f"dpo{k}"), rtol=1e-4, atol=2e-6)


def test_types_are_exchangeable_to_the_last_bit(tmp_path, start):
    random = np.random.default_rng(0)
    first = random.dirichlet(np.ones(3), 6)
    order, runs = [2, 0, 1], []
    for name, table in (("a", first), ("b", first[:, order])):
        given = {f"a{i}": row.tolist() for i, row in enumerate(table)}
        trainer = em(tmp_path / name, start, num_types=3, initial_posterior=given)
        trainer.train()
        runs.append(trainer)
    np.testing.assert_array_equal(runs[1].posterior, runs[0].posterior[:, order])
    for k in range(3):
        same(weights(runs[1].policies[k]), weights(runs[0].policies[order[k]]))


@pytest.mark.parametrize("name", ["W_batch", "W_posterior"])
def test_normalisation_of_the_weighted_loss(tmp_path, start, name):
    case = CASES[name]
    items, gamma = case["inputs"]["items"], np.array(case["inputs"]["posterior"])
    width = max(len(item["ranking"]) for item in items)
    logps, reference, scores = (torch.zeros(len(items), width, dtype=torch.float64) for _ in range(3))
    mask = torch.zeros(len(items), width).bool()
    for b, item in enumerate(items):
        k = len(item["ranking"])
        logps[b, :k], reference[b, :k] = torch.tensor(item["seq_logps"]), torch.tensor(item["ref_seq_logps"])
        mask[b, :k] = True
        for place, response in enumerate(item["ranking"]):  # ranks that are not counted become ties for the last place
            scores[b, response] = -min(place, item["stages"])
    owners = np.array([item["owner"] for item in items])
    normalize = case["options"]["normalize"]
    rows = [row | {"annotator": "abc"[owner]} for row, owner in zip(opposed_rows()[: len(items)], owners, strict=True)]
    trainer = em(tmp_path, start, rows, normalize=normalize)
    made = m_step_rows(trainer.rows, gamma[owners], np.ones(len(rows)), [[0.0] * 3 for _ in rows], normalize)
    column = {n: torch.tensor(made[n], dtype=torch.float64) for n in ("posterior", "weight") if n in made.column_names}
    assert list(column) == (["posterior"] if normalize == "batch" else ["weight"])
    logps.requires_grad_()
    batch = {"scores": scores, "mask": mask, "ref_logps": reference, **column}
    losses, _ = TypePolicyTrainer.loss(trainer, batch, Forward(logps.unsqueeze(-1)), None)
    weight = trainer._weights(batch).double()
    loss = (losses * weight).sum() / weight.sum()
    close(loss, case["expected"]["loss"], "float32" if normalize == "posterior" else "float64")
    loss.backward()
    for gradient, want in zip(logps.grad, case["expected"]["grads_seq_logps"], strict=True):
        close(gradient[: len(want)], want, "float32")


@pytest.mark.parametrize("normalize", ["batch", "posterior"])
def test_micro_batches_do_not_change_an_m_step(tmp_path, start, normalize):
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = em(
            tmp_path / f"{batch}", start, opposed_rows(items=4)[:16], normalize=normalize, optim="sgd", rounds=1,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, learning_rate=0.1,
        )  # fmt: skip
        trainer.train()
        found.append(weights(trainer.policies[0]))
    same(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert max(float((found[0][n] - v).abs().max()) for n, v in weights(start).items()) > 1e-3


def test_adapters_share_one_base(tmp_path, start):
    trainer = em(tmp_path, start, peft=True, learning_rate=0.02, rounds=3)
    trainer.train()
    assert match_types(trainer.posterior, groups(trainer.annotators.names))[0] == 1
    saved = sorted(path.name for path in tmp_path.glob("**/*.safetensors"))
    assert saved == ["adapter_model.safetensors"] * 2  # no base weights anywhere
    assert json.loads((tmp_path / "mixture.json").read_text())["adapters"] is True


def test_a_loaded_model_is_saved_once_and_gives_the_same_run(tmp_path, start, tokenizer):
    runs = [em(tmp_path / "a", start), em(tmp_path / "b", tiny_llama(len(tokenizer)))]
    for trainer in runs:
        trainer.train()
    np.testing.assert_array_equal(runs[0].posterior, runs[1].posterior)
    assert not (tmp_path / "a/start").exists()
    same(weights(tmp_path / "b/start"), weights(start))
    em(tmp_path / "b", tiny_llama(len(tokenizer))).train()
    with pytest.raises(ValueError, match="model files"):
        em(tmp_path / "b", tiny_llama(len(tokenizer), seed=1)).train()


def test_the_previous_policy_is_a_start_and_the_reference_stays(tmp_path, start):
    trainer = em(tmp_path, start, start_from="previous", peft=True, learning_rate=0.01)
    trainer.train()
    fresh = em(tmp_path / "fresh", start, peft=True, learning_rate=0.01)
    fresh.train()
    one, other = ((round_folder(t, 0) / "annotators.csv").read_text() for t in (trainer, fresh))
    assert one == other
    assert not np.allclose(trainer.posterior, fresh.posterior, atol=1e-12)
    logs = json.loads((trainer.policies[0] / "trainer_state.json").read_text())["log_history"]
    assert abs(logs[0]["rewards/margins"]) > 0.05  # against the reference, which is not where this round began
    logs = json.loads((fresh.policies[0] / "trainer_state.json").read_text())["log_history"]
    assert abs(logs[0]["rewards/margins"]) < abs(0.5)


def test_every_row_is_scored_whatever_the_batch_size(tmp_path, start):
    """Seven rows and batches of four: the last row counts, and no row counts twice."""
    rows = opposed_rows()[:7]
    trainer = em(tmp_path, start, rows, rounds=1, num_types=1, ref_tokens_per_batch=60)
    trainer.train()
    args = PlackettLuceConfig(output_dir=str(tmp_path / "check"), use_cpu=True, report_to="none")
    judge = PlackettLuceTrainer(str(trainer.policies[0]), ref_model=str(start), args=args,
                                eval_dataset=Dataset.from_list(rows), processing_class=build_tokenizer())  # fmt: skip
    total = -7 * judge.evaluate()["eval_loss"]
    assert read_annotators(tmp_path / "annotators.csv")[2].sum() == pytest.approx(total, abs=1e-3)


def test_ties_for_the_best_are_counted_and_left_out(tmp_path, start, caplog):
    rows = opposed_rows()
    rows += [row | {"scores": [1.0, 1.0, 0.0], "annotator": "undecided"} for row in rows[:4]]
    with caplog.at_level(logging.WARNING):
        trainer = em(tmp_path, start, rows)
    assert "4 of 34 rows have a tie for the best" in caplog.text
    trainer.train()
    names, posterior, likelihood = read_annotators(tmp_path / "annotators.csv")
    at = names.index("undecided")
    assert not likelihood[at].any()
    rest = np.delete(posterior, at, 0)
    assert np.isfinite(rest).all() and 0 < posterior[at, 0] < 1


def test_weights_scale_the_likelihood_and_zero_removes_a_row(tmp_path, start):
    rows = opposed_rows()
    weighted = [row | {"weight": 0.0 if row["item"] == 2 else 2.0} for row in rows]
    trainer = em(tmp_path / "a", start, weighted, rounds=1, num_types=1, max_steps=1, learning_rate=1e-9)
    trainer.train()
    plain = em(tmp_path / "b", start, [row for row in rows if row["item"] != 2], rounds=1, num_types=1, max_steps=1,
               learning_rate=1e-9)  # fmt: skip
    plain.train()
    one, other = (sorted(read_annotators(t / "annotators.csv")[2][:, 0]) for t in (tmp_path / "a", tmp_path / "b"))
    np.testing.assert_allclose(one, 2 * np.array(other), rtol=1e-4)


def test_halves_train_on_one_half_and_score_the_other(tmp_path, start):
    trainer = em(tmp_path, start, score_on="heldout_half", rounds=2, learning_rate=0.01)
    trainer.train()
    counts = [
        [int(row["items"]) for row in csv.DictReader((round_folder(trainer, i) / "annotators.csv").open())]
        for i in (0, 1)
    ]
    assert all(a + b == 5 and {a, b} == {2, 3} for a, b in zip(*counts, strict=True))
    steps = [json.loads((p / "trainer_state.json").read_text())["global_step"] for p in trainer.policies]
    assert steps == [-(-(30 - sum(counts[1])) // 4)] * 2


def test_restarts_keep_the_likeliest_run(tmp_path, start):
    trainer = em(tmp_path, start, restarts=3, rounds=1, learning_rate=0.01)
    trainer.train()
    rounds = list(csv.DictReader((tmp_path / "rounds.csv").open()))
    best = max(rounds, key=lambda row: float(row["log_likelihood"]))
    assert f"restart-{best['restart']}/" in trainer.policies[0].as_posix()
    assert len({row["log_likelihood"] for row in rounds}) == 3
    assert len(list(tmp_path.glob("restart-*/*/*/policy"))) == 2


def test_a_run_stops_when_nothing_changes_any_more(tmp_path, start):
    trainer = em(tmp_path, start, rounds=6, stop_change=50.0)
    trainer.train()
    assert len(list((tmp_path / "restart-0").glob("round-*"))) == 2


def test_finished_rounds_are_kept_and_more_can_be_asked_for(tmp_path, start):
    em(tmp_path, start, rounds=1).train()
    first = (tmp_path / "restart-0/round-00/manifest.json").stat().st_mtime_ns
    trainer = em(tmp_path, start, rounds=2)
    trainer.train()
    assert (tmp_path / "restart-0/round-00/manifest.json").stat().st_mtime_ns == first
    whole = em(tmp_path / "whole", start, rounds=2)
    whole.train()
    np.testing.assert_array_equal(trainer.posterior, whole.posterior)
    same(weights(trainer.policies[0]), weights(whole.policies[0]))


def test_other_settings_are_refused_by_name(tmp_path, start):
    em(tmp_path, start, rounds=1).train()
    with pytest.raises(ValueError, match=r"beta: 0.1 there, 0.2 now\)"):
        em(tmp_path, start, rounds=1, beta=0.2).train()
    with pytest.raises(ValueError, match=r"\(training rows: "):
        em(tmp_path, start, opposed_rows()[:-1], rounds=1).train()


# Warnings and refusals.


def test_a_uniform_start_an_empty_type_and_a_sure_e_step_are_warned_of(tmp_path, start, caplog):
    uniform = {f"a{i}": [0.5, 0.5] for i in range(6)}
    with caplog.at_level(logging.WARNING):
        trainer = em(tmp_path / "a", start, initial_posterior=uniform, rounds=1)
        trainer.train()
    assert "The first guess is the same for all annotators" in caplog.text
    np.testing.assert_allclose(trainer.posterior, 0.5, atol=1e-12)
    caplog.clear()
    one = {f"a{i}": [0.999, 0.001] if i else [0.9985, 0.0015] for i in range(6)}
    with caplog.at_level(logging.WARNING):
        em(tmp_path / "b", start, initial_posterior=one, rounds=1, learning_rate=1e-6).train()
    assert "Type 1 has 0.1% of the annotators after round 1" in caplog.text
    assert "above 0.99" in caplog.text and "heldout_half" in caplog.text


@pytest.mark.parametrize(
    "kwargs, word",
    [
        ({"num_types": 0}, "num_types=0"),
        ({"rounds": 1.5}, "rounds=1.5"),
        ({"beta": 0}, "beta=0"),
        ({"init": "kmens"}, "init='kmens'"),
        ({"init": "given"}, "initial_posterior belong together"),
        ({"init": "kmeans", "initial_posterior": {"a": [1.0]}}, "belong together"),
        ({"initial_posterior": {"a": [1.0]}, "init": "given", "restarts": 2}, "restarts"),
        ({"normalize": "sum"}, "normalize='sum'"),
        ({"top_q": 0}, "top_q=0"),
        ({"stop_change": -1.0}, "stop_change"),
        ({"push_to_hub": True}, "push_to_hub"),
    ],
)
def test_wrong_options_name_themselves(tmp_path, kwargs, word):
    with pytest.raises(ValueError, match=word):
        em_config(tmp_path, **kwargs)


def test_rows_that_em_cannot_use_are_named(tmp_path, start):
    rows = opposed_rows()
    nobody = [{n: v for n, v in row.items() if n != "annotator"} for row in rows]
    for data, kwargs, word in (
        (nobody, {}, "no column 'annotator'"),
        ([*rows[:3], rows[3] | {"annotator": None}], {}, "row 3 of train_dataset: 'annotator' is None"),
        (rows, {"num_types": 7}, "num_types=7 is more than the 6 annotators"),
        ([row | {"scores": [1.0, 1.0, 0.0]} for row in rows], {}, "no row of train_dataset says who was best"),
    ):
        with pytest.raises(ValueError, match=word):
            em(tmp_path, start, data, **kwargs)
    with pytest.raises(ValueError, match="no row for annotator"):
        em(tmp_path, start, init="given", initial_posterior={"a0": [0.5, 0.5]}).train()
    with pytest.raises(ValueError, match="give 2 probabilities"):
        em(tmp_path, start, initial_posterior={f"a{i}": [0.5, 0.6] for i in range(6)}).train()
    with pytest.raises(ValueError, match="one policy per type"):
        em(tmp_path, start).predict(None)


# First guesses.


@pytest.mark.parametrize("kind", ["agreement", "kmeans"])
def test_clusters_find_opposed_annotators(tmp_path, start, kind):
    trainer = em(tmp_path, start, opposed_rows(annotators=10, items=6))
    rows = Annotators(trainer.annotators.names, trainer._owner)
    found = getattr(init, kind)(trainer.rows, rows, 2, np.random.default_rng(0))
    assert set(found.ravel()) == {0.0, 1.0} and match_types(found, groups(rows.names))[0] == 1


def test_agreement_needs_shared_items_and_auto_falls_back(tmp_path, start, capsys):
    rows = [row for row in opposed_rows(annotators=5) if row["item"] == int(row["annotator"][1])]
    trainer = em(tmp_path, start, rows, init="agreement", rounds=1)
    with pytest.raises(ValueError, match="several annotators judged"):
        trainer.train()
    em(tmp_path / "auto", start, rows, init="auto", rounds=1).train()
    assert "First guess of the types: dirichlet" in capsys.readouterr().out
    em(tmp_path / "shared", start, init="auto", rounds=1).train()
    assert "First guess of the types: agreement" in capsys.readouterr().out


def test_a_table_of_a_run_is_a_first_guess_and_annotators_may_be_numbers(tmp_path, start):
    rows = [row | {"annotator": int(row["annotator"][1])} for row in opposed_rows()]
    first = em(tmp_path / "a", start, rows, rounds=1)
    first.train()
    assert first.annotators.names[0] in range(6)
    second = em(tmp_path / "b", start, rows, rounds=1, initial_posterior=str(tmp_path / "a/annotators.csv"))
    second.train()
    np.testing.assert_array_equal(read_annotators(tmp_path / "b/restart-0/start.csv")[1], first.posterior)
