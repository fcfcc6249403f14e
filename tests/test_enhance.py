"""Training in rounds: what a round holds, resuming after a kill in each phase, refusal to mix settings."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import types
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file

import processes
from distributed_matrix import torchrun
from helpers import family_tokenizer, flags, save_start
from trainers import DPOConfig, DPOTrainer, LIREConfig, LIRETrainer
from trainers import rounds as enhance
from trainers.cli import train
from trainers.generation import SamplingConfig, sample_responses
from trainers.generation.start import weights_of
from trainers.runs import files
from trainers.runs.checkpoints import last_checkpoint
from trainers.runs.record import read_run

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["the dog sleeps", "a lazy day", "say something kind", "Paris, of course", "jumps over", "it rains"]
PROMPTS = ["what is the capital", "say something", "how was the day", "where is the dog", "the quick", "a friend said"]
ROWS = [
    {
        "prompt": [{"role": "user", "content": prompt}],
        "responses": [[{"role": "assistant", "content": TEXTS[(i + k) % 6]}] for k in range(2 + i % 2)],
        "scores": [float(k) for k in range(2 + i % 2)],
        "topic": 10.0 * i,
    }
    for i, prompt in enumerate(PROMPTS)
]
K = 3
OPTIONS = {
    "rounds": 2, "num_generations": K, "scorer": "test_enhance.vowels", "max_new_tokens": 8, "temperature": 1.0,
    "top_p": 1.0, "batch_size": 4, "held_out_generations": 2,
}  # fmt: skip


def vowels(prompts, completions, *, topic, **columns):
    """Share of vowels, plus the topic of the prompt."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(c in "aeiou" for c in t) / (len(t) + 1) + n for t, n in zip(texts, topic, strict=True)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_start(folder / "model", "llama3")
    Dataset.from_list(ROWS).to_json(folder / "rows.jsonl")
    return folder


