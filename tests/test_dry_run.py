"""`scripts/train.py --dry_run` in process, on a tiny model without weights."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from transformers import AutoTokenizer

from helpers import FAMILIES, build_tokenizer, flags, tiny_llama
from trainers import PreferenceConfig, PreferenceTrainer, SWEPOConfig, SWEPOTrainer
from trainers.cli.dry_run import part_of, plan_batches
from trainers.cli.train import main
from trainers.data.budget import packed_tokens, token_lengths

ROOT = Path(__file__).resolve().parents[1]
FILES = {str(path.relative_to(ROOT)): yaml.safe_load(path.read_text()) for path in ROOT.glob("configs/**/*.yaml")}
# A method's file for UltraFeedback is a part of a recipe (see test_recipes.py).
RECIPES = sorted(n for n, content in FILES.items() if {"trainer", "model_name_or_path"} <= content.keys())
STAGES = [name for name in RECIPES if FILES[name]["trainer"] == "SGPOTrainer"]
ENGINES = {"single": "one process", "ddp": "DDP", "zero2": "DeepSpeed ZeRO-2", "zero3": "DeepSpeed ZeRO-3",
           "fsdp2": "FSDP2"}  # fmt: skip

# Of `tiny_llama(330)`: input and output width of the linear layers of a layer.
LAYERS = 2
LINEARS = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32), "gate_proj": (32, 64),
           "up_proj": (32, 64), "down_proj": (64, 32)}  # fmt: skip
LINEAR_WEIGHTS = LAYERS * sum(a * b for a, b in LINEARS.values())
PARAMETERS = LINEAR_WEIGHTS + 2 * 330 * 32 + LAYERS * 2 * 32 + 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model` with a config and a tokenizer that knows the pad token of every recipe, and no weights; and 120 rows.

    One row has too few responses, and one has an empty response.
    """
    folder, words = tmp_path_factory.mktemp("start"), "the quick brown fox jumps over the lazy dog".split()
    template, bos, eos, special = FAMILIES["llama3"]
    pads = {content["pad_token"] for content in FILES.values() if content.get("pad_token")}
    build_tokenizer(template, bos=bos, eos=eos, special=sorted({*special, *pads})).save_pretrained(folder / "model")
    tiny_llama(330, dtype="bfloat16").config.save_pretrained(folder / "model")
    texts = [[" ".join(words[: 1 + (i + k) % 9]) for k in range(2 + i % 3)] for i in range(120)]
    texts[5], texts[7] = ["the"], [*texts[7], ""]
    rows = [
        {"prompt": " ".join([*words[: 1 + i % 7], str(i)]), "responses": responses, "annotator": f"a{i % 6}",
         "scores": [float(k) for k in range(len(responses))]}
        for i, responses in enumerate(texts)
    ]  # fmt: skip
    for name in ("rows", "more"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def report(folder, tmp_path, capsys):
    """The report of a dry run with these flags, on top of a file, in a folder where nothing must be left."""

    def run(*argv, **options):
        local = {"model_name_or_path": folder / "model", "dataset_name": folder / "rows.jsonl", "output_dir": tmp_path}
        main([*argv, "--dry_run", *flags(**local | options)])
        assert not any(tmp_path.iterdir())
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_passes_without_weights(name, folder, report):
    local = {}
    if FILES[name].get("dataset_test_split") == "test":  # the file here has no other split than train
        local["dataset_test_split"] = "train[:10]"
    if name in STAGES:
        local |= {"sft_target_source": "best", "preference_dataset": folder / "more.jsonl",
                  "dataset_train_split": "train[:40]", "preference_split": "train[40:100]"}  # fmt: skip
        local["dataset_test_split"] = "train[100:]"
    text = report("--config", str(ROOT / name), **local)
    targets = FILES[name].get("lora_target_modules") if FILES[name].get("use_peft") else []
    targets = list(LINEARS) if targets == ["all-linear"] else targets
    adapter = sum(LAYERS * FILES[name]["lora_r"] * sum(LINEARS[target]) for target in targets)
    assert f"trained: {adapter or PARAMETERS:,} (" in text
    assert float(re.search(r"^  sum +([\d.]+)", text, re.M)[1]) > 0
    assert ("the DPO stage of one of" in text and "training on 39 rows" in text) == (name in STAGES)


@pytest.mark.parametrize("name", ENGINES)
def test_every_accelerate_file(name, report):
    text, processes = report(accelerate_config=name), FILES[f"configs/accelerate/{name}.yaml"]["num_processes"]
    assert f"{ENGINES[name]}, {processes} GPU(s)" in text
    assert f"8 prompts x {processes} process(es) x 1 accumulated = {8 * processes} prompts per step" in text


def test_the_report(folder, report):
    settings = {"bf16": True, "dtype": "bfloat16", "max_length": 45, "alpha": 0.25, "dataset_test_split": "train[:10]"}
    steps = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 1.5}
    text = report(as_chat=True, **settings, **steps)
    for line in (
        f"{PARAMETERS:,} parameters, 2 layers, hidden size 32, vocabulary 330",
        "alpha: 0.25",
        "120 rows in, 119 kept, 1 dropped",
        "responses dropped: 1 (empty text)",
        "10 rows in, 9 kept, 1 dropped",
        "scored 0: 'the<|eot_id|>'",
        "responses per prompt: 2: 40, 3: 40, 4: 39",
        "2 prompts x 1 process(es) x 4 accumulated = 8 prompts per step",
        "15 steps per epoch, 23 in all",
        "The trained weights are kept in half precision",
    ):
        assert line in text, line
    paths = [folder / f"{name}.jsonl" for name in ("rows", "more")]
    text = report(dataset_name=paths)
    assert all(f"train, {path}: 120 rows in, 119 kept, 1 dropped" in text for path in paths)
    text = report(dataset_name=paths, dataset_max_rows=[30, 70])
    assert f"train, mixture: 100 rows\n    30 rows (30.0%) from the 119 of {paths[0]}\n    70 rows (70.0%)" in text


