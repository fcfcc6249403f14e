"""The mixture of an EM-DPO run: serving it, regrets from samples, the single policy, the number of types, commands."""

import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

import processes
from emdpo_rows import em_config, opposed_rows, quick_collection  # noqa: F401
from helpers import build_tokenizer, tiny_llama
from test_emdpo_parts import CASES, close
from trainers import EMDPOTrainer, MixturePolicy
from trainers.cli import aggregate
from trainers.cli import types as choose_types
from trainers.emdpo.aggregate import Arena, Player, compare
from trainers.emdpo.distill import mixture_samples
from trainers.emdpo.game import min_max_regret, regret_matrix
from trainers.emdpo.serve import mixture_logps
from trainers.forward import cache
from trainers.generation.sampler import Sample, SamplingConfig
from trainers.runs import files

ROOT = Path(__file__).resolve().parents[1]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
PROMPTS = ["the cat sat on", "a mat and saw", "over an old green hill"]
SAMPLING = SamplingConfig(num_generations=2, max_new_tokens=6, temperature=1.0, top_p=1.0, batch_size=4)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("start"), build_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    Dataset.from_list(opposed_rows()).to_json(folder / "rows.jsonl")
    Dataset.from_list([{"prompt": p} for p in PROMPTS]).to_json(folder / "prompts.jsonl")
    return folder


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request, tmp_path_factory, start):
    folder = tmp_path_factory.mktemp(request.param)
    EMDPOTrainer(
        str(start), args=em_config(folder, learning_rate=0.02, rounds=2), processing_class=build_tokenizer(),
        train_dataset=Dataset.from_list(opposed_rows()),
        peft_config=LoraConfig(**LORA) if request.param == "lora" else None,
    ).train()  # fmt: skip
    return folder


