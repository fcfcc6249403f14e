"""The policies of an EM-DPO run: regrets, the game, the command, one policy, the served mixture."""

import json
import math
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig

import processes
from emdpo_runs import LORA, OPTIONS, em, opposed_rows, quick_collection, same, types_alone, weights  # noqa: F401
from helpers import build_tokenizer, close, leave_processes, tiny_llama
from test_emdpo_parts import CASES
from trainers import MixturePolicy
from trainers.cli import aggregate
from trainers.emdpo import distill
from trainers.emdpo.aggregate import Arena, Player, compare
from trainers.emdpo.distill import mixture_samples
from trainers.emdpo.game import min_max_regret, regret_matrix
from trainers.emdpo.serve import mixture_logps
from trainers.emdpo.tables import MIXTURE
from trainers.forward import cache
from trainers.generation.sampler import Sample
from trainers.runs import files

PROMPTS = ["the cat sat on", "a mat and saw", "over an old green hill"]
SAMPLING = {"num_generations": 2, "max_new_tokens": 6, "batch_size": 4}


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request, tmp_path_factory, start):
    Dataset.from_list([{"prompt": p} for p in PROMPTS]).to_json(start / "prompts.jsonl")
    folder = tmp_path_factory.mktemp(request.param)
    em(folder, start, learning_rate=0.02, peft=request.param == "lora").train()
    return folder


full = pytest.mark.parametrize("run", ["full"], indirect=True)


@pytest.fixture
def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


def command(run, start, *more):
    return ["--run_dir", str(run), "--dataset_name", str(start / "prompts.jsonl"), "--max_new_tokens", "6",
            "--num_generations", "2", *map(str, more)]  # fmt: skip


def overview(folder):
    return json.loads((folder / "aggregate.json").read_text())


@pytest.mark.parametrize("content, told", [
    ('{"text": "a"}', "row 0 needs a `prompt`"), ('["a"]', "row 0 needs a `prompt`"), ("", "has no rows"),
])  # fmt: skip
def test_prompts_that_are_none_are_named(tmp_path, content, told):
    (tmp_path / "prompts.jsonl").write_text(content)
    with pytest.raises(ValueError, match=told):
        aggregate.main(["--run_dir", str(tmp_path), "--dataset_name", str(tmp_path / "prompts.jsonl")])


# Regrets from samples.


def test_gains_are_log_ratios_of_the_samples(run, start, tmp_path):
    arena = Arena(run, PROMPTS, tmp_path, **SAMPLING)
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
    np.testing.assert_array_equal(Arena(run, PROMPTS, tmp_path, **SAMPLING).gains(players)[0], gains)


def test_the_table_compares_every_aggregate():
    random, names, shares = np.random.default_rng(0), ["type-0", "type-1", "dpo"], np.array([0.9, 0.1])
    truth = np.array([[4.0, -1.0, 1.0], [-2.0, 5.0, 3.0]])
    gains = truth[..., None] + random.normal(0, 0.1, (2, 3, 200))
    report, regret = compare(gains, names, shares, resamples=100), regret_matrix(gains.mean(-1))
    np.testing.assert_allclose(report["regret"], regret)
    mixture, value = min_max_regret(regret[:, :2])
    np.testing.assert_allclose(report["mixture"], mixture)
    table, single = report["table"], "best single type (type-1)"
    expected = {"uniform mixture": [0.5, 0.5, 0], "shares of EM": [0.9, 0.1, 0], single: [0, 1, 0], "dpo": [0, 0, 1]}
    for name, weights_of in expected.items():
        assert table[name]["max"] == pytest.approx((regret @ weights_of).max())
        assert table[name]["max_low"] <= table[name]["max"] <= table[name]["max_high"]
    assert table["dpo"]["regret"] == pytest.approx(regret[:, 2])
    assert table["min-max mixture"]["max"] == pytest.approx(value)
    assert all(table[name]["max"] > value for name in ("uniform mixture", "shares of EM", single))
    assert table["min-max mixture, judged on other prompts"]["max"] == pytest.approx(value, abs=0.1)
    scaled = compare(gains, names, shares, np.array([1.0, 3.0]), resamples=10)
    assert scaled["mixture"][1] > report["mixture"][1]
    # The factors are of the game: regrets stay in nats.
    row = scaled["table"]["min-max mixture"]
    np.testing.assert_allclose(row["regret"], regret[:, :2] @ scaled["mixture"])
    assert row["max"] == pytest.approx(max(row["regret"])) and row["low"][1] <= row["regret"][1] <= row["high"][1]
    assert row["weighted_max"] == pytest.approx(scaled["value"])
    assert scaled["value"] == pytest.approx((np.array([1.0, 3.0]) * row["regret"]).max())
    # A handful of prompts has no interval.
    few = compare(gains[..., :4], names, shares, resamples=20)
    assert few["interval"] is None and "low" not in few["table"]["uniform mixture"]
    said = {"samples": {}, "settings": {"num_generations": 2, "max_new_tokens": 6}}
    assert "No intervals: 4 prompts" in aggregate.table(few | said) and "No type regrets" not in aggregate.table(
        few | said
    )
    # A policy that went so far that another type's log-ratios favour it over that type's own.
    far = compare(gains + np.array([[0, 9, 0], [0, 0, 0]])[..., None], names, shares, resamples=10)
    assert far["mixture"] == [0, 1] and "No type regrets the answers of type-1," in aggregate.table(far | said)