def test_what_rounds_will_ask_of_servers(report):
    common = {"rounds": 2, "num_generations": 3, "held_out_generations": 4, "max_new_tokens": 50}
    judge = {"judge": "http://localhost:9", "model": "strict", "request": {"max_tokens": 7}, "prices": [0, 1000]}
    served = {"reward_server": "http://localhost:9/v1", "model": "rm", "weight": 2}
    text = report(
        dataset_test_split="train[:10]", self_enhance=json.dumps({**common, "scorer": [judge, served, "os.getcwd"]})
    )
    calls = 2 * 40 + 3 * 40 + 4 * 39 + 2 * 3 * 119 + (2 + 1) * 4 * 9  # own responses, samples, held-out samples
    assert f"strict at http://localhost:9: {calls:,} calls and one more for" in text
    assert f"answers of at most {7 * calls:,}, for {7 * calls / 1000:.2f}" in text
    assert f"rm at http://localhost:9/v1: {-(-calls // 8)} calls, about" in text
    assert "scorers on servers" not in report(self_enhance=json.dumps({**common, "scorer": "os.getcwd"}))


def test_token_percentiles(folder, report):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows if len(row["responses"]) > 1]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    lengths = sorted(map(len, prompts))
    # The q-th percentile of 119 values is the smallest that at least q % do not exceed.
    expected = [lengths[n - 1] for n in (60, 108, 114, 118, 119)]
    text = report(as_chat=True)
    assert [int(n) for n in re.search(r"^  prompt ((?: +\d+)+)$", text, re.M)[1].split()] == expected


def test_an_adapter_on_a_quantised_base(report):
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "dtype": "bfloat16"}
    adapter = LAYERS * 4 * sum(map(sum, LINEARS.values()))
    text = report(**lora)
    assert f"trained: {adapter:,} ({adapter / (PARAMETERS + adapter):.2%}), LoRA of rank 4" in text
    weights = [float(re.search(r"weights +([\d.]+) MiB", t)[1]) for t in (text, report(**lora, load_in_4bit=True))]
    assert weights[0] - weights[1] == pytest.approx(LINEAR_WEIGHTS * (2 - 4.5 / 8) / 2**20, abs=0.011)