def arguments(inputs, output, *, lora=False, options=None, **changes):
    given = {
        "trainer": "LIRETrainer", "model_name_or_path": inputs / "model", "dataset_name": inputs / "rows.jsonl",
        "dataset_train_split": "train[:4]", "dataset_test_split": "train[4:]", "output_dir": output,
        "self_enhance": json.dumps(OPTIONS | (options or {})), "use_cpu": True, "report_to": "none",
        "learning_rate": 0.01, "temperature": 5.0, "num_train_epochs": 2, "per_device_train_batch_size": 1,
        "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "logging_steps": 1, "disable_tqdm": True,
        "seed": 3,
    }  # fmt: skip
    if lora:
        given |= {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
    return flags(**{name: value for name, value in (given | changes).items() if value is not None})


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train.main(arguments(inputs, folder))
    return folder


@pytest.fixture(scope="module")
def finished_lora(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished_lora")
    train.main(arguments(inputs, folder, lora=True))
    return folder


def pool(folder, index):
    data = gzip.decompress((folder / f"round-{index:02d}" / "rows.jsonl.gz").read_bytes())
    return [json.loads(line) for line in data.decode().splitlines()]


def texts(row):
    return [response[0]["content"] for response in row["responses"]]


def assert_same(found, expected, weights="model.safetensors"):
    """The same pools, the same weights to the last bit, and the same rewards on held-out prompts."""
    for index in range(OPTIONS["rounds"]):
        assert pool(found, index) == pool(expected, index)
        one, other = (load_file(f / f"round-{index:02d}" / "checkpoint" / weights) for f in (found, expected))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        manifests = [json.loads((f / f"round-{index:02d}" / "manifest.json").read_text()) for f in (found, expected)]
        for name in ("samples", "held_out", "started_from"):
            assert manifests[0][name] == manifests[1][name]
    assert (found / weights).read_bytes() == (expected / "round-01" / "checkpoint" / weights).read_bytes()


def test_a_pool_holds_own_responses_and_samples_of_the_rounds_policy_all_scored(inputs, finished):
    tokenizer = family_tokenizer("llama3")
    config = SamplingConfig(num_generations=K, max_new_tokens=8, temperature=1.0, top_p=1.0, seed=3)
    args = LIREConfig(output_dir=str(finished), use_cpu=True)
    for index, start in enumerate([None, finished / "round-00" / "checkpoint"]):
        policy = weights_of(str(inputs / "model"), start, args).whole()
        prompts = [row["prompt"] for row in ROWS[:4]]
        samples = sample_responses(policy, tokenizer, prompts, config, round=index, progress=False)
        for row, source, drawn in zip(pool(finished, index), ROWS[:4], samples, strict=True):
            own = len(source["responses"])
            assert row["prompt"] == source["prompt"] and row["topic"] == source["topic"]
            assert texts(row) == [*texts(source), *(sample.text for sample in drawn)]
            assert row["sampled_in_round"] == [-1] * own + [index] * K
            assert row["unfinished_responses"] == [False] * own + [sample.truncated for sample in drawn]
            completions = [[{"role": "assistant", "content": text}] for text in texts(row)]
            assert row["scores"] == vowels(None, completions, topic=[row["topic"]] * len(completions))
    assert texts(pool(finished, 0)[0])[2:] != texts(pool(finished, 1)[0])[2:]


def test_a_round_starts_from_the_weights_of_the_round_before(inputs, finished):
    weights = [load_file(path / "model.safetensors") for path in (
        inputs / "model", finished / "round-00" / "checkpoint", finished / "round-01" / "checkpoint")]  # fmt: skip
    steps = [max(float((b[n] - a[n]).abs().max()) for n in a) for a, b in zip(weights, weights[1:], strict=False)]
    assert all(0.01 < step < 0.09 for step in steps)  # 8 Adam steps of at most the decaying rate 0.01 each
    for name in ("model.safetensors", "tokenizer.json", "README.md", "eval_results.json"):  # as of any run
        assert (finished / name).read_bytes() == (finished / "round-01" / "checkpoint" / name).read_bytes()
    assert not list(finished.glob("**/checkpoint-*")) and not list(finished.glob("*/training"))
    rows = Dataset.from_list(pool(finished, 1))
    states = []
    for start in (finished / "round-00" / "checkpoint", inputs / "model"):
        args = LIREConfig(output_dir=str(finished), use_cpu=True, report_to="none", temperature=5.0, seed=4,
                          learning_rate=0.01, num_train_epochs=2, per_device_train_batch_size=1, save_strategy="no",
                          disable_tqdm=True)  # fmt: skip
        trainer = LIRETrainer(str(start), args=args, train_dataset=rows)
        trainer.train()
        states.append(trainer.model.state_dict())
    assert all(torch.equal(weights[2][name], states[0][name]) for name in weights[2])
    assert not all(torch.equal(weights[2][name], states[1][name]) for name in weights[2])


def test_the_manifest_says_what_a_round_gave(finished):
    first, manifest = (json.loads((finished / f"round-0{i}" / "manifest.json").read_text()) for i in (0, 1))
    fresh = [score for row in pool(finished, 1) for score in row["scores"][-K:]]
    assert manifest["round"] == 1 and manifest["started_from"] == "round-00/checkpoint"
    assert manifest["samples"]["responses"] == 4 * K == len(fresh)
    assert manifest["samples"]["mean_score"] == pytest.approx(sum(fresh) / len(fresh), abs=1e-4)
    assert manifest["training"]["steps"] == 8 and "lire/effective_candidates" in manifest["training"]
    held_out, reward = manifest["held_out"], manifest["held_out"]["reward"]["mean"]
    scores = [json.loads(line)["scores"] for line in (finished / "round-01/held-out/scores/scores-00000.jsonl").open()]
    assert reward == pytest.approx(sum(map(sum, scores)) / 4) and held_out["reward"]["count"] == 2  # prompts
    before = held_out["before_the_first_round"]["mean"]
    assert first["held_out"]["before_the_first_round"]["mean"] == before
    assert held_out["gain_of_all_rounds"]["mean"] == pytest.approx(reward - before)
    assert held_out["gain_of_this_round"]["mean"] == pytest.approx(reward - first["held_out"]["reward"]["mean"])
    assert json.loads((finished / "rounds.json").read_text())["rounds"] == [first, manifest]
    titles = [part["title"] for part in read_run(finished / "round-01/checkpoint").record["left_out"]]
    assert titles[0].endswith("rows.jsonl, training rows")  # of the run's data, before those of the round


def test_finished_work_is_not_done_again(inputs, finished, monkeypatch):
    """Also with settings that change no round."""
    before = {path: path.read_bytes() for path in finished.glob("round-*/**/*") if path.is_file()}

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for name in ("load_start", "weights_of"):
        monkeypatch.setattr(enhance, name, refuse)
    train.main(arguments(inputs, finished, logging_steps=7, layout="rows", options={"batch_size": 2}))
    assert {path: path.read_bytes() for path in finished.glob("round-*/**/*") if path.is_file()} == before
    with pytest.raises(AssertionError, match="a model was loaded"):
        train.main(arguments(inputs, finished, options={"rounds": 3}))
    assert not (finished / "round-02" / "manifest.json").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 0.02}, "learning_rate was 0.01 and is 0.02"),
        ({"options": {"top_p": 0.9}}, "self_enhance.top_p was 1.0 and is 0.9"),
        ({"dataset_name": "other.jsonl"}, "self_enhance.json .*: held-out columns are others. Set"),
        ({"options": {"rounds": 1}}, "rounds=1, but .* holds more"),
        ({"options": {"scorer": "no_such_lab.kindness"}}, "no_such_lab"),
        ({"options": {"top_p": 2}}, "self_enhance: top_p=2 must be"),
        ({"self_enhance": '{"rounds": 2}'}, "self_enhance needs the key 'scorer'"),
        ({"options": {"scorrer": "x"}}, "self_enhance: unknown key 'scorrer': did you mean scorer"),
        ({"self_enhance": None}, "holds a run with self_enhance: choose another output_dir"),
    ],
    ids=str,
)
def test_what_would_mix_or_undo_finished_rounds_is_refused(inputs, finished, changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = [row | {"topic": row["topic"] + (i > 3)} for i, row in enumerate(ROWS)]  # of held-out rows
    Dataset.from_list(others).to_json("other.jsonl")
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(ValueError, match=message):
        train.main(arguments(inputs, finished, **changes))
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_old_samples_are_kept_and_iterations_lengthen_a_round(inputs, tmp_path):
    options = {"keep_old": True, "iterations": 2, "own_responses": False, "held_out_generations": 0}
    train.main(arguments(inputs, tmp_path, options=options, num_train_epochs=1, logging_steps=3))
    first, second = pool(tmp_path, 0), pool(tmp_path, 1)
    for old, new in zip(first, second, strict=True):
        assert old["sampled_in_round"] == [0] * K and new["sampled_in_round"] == [0] * K + [1] * K
        assert texts(new)[:K] == texts(old) and new["scores"][:K] == old["scores"]
    manifest = json.loads((tmp_path / "round-00" / "manifest.json").read_text())
    assert manifest["training"]["steps"] == 8 and "held_out" not in manifest
    assert len((tmp_path / "round-01/scores/scores-00000.jsonl").read_text().splitlines()) == 4


def test_lora_goes_on_with_the_same_adapter(inputs, finished_lora):
    adapters = [load_file(finished_lora / f"round-0{i}" / "checkpoint" / "adapter_model.safetensors") for i in (0, 1)]
    assert adapters[0].keys() == adapters[1].keys()
    assert not any(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    card = (finished_lora / "round-01/checkpoint/README.md").read_text()
    assert f"from the adapter `{finished_lora}/round-00/checkpoint`" in card
    args = LIREConfig(output_dir=str(finished_lora), use_cpu=True, report_to="none")
    policies = (weights_of(str(inputs / "model"), start, args, dtype="float32") for start in (finished_lora, None))
    merged, base = (policy.whole() for policy in policies)
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapters[1][f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    scale = json.loads((finished_lora / "adapter_config.json").read_text())["lora_alpha"] / 4
    change = merged.get_submodule(name).weight - base.get_submodule(name).weight
    torch.testing.assert_close(change, scale * b @ a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sync", [False, True])
def test_any_method_goes_in_rounds_and_takes_the_start_of_the_round_for_its_reference(inputs, tmp_path, sync):
    """From Python; the first loss of every round is the closed form at policy = reference.

    A reference that follows to the policy itself keeps every loss there.
    """
    args = DPOConfig(
        output_dir=str(tmp_path / "out"), self_enhance=OPTIONS, use_cpu=True, report_to="none", learning_rate=0.01,
        num_train_epochs=2, per_device_train_batch_size=1, logging_steps=1, disable_tqdm=True, sync_ref_model=sync,
        ref_model_sync_steps=1, ref_model_mixup_alpha=1.0,
    )  # fmt: skip
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    data = {"train": Dataset.from_list(ROWS[:4]), "test": Dataset.from_list(ROWS[4:])}
    DPOTrainer.run(args, data, str(inputs / "model"), peft_config=adapter)
    for index in (0, 1):
        state = json.loads((tmp_path / f"out/round-0{index}/checkpoint/trainer_state.json").read_text())
        losses = [log["loss"] for log in state["log_history"] if "loss" in log]
        assert losses[0] == pytest.approx(0.693147, abs=1e-5)
        assert all(loss == pytest.approx(0.693147, abs=1e-5) for loss in losses[1:]) == sync


def test_rows_from_python_are_read_as_a_trainer_reads_them(inputs, tmp_path):
    """Pairs in plain text, which become messages before they are sampled on."""
    pairs = [
        {"prompt": row["prompt"][0]["content"], "chosen": TEXTS[i], "rejected": TEXTS[i - 1], "topic": row["topic"]}
        for i, row in enumerate(ROWS)
    ]
    args = LIREConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1, as_chat=True, seed=3,
                      save_strategy="no", disable_tqdm=True, self_enhance=OPTIONS | {"rounds": 1})  # fmt: skip
    data = {"train": Dataset.from_list(pairs[:4]), "test": Dataset.from_list(pairs[4:])}
    LIRETrainer.run(args, data, str(inputs / "model"))
    made = pool(tmp_path, 0)
    assert [row["prompt"] for row in made] == [row["prompt"] for row in ROWS[:4]]
    assert [texts(row)[:2] for row in made] == [[TEXTS[i], TEXTS[i - 1]] for i in range(4)]


def test_a_run_goes_on_with_a_function_that_was_handed_over(inputs, tmp_path):
    """In another process the same function lies elsewhere in memory; a copy stands for it."""

    def run(scorer, rounds):
        args = LIREConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1, save_strategy="no",
                          disable_tqdm=True, self_enhance=OPTIONS | {"rounds": rounds, "scorer": scorer})  # fmt: skip
        LIRETrainer.run(args, {"train": Dataset.from_list(ROWS[:4])}, str(inputs / "model"))

    copied = types.FunctionType(vowels.__code__, globals(), "vowels")
    run([{"spec": vowels, "weight": 2}], 1)
    run([{"spec": copied, "weight": 2}], 2)
    assert len(list(tmp_path.glob("round-*/manifest.json"))) == 2
    with pytest.raises(ValueError, match=r"self_enhance.scorer was \[.*test_enhance.vowels.* and is \[.*pool"):
        run([{"spec": pool, "weight": 2}], 2)


def test_the_tokenizer_is_that_of_the_models_revision(inputs, tmp_path, revisions):
    args = LIREConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1, save_strategy="no",
                      disable_tqdm=True, model_init_kwargs={"revision": "b3"},
                      self_enhance=OPTIONS | {"rounds": 1})  # fmt: skip
    LIRETrainer.run(args, {"train": Dataset.from_list(ROWS[:4])}, str(inputs / "model"))
    assert revisions == {"b3"}


CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]


