"""`scripts/train.py --dry_run` in process, on a tiny model without weights, and the command line around it."""

import json
import re
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from transformers import AutoTokenizer

from helpers import FAMILIES, build_tokenizer, tiny_llama
from trainers import SWEPOConfig, SWEPOTrainer
from trainers.cli.dry_run import plan_batches
from trainers.cli.train import main
from trainers.data.budget import packed_tokens, token_lengths

ROOT = Path(__file__).resolve().parents[1]
FILES = {str(path.relative_to(ROOT)): yaml.safe_load(path.read_text()) for path in ROOT.glob("configs/**/*.yaml")}
# A method's file for UltraFeedback is a part of a recipe (see test_recipes.py).
WHOLE = sorted(n for n, content in FILES.items() if {"trainer", "model_name_or_path"} <= content.keys())
STAGES = [name for name in WHOLE if FILES[name]["trainer"] == "SGPOTrainer"]
RECIPES = [name for name in WHOLE if name not in STAGES]
ENGINES = {"single": "one process", "ddp": "DDP", "zero2": "DeepSpeed ZeRO-2", "zero3": "DeepSpeed ZeRO-3",
           "fsdp2": "FSDP2"}  # fmt: skip

# Of `tiny_llama(330)`: input and output width of the linear layers of a layer.
LAYERS = 2
LINEARS = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32), "gate_proj": (32, 64),
           "up_proj": (32, 64), "down_proj": (64, 32)}  # fmt: skip
LINEAR_WEIGHTS = LAYERS * sum(a * b for a, b in LINEARS.values())
PARAMETERS = LINEAR_WEIGHTS + 2 * 330 * 32 + LAYERS * 2 * 32 + 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a config and a tokenizer that knows the pad token of every recipe, and no weights."""
    folder = tmp_path_factory.mktemp("model")
    template, bos, eos, special = FAMILIES["llama3"]
    pads = {content["pad_token"] for content in FILES.values() if content.get("pad_token")}
    build_tokenizer(template, bos=bos, eos=eos, special=sorted({*special, *pads})).save_pretrained(folder)
    tiny_llama(330, dtype="bfloat16").config.save_pretrained(folder)
    return str(folder)


def completion(text, score):
    ratings = {name: {"Rating": str(1 + score // 3)} for name in ("helpfulness", "honesty")}
    return {"response": text, "overall_score": float(score), "annotations": ratings, "model": "m"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 120 rows for each `data_format`, of which one row has too few responses and one response is empty."""
    folder, words = tmp_path_factory.mktemp("data"), "the quick brown fox jumps over the lazy dog".split()
    texts = [[" ".join(words[: 1 + (i + k) % 9]) for k in range(2 + i % 3)] for i in range(120)]
    texts[5], texts[7] = ["the"], [*texts[7], ""]
    rows = [
        {"instruction": " ".join(words[: 1 + i % 7]), "source": "own",
         "completions": [completion(text, 1 + (i * 7 + k * 3) % 10) for k, text in enumerate(responses)]}
        for i, responses in enumerate(texts)
    ]  # fmt: skip
    plain = [
        {"prompt": row["instruction"], "responses": responses, "scores": [float(k) for k in range(len(responses))],
         "annotator": f"a{i % 6}"}
        for i, (row, responses) in enumerate(zip(rows, texts, strict=True))
    ]  # fmt: skip
    files = {"ultrafeedback": rows, "ultrafeedback_fine_grained": rows, None: plain}
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    return {name: str(folder / f"{name}.jsonl") for name in files}


@pytest.fixture
def recipe(tmp_path, model, data):
    """Writes a recipe with the given keys changed (None: left out) and gives its path."""

    def write(**changes):
        content = {
            "trainer": "SWEPOTrainer",
            "model_name_or_path": model,
            "dataset_name": data["ultrafeedback"],
            "data_format": "ultrafeedback",
            "max_length": 64,
            "output_dir": str(tmp_path / "out"),
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in content.items() if value is not None}))
        return str(path)

    return write


@pytest.fixture
def report(recipe, capsys):
    """The report of a dry run of a recipe with the given keys changed."""

    def run(*flags, **changes):
        main(["--config", recipe(**changes), "--dry_run", *flags])
        return capsys.readouterr().out

    return run


def accelerate(name):
    return ["--accelerate_config", str(ROOT / f"configs/accelerate/{name}.yaml")]


