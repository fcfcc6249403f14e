"""Comparing methods: equal rows, figures that can be recomputed, resuming, and the baselines that need no training."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers import family_tokenizer, flags, save_start
from test_pages import check_page
from trainers.cli import compare, config_files
from trainers.cli.compare_data import RowOptions, cut_rows, scale_scores
from trainers.cli.compare_report import aggregate, notes, plot
from trainers.pages.text import interval
from trainers.runs.files import read_rows
from trainers.statistics import t_interval

WORDS = "the dog had a lazy day and a friend said it was kind to jump over the quick brown fox in Paris".split()
ROWS = [
    {
        "prompt": " ".join(WORDS[i : i + 3]),
        "responses": [" ".join(WORDS[(3 * i + 5 * k) % 12 :][: 1 + (i + k) % 6]) for k in range(5)],
        "scores": [float((7 * i + 3 * k * k) % 11) - 40.0 * (k == 2) for k in range(5)],
        "models": [f"m{k}" for k in range(5)],
        "source": "own",
    }
    for i in range(14)
]


STILL = {"trainer": "LIRETrainer", "temperature": 3.0, "learning_rate": 0.0}


def count_a(prompts, completions, **columns):
    return [float(completion[0]["content"].count("a")) for completion in completions]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_start(folder / "model", "llama3")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def test_mappings_are_json_on_a_command_line():
    mappings = {"base": '{"model_name_or_path": "m"}', "methods": '{"dpo": {}}', "samples": '{"prompts": 3}'}
    (read,) = config_files.read(flags(output_dir="x", dataset_name="x", **mappings), compare.CompareArguments)
    assert (read.base, read.methods, read.samples["prompts"]) == ({"model_name_or_path": "m"}, {"dpo": {}}, 3)


def config(inputs, output, **changes):
    base = {
        "model_name_or_path": str(inputs / "model"), "use_peft": True, "lora_r": 4, "lora_dropout": 0.0,
        "lora_target_modules": ["all-linear"], "as_chat": True, "learning_rate": 0.02, "max_steps": 3,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "use_cpu": True, "disable_tqdm": True,
        "precompute_ref_logps": True, "ref_cache_dir": str(inputs / "reference"),
    }  # fmt: skip
    content = {
        "output_dir": str(output), "dataset_name": str(inputs / "rows.jsonl"), "train_rows": 6, "test_rows": 5,
        "responses_per_prompt": 4, "score_scale": "rank", "seeds": [1, 2],
        "samples": {"prompts": 3, "num_generations": 2, "max_new_tokens": 7, "scorer": "test_compare.count_a"},
        "methods": {"DPO best/worst": {"trainer": "DPOTrainer", "beta": 0.1}, "LIRE at rest": STILL},
    }  # fmt: skip
    content = {**content, **changes, "base": {**base, **changes.get("base", {})}}
    path = output / "config.yaml"
    output.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return ["--config", str(path)]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    compare.main(config(inputs, folder))
    return folder


def figures(folder):
    return json.loads((folder / "results.json").read_text())


def log_probability(model, prompt_ids, response_ids):
    with torch.no_grad():
        logps = model(torch.tensor([prompt_ids + response_ids])).logits[0].double().log_softmax(-1)
    return sum(float(logps[len(prompt_ids) - 1 + t, token]) for t, token in enumerate(response_ids))


def test_the_rows_of_the_package_are_found_from_any_folder(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {"dataset_name": "data/demo/preferences.jsonl.gz", "dataset_split": "train[:12]"}
    (arguments,) = config_files.read(config(inputs, tmp_path, **changes), compare.CompareArguments)
    assert len(compare.Data(arguments).train) == 6


def test_figures_follow_from_the_saved_models(inputs, finished):
    """Accuracy and KL of a trained run, recomputed with the model's own logits."""
    tokenizer, rows = family_tokenizer("llama3"), read_rows(finished / "test.jsonl.gz")
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    accuracies, lengths, kls, rewards = [], [], [], []
    for seed in (1, 2):
        run = json.loads((finished / f"dpo-best-worst/seed-{seed}/manifest.json").read_text())
        model = PeftModel.from_pretrained(base, finished / f"dpo-best-worst/seed-{seed}/model")

        def ratio(prompt, ids, model=model):
            with model.disable_adapter():
                reference = log_probability(model, prompt, ids)
            return log_probability(model, prompt, ids) - reference

        for row in rows:
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            chats = [row["prompt"] + response for response in row["responses"]]
            ids = [tokenizer.apply_chat_template(chat, return_dict=False)[len(prompt) :] for chat in chats]
            ratios = [ratio(prompt, response) for response in ids]
            accuracies.append(share_in_order(ratios, row["scores"]))
            lengths.append(share_in_order([len(response) for response in ids], row["scores"]))
        sampled = run["samples"]
        prompts = [row["prompt"] for row in rows[:3] for _ in range(2)]
        prompts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]
        expected = [ratio(prompt, ids) for prompt, ids in zip(prompts, sampled["token_ids"], strict=True)]
        assert sampled["logratios"] == pytest.approx(expected, abs=1e-4)
        assert sampled["tokens"] == [len(ids) for ids in sampled["token_ids"]] and len(expected) == 6
        kls.append(sum(expected) / 6)
        rewards.append(sum(text.count("a") for text in sampled["texts"]) / 6)
        base = model.unload()
    found = figures(finished)
    method = found["methods"]["DPO best/worst"]
    assert method["accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    assert method["own_accuracy"]["mean"] == pytest.approx(np.mean(accuracies))  # beta times the log-ratio
    assert found["baselines"]["longer response first"]["accuracy"]["mean"] == pytest.approx(np.mean(lengths[:5]))
    assert method["accuracy_over_length"]["mean"] == pytest.approx(np.mean(accuracies) - np.mean(lengths[:5]))
    assert method["kl"] == pytest.approx(t_interval(kls), abs=1e-4)
    assert method["reward"] == pytest.approx(t_interval(rewards))
    assert method["steps"] == [3]


def share_in_order(values, scores):
    pairs = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if scores[i] > scores[j]]
    return sum(0.5 * (1 + np.sign(values[i] - values[j])) for i, j in pairs) / len(pairs)


