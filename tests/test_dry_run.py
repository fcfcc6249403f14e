"""`scripts/train.py --dry_run` in process, on a tiny model without weights, and the command line around it."""

import json
import re
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from transformers import AutoTokenizer

import trainers
from helpers import FAMILIES, build_tokenizer, tiny_llama
from trainers import SWEPOConfig, SWEPOTrainer
from trainers.cli.train import main
from trainers.data.budget import packed_tokens, token_lengths
from trainers.estimate import count_steps, plan_batches

ROOT = Path(__file__).resolve().parents[1]
FILES = {str(path.relative_to(ROOT)): yaml.safe_load(path.read_text()) for path in ROOT.glob("configs/**/*.yaml")}
# A method's file for UltraFeedback is a part of a recipe (see test_recipes.py).
WHOLE = sorted(n for n, content in FILES.items() if {"trainer", "model_name_or_path"} <= content.keys())
STAGES = [name for name in WHOLE if hasattr(getattr(trainers, FILES[name]["trainer"]), "planned_rows")]
RECIPES = [name for name in WHOLE if name not in STAGES]
FSDP2 = str(ROOT / "configs/accelerate/fsdp2.yaml")
ACCELERATE = sorted(name for name in FILES if name.startswith("configs/accelerate/"))

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
    report = capsys.readouterr().out
    assert "responses per prompt\n  2: 60 (100.0%)" in report
    assert "the DPO stage of one of 1 round(s)" in report and "training on 40 rows" in report
    assert float(re.search(r"^  sum +([\d.]+)", report, re.M)[1]) > 0
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="SGPO does not run under FSDP2"):
        main(["--config", str(ROOT / name), "--dry_run", *flags, "--accelerate_config", FSDP2])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_passes_without_weights(name, model, data, tmp_path, capsys):
    local = ["--model_name_or_path", model, "--dataset_name", data[FILES[name].get("data_format")]]
    if FILES[name].get("dataset_test_split") == "test":  # the file here has no other split than train
        local += ["--dataset_test_split", "train[:10]"]
    main(["--config", str(ROOT / name), "--dry_run", *local, "--output_dir", str(tmp_path)])
    report = capsys.readouterr().out
    targets = FILES[name].get("lora_target_modules") if FILES[name].get("use_peft") else []
    targets = list(LINEARS) if targets == ["all-linear"] else targets
    adapter = sum(LAYERS * FILES[name]["lora_r"] * sum(LINEARS[target]) for target in targets)
    assert f"trained: {adapter or PARAMETERS:,} (" in report
    assert ("none: the adapter is switched off" in report) == bool(adapter)
    assert float(re.search(r"^  sum +([\d.]+)", report, re.M)[1]) > 0
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ACCELERATE)
def test_every_accelerate_file(name, recipe, capsys):
    main(["--config", recipe(), "--dry_run", "--accelerate_config", str(ROOT / name)])
    report = capsys.readouterr().out
    processes = FILES[name]["num_processes"]
    shown = {"single": "one process", "ddp": "DDP", "zero2": "DeepSpeed ZeRO-2", "zero3": "DeepSpeed ZeRO-3",
             "fsdp2": "FSDP2"}  # fmt: skip
    assert f"{shown[Path(name).stem]}, {processes} GPU(s)" in report
    assert f"8 prompts x {processes} process(es) x 1 accumulated = {8 * processes} prompts per step" in report


def test_the_report(recipe, capsys):
    settings = {"bf16": True, "dtype": "bfloat16", "max_length": 45, "alpha": 0.25, "dataset_test_split": "train[:10]"}
    steps = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 1.5}
    main(["--config", recipe(**settings, **steps), "--dry_run"])
    report = capsys.readouterr().out
    for line in (
        f"{PARAMETERS:,} parameters, 2 layers, hidden size 32, vocabulary 330",
        f"trained: {PARAMETERS:,} (100.00%)",
        "SWEPO (SWEPOTrainer)",
        "alpha: 0.25",
        "120 rows in, 119 kept, 1 dropped",
        "rows dropped: 1 (fewer than 2 responses given)",
        "responses dropped: 1 (empty text)",
        "10 rows in, 9 kept, 1 dropped",
        "2 prompts x 1 process(es) x 4 accumulated = 8 prompts per step",
        "15 steps per epoch, 23 in all",
        "one process, 1 GPU(s), 16-bit precision, 0 of 2 layers recomputed",
        "The trained weights are kept in half precision",
    ):
        assert line in report, line
    counts = {int(k): int(n) for k, n in re.findall(r"([234]): (\d+) \(", report.split("responses per prompt")[1])}
    assert counts == {2: 40, 3: 40, 4: 39}