@pytest.mark.parametrize("name", STAGES)
def test_of_several_stages_the_last_training_is_described(name, model, tmp_path, capsys):
    rows = [{"prompt": f"say {i}", "responses": ["the fox " * k for k in (1, 2)], "scores": [0.0, 1.0]}
            for i in range(120)]  # fmt: skip
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    local = {
        "model_name_or_path": model, "dataset_name": tmp_path / "rows.jsonl", "sft_target_source": "best",
        "preference_dataset": tmp_path / "rows.jsonl", "dataset_train_split": "train[:40]",
        "preference_split": "train[40:100]", "dataset_test_split": "train[100:]", "output_dir": tmp_path / "out",
    }  # fmt: skip
    flags = [str(part) for key, value in local.items() for part in (f"--{key}", value)]
    main(["--config", str(ROOT / name), "--dry_run", *flags])
    text = capsys.readouterr().out
    assert "responses per prompt: 2: 60" in text
    assert "the DPO stage of one of 1 round(s)" in text and "training on 40 rows" in text
    assert float(re.search(r"^  sum +([\d.]+)", text, re.M)[1]) > 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_passes_without_weights(name, model, data, tmp_path, capsys):
    local = ["--model_name_or_path", model, "--dataset_name", data[FILES[name].get("data_format")]]
    if FILES[name].get("dataset_test_split") == "test":  # the file here has no other split than train
        local += ["--dataset_test_split", "train[:10]"]
    main(["--config", str(ROOT / name), "--dry_run", *local, "--output_dir", str(tmp_path)])
    text = capsys.readouterr().out
    targets = FILES[name].get("lora_target_modules") if FILES[name].get("use_peft") else []
    targets = list(LINEARS) if targets == ["all-linear"] else targets
    adapter = sum(LAYERS * FILES[name]["lora_r"] * sum(LINEARS[target]) for target in targets)
    assert f"trained: {adapter or PARAMETERS:,} (" in text
    assert float(re.search(r"^  sum +([\d.]+)", text, re.M)[1]) > 0
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ENGINES)
def test_every_accelerate_file(name, report):
    text = report(*accelerate(name))
    processes = FILES[f"configs/accelerate/{name}.yaml"]["num_processes"]
    assert f"{ENGINES[name]}, {processes} GPU(s)" in text
    assert f"8 prompts x {processes} process(es) x 1 accumulated = {8 * processes} prompts per step" in text


def test_the_report(report, data):
    settings = {"bf16": True, "dtype": "bfloat16", "max_length": 45, "alpha": 0.25, "dataset_test_split": "train[:10]"}
    steps = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 1.5}
    text = report(**settings, **steps)
    for line in (
        f"{PARAMETERS:,} parameters, 2 layers, hidden size 32, vocabulary 330",
        f"trained: {PARAMETERS:,} (100.00%)",
        "SWEPO (SWEPOTrainer)",
        "alpha: 0.25",
        "120 rows in, 119 kept, 1 dropped",
        "rows dropped: 1 (fewer than 2 responses given)",
        "responses dropped: 1 (empty text)",
        "10 rows in, 9 kept, 1 dropped",
        "scored 1: 'the<|eot_id|>'",
        "responses per prompt: 2: 40, 3: 40, 4: 39",
        "2 prompts x 1 process(es) x 4 accumulated = 8 prompts per step",
        "15 steps per epoch, 23 in all",
        "one process, 1 GPU(s), 16-bit precision",
        "The trained weights are kept in half precision",
    ):
        assert line in text, line


def test_of_several_data_sets_each_says_what_it_drops(report, data):
    mixed = {"dataset_name": [data["ultrafeedback"], data[None]], "data_format": ["ultrafeedback", "rows"]}
    text = report(as_chat=True, **mixed)
    for path in mixed["dataset_name"]:
        assert f"train, {path}: 120 rows in, 119 kept, 1 dropped" in text


def test_token_percentiles(report, model, data):
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in Path(data["ultrafeedback"]).read_text().splitlines()]
    chats = [[{"role": "user", "content": row["instruction"]}] for row in rows if len(row["completions"]) > 1]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    lengths = sorted(map(len, prompts))
    # The q-th percentile of 119 values is the smallest that at least q % do not exceed.
    expected = [lengths[n - 1] for n in (60, 108, 114, 118, 119)]
    assert [int(n) for n in re.search(r"^  prompt ((?: +\d+)+)$", report(), re.M)[1].split()] == expected