@pytest.fixture
def copied(run, tmp_path):
    """A run of its own, for tests that write into it."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_probability_of_a_response_under_the_mixture():
    case = CASES["M1"]
    logps = torch.tensor(case["inputs"]["seq_logps_per_policy"], dtype=torch.float64)
    weights = torch.tensor(case["inputs"]["weights"], dtype=torch.float64)
    close(mixture_logps(logps, weights), case["expected"]["mixture_logps"])
    assert mixture_logps(torch.tensor([[-3.0, -900.0]]), torch.tensor([1.0, 0.0])).item() == -3.0


def types_alone(run, start):
    """The policies read one by one, without MixturePolicy."""
    paths = [run / path for path in json.loads((run / "mixture.json").read_text())["policies"]]
    for path in paths:
        if (path / "adapter_config.json").exists():
            yield PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), path).eval()
        else:
            yield AutoModelForCausalLM.from_pretrained(path).eval()


def test_the_mixture_answers_with_one_policy_per_prompt_and_knows_its_probabilities(run, start):
    tokenizer = build_tokenizer()
    mixture = MixturePolicy.from_pretrained(run, weights=[0.3, 0.7])
    prompts = [tokenizer(p)["input_ids"] for p in PROMPTS]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    types = [1, 0, 1]
    found = mixture.generate(ids, seen, types=types, do_sample=False, max_new_tokens=5)
    alone = list(types_alone(run, start))
    for i, k in enumerate(types):
        expected = alone[k].generate(torch.tensor([prompts[i]]), do_sample=False, max_new_tokens=5, pad_token_id=0)
        new = expected[0, len(prompts[i]) :]
        assert found[i, width : width + len(new)].tolist() == new.tolist()
    responses = [[[5, 6, 2], [7, 2]], [[9, 8, 7, 6]], [[4, 2]]]
    logps = mixture.logps(prompts, responses)
    assert logps.shape == (3, 2) and not logps[1, 1]
    for i, prompt in enumerate(prompts):
        for j, response in enumerate(responses[i]):
            each = []
            for model in alone:
                rows = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                each.append(rows.gather(1, torch.tensor(response)[:, None]).sum().item())
            assert float(logps[i, j]) == pytest.approx(
                np.logaddexp(math.log(0.3) + each[0], math.log(0.7) + each[1]), abs=1e-4
            )


def test_probabilities_of_all_next_tokens_sum_to_one(run):
    mixture = MixturePolicy.from_pretrained(run)
    vocabulary = len(build_tokenizer())
    total = mixture.logps([[5, 6, 7]], [[[token] for token in range(vocabulary)]]).exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-5)


def test_types_are_drawn_by_the_weights(run):
    mixture = MixturePolicy.from_pretrained(run, weights=[0.2, 0.8], seed=1)
    assert mixture.draw(4000).mean() == pytest.approx(0.8, abs=0.03)
    out = mixture.generate(torch.tensor([[5, 6], [7, 8]]), max_new_tokens=3)
    assert out.shape[0] == 2 and out[:, :2].tolist() == [[5, 6], [7, 8]]
    with pytest.raises(ValueError, match="probabilities that sum to 1"):
        MixturePolicy.from_pretrained(run, weights=[0.2, 0.9])
    with pytest.raises(ValueError, match="no mixture.json"):
        MixturePolicy.from_pretrained(run / "reference")


def test_adapters_are_held_on_one_base(run, start):
    mixture = MixturePolicy.from_pretrained(run)
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(start).parameters())
    if isinstance(mixture.models, list):
        assert len(mixture.models) == 2
        return
    adapters = [sum(p.numel() for n, p in mixture.models.named_parameters() if f".type-{k}." in n) for k in (0, 1)]
    assert sum(p.numel() for p in mixture.models.parameters()) == base + sum(adapters) and adapters[0] > 0


# Regrets from samples.


def test_gains_are_log_ratios_of_the_samples(run, start, tmp_path):
    arena = Arena(run, PROMPTS, SAMPLING, tmp_path, Accelerator(cpu=True))
    players = [*arena.types, Player("start", start)]
    gains, samples = arena.gains(players)
    assert gains.shape == (2, 3, 3)
    tokenizer, models = build_tokenizer(), list(types_alone(run, start))
    reference = AutoModelForCausalLM.from_pretrained(start).eval()
    for j in range(3):
        for p, prompt in enumerate(PROMPTS):
            ids = tokenizer(prompt)["input_ids"]
            expected = np.zeros(2)
            for sample in samples[j][p]:
                both = torch.tensor([ids + sample.token_ids])
                target = both[0, len(ids) :, None]
                logps = [m(both).logits[0, len(ids) - 1 : -1].log_softmax(-1).gather(1, target).sum().item()
                         for m in (*models, reference)]  # fmt: skip
                expected += (np.array(logps[:2]) - logps[2]) / 2
            np.testing.assert_allclose(gains[:, j, p], expected, atol=1e-4)
    again, _ = Arena(run, PROMPTS, SAMPLING, tmp_path, Accelerator(cpu=True)).gains(players)
    np.testing.assert_array_equal(again, gains)
    with pytest.raises(ValueError, match="max_new_tokens was 6 and is 7"):
        longer = SamplingConfig(num_generations=2, max_new_tokens=7, temperature=1.0, top_p=1.0)
        Arena(run, PROMPTS, longer, tmp_path, Accelerator(cpu=True)).gains(players)


@pytest.mark.parametrize("options", [{"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.9}])
def test_samples_that_are_not_those_of_the_policy_are_refused(run, tmp_path, options):
    with pytest.raises(ValueError, match="temperature 1, top_p 1"):
        Arena(run, PROMPTS, SamplingConfig(**{"top_p": 1.0, **options}), tmp_path, Accelerator(cpu=True))


def test_the_table_compares_every_aggregate():
    random = np.random.default_rng(0)
    truth = np.array([[4.0, -1.0, 1.0], [-2.0, 5.0, 3.0]])
    gains = truth[..., None] + random.normal(0, 0.1, (2, 3, 200))
    report = compare(gains, ["type-0", "type-1", "dpo"], np.array([0.9, 0.1]), resamples=100)
    regret = regret_matrix(gains.mean(-1))
    np.testing.assert_allclose(report["regret"], regret)
    mixture, value = min_max_regret(regret[:, :2])
    np.testing.assert_allclose(report["mixture"], mixture)
    table = report["table"]
    assert table["min-max mixture"]["max"] == pytest.approx(value)
    assert table["uniform mixture"]["max"] == pytest.approx((regret[:, :2] @ [0.5, 0.5]).max())
    assert table["shares of EM"]["max"] == pytest.approx((regret[:, :2] @ [0.9, 0.1]).max())
    assert table["best single type (type-1)"]["max"] == pytest.approx(regret[:, 1].max())
    assert table["dpo"]["regret"] == pytest.approx(regret[:, 2])
    mixtures = ("uniform mixture", "shares of EM", "best single type (type-1)")
    assert all(table["min-max mixture"]["max"] < table[name]["max"] for name in mixtures)
    for name in ("min-max mixture", "dpo"):
        assert table[name]["max_low"] <= table[name]["max"] <= table[name]["max_high"]
    assert table["min-max mixture, judged on other prompts"]["max"] == pytest.approx(value, abs=0.1)
    scaled = compare(gains, ["type-0", "type-1", "dpo"], np.array([0.9, 0.1]), np.array([1.0, 3.0]), resamples=10)
    assert scaled["mixture"][1] > report["mixture"][1]
    # The factors are of the game: regrets stay in nats.
    row = scaled["table"]["min-max mixture"]
    np.testing.assert_allclose(row["regret"], regret[:, :2] @ scaled["mixture"])
    assert row["max"] == pytest.approx(max(row["regret"])) and row["low"][1] <= row["regret"][1] <= row["high"][1]
    assert row["weighted_max"] == pytest.approx(scaled["value"])
    assert scaled["value"] == pytest.approx((np.array([1.0, 3.0]) * row["regret"]).max())
    assert scaled["table"]["dpo"]["regret"] == pytest.approx(regret[:, 2])


# One policy.


def test_answers_of_the_mixture_are_those_of_its_policies_token_for_token():
    def sample(k, i, j):
        return Sample("", [10 * k + 1, i, j, 2], truncated=False)

    samples = [[[sample(k, i, j) for j in range(40)] for i in range(10)] for k in range(2)]
    rows = mixture_samples(samples, [[7, 8]] * 10, np.array([0.25, 0.75]))
    assert len(rows) == 400 and rows[0]["completion_mask"] == [0, 0, 1, 1, 1, 1]
    assert all(ids[:2] == [7, 8] and ids[-1] == 2 for ids in rows["input_ids"])
    assert len({tuple(ids[3:]) for ids in rows["input_ids"]}) == 400  # each prompt and index once
    assert np.mean([ids[2] == 11 for ids in rows["input_ids"]]) == pytest.approx(0.75, abs=0.07)


def command(run, start, *more):
    return ["--run_dir", str(run), "--dataset_name", str(start / "prompts.jsonl"), "--max_new_tokens", "6",
            "--num_generations", "2", "--extra", f"start={start}", *more]  # fmt: skip


def test_the_command_writes_weights_table_picture_and_one_plain_model(copied, start, capsys):
    aggregate.main(command(copied, start, "--distill", "--distill_learning_rate", "1e-2"))
    folder = copied / "aggregate"
    report = json.loads((folder / "aggregate.json").read_text())
    mixture = json.loads((copied / "mixture.json").read_text())
    assert mixture["weights"] == report["mixture"] and sum(mixture["weights"]) == pytest.approx(1)
    assert report["policies"] == ["type-0", "type-1", "start", "base-model", "distilled"]
    assert "| distilled |" in (folder / "table.md").read_text() and "| distilled |" in capsys.readouterr().out
    assert (folder / "regret.svg").stat().st_size > 1000
    model = AutoModelForCausalLM.from_pretrained(folder / "distilled")
    assert not isinstance(model, PeftModel) and (folder / "distilled/tokenizer.json").exists()
    before = AutoModelForCausalLM.from_pretrained(start).state_dict()
    assert model.state_dict().keys() == before.keys()
    moved = [float((v - before[n]).abs().max()) for n, v in model.state_dict().items()]
    assert max(moved) > 1e-3
    served = MixturePolicy.from_pretrained(copied)
    np.testing.assert_allclose(served.weights.numpy(), report["mixture"])
    EMDPOTrainer(
        str(start), args=em_config(copied, learning_rate=0.02), processing_class=build_tokenizer(),
        train_dataset=Dataset.from_list(opposed_rows()),
        peft_config=LoraConfig(**LORA) if mixture["adapters"] else None,
    ).train()  # fmt: skip
    assert json.loads((copied / "mixture.json").read_text())["weights"] == report["mixture"]


def die_and_aggregate(phase, argv):
    """Aggregate until two writes of samples or scores."""
    module, name = {"samples": (files, "append_records"), "scores": (cache, "_write")}[phase]
    setattr(module, name, processes.die_after(getattr(module, name), 2))
    aggregate.main(argv)


@pytest.mark.parametrize("run", ["full"], indirect=True)
def test_survives_kill_9_in_the_aggregation(copied, start, tmp_path):
    whole = Path(shutil.copytree(copied, tmp_path / "whole"))
    aggregate.main(command(whole, start))
    for phase in ("samples", "scores"):
        codes, output = processes.run(die_and_aggregate, phase, command(copied, start))
        assert codes == [-signal.SIGKILL], output
        assert not (copied / "aggregate/aggregate.json").exists()
    aggregate.main(command(copied, start))
    found, expected = (json.loads((f / "aggregate/aggregate.json").read_text()) for f in (copied, whole))
    assert found == expected


def test_inputs_of_the_command_that_cannot_be_used_are_named(copied, start, tmp_path):
    with pytest.raises(ValueError, match="not name=folder"):
        aggregate.main([*command(copied, start)[:-1], "dpo=nowhere"])
    with pytest.raises(ValueError, match="no mixture.json"):
        aggregate.main(command(tmp_path, start))
    (tmp_path / "bad.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(ValueError, match="has no 'prompt'"):
        aggregate.main([*command(copied, start), "--dataset_name", str(tmp_path / "bad.jsonl")])


# The number of types.


def test_choosing_the_number_of_types_holds_out_whole_annotators(start, tmp_path):
    flags = {
        "model_name_or_path": start, "dataset_name": start / "rows.jsonl", "output_dir": tmp_path, "use_cpu": True,
        "report_to": "none", "learning_rate": 0.01, "rounds": 2, "init": "agreement", "disable_tqdm": True,
        "per_device_train_batch_size": 4, "save_strategy": "no", "max_types": 2, "held_out": 0.34, "seed": 3,
    }  # fmt: skip
    report = choose_types.main([str(part) for name, value in flags.items() for part in (f"--{name}", value)])
    assert report["held_out_annotators"] == 2 and report["held_out_items"] == 10
    inside = {line.split(",")[0] for line in (tmp_path / "types-2/annotators.csv").read_text().splitlines()[1:]}
    outside = {line.split(",")[0] for line in (tmp_path / "types-2/held_out.csv").read_text().splitlines()[1:]}
    assert len(inside) == 4 and len(outside) == 2 and not inside & outside
    one, two = report["types"]
    assert two["gain_over_one_less"]["mean"] == pytest.approx(
        two["log_likelihood"]["mean"] - one["log_likelihood"]["mean"]
    )
    # Opposed annotators share no policy: one type cannot say more than chance, log 3! per ranking.
    assert one["log_likelihood_per_item"] < -1.7 and two["log_likelihood_per_item"] > one["log_likelihood_per_item"]
    text = (tmp_path / "table.md").read_text()
    assert "a coin" in (tmp_path / "plot.svg").read_text() and "| 2 |" in text
    # A coin: log 3! for each of 5 rankings.
    assert report["coin_log_likelihood"] == pytest.approx(-5 * math.log(6))
    assert one["gain_over_coin"]["mean"] == pytest.approx(one["log_likelihood"]["mean"] + 5 * math.log(6))
    assert "| *a coin* | -8.959 |" in text and "No intervals: 2 held-out annotators are fewer than 5" in text
    assert "[" not in text and two["gain_over_one_less"]["low"] is None
    results = {k: json.loads((tmp_path / f"types-{k}/result.json").read_text()) for k in (1, 2)}
    assert ("more about new annotators than a coin" in text) == (two["gain_over_coin"]["mean"] < 0)
    for k, result in results.items():
        many = {f"b{i}": -9.0 - k - i / 10 for i in range(6)}
        result["held_out"] |= {"per_annotator": many, "coin": dict.fromkeys(many, -8.0)}
        (tmp_path / f"types-{k}/result.json").write_text(json.dumps(result))
    worse = choose_types.summarize(tmp_path, 2)
    text = choose_types.table(worse)
    assert "No number of types says more about new annotators than a coin" in text and "-2.250 [" in text
    assert "Intervals from fewer than 20 held-out annotators (6) are too narrow" in text
    with pytest.raises(ValueError, match="too few to hold one out"):
        choose_types.held_out_annotators(["a", "b", "a"], 0.5, 0)
