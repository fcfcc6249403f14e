"""The stages of SGPO from one recipe: what each leaves, and what the options change."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from helpers import family_tokenizer
from sgpo_rows import PROMPTS, command, finished_run, history, manifest, rows, same, vowels, weights
from trainers import SGPOTrainer
from trainers.cli import train
from trainers.cli.sgpo_report import word_diff, write_report
from trainers.data.tokenization import tokenize_row
from trainers.generation import SamplingConfig, sample_responses
from trainers.generation.start import load_for_sampling
from trainers.sgpo.config import STAGES, SGPOConfig
from trainers.sgpo.improver import sft_rows
from trainers.sgpo.monitor import Limits
from trainers.sgpo.text import improver_prompt


def shorter(prompts, drafts, references):
    """A reviser with a known edit: the draft's first half, none for the first prompt and a space for the second."""
    known = {PROMPTS[0]: None, PROMPTS[1]: " "}
    return [known.get(p[-1]["content"], d[: len(d) // 2] + "!") for p, d in zip(prompts, drafts, strict=True)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return finished_run(tmp_path_factory.getbasetemp() / "sgpo")[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory.getbasetemp() / "sgpo")[1]


# What the stages leave.


def test_every_stage_ends_with_a_manifest_of_inputs_outputs_seed_and_counts(finished):
    for name in STAGES:
        found = manifest(finished, name)
        assert set(found) == {"hash", "inputs", "template", "seed", "outputs", "counts"} and found["seed"] == 3
        assert found["counts"] and all(found["outputs"].values())
    assert manifest(finished, "dpo")["inputs"]["pairs"] == manifest(finished, "pairs")["outputs"]["rows.jsonl.gz"]
    assert manifest(finished, "pairs")["inputs"]["improver"] == manifest(finished, "improver")["outputs"]["model"]
    assert manifest(finished, "improver")["inputs"]["start"] == manifest(finished, "sft")["outputs"]["model"]
    assert manifest(finished, "targets")["template"] != manifest(finished, "pairs")["template"]
    assert not list(finished.glob("**/checkpoint-*")) and not list(finished.glob("**/training"))


def test_counts_add_up_and_no_prompt_is_in_two_sets(finished):
    for name, size in (("filter", 5), ("pairs", 5)):
        counts = manifest(finished, name)["counts"]
        kept, dropped = rows(finished, name), rows(finished, name, "dropped.jsonl.gz")
        assert len(kept) == counts["kept"] and len(kept) + len(dropped) == size
        assert sum(counts["dropped"].values()) == len(dropped) and all(row["reason"] for row in dropped)
    sets = [{row["prompt"][0]["content"] for row in rows(finished, name)} for name in ("current", "pairs", "before")]
    assert sets[0] == set(PROMPTS[:5]) and sets[1] <= set(PROMPTS[5:10]) and sets[2] == set(PROMPTS[10:])


def test_both_sides_of_a_pair_come_from_the_improver(inputs, finished):
    """Rejected is its answer to the plain prompt, chosen what it makes of that; each with its own random stream."""
    args = SGPOConfig(output_dir=str(finished), use_cpu=True, report_to="none")
    model, tokenizer = load_for_sampling(str(inputs / "model"), finished / "round-00/improver/model", args, dtype=None)
    pairs = sorted(
        rows(finished, "pairs") + rows(finished, "pairs", "dropped.jsonl.gz"), key=lambda r: r["prompt"][0]["content"]
    )
    config = {"num_generations": 1, "max_new_tokens": 24, "top_p": 1.0, "seed": 3}
    plain = [row["prompt"] for row in pairs]
    drawn = sample_responses(model, tokenizer, plain, SamplingConfig(temperature=1.0, **config), progress=False)
    assert [row["rejected"] for row in pairs] == [samples[0].text for samples in drawn]
    asked = [improver_prompt(row["prompt"], row["rejected"]) for row in pairs]
    drawn = sample_responses(model, tokenizer, asked, SamplingConfig(temperature=0.7, **config), progress=False)
    assert [row["chosen"] for row in pairs] == [samples[0].text for samples in drawn]


def test_dpo_starts_at_ln_2_and_moves(finished):
    logs = [log for log in history(finished, "dpo") if "loss" in log]
    assert logs[0]["loss"] == pytest.approx(0.6931472, abs=1e-5) and logs[0]["rewards/margins"] == 0
    assert logs[-1]["loss"] != pytest.approx(0.6931472, abs=1e-3)
    counts = manifest(finished, "dpo")["counts"]
    assert counts["first_loss"] == logs[0]["loss"] and counts["margin"] == logs[-1]["rewards/margins"]
    assert not same(weights(finished / "round-00/dpo/model"), weights(finished / "round-00/improver/model"))
    for name in ("model.safetensors", "tokenizer.json", "README.md", "train_results.json"):
        assert (finished / name).read_bytes() == (finished / "round-00/dpo/model" / name).read_bytes()


def test_chosen_and_rejected_follow_the_same_plain_prompt():
    tokenizer = family_tokenizer("llama3")
    prompt = [{"role": "user", "content": "where is the dog"}]
    responses = [[{"role": "assistant", "content": text}] for text in ("it is in Paris", "over")]
    pair = tokenize_row({"prompt": prompt, "responses": responses, "scores": [1.0, 0.0]}, tokenizer)
    plain = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert pair["prompt_ids"] == list(plain)
    asked = improver_prompt(prompt, "over")
    columns = sft_rows([(asked, "it is in Paris")], tokenizer)
    mask = columns["completion_mask"][0]
    target = [token for token, kept in zip(columns["input_ids"][0], mask, strict=True) if kept]
    assert target == pair["response_ids"][0]  # the same tokens in the improver's training as in the DPO stage
    assert mask == sorted(mask) and sum(mask) == len(target)


def test_held_out_answers_use_the_same_streams_for_every_model(inputs, finished):
    improver, policy = (rows(finished, "measure", f"{name}.jsonl.gz") for name in ("improver", "policy"))
    assert [row["prompt"] for row in improver] == [row["prompt"] for row in policy]
    counts = manifest(finished, "measure")["counts"]
    texts = [[row["chosen"], row["rejected"]] for row in policy]
    scores = [vowels(None, [[{"content": t}] for t in pair], reference=None) for pair in texts]
    gain = sum(chosen - rejected for chosen, rejected in scores) / len(scores)
    assert counts["policy_scorer_gain"] == pytest.approx(gain)


# Options.


def test_a_reviser_with_a_known_edit_gives_known_targets_and_drops(inputs, tmp_path):
    argv = command(inputs, tmp_path, sft=None, scorer=None, reviser="external", stage="before",
                   reviser_function="test_sgpo_stages.shorter", filter_statistic="none")  # fmt: skip
    for name in ("before", "current", "targets", "filter"):
        argv[argv.index("--stage") + 1] = name
        train.main(argv)
    current, targets = rows(tmp_path, "current"), rows(tmp_path, "targets")
    usable = [not row["current_truncated"] and bool(row["current"].strip()) for row in current]
    expected = shorter([row["prompt"] for row in current], [row["current"] for row in current], [])
    assert [row["target"] for row in targets] == [e if ok else None for e, ok in zip(expected, usable, strict=True)]
    dropped = {row["prompt"][0]["content"]: row["reason"] for row in rows(tmp_path, "filter", "dropped.jsonl.gz")}
    assert dropped[PROMPTS[0]] == "target: the reviser gave none" and dropped[PROMPTS[1]] == "target: empty"
    assert manifest(tmp_path, "targets")["counts"]["revised"] == sum(usable[2:])
    assert "statistic" not in rows(tmp_path, "filter")[0]


def test_vllm_loads_the_model_of_each_stage(inputs, finished, tmp_path, monkeypatch):
    """With a stand-in for vLLM, which cannot run here: what it is asked for, and that its answers are kept."""
    asked = []

    class LLM:
        def __init__(self, model, **options):
            asked.append((model, options))

        def generate(self, prompts, params, use_tqdm):
            assert all(p.kwargs["max_tokens"] == 24 and p.kwargs["temperature"] == 1.0 for p in params)
            answer = SimpleNamespace(text="a kind day", token_ids=[5, 6, 2], finish_reason="stop")
            return [SimpleNamespace(outputs=[answer]) for _ in prompts]

    parts = {"LLM": LLM, "SamplingParams": lambda **kwargs: SimpleNamespace(kwargs=kwargs),
             "TokensPrompt": lambda prompt_token_ids: prompt_token_ids}  # fmt: skip
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(**parts))
    shutil.copytree(finished / "round-00/sft", tmp_path / "round-00/sft")
    for stage in ("before", "current"):
        train.main(command(inputs, tmp_path, use_vllm=True, stage=stage))
    assert asked == [(str(tmp_path / "round-00/sft/model"), {})] * 2
    assert [row["current"] for row in rows(tmp_path, "current")] == ["a kind day"] * 5
    with pytest.raises(ValueError, match=r"current/settings.json .*use_vllm was True and is False"):
        train.main(command(inputs, tmp_path, dataset_test_split=None))


@pytest.mark.slow
def test_two_rounds_start_from_the_policy_of_the_round_before(inputs, tmp_path):
    argv = command(inputs, tmp_path, sft=None, scorer=None, dataset_test_split=None, rounds=1, save_strategy="no",
                   num_train_epochs=1, policy_weight=0.5, sft_weight=0.1)  # fmt: skip
    train.main(argv)
    first = weights(tmp_path)
    argv[argv.index("--rounds") + 1] = "2"
    train.main(argv)  # rounds can be added
    settings = json.loads((tmp_path / "round-01/current/settings.json").read_text())["settings"]
    assert settings["inputs"]["start"] == manifest(tmp_path, "dpo")["outputs"]["model"]
    assert same(first, weights(tmp_path / "round-00/dpo/model")) and not same(first, weights(tmp_path))
    state = json.loads((tmp_path / "round-01/dpo/model/trainer_state.json").read_text())
    # ln 2 and the SFT term at the start of the round: the reference is the newest improver.
    log = state["log_history"][0]
    assert log["rewards/margins"] == 0 and log["loss"] > 0.6931472
    assert not (tmp_path / "round-01/measure").exists() and not (tmp_path / "round-00/before").exists()


def _copies(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("option, start, reference", [("ref", "improver", "model"), ("separate", "model", "model")])
def test_the_reference_and_the_start_of_dpo(inputs, finished, tmp_path, option, start, reference, monkeypatch):
    """`ref: initial` compares with the model before all rounds; a separate improver leaves the policy there."""
    seen, loss = {}, SGPOTrainer.loss

    def spy(self, batch, policy, found):
        if not seen:
            logratios = (policy.logps - found.logps).detach().abs().max()
            seen.update(logratios=float(logratios), policy=_copies(self.model),
                        reference=_copies(self.reference.model))  # fmt: skip
        return loss(self, batch, policy, found)

    monkeypatch.setattr(SGPOTrainer, "loss", spy)
    options = {"ref": "initial"} if option == "ref" else {"separate_improver": True}
    train.main(
        command(inputs, tmp_path, sft=None, scorer=None, dataset_test_split=None, save_strategy="no", **options)
    )
    paths = {"improver": tmp_path / "round-00/improver/model", "model": inputs / "model"}
    for name, path in (("policy", start), ("reference", reference)):
        expected = weights(paths[path])
        assert all(torch.equal(seen[name][n], expected[n]) for n in expected)
    assert (seen["logratios"] == 0) == (start == reference)
    logs = [log["rewards/chosen"] for log in history(tmp_path, "dpo") if "loss" in log]
    assert (logs[0] == 0) == (start == reference)
    assert manifest(tmp_path, "dpo")["counts"]["chosen_drift"] == pytest.approx((logs[-1] - logs[0]) / 0.1)


@pytest.mark.slow
def test_lora_goes_on_with_one_adapter_and_starts_at_ln_2(inputs, tmp_path):
    train.main(command(inputs, tmp_path, scorer=None, use_peft=True, lora_r=4, lora_dropout=0.0,
                       lora_target_modules="all-linear"))  # fmt: skip
    adapters = [
        load_file(tmp_path / f"round-00/{name}/model/adapter_model.safetensors") for name in ("sft", "improver", "dpo")
    ]
    assert adapters[0].keys() == adapters[1].keys() == adapters[2].keys()
    assert not any(torch.equal(a[n], b[n]) for a, b in zip(adapters, adapters[1:], strict=False) for n in a)
    assert history(tmp_path, "dpo")[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"preference_split": None}, "preference_split is missing"),
        ({"preference_split": "train[:5]"}, "no preference prompt is left"),
        ({"sft_target_source": "answer"}, "set sft_target_source to the one with the reference answer"),
        ({"use_vllm": True, "use_peft": True}, "use_vllm samples from full models"),
        ({"use_vllm": True}, "use_vllm needs vLLM: pip install vllm"),
        ({"push_to_hub": True}, "push_to_hub does not work"),
    ],
)
def test_what_cannot_be_run_is_said_at_once(inputs, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train.main(command(inputs, tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "round-00").exists()


def test_an_empty_set_of_pairs_stops_the_run(inputs, tmp_path):
    with pytest.raises(ValueError, match=r"filter: no row is left, .*cut at max_new_tokens"):
        train.main(command(inputs, tmp_path, sampling={"max_new_tokens": 1}, scorer=None, sft=None))
    assert len(rows(tmp_path, "filter", "dropped.jsonl.gz")) == 5
    page = write_report(tmp_path).read_text()
    assert "Round 1, filter: no row was kept, so the run ended there. Dropped: 5 draft: cut at max_new_tokens." in page
    assert "Nothing is beyond" not in page  # all drafts are cut off


def test_a_stage_that_has_not_ended_is_named_on_the_page(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "round-00/measure/manifest.json").unlink()
    (run / "limits.json").write_text(json.dumps({"limits": {name: None for name in vars(Limits())}}))
    page = write_report(run).read_text()
    assert (
        "Round 1, measure: begun, and not finished." in page and "Nothing is beyond the run&#x27;s limits so" in page
    )


def test_alarms_warn_or_stop(inputs, finished, capsys):
    train.main(command(inputs, finished, limits={"lowest_edit": 1.1}))
    assert "WARNING: pairs/median_edit_ratio is 1, below 1.1 (limits.lowest_edit)" in capsys.readouterr().out
    page = write_report(finished).read_text()
    assert "pairs/median_edit_ratio is 1, below 1.1 (limits.lowest_edit)" in page and "the run&#x27;s limits" in page
    (finished / "limits.json").unlink()
    page = write_report(finished).read_text()
    assert "below 1.1" not in page and "the default limits (the run&#x27;s own were not kept)" in page
    with pytest.raises(ValueError, match="on_alarm is stop, and the monitor found: .*limits.lowest_edit"):
        train.main(command(inputs, finished, limits={"lowest_edit": 1.1}, on_alarm="stop"))


# The page.


def test_the_page_shows_stages_alarms_numbers_and_edits(finished):
    page = write_report(finished).read_text()
    for text in ("2, dpo", "measure/pairs_scorer_gain", "<script", "http://", "https://", "nan"):
        assert text not in page
    reasons = manifest(finished, "filter")["counts"]["dropped"]
    for text in ("1, dpo", "Share of copies: targets against drafts", "<svg", "<ins>", "ln 2", *reasons):
        assert text in page
    first = rows(finished, "pairs")[0]
    left, right = word_diff(first["rejected"], first["chosen"])
    assert left in page and right in page