def test_a_plan_for_gpus_takes_their_dtype(report):
    text = report(dtype="fast", accelerate_config="single")
    assert "dtype: bfloat16, because the GPUs of" in text and "half precision" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_token": "<none>"}, "pad_token='<none>' is not in the vocabulary"),
        ({"layout": "shared", "attn_implementation": "eager"}, "attn_implementation is 'eager'"),
        ({"data_format": "ultra"}, "unknown data_format 'ultra'"),
        ({"invalid_rows": "error"}, "row 5"),
        ({"trainer": "trainers.SWEPOConfig"}, "not a PreferenceTrainer"),
    ],
)
def test_what_would_stop_the_run_stops_here(changes, message, report):
    with pytest.raises(ValueError, match=message):
        report(**changes)


@dataclass
class DROConfig(PreferenceConfig):
    tau: float = 1.0


class DROTrainer(PreferenceTrainer):
    config_class, method, needs_reference = DROConfig, "DRO", False


def test_a_trainer_by_import_path_brings_its_own_fields(report):
    text = report(trainer="test_dry_run.DROTrainer", tau=0.5)
    assert "DRO (DROTrainer)" in text and "tau: 0.5" in text and re.search(r"reference +0\.00", text)


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_train_epochs": 1.5},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "dataloader_drop_last": True},
        {"max_tokens_per_batch": 60, "gradient_accumulation_steps": 2, "num_train_epochs": 2},
        {"per_device_train_batch_size": 4, "max_steps": 7},
    ],
)
def test_steps_are_those_of_the_trainer(settings, tmp_path):
    rows = [
        {"prompt_ids": [5] * (1 + i % 4), "response_ids": [[6] * (2 + i % 5)] * k, "scores": [1.0, 0.0, 2.0][:k]}
        for i, k in enumerate([2, 3] * 15)
    ]
    args = SWEPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)
    trainer = SWEPOTrainer(
        tiny_llama(50), args=args, train_dataset=Dataset.from_list(rows), processing_class=build_tokenizer()
    )
    loader = trainer.get_train_dataloader()
    _, per_epoch, *_, max_steps = trainer.set_initial_training_values(args, loader)
    assert plan_batches(token_lengths(trainer.train_dataset), args, 1)[2:] == (len(loader), per_epoch, max_steps)


def test_large_batches():
    lengths = [(2, [n, 1]) for n in range(1, 201)]
    args = SWEPOConfig(output_dir="unused", use_cpu=True, per_device_train_batch_size=3)
    batches = plan_batches(lengths, args, 8)
    assert (batches.per_process, batches.at(0.99), batches.at(1)) == (9, [197] * 3, [199] * 3)
    args.max_tokens_per_batch = 500
    batches = plan_batches(lengths, args, 8)
    tokens = [sum(packed_tokens(lengths[i]) for i in batches.at(place)) for place in (0.99, 1)]
    assert 400 < tokens[0] <= tokens[1] <= 500


def test_what_goes_backward_at_once():
    rows = [(10, [4, 4, 4]), (20, [5, 1])]
    assert part_of(rows, None) == part_of(rows, 48) == rows
    assert part_of(rows, 47) == [(10, [4, 4]), (20, [5, 1])]
    assert part_of(rows, 40) == [(10, [4]), (20, [5])]
    assert part_of(rows, 1) == [(10, [4]), (20, [5])]


def test_gradients_that_fsdp_accumulates(report):
    told, given = "FSDP adds up whole gradients", {"gradient_accumulation_steps": 2, "accelerate_config": "fsdp2"}
    assert told in report(**given)
    synced = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    assert told not in report(**given, accelerator_config=json.dumps(synced))
