"""The stages of SGPO from one recipe and from Python: what each leaves, what the options change, and the page."""

import re
import shutil
from contextlib import contextmanager

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file

from helpers import family_tokenizer
from sgpo_rows import OPTIONS, PROMPTS, command, counts, finished_run, history, rows, same, vowels, weights
from trainers import SGPOConfig, SGPOTrainer
from trainers.cli import train
from trainers.cli.report import write_report
from trainers.data.tokenization import tokenize_row
from trainers.generation.collect import sample_responses
from trainers.generation.sampler import SamplingConfig
from trainers.generation.start import weights_of
from trainers.sgpo import monitor, sampling
from trainers.sgpo.improver import sft_rows
from trainers.sgpo.text import improver_prompt

LN_2 = 0.6931472
SHORT = {"sft": None, "scorer": None, "dataset_test_split": None, "save_strategy": "no"}


def shorter(prompts, drafts, references):
    """A reviser with a known edit: the draft's first half, none for the first prompt and a space for the second."""
    known = {PROMPTS[0]: None, PROMPTS[1]: " "}
    return [known.get(p[-1]["content"], d[: len(d) // 2] + "!") for p, d in zip(prompts, drafts, strict=True)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return finished_run(tmp_path_factory.getbasetemp())[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory.getbasetemp())[1]


def test_from_python_it_is_the_same_run_and_draws_from_equal_weights_share_what_samples(
    inputs, finished, tmp_path, monkeypatch
):
    opened, log = sampling.opened, []

    @contextmanager
    def logged(engine, weights, folder):
        log.append(f"{folder.parent.name}/{folder.name}")
        with opened(engine, weights, folder) as backend:
            yield backend
        log.append("end")

    monkeypatch.setattr(sampling, "opened", logged)
    dataset = load_dataset("json", data_files=str(inputs / "rows.jsonl"), split="train")
    parts = {"train": range(5), "preferences": range(5, 10), "test": range(10, 12), "sft": range(5)}
    args = SGPOConfig(output_dir=str(tmp_path), **OPTIONS)
    SGPOTrainer.run(args, {name: dataset.select(part) for name, part in parts.items()}, str(inputs / "model"))
    assert rows(tmp_path, "pairs") == rows(finished, "pairs") and same(weights(tmp_path), weights(finished))
    starts = [
        "current/samples",
        "targets/samples",
        "pairs/rejected",
        "gate/before",
        "improver/rejected",
        "policy/rejected",
    ]
    assert log == [word for start in starts for word in (start, "end")]


def test_counts_add_up_and_no_prompt_is_in_two_sets(finished):
    for name in ("filter", "pairs"):
        kept, dropped = rows(finished, name), rows(finished, name, "dropped.jsonl.gz")
        assert len(kept) == counts(finished, name)["kept"] and len(kept) + len(dropped) == 5
        assert sum(counts(finished, name)["dropped"].values()) == len(dropped) and all(r["reason"] for r in dropped)
    found = (rows(finished, "current"), rows(finished, "pairs"), rows(finished, "measure", "policy.jsonl.gz"))
    sets = [{row["prompt"][0]["content"] for row in part} for part in found]
    assert sets[0] == set(PROMPTS[:5]) and sets[1] <= set(PROMPTS[5:10]) and sets[2] == set(PROMPTS[10:])
    assert not list(finished.glob("**/checkpoint-*")) and not list(finished.glob("**/training"))
    # The scorer sees the held-out answers.
    texts = [[row["chosen"], row["rejected"]] for row in rows(finished, "measure", "policy.jsonl.gz")]
    scores = [vowels(None, [[{"content": t}] for t in pair], reference=None) for pair in texts]
    gain = sum(chosen - rejected for chosen, rejected in scores) / len(scores)
    assert counts(finished, "measure")["policy_scorer_gain"] == pytest.approx(gain)


def test_both_sides_of_a_pair_come_from_the_improver(inputs, finished):
    """Rejected is its answer to the plain prompt, chosen what it makes of that; each with its own random stream."""
    args = SGPOConfig(output_dir=str(finished), use_cpu=True, report_to="none")
    improver = weights_of(str(inputs / "model"), finished / "round-00/improver/model", args)
    model, tokenizer = improver.whole(), improver.tokenizer
    pairs = rows(finished, "pairs") + rows(finished, "pairs", "dropped.jsonl.gz")
    config = {"num_generations": 1, "max_new_tokens": 24, "top_p": 1.0, "seed": 3}
    plain = [row["prompt"] for row in pairs]
    drawn = sample_responses(model, tokenizer, plain, SamplingConfig(temperature=1.0, **config), progress=False)
    assert [row["rejected"] for row in pairs] == [samples[0].text for samples in drawn]
    asked = [improver_prompt(row["prompt"], row["rejected"]) for row in pairs]
    drawn = sample_responses(model, tokenizer, asked, SamplingConfig(temperature=0.7, **config), progress=False)
    assert [row["chosen"] for row in pairs] == [samples[0].text for samples in drawn]
    held_out = rows(finished, "gate", "greedy.jsonl.gz")
    drawn = sample_responses(model, tokenizer, [row["prompt"] for row in held_out],
                             SamplingConfig(temperature=0.0, **config), progress=False)  # fmt: skip
    assert [row["greedy"] for row in held_out] == [samples[0].text for samples in drawn]


def test_dpo_starts_at_ln_2_and_moves(finished):
    logs = [log for log in history(finished, "dpo") if "loss" in log]
    assert logs[0]["loss"] == pytest.approx(LN_2, abs=1e-5) and logs[0]["rewards/margins"] == 0
    assert logs[-1]["loss"] != pytest.approx(LN_2, abs=1e-3)
    assert counts(finished, "dpo")["chosen_drift"] == logs[-1]["rewards/chosen"] / 0.1
    assert not same(weights(finished / "round-00/dpo/model"), weights(finished / "round-00/improver/model"))
    for name in ("model.safetensors", "tokenizer.json", "README.md", "train_results.json"):
        assert (finished / name).read_bytes() == (finished / "round-00/dpo/model" / name).read_bytes()


def test_the_reference_of_full_weights_stays_what_the_stage_starts_from(inputs, finished, tmp_path, monkeypatch):
    """At its end too, when every weight of the policy is another."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for name in ("dpo", "measure"):
        shutil.rmtree(tmp_path / "round-00" / name)
    release, policy, reference = SGPOTrainer.release, {}, {}

    def spy(self):
        for seen, model in ((policy, self.model), (reference, self.reference.model)):
            seen.update({name: weight.detach().clone() for name, weight in model.named_parameters()})
        release(self)

    monkeypatch.setattr(SGPOTrainer, "release", spy)
    train.main(command(inputs, tmp_path))
    improver = weights(tmp_path / "round-00/improver/model")
    assert same(reference, improver) and policy.keys() == improver.keys()
    assert not any(torch.equal(policy[name], weight) for name, weight in improver.items())


def test_a_target_has_the_same_tokens_in_the_improver_and_in_dpo():
    tokenizer = family_tokenizer("llama3")
    prompt = [{"role": "user", "content": "where is the dog"}]
    responses = [[{"role": "assistant", "content": text}] for text in ("it is in Paris", "over")]
    pair = tokenize_row({"prompt": prompt, "responses": responses, "scores": [1.0, 0.0]}, tokenizer)
    columns = sft_rows([(improver_prompt(prompt, "over"), "it is in Paris")], tokenizer)
    [ids], [labels] = columns["input_ids"], columns["labels"]
    target = pair["response_ids"][0]
    assert ids[-len(target) :] == target and labels == [-100] * (len(ids) - len(target)) + target


# Options.


def test_a_reviser_with_a_known_edit_gives_known_targets_and_drops(inputs, tmp_path):
    train.main(command(inputs, tmp_path, **SHORT, reviser="external", reviser_function="test_sgpo_stages.shorter",
                       filter_statistic="none"))  # fmt: skip
    current = rows(tmp_path, "current")
    usable = [not row["current_truncated"] and bool(row["current"].strip()) for row in current]
    expected = shorter(*([row[name] for row in current] for name in ("prompt", "current", "reference")))
    expected = [text if ok else None for text, ok in zip(expected, usable, strict=True)]
    assert [row["target"] or None for row in rows(tmp_path, "targets")] == expected
    dropped = {row["prompt"][0]["content"]: row["reason"] for row in rows(tmp_path, "filter", "dropped.jsonl.gz")}
    assert dropped[PROMPTS[0]] == dropped[PROMPTS[1]] == "target: empty, or no revision in it"
    assert counts(tmp_path, "targets")["revised"] == sum(usable[2:])
    assert "statistic" not in rows(tmp_path, "filter")[0] and not (tmp_path / "round-00/measure").exists()


def nothing(prompts, drafts, references):
    return [None] * len(prompts)


def test_a_run_without_rows_to_train_on_ends_and_its_page_says_why(inputs, tmp_path):
    options = {"reviser": "external", "reviser_function": "test_sgpo_stages.nothing"}
    with pytest.raises(ValueError, match=r"filter: no row is left, .*target: empty, or no revision in it"):
        train.main(command(inputs, tmp_path, **SHORT, **options))
    page = write_report(tmp_path, []).read_text()
    assert "Round 1, filter: begun, and not finished. Dropped:" in page


@pytest.mark.slow
def test_two_rounds_start_from_the_policy_of_the_round_before(inputs, tmp_path):
    argv = command(inputs, tmp_path, **SHORT, rounds=1, policy_weight=0.5, sft_weight=0.1)
    train.main(argv)
    first = weights(tmp_path)
    argv[argv.index("--rounds") + 1] = "2"
    train.main(argv)  # rounds can be added
    assert same(first, weights(tmp_path / "round-00/dpo/model")) and not same(first, weights(tmp_path))
    log = history(tmp_path / "round-01" / "..", "dpo")[0]
    # ln 2 and the SFT term at the start of the round: the reference is the newest improver.
    assert log["rewards/margins"] == 0 and log["loss"] > LN_2
    page = write_report(tmp_path, []).read_text()
    assert "2, dpo" in page and ">limit</text>" in page  # the figures over the rounds
    argv[argv.index("--rounds") + 1] = "1"
    with pytest.raises(ValueError, match="rounds=1, but .* holds more"):  # and are not taken back
        train.main(argv)


@pytest.mark.slow
def test_the_reference_may_be_the_model_before_all_rounds(inputs, tmp_path, monkeypatch):
    seen, loss = {}, SGPOTrainer.loss

    def spy(self, batch, policy, reference):
        if not seen:
            models = {"policy": self.model, "reference": self.reference.model}
            seen.update({k: {n: p.detach().clone() for n, p in m.named_parameters()} for k, m in models.items()})
        return loss(self, batch, policy, reference)

    monkeypatch.setattr(SGPOTrainer, "loss", spy)
    train.main(command(inputs, tmp_path, **SHORT, ref="initial"))
    for name, path in (("policy", tmp_path / "round-00/improver/model"), ("reference", inputs / "model")):
        expected = weights(path)
        assert all(torch.equal(seen[name][n], expected[n]) for n in expected)
    logs = [log["rewards/chosen"] for log in history(tmp_path, "dpo") if "loss" in log]
    assert logs[0] != 0 and counts(tmp_path, "dpo")["chosen_drift"] == pytest.approx((logs[-1] - logs[0]) / 0.1)


@pytest.mark.slow
def test_lora_goes_on_with_one_adapter_and_starts_at_ln_2(inputs, tmp_path):
    train.main(command(inputs, tmp_path, scorer=None, use_peft=True, lora_r=4, lora_dropout=0.0,
                       lora_target_modules="all-linear"))  # fmt: skip
    adapters = [
        load_file(tmp_path / f"round-00/{name}/model/adapter_model.safetensors") for name in ("sft", "improver", "dpo")
    ]
    assert adapters[0].keys() == adapters[1].keys() == adapters[2].keys()
    assert not any(torch.equal(a[n], b[n]) for a, b in zip(adapters, adapters[1:], strict=False) for n in a)
    assert history(tmp_path, "dpo")[0]["loss"] == pytest.approx(LN_2, abs=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"save_only_model": True}, "save_only_model=True leaves out what a killed stage goes on from"),
        ({"scorer": "sgpo_rows.consonants"}, "has no attribute .consonants"),
        ({"reviser": "external", "reviser_function": "sgpo_rows.nobody"}, "'sgpo_rows.nobody' cannot be imported"),
        ({"reviser": "external", "reviser_function": "nobody"}, "'nobody' cannot be imported"),
    ],
)
def test_what_cannot_be_run_is_said_at_once(inputs, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train.main(command(inputs, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_alarms_warn_or_stop(inputs, finished, capsys):
    train.main(command(inputs, finished))
    assert "WARNING: pairs/median_edit_ratio is 1, above 0.8" in capsys.readouterr().out
    with pytest.raises(ValueError, match="on_alarm is stop, and the monitor says: .*targets/"):
        train.main(command(inputs, finished, on_alarm="stop"))


def against(prompts, completions, **columns):
    """A scorer that likes every rejected response by 1 more than the chosen one, as they come in turns."""
    return [float(i % 2) for i in range(len(completions))]


def in_favour(prompts, completions, **columns):
    return [-score for score in against(prompts, completions)]


def equal(prompts, completions, **columns):
    return [0.5] * len(completions)


@pytest.mark.parametrize("scorer, gain", [(against, -1.0), (equal, 0.0), (in_favour, 1.0)])
def test_the_gate_before_dpo_asks_whether_improved_responses_are_better(
    inputs, finished, tmp_path, monkeypatch, capsys, scorer, gain
):
    """What was made before the gate is there already; `stop` refuses DPO and `warn` goes on, by held-out figures."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for name in ("gate", "dpo", "measure"):
        shutil.rmtree(tmp_path / "round-00" / name)
    monkeypatch.setattr(monitor, "RULES", [rule for rule in monitor.RULES if rule[0].endswith("scorer_gain")])
    changes = {"scorer": f"test_sgpo_stages.{scorer.__name__}"}
    if gain <= 0:
        with pytest.raises(ValueError, match=f"on_alarm is stop.* gate/improver_scorer_gain is {gain:g}, not above 0"):
            train.main(command(inputs, tmp_path, **changes, on_alarm="stop"))
        assert not (tmp_path / "round-00/dpo").exists()
        assert "gate/improver_scorer_gain is" in write_report(tmp_path, []).read_text()
    train.main(command(inputs, tmp_path, **changes, on_alarm="warn" if gain <= 0 else "stop"))
    assert ("WARNING" in capsys.readouterr().out) == (gain <= 0)
    found = counts(tmp_path, "gate")
    assert found["pairs_scorer_gain"] == found["improver_scorer_gain"] == found["over_greedy_scorer_gain"] == gain
    assert same(weights(tmp_path / "round-00/dpo/model"), weights(finished / "round-00/dpo/model"))


def test_the_page_shows_stages_alarms_numbers_and_edits(finished):
    page = write_report(finished, []).read_text()
    assert not re.search(r"2, dpo|<script|\bnan\b", page)
    reasons = counts(finished, "filter")["dropped"]
    for text in ("1, dpo", "targets/copy_rate", "<svg", "<ins>", "Warning signs", "above 0.8", *reasons):
        assert text in page