def test_an_adapter_on_a_quantised_base(report):
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"], "dtype": "bfloat16"}
    adapter = LAYERS * 4 * sum(map(sum, LINEARS.values()))
    text = report(**lora)
    assert f"trained: {adapter:,} ({adapter / (PARAMETERS + adapter):.2%}), LoRA of rank 4" in text
    weights = [float(re.search(r"weights +([\d.]+) MiB", t)[1]) for t in (text, report("--load_in_4bit", **lora))]
    assert weights[0] - weights[1] == pytest.approx(LINEAR_WEIGHTS * (2 - 4.5 / 8) / 2**20, abs=0.011)


def test_a_plan_for_gpus_takes_their_dtype(report):
    text = report("--dtype", "fast", *accelerate("single"))
    assert "dtype: bfloat16, because the GPUs of" in text and "half precision" in text


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"learnign_rate": 1.0}, [], "learnign_rate"),
        ({}, ["--learnign_rate", "1"], "learnign_rate"),
        ({"gpu_tflops": 312}, [], "gpu_tflops is no option any more: .*--probe"),
        ({}, ["--utilisation", "0.3"], "utilisation is no option any more: .*--probe"),
        ({"trainer": "SWEEPTrainer"}, [], "SWEEPTrainer.*one of: .*SWEPOTrainer"),
        ({}, ["--trainer", "trainers.SWEPOConfig"], "not a PreferenceTrainer"),
        ({"model_name_or_path": None}, [], "model_name_or_path is missing"),
        ({"dataset_name": None}, [], "dataset_name is missing"),
        ({"pad_token": "<none>"}, [], "pad_token='<none>' is not in the vocabulary"),
        ({"layout": "shared", "attn_implementation": "eager"}, [], "attn_implementation is 'eager'"),
        ({"data_format": "ultra"}, [], "unknown data_format 'ultra'"),
        ({"invalid_rows": "error"}, [], "row 5"),
        ({}, ["--accelerate_config", "no/file.yaml"], "no/file.yaml"),
        ({"trainer": "EMDPOTrainer"}, accelerate("fsdp2"), "EM-DPO does not run under FSDP2"),
        ({"trainer": "EMDPOTrainer"}, [], "train_dataset has no column 'annotator'"),
    ],
)
def test_mistakes_are_named(changes, flags, message, report):
    with pytest.raises(ValueError, match=message):
        report(*flags, **changes)


def test_a_later_file_wins_over_an_earlier_one_and_a_flag_over_all(recipe, tmp_path, capsys):
    for name, text in {"one": "beta: 0.5\ngamma: 2.0\n", "two": "beta: 0.25\nalpha: 3.0\n"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    files = [recipe(), str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")]
    for argv in (["--config", *files], [f"--config={file}" for file in files]):
        main([*argv, "--dry_run", "--alpha=4.0", "--max_train_rows", "20"])
        text = capsys.readouterr().out
        assert all(line in text for line in ("beta: 0.25", "gamma: 2.0", "alpha: 4.0", "20 rows in, 19 kept"))
    for bad in ("- beta\n", None):
        (tmp_path / "two.yaml").unlink() if bad is None else (tmp_path / "two.yaml").write_text(bad)
        with pytest.raises(ValueError, match="two.yaml (is not a YAML mapping|does not exist)"):
            main(["--config", *files, "--dry_run"])


def test_a_trainer_by_import_path_brings_its_own_fields(report, tmp_path, monkeypatch):
    (tmp_path / "dro_for_dry_run.py").write_text(
        "from dataclasses import dataclass, field\n"
        "from trainers import PreferenceConfig, PreferenceTrainer\n"
        "@dataclass\n"
        "class DROConfig(PreferenceConfig):\n"
        "    tau: float = field(default=1.0, metadata={'help': 'Temperature.'})\n"
        "class DROTrainer(PreferenceTrainer):\n"
        "    config_class, method, needs_reference = DROConfig, 'DRO', False\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    text = report(trainer="dro_for_dry_run.DROTrainer", tau=0.5)
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


def test_gradients_that_fsdp_accumulates(report):
    told = "FSDP adds up whole gradients"
    assert told in report(*accelerate("fsdp2"), gradient_accumulation_steps=2)
    synced = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    assert told not in report(*accelerate("fsdp2"), gradient_accumulation_steps=2, accelerator_config=synced)
