"""The program `polypo`: usages without imports, recipes and flags, what it hands to accelerate, and the wheel."""

import contextlib
import dataclasses
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import psutil
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from peft import get_peft_model

import moved
import polypo
import trainers
from helpers import flags, save_start, tiny_llama
from polypo import recipes, usage
from test_trainer import rows
from trainers import SWEPOConfig, SWEPOTrainer
from trainers.cli import train
from trainers.cli.arguments import DataArguments, ModelArguments

ROOT = Path(__file__).resolve().parents[1]
TRAINERS = [name for name in trainers.__all__ if name.endswith("Trainer") and name != "PreferenceTrainer"]
LIBRARIES = ("torch", "transformers", "trl", "deepspeed", "datasets", "numpy")


# Usages.


def test_usages_import_none_of_the_libraries_that_take_seconds():
    code = (
        "import sys, polypo\nfor line in ('--help', '--version', 'train --help --config lire/demo.yaml'):\n"
        "    polypo.main(line.split())\n"
        f"assert not {set(LIBRARIES)} & sys.modules.keys(), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in (*polypo.COMMANDS, f"\npolypo {version('polypo')}\n"))
    assert "LIRETrainer" in done.stdout and "--sft_alpha" in done.stdout and "--config_name" not in done.stdout


def test_a_usage_may_be_cut_by_its_reader():
    command = [sys.executable, "-m", "polypo", "train", "--help", "all"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as program:
        program.stdout.close()
        assert program.stderr.read() == b""
    assert program.returncode == 0


@pytest.mark.parametrize("name", TRAINERS)
def test_a_usage_has_the_options_of_the_classes(name):
    shown = usage.train(["--help", "all", "--trainer", name])
    cls = getattr(trainers, name).config_class
    fields = [field for c in (cls, DataArguments, ModelArguments) for field in dataclasses.fields(c) if field.init]
    assert {*re.findall(r"^  --(\w+)", shown, flags=re.M)} == {field.name for field in fields} | usage.LAUNCH.keys()
    read = usage.config_of(name)
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING and isinstance(field.default, float | bool | None):
            assert read[field.name].default == str(field.default)
        if isinstance(text := field.metadata.get("help"), str):
            assert read[field.name].help == text
    short = usage.train(["--help", "--trainer", name])
    assert all(f"--{name} " in short for name in (*usage.MODEL, *usage.TRAINING)) and "--help all" in short


def test_a_default_is_shown_as_a_flag_takes_it_and_never_as_code():
    shown = {name: " ".join(usage.command(name).split()) for name in ("aggregate", "compare", "masks")}
    assert "vllm serve. --seed" in shown["aggregate"] and "dpo=runs/dpo. --distill" in shown["aggregate"]
    assert "with each. [1 2 3]" in shown["compare"] and "from 0. [0 1 2]" in shown["masks"]
    train = " ".join(usage.train([]).split())
    assert "slices included. [train]" in train and "[]" not in train


def test_a_usage_of_a_method_in_the_folder_where_one_is(tmp_path):
    (tmp_path / "my_lab").mkdir()
    code = (ROOT / "README.md").read_text().partition("`my_lab/hinge.py`:\n\n```python\n")[2].partition("```")[0]
    (tmp_path / "my_lab/hinge.py").write_text(code)
    # As the installed program, before whose modules the folder is not.
    run = [sys.executable, "-P", "-c", "import polypo; polypo.main()", "train", "--help"]
    done = subprocess.run([*run, "--trainer", "my_lab.hinge.HingeTrainer"], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert "--margin float" in done.stdout and "Wanted lead of the best response" in done.stdout, done.stderr


def test_commands_are_modules_and_forwards_lead_to_some():
    for name in polypo.COMMANDS:
        assert callable(importlib.import_module(f"trainers.cli.{name}").main)
    shown = {"generate": "--num_generations", "compare": "--methods", "masks": "polypo masks --checkpoint",
             "types": "--held_out", "prepare": "--streaming", "inspect": "--max_rows", "aggregate": "--run_dir",
             "report": "runs/", "sweep": "--draws"}  # fmt: skip
    for name, flag in shown.items():
        assert flag in usage.command(name)
    required, _, optional = usage.command("generate").partition("\noptions:")
    assert "\nrequired:" in required and "--scorer " in required and "--seed " in optional
    for name, module in moved.MODULES.items():
        assert (ROOT / f"scripts/{name}.py").is_file() and importlib.util.find_spec(module)


# Mistakes.

MISTAKES = {  # command line -> what is said of it; {model} is there
    "trian": "no command 'trian': did you mean train",
    "train --help --trainer SWEPOTrainr": "no class SWEPOTrainr: did you mean SWEPOTrainer",
    "train --config swepo/dmo.yaml": "dmo.yaml does not exist: did you mean swepo/demo.yaml",
    "train --model_name_or_path no/such --dataset_name x": "no/such is no folder, and no model of the hub",
    "train --model_name_or_path . --dataset_name x": "has neither config.json nor",
    "train --model_name_or_path {adapters} --dataset_name x": r"adapters in folders: name \S+/dpo or \S+/sft",
    "train --dataset_name x": "model_name_or_path is missing",
    "train --accelerate_config zero3 --model_name_or_path {model} --dataset_name x": "asks for 8 GPUs .* it has 0",
    "train --config": "--config: expected at least one argument",
    "train --num_processes": "--num_processes/--num-processes: expected one argument",
    "generate --model {model}": "arguments are required: --prompts",
    "generate --modle {model}": "'modle' is not known: did you mean model",
    "generate --model {model} --prompts no.jsonl --output x.jsonl --scorer x": "no file or folder 'no.jsonl'",
    "types --beta 0": "beta=0.0 must be a finite number, above 0",
    "types --output_dir x --use_cpu true --streaming true": "streaming: annotators are held out of all rows",
    "inspect --model {model}": "dataset_name is missing",
    "inspect no.jsonl": "no file or folder 'no.jsonl'",
    "inspect no.jsonl --output page.md": "page.md: give a name that ends in .html",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_ends_the_program_with_a_line(line, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dpo", "sft"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "adapter_config.json").touch()
    monkeypatch.syspath_prepend(tmp_path)  # restores the path, to which the program adds
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match=f"^error: .*{MISTAKES[line]}"):
        polypo.main(line.format(model=start, adapters=tmp_path / "adapters").split())


def test_a_crash_keeps_its_traceback(monkeypatch):
    def _inner_training_loop():  # of transformers
        raise ValueError("late")

    for error, late in ((KeyError, None), (ValueError, _inner_training_loop)):
        with pytest.raises(error), polypo.mistakes_told():
            late() if late else {}["key"]
    monkeypatch.setenv("POLYPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no command"):
        polypo.main(["trian"])


def test_an_interrupt_ends_the_program_as_shells_expect(capsys):
    with pytest.raises(SystemExit) as ended, polypo.mistakes_told():
        raise KeyboardInterrupt
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"


# Recipes and flags.

CONFIGS = {  # content of a recipe -> what is said of it
    "a: [1": "config.yaml is no YAML",
    "- a": "is not a YAML mapping",
    "a: !!python/object/apply:os.system [touch ran]": "is no YAML of plain values",
    "beta: 1\nbeta: 2": "the key 'beta' is there twice",
    "learning_rat: 1": "'learning_rat' is not known: did you mean learning_rate",
    "loss_type: sigmoid": "'loss_type' is not known: the loss is the trainer's",
    "warmup_rat: 1": "'warmup_rat' is not known: see --help",
    "utilisation: 0.3": "utilisation is no option any more: hours .* --probe",
    "max_steps: true": "max-steps: needs a whole number, not 'true'",
    "beta: true": "beta: needs a number, not 'true'",
    "bf16: 3": "bf16: Truthy value expected: got 3",
    "seed: 1.5": "seed: needs a whole number, not '1.5'",
    "beta: 0": "beta=0.0 must be a finite number, above 0",
    "beta:": "beta=None must be a finite number",
    "max_train_rows: 0": "max_train_rows=0 must be",
    "dataset_weights: [-1]": "dataset_weights=.* give positive numbers",
    "model_name_or_path: x": "dataset_name is missing",
    "dataset_name: x": "model_name_or_path is missing",
    "model_name_or_path: runs/no/model": "is not there. A recipe of the demo takes it",
    "trainer: Nothing": "was not found .* or one of DPOTrainer, ",
    "trainer: LIRETrainr": "was not found .* did you mean LIRETrainer",
    "trainer: dpo": "is not a PreferenceTrainer: did you mean DPOTrainer",
    "trainer: swepotrainer": "was not found .* did you mean SWEPOTrainer",
    "accelerate_config: zero9": "is no file: name one, or one of ddp, ",
}


@pytest.mark.parametrize("content", CONFIGS)
def test_what_is_wrong_in_a_recipe_is_named(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(content)
    with pytest.raises(ValueError, match=CONFIGS[content]):
        train.main(["--config", "config.yaml", "--output_dir", "out", "--use_cpu", "true"])
    assert not Path("ran").exists()


def test_files_flags_and_values_of_every_kind(tmp_path, monkeypatch):
    """A text stands for what a flag would give, a whole number for any, and null for what may be left out."""
    monkeypatch.delenv("SOME_NAME", raising=False)
    (tmp_path / "a.yaml").write_text("beta: 0.5\nalpha: 0.5\ngamma: 0.5\noutput_dir: out\nuse_cpu: true\n")
    (tmp_path / "b.yaml").write_text(
        "learning_rate: 1e-4\nalpha: 1\nmax_steps: '3'\nbf16: 'false'\nmax_length: null\nsave_strategy: no\n"
        "lora_target_modules: [q_proj, v_proj]\nreport_to: [none]\nmodel_init_kwargs: {dtype: bfloat16}\n"
        "logging_steps: 0.5\nwarmup_steps: 0.1\noptim: adamw_torch\nlr_scheduler_kwargs: {}\nmodel_name_or_path: x\n"
        "dataset_name: y\ndataset_config: 1.10\ndata_format: [no]\n"
        "accelerator_config: {split_batches: false}\nenv: {SOME_NAME: a}\ndata_seed: 0x10\nfsdp: ''\n"
        "max_grad_norm: .inf\nuse_peft: on\ndisable_tqdm: off\nrun_name: 2026-01-02\nhub_model_id: 0_10\n"
    )
    files = [str(tmp_path / name) for name in ("a.yaml", "b.yaml")]
    for argv in (["--config", *files, "--gamma", "2"], ["--gamma", "2", f"--config={files[0]}", "--config", files[1]]):
        _, data, args, model = train.parse(argv)
        assert (args.beta, args.alpha, args.gamma) == (0.5, 1, 2)
        assert (args.learning_rate, args.max_steps, args.bf16, args.max_length) == (1e-4, 3, False, None)
        assert model.lora_target_modules == ["q_proj", "v_proj"] and args.save_strategy == "no"
        assert (data.dataset_name, data.dataset_config, data.data_format) == ("y", "1.10", "no")
        assert args.model_init_kwargs["dtype"] == "bfloat16" and args.data_seed == 16
        assert (args.max_grad_norm, model.use_peft, args.disable_tqdm) == (float("inf"), True, False)
        assert (args.run_name, args.hub_model_id) == ("2026-01-02", "0_10")
    assert os.environ.pop("SOME_NAME") == "a"


@pytest.mark.parametrize("asked", ["q_proj", "self_attn.q_proj", ".*[.]q_proj"])
def test_one_target_of_an_adapter_is_a_name_or_a_regular_expression(asked):
    for flags_of_it, recipe in ((["--lora_target_modules", asked], {}), ([], {"lora_target_modules": asked})):
        own = {"output_dir": "out", "use_cpu": True, "use_peft": True}
        model = train.read(flags_of_it, own | recipe)[-1]
        adapted = get_peft_model(tiny_llama(20), model.of_trainer["peft_config"])
        assert adapted.targeted_module_names == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


@pytest.mark.parametrize("name, value", [("lora_r", "8"), ("lora_target_modules", "q_proj"), ("use_dora", "true")])
def test_an_option_of_an_adapter_without_one_is_refused(name, value):
    own = {"output_dir": "out", "use_cpu": True}
    with pytest.raises(ValueError, match=f"{name} has no effect without use_peft"):
        train.read([f"--{name}", value], own)
    assert train.read(["--use_peft", "false"], own | {name: value})[-1].of_trainer["peft_config"] is None
    assert train.read(["--use_peft"], own | {name: value})[-1].of_trainer["peft_config"] is not None


# Accelerate.


def test_the_variables_of_a_recipe_count_before_processes_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "of the shell")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: tmp_path / huggingface_hub.get_token())
    Path("a.yaml").write_text("model_name_or_path: org/gated\ndataset_name: x\nenv: {HF_TOKEN: mine}\n")
    Path("mine").mkdir()
    Path("mine/config.json").write_text("{}")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="asks for 8 GPUs"):  # after the model was found
        polypo.main(["train", "--config", "a.yaml", "--accelerate_config", "zero3"])


ZERO3, DDP = (str(ROOT / f"polypo/configs/accelerate/{name}.yaml") for name in ("zero3", "ddp"))


@pytest.mark.parametrize(
    "argv, needed, launch, rest",
    [
        ("--beta 1", True, [], "--beta 1"),
        ("--beta 1", False, None, "--beta 1"),
        ("--beta 1 --num_processes=2 --cpu", False, ["--num_processes", "2", "--cpu"], "--beta 1"),
        ("--accelerate-config ddp --beta 1", False, ["--config_file", DDP], "--beta 1"),
        ("--config recipe.yaml --max_steps -1", True, ["--config_file", ZERO3], "--config recipe.yaml --max_steps -1"),
        ("--config recipe.yaml --accelerate_config ddp", True, ["--config_file", DDP], "--config recipe.yaml"),
        ("--accelerate_config ddp --dry_run", True, None, "--dry_run --accelerate_config ddp"),
        ("--dry_run false --beta 1", True, [], "--dry_run false --beta 1"),
    ],
)
def test_what_goes_to_accelerate_and_what_to_the_command(argv, needed, launch, rest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("accelerate_config: zero3\nbeta: 1\n")
    assert polypo.split_launch(argv.split(), needed=needed) == (launch, rest.split())


def test_accelerate_has_the_options_that_are_handed_to_it():
    values = {name: "1" for name in usage.LAUNCH} | {"main_process_ip": "10.0.0.1"}
    known = launch_command_parser().parse_args(
        [*flags(**values), "--cpu", "--quiet", "--config_file", "a", "--module", "b"]
    )
    assert known.training_script == "b" and known.gpu_ids == "1" and known.machine_rank == 1


WORKER = "from polypo.worker import end_with_launcher as end; end(); print('started', flush=True); input()"
PROGRAM = f"""
import os, subprocess, sys
os.environ[{polypo.LAUNCHER!r}] = str(os.getpid())
worker = subprocess.Popen([sys.executable, "-c", {WORKER!r}], stdin=sys.stdin)
print(worker.pid, flush=True)
worker.wait()
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_what_accelerate_started_ends_when_the_program_is_killed(sent):
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    worker = psutil.Process(int(program.stdout.readline()))
    assert program.stdout.readline() == b"started\n"
    program.send_signal(sent)
    program.wait(10)
    with contextlib.suppress(psutil.NoSuchProcess):
        worker.wait(10)  # TimeoutExpired where it lives on
    program.stdin.close()


def test_the_wheel_trains_a_recipe_on_the_demo_rows_without_a_checkout(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("trainers", "polypo", "configs", "data"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, source]
    subprocess.run(build, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("polypo-*.whl"))) as wheel:
        wheel.extractall(site)
    [entry] = site.glob("*.dist-info/entry_points.txt")
    assert "polypo = polypo:main" in entry.read_text()
    recipe = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    assert recipe == {path.relative_to(site / "polypo") for path in (site / "polypo/configs").rglob("*.yaml")}

    save_start(tmp_path / "model", "llama3")
    command = ["train", "--config", "dpo/demo.yaml", "--accelerate_config", "single", "--cpu", "--use_cpu", "true"]
    command += ["--model_name_or_path", "model", "--max_steps", "1", "--lora_target_modules", "q_proj", "v_proj"]
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-m", "polypo", *command], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs/dpo-demo/adapter_model.safetensors").is_file()
    assert recipes.shipped("data/demo/prompts.jsonl") == "data/demo/prompts.jsonl" or Path.cwd() != ROOT


# From Python.


def test_a_method_is_started_in_five_lines_of_python(tmp_path, start):
    args = SWEPOConfig(output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_steps=1,
                       per_device_train_batch_size=2, resume_from_checkpoint="true")  # fmt: skip
    data = {"train": Dataset.from_list(rows(8)), "test": Dataset.from_list(rows(4))}
    trainer = SWEPOTrainer.run(args, data, str(start))
    assert trainer.state.global_step == 2
    names = ("model.safetensors", "tokenizer.json", "README.md", "train_results.json", "eval_results.json")
    assert all((tmp_path / name).is_file() for name in names)
    assert SWEPOTrainer.run(args, data, str(start)) is None  # it is finished