# The command.


def test_the_command_writes_weights_table_picture_and_one_plain_model(copied, start):
    aggregate.main(command(copied, start, "--distill", "--distill_learning_rate", "1e-2", "--extra", f"start={start}"))
    folder = copied / "aggregate"
    report, mixture = overview(folder), json.loads((copied / MIXTURE).read_text())
    assert mixture["weights"] == report["mixture"] and sum(mixture["weights"]) == pytest.approx(1)
    assert report["policies"] == ["type-0", "type-1", "start", "base-model", "distilled"]
    assert "| distilled |" in (folder / "table.md").read_text() and (folder / "regret.svg").stat().st_size
    model = AutoModelForCausalLM.from_pretrained(folder / "distilled")
    before = AutoModelForCausalLM.from_pretrained(start).state_dict()
    assert model.state_dict().keys() == before.keys() and (folder / "distilled/tokenizer.json").exists()
    assert max(float((v - before[n]).abs().max()) for n, v in model.state_dict().items()) > 1e-3
    np.testing.assert_allclose(MixturePolicy.from_pretrained(copied).weights.numpy(), report["mixture"])


@full
def test_the_distilled_policy_is_trained_anew_when_anything_about_it_changed(copied, start, capsys):
    distil = ("--distill", "--distill_learning_rate", "1e-2")
    aggregate.main(command(copied, start, *distil))
    folder = copied / "aggregate"
    first, report = weights(folder / "distilled"), overview(folder)
    made = (folder / "distilled/model.safetensors").stat().st_mtime_ns
    aggregate.main(command(copied, start, *distil))
    assert (folder / "distilled/model.safetensors").stat().st_mtime_ns == made and overview(folder) == report
    assert "is trained on 6 answers" in capsys.readouterr().out
    aggregate.main(command(copied, start, *distil, "--distill_batch_size", "2", "--type_weights", "1", "50"))
    assert max(float((weights(folder / "distilled")[n] - v).abs().max()) for n, v in first.items()) > 1e-5
    aggregate.main(command(copied, start, *distil))
    same(weights(folder / "distilled"), first)
    assert overview(folder) == report


@full
def test_other_settings_need_another_folder_and_more_rounds_set_the_weights_back(copied, start, tmp_path, caplog):
    for factors in ((1, 2, 3), (1, 0)):
        with pytest.raises(ValueError, match="type_weights=.*: give one positive number for each of the 2 types"):
            aggregate.main(command(copied, start, "--type_weights", *factors))
    assert not (copied / "aggregate").exists()  # nothing was sampled for it
    aggregate.main(command(copied, start))
    for more, word in ((("--num_generations", 3), "num_generations was 2"), (("--max_prompts", 2), "prompts was ")):
        with pytest.raises(ValueError, match=f"{word}.*--output, or remove"):
            aggregate.main(command(copied, start, *more))
    before = overview(copied / "aggregate")
    aggregate.main(command(copied, start, "--max_prompts", "2", "--output", tmp_path / "two"))
    assert overview(tmp_path / "two")["prompts"] == 2 and overview(copied / "aggregate") == before
    mixture = json.loads((copied / MIXTURE).read_text())
    assert mixture["weights_are"] == "min-max weights of ../two/aggregate.json"
    em(copied, start, learning_rate=0.02).train()
    assert json.loads((copied / MIXTURE).read_text()) == mixture and "set back" not in caplog.text
    em(copied, start, learning_rate=0.02, rounds=3).train()
    later = json.loads((copied / MIXTURE).read_text())
    assert later["weights"] == later["prior"] and "for the policies of an earlier round" in caplog.text
    with pytest.raises(ValueError, match="policy files are others.* another folder with --output"):
        aggregate.main(command(copied, start))