@pytest.mark.parametrize("turns", [
    [{"role": "assistant", "content": "let me see"}, {"role": "tool", "content": "4"}],
    [{"role": "assistant", "content": "", "tool_calls": CALLS}],
])  # fmt: skip
def test_own_responses_that_are_more_than_a_text_are_refused(inputs, tmp_path, turns):
    rows = [ROWS[0], ROWS[1] | {"responses": [turns, ROWS[1]["responses"][0]], "scores": [1.0, 0.0]}]
    args = LIREConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", self_enhance=OPTIONS)
    with pytest.raises(ValueError, match="training row 1 has a response of several messages.*own_responses"):
        LIRETrainer.run(args, {"train": Dataset.from_list(rows)}, str(inputs / "model"))


def die_and_train(phase, count, argv):
    """Train until so many training steps, or writes to a journal of samples or scores."""
    if phase == "training":
        transformers.Trainer.training_step = processes.die_after(transformers.Trainer.training_step, count)
    else:
        name = {"sampling": "samples", "scoring": "scores"}[phase]
        append = files.append_records
        files.append_records = processes.die_after(append, count, lambda path, _: Path(path).name.startswith(name))
    train.main(argv)


def run_and_die(argv, phase, count):
    codes, output = processes.run(die_and_train, phase, count, argv)
    assert codes == [-signal.SIGKILL], output