def test_a_method_that_does_not_move_is_at_chance_and_ranks_by_the_base_model(finished):
    """Also: what is called own rewards is not the log-ratio where the method has no reference."""
    found = figures(finished)
    still, base = found["methods"]["LIRE at rest"], found["baselines"]["base model's log-probability"]
    assert still["accuracy"] == pytest.approx({"mean": 0.5, "low": 0.5, "high": 0.5, "count": 2})
    assert still["kl"]["mean"] == pytest.approx(0.0, abs=1e-5)
    assert still["own_accuracy"]["mean"] == pytest.approx(base["accuracy"]["mean"])
    assert still["own_ndcg"]["mean"] == pytest.approx(base["ndcg"]["mean"], abs=1e-6)
    assert still["own_accuracy"]["mean"] != pytest.approx(0.5)
    assert not still["needs_reference"] and found["methods"]["DPO best/worst"]["needs_reference"]
    assert still["reward"]["mean"] == found["baselines"]["base model"]["reward"]["mean"]  # the same random streams


def test_the_table_and_the_plot(finished):
    text, svg, found = (finished / "table.md").read_text(), (finished / "plot.svg").read_text(), figures(finished)
    lines = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    assert len({*map(len, lines)}) == 1 and sum(line[1].startswith(" baseline: ") for line in lines) == 4
    accuracy = interval(found["methods"]["DPO best/worst"]["accuracy"])
    assert next(line[2] for line in lines if line[1] == " DPO best/worst ") == f" {accuracy} "
    assert "log-probabilities for those without (LIRE at rest)" in text and "an unbiased estimate of KL" in text
    assert plot(found) == svg and ">mean reward of fresh samples<" in svg
    for method in (*found["methods"].values(), *found["baselines"].values()):
        method.pop("reward", None)
    assert ">longer response first<" in plot(found)  # without a scorer, accuracy takes the place of the reward
    found["config"]["samples"]["temperature"] = 0.7
    assert "which is not the KL of the policy itself" in "".join(notes(found))
    page = check_page((finished / "report.html").read_text())
    differing = page.text[page.text.index("SettingDPO best/worst") :].partition("SettingValue")[0]
    assert "trainerDPOTrainerLIRETrainer" in differing and "seed" not in differing  # of the first seed
    assert "Log-probability of a response, nats: chosen" in {a.get("aria-label") for _, a in page.tags}