def test_token_percentiles(recipe, model, data, capsys):
    main(["--config", recipe(), "--dry_run"])
    report = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in Path(data["ultrafeedback"]).read_text().splitlines()]
    chats = [[{"role": "user", "content": row["instruction"]}] for row in rows if len(row["completions"]) > 1]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    lengths = sorted(map(len, prompts))
    # The q-th percentile of 119 values is the smallest that at least q % do not exceed.
    expected = [lengths[n - 1] for n in (60, 108, 114, 118, 119)]
    assert [int(n) for n in re.search(r"^  prompt ((?: +\d+)+)$", report, re.M)[1].split()] == expected


def test_adapter_and_quantised_base(recipe, capsys):
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"], "dtype": "bfloat16"}
    main(["--config", recipe(**lora), "--dry_run"])
    report = capsys.readouterr().out
    adapter = LAYERS * 4 * sum(map(sum, LINEARS.values()))
    assert f"trained: {adapter:,} ({adapter / (PARAMETERS + adapter):.2%}), LoRA of rank 4" in report
    assert "quantised" not in report
    main(["--config", recipe(**lora), "--dry_run", "--load_in_4bit", "true"])
    assert f"+ {LINEAR_WEIGHTS} x 0.562 B quantised" in capsys.readouterr().out


def test_model_init_kwargs_are_a_mapping_or_json(recipe, capsys):
    main(["--config", recipe(model_init_kwargs={"num_hidden_layers": 1}), "--dry_run"])
    assert "1 layers, hidden size 32" in capsys.readouterr().out
    main(["--config", recipe(), "--dry_run", "--model_init_kwargs", '{"num_hidden_layers": 3}'])
    assert "3 layers, hidden size 32" in capsys.readouterr().out


def test_hours_are_operations_over_speed(recipe, data, capsys):
    def report(*flags, **changes):
        main(["--config", recipe(**changes), "--dry_run", *flags])
        text = capsys.readouterr().out
        return text, [float(t) for t in re.findall(r"([\d.]+) hours", text)]

    slow = ("--gpu_tflops", "1e-7", "--utilisation", "0.5")
    text, (hours,) = report(*slow)
    assert "assumed: 1 GPU(s) x 1e-07 TFLOP/s x 50% utilisation" in text and "training: 3 pass(es)" in text
    assert report("--gpu_tflops", "2e-7", "--utilisation", "0.5")[1] == pytest.approx([hours / 2], rel=1e-3)
    _, (eight,) = report(*slow, "--accelerate_config", str(ROOT / "configs/accelerate/ddp.yaml"))
    assert eight == pytest.approx(hours / 8, rel=1e-3)
    text, (trained, scored, both) = report(*slow, precompute_ref_logps=True)
    assert "1 forward pass(es)" in text and trained + 3 * scored == pytest.approx(hours, rel=1e-3)
    assert both == pytest.approx(trained + scored, rel=1e-3)
    # One M-step per type and round; the reference and each of their policies score all rows.
    judged = {"dataset_name": data[None], "data_format": None}
    text, _ = report(*slow, trainer="EMDPOTrainer", num_types=2, rounds=4, num_train_epochs=1, **judged)
    assert "training: 8 pass(es)" in text and "between: 9 forward pass(es)" in text


def test_the_command_line_wins(recipe, capsys):
    main([f"--config={recipe(beta=0.5, gamma=2.0)}", "--beta=0.25", "--dry_run", "--max_train_rows", "20"])
    report = capsys.readouterr().out
    assert "beta: 0.25" in report and "gamma: 2.0" in report
    assert "20 rows in, 19 kept, 1 dropped" in report


def test_recomputing_and_sharding_need_less(recipe, capsys):
    def needs(*flags):
        main(["--config", recipe(per_device_train_batch_size=64, dtype="float32"), "--dry_run", *flags])
        report = capsys.readouterr().out
        return float(re.search(r"activations +\(?([\d.]+)", report)[1]), report

    whole, _ = needs("--model_init_kwargs", '{"num_hidden_layers": 40}')
    recomputed, report = needs("--model_init_kwargs", '{"num_hidden_layers": 40}', "--gradient_checkpointing", "true")
    assert recomputed < whole / 5
    assert "40 of 40 layers recomputed" in report


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"learnign_rate": 1.0}, [], "learnign_rate"),
        ({}, ["--learnign_rate", "1"], "learnign_rate"),
        ({}, ["--learning", "1"], "--learning"),
        ({"trainer": "SWEEPTrainer"}, [], "SWEEPTrainer.*one of: .*SWEPOTrainer"),
        ({}, ["--trainer", "no_lab.dro.DROTrainer"], "no_lab"),
        ({}, ["--trainer", "trainers.SWEPOConfig"], "not a PreferenceTrainer"),
        ({"model_name_or_path": None}, [], "model_name_or_path is missing"),
        ({"dataset_name": None}, [], "dataset_name is missing"),
        ({"pad_token": "<none>"}, [], "pad_token='<none>' is not in the vocabulary"),
        ({"layout": "columns"}, [], "layout='columns' is unknown"),
        ({"layout": "shared", "attn_implementation": "eager"}, [], "attn_implementation is 'eager'"),
        ({"data_format": "ultra"}, [], "unknown data_format 'ultra'"),
        ({"invalid_rows": "error"}, [], "row 5"),
        ({}, ["--accelerate_config", "no/file.yaml"], "no/file.yaml"),
        ({"trainer": "EMDPOTrainer"}, ["--accelerate_config", FSDP2], "EM-DPO does not run under FSDP2"),
    ],
)
def test_mistakes_are_named(changes, flags, message, recipe):
    with pytest.raises(ValueError, match=message):
        main(["--config", recipe(**changes), "--dry_run", *flags])