def test_a_run_may_be_moved_and_keeps_its_samples(start, tmp_path, monkeypatch):
    # A model that was given loaded lies in the run and moves with it.
    Dataset.from_list([{"prompt": p} for p in PROMPTS]).to_json(start / "prompts.jsonl")
    em(tmp_path / "old", tiny_llama(len(build_tokenizer())), rounds=1, learning_rate=0.02).train()
    aggregate.main(command(tmp_path / "old", start))
    report = overview(tmp_path / "old/aggregate")
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.setattr("trainers.generation.start.load_start", None)  # nothing is sampled or scored again
    aggregate.main(command(tmp_path / "new", start))
    assert overview(tmp_path / "new/aggregate") == report
    assert len(MixturePolicy.from_pretrained(tmp_path / "new").models) == 2


def die_and_aggregate(phase, argv):
    """Aggregate until two writes of samples or scores."""
    module, name = {"samples": (files, "append_records"), "scores": (cache, "_write")}[phase]
    setattr(module, name, processes.die_after(getattr(module, name), 2))
    aggregate.main(argv)


@full
def test_survives_kill_9_in_the_aggregation(copied, start, tmp_path):
    whole = Path(shutil.copytree(copied, tmp_path / "whole"))
    aggregate.main(command(whole, start))
    for phase in ("samples", "scores"):
        codes, output = processes.run(die_and_aggregate, phase, command(copied, start))
        assert codes == [-signal.SIGKILL], output
        assert not (copied / "aggregate/aggregate.json").exists()
    aggregate.main(command(copied, start))
    assert overview(copied / "aggregate") == overview(whole / "aggregate")


LAUNCHED = {  # what `accelerate launch` sets
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
              "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
              "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto", "ACCELERATE_GRADIENT_CLIPPING": "auto"},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
              "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
}  # fmt: skip


def aggregate_with_sgd(arguments, engine):
    from distributed_steps import begin, check_engine, prepare

    class Checked(distill.SFTTrainer):
        def train(self):
            super().train()
            check_engine(self, engine)

    os.environ.update({"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": "", **LAUNCHED[engine]})
    begin(engine)
    PartialState(cpu=True)
    distill.SFTTrainer, distill.SFTConfig = Checked, lambda **options: prepare(SFTConfig(**options), engine)
    aggregate.distilled = partial(aggregate.distilled, optim="sgd")  # Adam magnifies the rounding of small gradients
    aggregate.main(arguments)
    leave_processes()