def test_runs_are_not_repeated_and_seeds_can_be_added(inputs, finished, monkeypatch):
    path = finished / "lire-at-rest/seed-2/manifest.json"
    before, kept = json.loads(path.read_text()), {p: p.stat().st_mtime_ns for p in finished.glob("*/*/manifest.json")}
    whole = figures(finished)["methods"]
    path.unlink()
    trained, original = [], compare.measure
    monkeypatch.setattr(
        compare, "measure", lambda run, data: trained.append((run.name, run.seed)) or original(run, data)
    )
    compare.main(config(inputs, finished))
    assert trained == [("LIRE at rest", 2)]
    after = json.loads(path.read_text())
    for name in ("hash", "steps", "logps", "own_rewards", "samples"):
        assert after[name] == before[name]
    assert [p for p, time in kept.items() if p.stat().st_mtime_ns != time] == [path]
    again = figures(finished)["methods"]
    assert all(again[m][name] == whole[m][name] for m in whole for name in ("accuracy", "kl", "reward", "own_ndcg"))
    compare.main(config(inputs, finished, seeds=[1, 2, 3]))
    assert trained[1:] == [("DPO best/worst", 3), ("LIRE at rest", 3)]
    compare.main(config(inputs, finished))
    assert len(trained) == 3 and figures(finished)["methods"]["LIRE at rest"]["kl"]["count"] == 2