def test_a_later_file_wins_over_an_earlier_one_and_a_flag_over_both(recipe, tmp_path, capsys):
    for name, text in {"one": "beta: 0.5\ngamma: 2.0\n", "two": "beta: 0.25\nalpha: 3.0\n"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    files = [recipe(), str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")]
    for argv in (["--config", *files], [part for file in files for part in ("--config", file)]):
        main([*argv, "--dry_run", "--alpha", "4.0"])
        report = capsys.readouterr().out
        assert all(line in report for line in ("beta: 0.25", "gamma: 2.0", "alpha: 4.0"))
    (tmp_path / "two.yaml").write_text("- beta\n")
    with pytest.raises(ValueError, match="two.yaml is not a YAML mapping"):
        main(["--config", *files, "--dry_run"])


def test_a_dry_run_stops_where_the_method_cannot_use_the_rows(recipe, data):
    with pytest.raises(ValueError, match="train_dataset has no column 'annotator'"):
        main(["--config", recipe(trainer="EMDPOTrainer"), "--dry_run"])
    judged = {"trainer": "EMDPOTrainer", "dataset_name": data[None], "data_format": None}
    with pytest.raises(ValueError, match="num_types=7 is more than the 6 annotators of train_dataset"):
        main(["--config", recipe(**judged, num_types=7), "--dry_run"])


def test_a_dry_run_without_the_model_names_it(recipe):
    with pytest.raises(ValueError, match="(?s)model_name_or_path='lab/absent': .* needs config and tokenizer"):
        main(["--config", recipe(model_name_or_path="lab/absent"), "--dry_run"])


@pytest.mark.parametrize("argv", [["--config", "no/recipe.yaml"], ["--config=no/recipe.yaml"], ["--config"]])
def test_a_missing_config_file_is_named(argv):
    with pytest.raises(ValueError, match="--config .*does not exist"):
        main(argv)


def test_a_trainer_by_import_path_brings_its_own_fields(recipe, tmp_path, monkeypatch, capsys):
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
    main(["--config", recipe(trainer="dro_for_dry_run.DROTrainer", tau=0.5), "--dry_run"])
    report = capsys.readouterr().out
    assert "DRO (DROTrainer)" in report and "tau: 0.5" in report
    assert re.search(r"reference +0\.00  none", report)


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
    batches = plan_batches(token_lengths(trainer.train_dataset), args, 1)
    assert batches.per_process == len(loader)
    assert count_steps(args, batches.per_process) == (per_epoch, max_steps)


def test_large_batches():
    lengths = [(2, [n, 1]) for n in range(1, 201)]
    args = SWEPOConfig(output_dir="unused", use_cpu=True, per_device_train_batch_size=3)
    assert plan_batches(lengths, args, 8) == (9, [197] * 3, [199] * 3)
    args.max_tokens_per_batch = 500
    batches = plan_batches(lengths, args, 8)
    tokens = [sum(packed_tokens(lengths[i]) for i in rows) for rows in (batches.large, batches.largest)]
    assert 400 < tokens[0] <= tokens[1] <= 500


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"attn_implementation": "eager"}, "keeps attention scores"),
        ({"attn_implementation": "flash_attention_3"}, "cannot share prompts"),
        ({"precompute_ref_logps": True}, "The reference is in memory before training only"),
        ({"dtype": "bfloat16"}, "small steps are rounded away"),
    ],
)
def test_notes(settings, note, recipe, capsys):
    main(["--config", recipe(), "--dry_run"])
    assert "notes" not in capsys.readouterr().out
    main(["--config", recipe(**settings), "--dry_run"])
    assert note in capsys.readouterr().out


def test_gradients_that_fsdp_accumulates(recipe, capsys):
    flags = ["--dry_run", "--accelerate_config", str(ROOT / "configs/accelerate/fsdp2.yaml")]
    main(["--config", recipe(gradient_accumulation_steps=2), *flags])
    assert "FSDP adds up whole gradients" in capsys.readouterr().out
    synced = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    main(["--config", recipe(gradient_accumulation_steps=2, accelerator_config=synced), *flags])
    assert "FSDP adds up whole gradients" not in capsys.readouterr().out