def tear(journal):
    """Leaves half a line behind, as a kill amid a write does."""
    with open(journal, "ab") as file:
        file.write(b'{"prompt": 3, "ind')


def test_survives_kill_9_while_training(inputs, finished_lora, tmp_path):
    argv = arguments(inputs, tmp_path, lora=True)
    run_and_die(argv, "training", 13)  # 8 steps of round 0, 5 of round 1
    assert last_checkpoint(tmp_path / "round-01" / "training").endswith("checkpoint-3")
    assert (tmp_path / "round-00" / "manifest.json").exists() and not (
        tmp_path / "round-01" / "manifest.json"
    ).exists()
    half = tmp_path / "round-01" / "training" / "checkpoint-6"
    shutil.copytree(half.with_name("checkpoint-3"), half)
    (half / "trainer_state.json").unlink()
    kept = (tmp_path / "round-00" / "manifest.json").stat().st_mtime_ns
    train.main(argv)
    assert_same(tmp_path, finished_lora, "adapter_model.safetensors")
    assert (tmp_path / "round-00" / "manifest.json").stat().st_mtime_ns == kept


def test_a_killed_round_of_save_only_model_is_trained_anew(inputs, finished, tmp_path):
    argv = arguments(inputs, tmp_path, save_only_model=True)
    run_and_die(argv, "training", 5)
    assert last_checkpoint(tmp_path / "round-00/training").endswith("checkpoint-3")
    train.main(argv)
    assert_same(tmp_path, finished)