def test_other_settings_are_refused_by_name(inputs, finished):
    with pytest.raises(ValueError, match=r"DPO best/worst.beta was 0.1 and is 0.2"):
        methods = {"DPO best/worst": {"trainer": "DPOTrainer", "beta": 0.2}, "LIRE at rest": STILL}
        compare.main(config(inputs, finished, methods=methods))
    for own, told in (
        ({}, r"beta was 0.1 and is None"),
        ({"beta": 0.1, "pairs": "all"}, "pairs was None and is 'all'"),
    ):
        with pytest.raises(ValueError, match=told):
            methods = {"DPO best/worst": {"trainer": "DPOTrainer", **own}, "LIRE at rest": STILL}
            compare.main(config(inputs, finished, methods=methods))
    with pytest.raises(ValueError, match=r"base.lora_r was 4 and is 2"):
        compare.main(config(inputs, finished, base={"lora_r": 2}))
    with pytest.raises(ValueError, match="data are others; score_scale was 'rank' and is 'zscore'. Set"):
        compare.main(config(inputs, finished, score_scale="zscore"))
    with pytest.raises(ValueError, match="data are others; test_rows was 5 and is 4. Set"):
        compare.main(config(inputs, finished, test_rows=4))
    assert len(read_rows(finished / "test.jsonl.gz")) == 5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"base": {"learning_rat": 0.1}}, "learning_rat"),
        ({"base": {"seed": 4}}, "base sets seed"),
        ({"base": {"model_name_or_path": None}}, "model_name_or_path is missing"),
        ({"methods": {}}, "methods and seeds: name at least one of each"),
        ({"seeds": [1, 2, 1]}, "names one twice"),
        ({"methods": {"A": None}}, "methods: A must be a mapping of options"),
        (
            {"methods": {"A": {"trainer": "DPOTrainer", "max_steps": 9}}},
            "A sets max_steps, which all methods must share",
        ),
        (
            {"methods": {"A": {"trainer": "DPOTrainer", "assistant_only_loss": False}}},
            "A sets assistant_only_loss, which",
        ),
        ({"base": {"chat_template_kwargs": {"enable_thinking": False}}}, "chat_template_kwargs have no effect"),
        ({"methods": {"A b": {"trainer": "DPOTrainer"}, "a-B": {"trainer": "DPOTrainer"}}}, "give the same folder"),
        ({"methods": {"Base model": {"trainer": "DPOTrainer"}}}, "give the same folder"),
        ({"methods": {"A": {"trainer": "EMDPOTrainer"}}}, "A: EM-DPO has several policies"),
        ({"train_rows": 600}, "need 605 rows, but only 14 fit"),
        ({"base": {"max_length": 23}}, "rows do not fit in max_length"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_trained(inputs, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        compare.main(config(inputs, tmp_path / "out", **changes))
    assert not list(tmp_path.glob("**/manifest.json"))


def test_scores_keep_their_order_and_ties_on_every_scale():
    assert scale_scores([-17.0, 14.0, -16.5, -17.0], "rank") == pytest.approx([-2 / 3, 1.0, 1 / 3, -2 / 3])
    scaled = scale_scores([1.0, 4.0, 4.0, 7.0, -1.0], "zscore")
    assert scaled == pytest.approx([(x - 3) / math.sqrt(7.6) for x in (1, 4, 4, 7, -1)])
    assert scale_scores([2.0, 2.0, 2.0], "rank") == scale_scores([2.0, 2.0, 2.0], "zscore") == [0.0] * 3
    assert scale_scores([3.0, -1.0], "none") == [3.0, -1.0]


def test_cut_rows_counts_what_it_leaves_out_and_draws_by_prompt():
    rows = [
        *ROWS,
        {**ROWS[3], "scores": [0.0] * 5},
        {"prompt": "tied", "responses": ["a", "b", "c"], "scores": [2.0, 2.0, 2.0]},
        {"prompt": "short", "responses": ["a b", "b", "c d e f g h"], "scores": [1.0, 2.0, 3.0]},
        {"prompt": "one two three four five", "responses": ["a", "b", "c"], "scores": [1.0, 2.0, 3.0]},
    ]
    options = RowOptions(
        **{"responses_per_prompt": 3, "max_response_tokens": 5, "max_prompt_tokens": 4, "score_scale": "rank"}
    )
    kept, dropped = cut_rows(rows, lambda text: len(text.split()), options)
    assert dropped == {
        "the prompt occurs twice": 1,
        "all scores tied": 1,
        "fewer than 3 responses of at most 5 tokens": 1,
        "a prompt of more than 4 tokens": 1,
    }
    assert len(kept) == 14 and all(len(row["responses"]) == len(row["scores"]) == 3 for row in kept)
    assert kept[0].keys() == {"prompt", "responses", "scores", "source", "unfinished_responses"}
    marks = [text == kept[0]["responses"][1] for text in ROWS[0]["responses"]]
    marked, _ = cut_rows([ROWS[0] | {"unfinished_responses": marks}], lambda text: len(text.split()), options)
    assert marked == [kept[0] | {"unfinished_responses": [False, True, False]}]
    for row, source in zip(kept, ROWS, strict=True):
        where = [source["responses"].index(text) for text in row["responses"]]
        assert where == sorted(where) and all(len(text.split()) <= 5 for text in row["responses"])
        raw = [source["scores"][k] for k in where]
        assert np.array_equal(np.argsort(row["scores"], kind="stable"), np.argsort(raw, kind="stable"))
    backwards, _ = cut_rows(ROWS[::-1], lambda text: len(text.split()), options)
    assert backwards[::-1] == kept
    other, _ = cut_rows(ROWS, lambda text: len(text.split()), dataclasses.replace(options, draw_seed=1))
    assert other != kept


def test_aggregate_on_numbers_worked_by_hand():
    """Two prompts of 3 and 2 responses; the first run ranks all right, the second the second prompt wrongly."""
    base = {"name": "base model", "seed": None, "logps": [[-3.0, -2.0, -4.0], [-5.0, -1.0]], "seconds": 1.0}
    run = {"name": "A", "steps": 4, "train_seconds": 10.0, "seconds": 12.0, "needs_reference": True,
           "own_rewards": {"pairwise_accuracy": 0.75, "ndcg": 0.9}}  # fmt: skip
    report = {
        "config": {}, "data": {}, "machine": "float32",
        "scores": [[0.1, 0.5, 0.9], [2.0, 1.0]],
        "lengths": [[3, 2, 2], [5, 1]],
        "runs": [base, {**run, "seed": 1, "logps": [[-3.0, -1.0, 0.0], [-4.0, -1.0]]},
                 {**run, "seed": 2, "logps": [[-3.0, -1.0, 0.0], [-6.0, -1.0]], "train_seconds": 14.0}],
    }  # fmt: skip
    found = aggregate(report)
    method = found["methods"]["A"]
    assert method["accuracy"]["mean"] == pytest.approx(0.75)  # (1 + 1) / 2 and (1 + 0) / 2
    assert method["accuracy"]["high"] == pytest.approx(0.75 + 12.7062 * 0.25, abs=1e-3)  # t(0.975, 1) = 12.7062
    assert method["train_seconds"]["mean"] == 12.0
    longer = found["baselines"]["longer response first"]["accuracy"]  # pairs of prompt 0: two wrong, one tied
    assert longer["mean"] == pytest.approx((0.5 / 3 + 1) / 2)
    assert method["accuracy_over_length"]["mean"] == pytest.approx((1 - 0.5 / 3 + 0.5 - 1) / 2)
    per_token = found["baselines"]["base model's log-probability per token"]["accuracy"]
    assert per_token["mean"] == pytest.approx((0.5 / 3 + 0.5) / 2)  # -1, -1, -2 and -5/5, -1/1
    assert "kl" not in method
    report["runs"].pop()
    alone = aggregate(report)["methods"]["A"]["accuracy"]
    assert alone == {"mean": 1.0, "low": None, "high": None, "count": 1}