@pytest.mark.distributed
@pytest.mark.parametrize(
    "engine", ["ddp", pytest.param("zero3", marks=pytest.mark.slow), pytest.param("fsdp2", marks=pytest.mark.slow)]
)
def test_mixture_and_distilled_policy_do_not_depend_on_the_processes(start, tmp_path, monkeypatch, engine):
    monkeypatch.setattr(aggregate, "distilled", partial(aggregate.distilled, optim="sgd"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    em(tmp_path / "one", start, learning_rate=0.02).train()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    # Five prompts, which two processes do not divide; each answer once in the one policy's training.
    Dataset.from_list([{"prompt": row["prompt"]} for row in opposed_rows()]).to_json(tmp_path / "prompts.jsonl")
    own = ["--dataset_name", str(tmp_path / "prompts.jsonl"), "--max_prompts", "5", "--num_generations", "4",
           "--max_new_tokens", "6", "--distill", "--distill_learning_rate", "0.1"]  # fmt: skip
    aggregate.main(["--run_dir", str(tmp_path / "one"), *own, "--distill_batch_size", "4"])
    two = ["--run_dir", str(tmp_path / "two"), *own, "--distill_batch_size", "2"]
    codes, output = processes.run(aggregate_with_sgd, two, engine, count=2)
    assert codes == [0, 0], output
    expected, found = (overview(tmp_path / run / "aggregate") for run in ("one", "two"))
    np.testing.assert_allclose(found["mixture"], expected["mixture"], atol=1e-4)
    types = np.array(expected["regret"])[:, :2]
    assert np.abs(types).max() > 0.1
    np.testing.assert_allclose(np.array(found["regret"])[:, :2], types, atol=1e-4)
    trained = [weights(tmp_path / run / "aggregate/distilled") for run in ("one", "two")]
    same(trained[1], trained[0], rtol=1e-7, atol=1e-5)
    assert max(float((trained[0][name] - value).abs().max()) for name, value in weights(start).items()) > 1e-3


@pytest.mark.parametrize("extra", [["distilled=a"], ["min-max mixture=a"], ["a=b", "a=c"], ["a="]])
def test_names_of_further_policies_are_their_own(extra):
    with pytest.raises(ValueError, match="names that are not taken"):
        aggregate.AggregateArguments("run", "prompts", extra=extra)


def test_answers_of_the_mixture_are_those_of_its_policies_token_for_token():
    def sample(k, i, j):
        return Sample("", [10 * k + 1, i, j, 2], truncated=False)

    samples = [[[sample(k, i, j) for j in range(40)] for i in range(10)] for k in range(2)]
    rows = mixture_samples(samples, [[7, 8]] * 10, np.array([0.25, 0.75]))
    assert len(rows) == 400 and rows[0]["completion_mask"] == [0, 0, 1, 1, 1, 1]
    assert all(ids[:2] == [7, 8] and ids[-1] == 2 for ids in rows["input_ids"])
    assert len({tuple(ids[3:]) for ids in rows["input_ids"]}) == 400  # each prompt and index once
    assert np.mean([ids[2] == 11 for ids in rows["input_ids"]]) == pytest.approx(0.75, abs=0.07)


# Serving.


def test_probability_of_a_response_under_the_mixture():
    case = CASES["M1"]
    logps = torch.tensor(case["inputs"]["seq_logps_per_policy"], dtype=torch.float64)
    weights = torch.tensor(case["inputs"]["weights"], dtype=torch.float64)
    close(mixture_logps(logps, weights), case["expected"]["mixture_logps"])
    assert mixture_logps(torch.tensor([[-3.0, -900.0]]), torch.tensor([1.0, 0.0])).item() == -3.0


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
            expected = np.logaddexp(math.log(0.3) + each[0], math.log(0.7) + each[1])
            assert float(logps[i, j]) == pytest.approx(expected, abs=1e-4)
    vocabulary = [[[token] for token in range(len(tokenizer))]]
    assert float(mixture.logps([[5, 6, 7]], vocabulary).exp().sum()) == pytest.approx(1, abs=1e-5)


def test_types_are_drawn_by_the_weights_and_adapters_lie_on_one_base(run, start):
    mixture = MixturePolicy.from_pretrained(run, weights=[0.2, 0.8], seed=1)
    assert mixture.draw(4000).mean() == pytest.approx(0.8, abs=0.03)
    out = mixture.generate(torch.tensor([[5, 6], [7, 8]]), max_new_tokens=3)
    assert out.shape[0] == 2 and out[:, :2].tolist() == [[5, 6], [7, 8]]
    with pytest.raises(ValueError, match="no mixture.json"):
        MixturePolicy.from_pretrained(run / "reference")
    if isinstance(mixture.models, list):
        return
    base = sum(p.numel() for p in tiny_llama(len(build_tokenizer())).parameters())
    adapters = [sum(p.numel() for n, p in mixture.models.named_parameters() if f".type-{k}." in n) for k in (0, 1)]
    assert sum(p.numel() for p in mixture.models.parameters()) == base + sum(adapters) and adapters[0] > 0


@pytest.fixture(scope="module")
def adapters():
    tokenizer = build_tokenizer()
    config = LoraConfig(**LORA, lora_dropout=0.3)
    model = get_peft_model(tiny_llama(len(tokenizer)), config, adapter_name="type-0")
    model.add_adapter("type-1", config)
    return MixturePolicy(model.eval(), [0.3, 0.7], tokenizer)


@pytest.mark.parametrize("weights", [[1.0], [0.2, 0.9], [math.nan, 1.0], [-0.5, 1.5]])
def test_weights_are_one_probability_per_policy(adapters, weights):
    with pytest.raises(ValueError, match="must be 2 probabilities that sum to 1"):
        MixturePolicy(adapters.models, weights, adapters.tokenizer)


def test_adapters_with_dropout_are_served_without_it_and_prompts_stay_shared(adapters):
    prompts, responses = [[5, 6, 7]], [[[8, 9], [10, 11, 2]]]
    first = adapters.logps(prompts, responses)
    assert adapters._runner.layout == "auto"
    adapters.models.train()
    torch.testing.assert_close(adapters.logps(prompts, responses), first)
    adapters.models.eval()