@pytest.mark.slow
def test_survives_kill_9_in_every_phase_of_one_run(inputs, finished, tmp_path):
    argv = arguments(inputs, tmp_path)
    run_and_die(argv, "sampling", 3)  # 1 batch of held-out prompts before the first round, then 2 of 3
    assert len((tmp_path / "round-00/samples/samples-00000.jsonl").read_text().splitlines()) == 8
    tear(tmp_path / "round-00/samples/samples-00000.jsonl")
    run_and_die(argv, "scoring", 1)
    assert not (tmp_path / "round-00/rows.jsonl.gz").exists()
    tear(tmp_path / "round-00/scores/scores-00000.jsonl")
    run_and_die(argv, "training", 4)
    assert last_checkpoint(tmp_path / "round-00/training").endswith("checkpoint-3")
    run_and_die(argv, "sampling", 3)  # 1 batch of held-out prompts after the first round, then 2 of 3
    run_and_die(argv, "training", 7)
    assert last_checkpoint(tmp_path / "round-01/training").endswith("checkpoint-6")
    train.main(argv)
    assert_same(tmp_path, finished)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_sample_and_train_together(inputs, finished, tmp_path):
    command = [*torchrun(), str(ROOT / "scripts" / "train.py"), *arguments(inputs, tmp_path)]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert pool(tmp_path, 0) == pool(finished, 0)
    journals = [(tmp_path / f"round-01/samples/samples-0000{rank}.jsonl").read_text() for rank in (0, 1)]
    keys = [(r["prompt"], r["index"]) for j in journals for r in map(json.loads, j.splitlines())]
    assert sorted(keys) == [(i, j) for i in range(4) for j in range(K)]
    assert json.loads((tmp_path / "round-01" / "manifest.json").read_text())["training"]["steps"] == 4
    assert (tmp_path / "model.safetensors").exists()
