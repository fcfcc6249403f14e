"""The page of any run: what a training leaves for it, and what it shows of one that is done, amid, broken, of two."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from helpers import flags, save_start
from test_pages import HOSTILE, check_page
from test_trainer import config, rows
from trainers import DPOTrainer, SWEPOTrainer
from trainers.cli import report, train
from trainers.cli.report import main, write_report
from trainers.pages.signs import SIGNS
from trainers.runs.files import write_rows
from trainers.runs.record import read_run

ROOT = Path(__file__).resolve().parents[1]
LEFT = "fewer than 2 usable responses left"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of rows to train on, of which one lacks a score and one has no text, and of held-out rows."""
    folder = tmp_path_factory.mktemp("data")
    given = rows(10)
    given[1]["scores"][0], given[5]["responses"] = None, ["", "", ""]
    write_rows(folder / "train.jsonl", given)
    write_rows(folder / "test.jsonl", rows(6, seed=1))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, start, data):
    """Two runs of the launcher that differ in their learning rate: 0, which changes nothing, and a large one."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rate in (("still", 0.0), ("fast", 0.5)):
        options = {
            "model_name_or_path": start, "use_cpu": True, "report_to": "none", "max_steps": 6, "logging_steps": 1,
            "eval_strategy": "steps", "eval_steps": 2, "save_steps": 4, "per_device_train_batch_size": 4,
            "learning_rate": rate, "optim": "sgd", "lr_scheduler_type": "constant", "output_dir": folder / name,
            "max_length": 40, "disable_tqdm": True,
        }  # fmt: skip
        files = ["--dataset_name", str(data / "train.jsonl"), str(data / "test.jsonl")]
        train.main(
            [*flags(**options), *files, "--dataset_train_split", "train", "", "--dataset_test_split", "", "train"]
        )
    return folder


def page_of(*folders, given=()):
    path = write_report(folders, given)
    assert path.name == ("report.html" if len(folders) == 1 else "comparison.html")
    return check_page(path.read_text(encoding="utf-8"))


def test_a_run_keeps_what_its_page_says(runs, start):
    record = read_run(runs / "fast").record
    assert (record["trainer"], record["method"], record["model"]) == ("SWEPOTrainer", "SWEPO", str(start))
    assert {"learning_rate", "max_steps", "save_steps"} <= {*record["changed"]}
    assert not {"output_dir", "report_to", "weight_decay", "gradient_checkpointing"} & {*record["changed"]}
    assert record["settings"]["learning_rate"] == 0.5 and record["settings"]["pad_token"] is None
    reading, test, tokens, _ = record["left_out"]
    assert (reading["rows_in"], reading["rows_out"], reading["reasons"]) == (10, 9, {LEFT: 1})
    assert reading["responses_dropped"] == {"missing score": 1, "empty text": 3}
    assert test["rows_in"] == 6 and tokens["rows_in"] == 9
    titles = [part["title"].rpartition("/")[2] for part in record["left_out"]]
    assert titles == ["train.jsonl, training rows", "test.jsonl, held-out rows", "Tokenising, training rows",
                      "Tokenising, held-out rows"]  # fmt: skip


def test_the_page_of_a_run(runs, data):
    page = page_of(runs / "fast")
    assert f"SWEPO from {read_run(runs / 'fast').record['model']}, on {data}/train.jsonl" in page.text
    assert "step 6 of 6." in page.text
    labels = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg"]
    wanted = ("Loss", "Pairwise ranking accuracy", "Log-probability of a response, nats", "Tokens of a response")
    assert {*wanted, "Learning rate", "Gradient norm", "swepo/positives"} <= {*labels}
    told = (f"rows dropped: 1 ({LEFT})", "responses dropped: 3 (empty text)", "responses dropped: 1 (missing score)")
    assert "; ".join(told) in page.text
    # Its own settings stand before those that are the defaults.
    assert (
        page.text.index("learning_rate0.5") < page.text.index("All other settings") < page.text.index("weight_decay")
    )
    assert "evaluation" in page.text and "Nothing is learned" in page.text


def test_runs_side_by_side_show_what_differs(runs):
    page = page_of(runs / "still", runs / "fast")
    text = page.text
    settings = text[text.index("Settingstillfast") :].partition("SettingValue")[0]
    assert settings.split() == ["Settingstillfast", "learning_rate0.00.5"]
    state = read_run(runs / "fast").history
    last = next(log for log in reversed(state) if "eval_loss" in log)["eval_loss"]
    first = next(log for log in reversed(read_run(runs / "still").history) if "eval_loss" in log)["eval_loss"]
    assert f"eval_loss{first:.4g}{last:.4g}" in text
    assert "Nothing is learned. still: In the eval logs" in text and (runs / "still/comparison.html").is_file()
    with pytest.raises(ValueError, match="named twice"):
        write_report([runs / "fast", runs / "still/../fast"])
    with pytest.raises(ValueError, match="--rows: masks are shown of one run"):
        write_report([runs / "fast", runs / "still"], ["--rows", "1"])


def test_samples_are_those_of_the_start_and_of_the_policy(runs, data, capsys):
    page = page_of(runs / "still", runs / "fast", given=["--samples", "2", "--max_new_tokens", "6"])
    still, fast = (page.text.partition(f"\n{name}6.0100%")[2].partition("\n")[0] for name in ("still", "fast"))
    assert "The KL is an estimate from these answers alone" in page.text
    assert float(still) == 0 and float(fast) != 0  # nats from the start, which the first has not left
    assert f"{rows(6, seed=1)[0]['prompt']}" in page.text
    answers = page.text.partition("before, 6 tokens, cut off")[2]
    before, _, answers = answers.partition("still, 6 tokens, cut off")
    after, _, moved = answers.partition("fast, 6 tokens, cut off")
    assert before.strip() and before.strip() == after.strip() and moved.partition("\n")[0].strip() != after.strip()
    main([str(runs / "fast"), "--samples", "1", "--max_new_tokens=2", "--dataset_name", str(data / "train.jsonl"),
          "--dataset_test_split", "train"])  # fmt: skip
    assert (
        "report.html is ready" in capsys.readouterr().out
        and "after, 2 tokens" in (runs / "fast/report.html").read_text()
    )
    with pytest.raises(ValueError, match="the option 'temprature' is not known"):
        write_report(runs / "fast", ["--samples", "1", "--temprature", "2"])
    with pytest.raises(ValueError, match="samples=-1 must be"):
        write_report(runs / "fast", ["--samples", "-1"])


def sampled(path):
    """The flags for answers to prompts of a file."""
    return flags(samples=2, max_new_tokens=6, dataset_name=path, dataset_test_split="train")


def kl_of(page, name="after"):
    """Nats per answer from the policy before, of the table of samples."""
    return float(re.search(rf"\n{name}6\.0100%(.*)\n", page.text)[1])


@pytest.fixture
def sft(start, tmp_path):
    """A folder with an adapter that says something else than its base."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(start), lora)
    model.save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


def test_a_run_that_goes_on_from_an_adapter_names_it_and_its_samples_begin_there(sft, start, data, tmp_path):
    options = {
        "trainer": "DPOTrainer", "model_name_or_path": sft, "use_cpu": True, "report_to": "none", "max_steps": 1,
        "learning_rate": 0.0, "output_dir": tmp_path / "run", "dataset_name": data / "train.jsonl",
        "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    train.main(flags(**options))
    record = read_run(tmp_path / "run").record
    assert (record["model"], record["start_adapter"]) == (str(start), str(sft))
    assert (record["reference"], record["adapter_name"]) == ("a frozen copy of the adapter as it was", "default")
    assert f"DPOTrainer`, from the adapter `{sft}`." in (tmp_path / "run/README.md").read_text()
    given = sampled(data / "test.jsonl")
    page = page_of(tmp_path / "run", given=given)
    assert f"DPO from {sft} on {start}, on " in page.text and f"start_adapter{sft}" in page.text
    assert f"before is {sft}, the adapter on {start} that training went on from" in page.text
    assert kl_of(page) == 0  # nothing was learned
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    path = tmp_path / "other/run.json"
    path.write_text(json.dumps(record | {"start_adapter": None}))  # which began with the base
    page = page_of(tmp_path / "run", tmp_path / "other", given=given)
    assert f"from ({sft}), not on disk as it was, or not one for all" in page.text
    assert kl_of(page, "run") == kl_of(page, "other") != 0
    sft.rename(tmp_path / "moved")
    page = page_of(tmp_path / "run", given=given)
    assert f"before is {start}, the model under the adapter" in page.text and f"from ({sft}), not on" in page.text
    assert kl_of(page) != 0
    assert kl_of(page_of(tmp_path / "run", given=[*given, "--model_name_or_path", str(tmp_path / "moved")])) == 0
    shutil.copytree(tmp_path / "run", sft)  # a run into the folder that it began with
    assert f"({sft}), not on disk as it was" in page_of(sft, given=given).text


def test_the_policy_of_two_adapters_is_found_where_peft_saves_it(sft, start, data, tmp_path, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(start)
    model = PeftModel.from_pretrained(base, sft, adapter_name="policy", is_trainable=True)
    model.load_adapter(sft, adapter_name="sft")
    args = config(tmp_path / "two", cls=DPOTrainer, learning_rate=0.0)
    made = DPOTrainer(model, ref_model="sft", args=args, train_dataset=Dataset.from_list(rows()))
    made.train()
    made.save_model()
    record = read_run(tmp_path / "two").record
    assert (record["reference"], record["start_adapter"]) == ("the adapter 'sft'", "'policy' of a PeftModel")
    given = sampled(data / "test.jsonl")
    page = page_of(tmp_path / "two", given=given)
    assert kl_of(page) != 0 and "went on from ('policy' of a PeftModel), not on disk" in page.text
    assert kl_of(page_of(tmp_path / "two", given=[*given, "--model_name_or_path", str(sft)])) == 0


@pytest.mark.parametrize("kind", ["full", "fresh", "path", "model"])
def test_the_record_names_the_reference(kind, start, tmp_path):
    given = {
        "full": ({}, "a frozen copy of the policy as it was"),
        "fresh": ({"peft_config": LoraConfig(task_type="CAUSAL_LM")}, "the model with its adapter off"),
        "path": ({"ref_model": str(start)}, str(start)),
        "model": ({"ref_model": AutoModelForCausalLM.from_pretrained(start)}, str(start)),
    }
    options, told = given[kind]
    data = Dataset.from_list(rows())
    made = DPOTrainer(str(start), args=config(tmp_path, cls=DPOTrainer), train_dataset=data, **options)
    made.write_record()
    record = read_run(tmp_path).record
    assert (record["reference"], record["start_adapter"]) == (told, None)
    assert f"reference{told}" in page_of(tmp_path).text


def test_samples_say_that_they_cannot_have_options_of_the_template(runs, data, tmp_path):
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    chats = [row | {"tools": [tool], "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows(3)]
    write_rows(tmp_path / "tools.jsonl", [chats[0] | {"tools": None}, *chats[1:]])
    with pytest.raises(ValueError, match="'tools' cannot be used where answers are sampled"):
        write_report(runs / "fast", sampled(tmp_path / "tools.jsonl"))
    shutil.copytree(runs / "fast", tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    record["settings"]["chat_template_kwargs"] = {"enable_thinking": False}
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="chat_template_kwargs have no effect on sampling"):
        write_report(tmp_path / "run", ["--samples", "2"])


def test_a_folder_of_runs_names_them(runs):
    told = f"no log of a training.* name one, or several \\({runs}/fast {runs}/still\\)"
    with pytest.raises(ValueError, match=told):
        write_report(runs)


def test_a_run_amid_its_training(runs, tmp_path):
    shutil.copytree(runs / "fast", tmp_path / "amid")
    (tmp_path / "amid/trainer_state.json").unlink()
    shutil.rmtree(tmp_path / "amid/checkpoint-6")
    (tmp_path / "amid/checkpoint-8").mkdir()  # a kill cut it short
    (tmp_path / "amid/checkpoint-8/trainer_state.json").write_text('{"global_step": 8, ')
    page = page_of(tmp_path / "amid")
    assert "step 4 of 6, the log is that of checkpoint-4, the newest checkpoint." in page.text
    assert "too few logs" in page.text  # no sign is said to be absent that cannot be told yet
    assert page_of(tmp_path / "amid/checkpoint-4").text.count("learning_rate") == page.text.count("learning_rate")
    (tmp_path / "amid/config.json").unlink()  # only the checkpoint has a policy
    assert "after, 2 tokens" in page_of(tmp_path / "amid", given=["--samples", "1", "--max_new_tokens", "2"]).text
    shutil.rmtree(tmp_path / "amid/checkpoint-4")
    with pytest.raises(ValueError, match="holds no policy yet"):
        write_report(tmp_path / "amid", ["--samples", "1"])
    shutil.rmtree(tmp_path / "amid/checkpoint-8")
    page = page_of(tmp_path / "amid")
    assert "nothing is logged yet" in page.text and "learning_rate" in page.text
    assert "svg" not in {tag for tag, _ in page.tags}
    (tmp_path / "amid/run.json").unlink()
    with pytest.raises(ValueError, match=r"no log of a training: neither trainer_state.json.*nor run.json"):
        write_report(tmp_path / "amid")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        write_report(tmp_path / "nowhere")


def test_the_log_is_that_of_the_end_where_a_copy_has_lost_the_times(runs, tmp_path):
    shutil.copytree(runs / "fast", tmp_path / "copy")
    os.utime(tmp_path / "copy/checkpoint-4/trainer_state.json", (2e9, 2e9))
    assert read_run(tmp_path / "copy", "fast") == read_run(runs / "fast", "fast")
    (tmp_path / "copy/checkpoint-4/trainer_state.json").write_text(  # of a run that began anew after that
        json.dumps({"log_history": [{"step": 1, "loss": 0.25}], "global_step": 1})
    )
    os.utime(tmp_path / "copy/checkpoint-4/trainer_state.json", (2e9, 2e9))
    assert read_run(tmp_path / "copy").checkpoint == "checkpoint-4"


def test_what_is_no_number_of_a_step_is_passed_over(tmp_path):
    logs = [{"step": 1, "loss": "0.5"}, {"loss": 0.5}, "loss", {"step": 2, "loss": None}, {"step": 3, "loss": 0.25}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
    assert read_run(tmp_path).history == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.25}]
    assert "Loss, last third0.25" in page_of(tmp_path).text


def test_what_evaluations_alone_log_is_among_the_figures(tmp_path):
    told = {"runtime": 1.0, "samples_per_second": 2.0, "model_preparation_time": 3.0, "loss": 0.5, "right": 0.75}
    logs = [{"step": 3} | {f"eval_{of}_{name}": value for name, value in told.items()} for of in ("a", "b")]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 3, "loss": 0.25}, *logs]}))
    table = page_of(tmp_path).text.partition("MetricValue")[2].partition("Data that was left out")[0]
    assert table.split() == ["loss0.25", *(f"eval_{of}_{value}" for of in "ab" for value in ("loss0.5", "right0.75"))]


LOG = "trainer_state.json"
STAGED = ("runs.json", "self_enhance.json", "results.json")
BROKEN = [
    (LOG, '{"log_history": [', "is not JSON"), (LOG, "[1]", "no JSON object"), (LOG, "{}", "has no log_history"),
    *((name, '{"a": ', "is not JSON .*cut short") for name in STAGED),
    *((name, '{"results": 1}', "there lacks '.*move it away") for name in STAGED),  # as other programs call theirs
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "told"), BROKEN)
def test_a_broken_file_of_a_run_is_named(tmp_path, name, content, told):
    (tmp_path / "round-00/held-out/samples").mkdir(parents=True)
    (tmp_path / "round-00/manifest.json").write_text("{}")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.*{told}"):
        write_report(tmp_path)


def test_a_run_of_an_older_version_has_its_curves_and_says_what_is_missing(runs, tmp_path):
    shutil.copytree(runs / "fast", tmp_path / HOSTILE.partition("/")[0])
    (folder,) = tmp_path.iterdir()
    (folder / "run.json").unlink()
    page = page_of(folder)
    assert "There is no run.json" in page.text and page.text.count("<script>alert('x')<") >= 1
    with pytest.raises(ValueError, match="--samples: it is not recorded .*give --model_name_or_path"):
        write_report(folder, ["--samples", "1"])


def test_trainers_from_python_keep_a_record_and_no_secret(tmp_path, tokenizer, start):
    keywords = {"dtype": "float32", "token": "hf_secret"}
    args = config(tmp_path / "out", model_init_kwargs=keywords, hub_token="hf_other")
    SWEPOTrainer(str(start), args=args, train_dataset=Dataset.from_list(rows())).train()
    text = (tmp_path / "out/run.json").read_text()
    assert "hf_" not in text and json.loads(text)["settings"]["model_init_kwargs"]["dtype"] == "float32"
    page = page_of(tmp_path / "out")  # nothing was saved
    assert "nothing is logged yet" in page.text
    with pytest.raises(ValueError, match="--samples: the run names no held-out rows"):
        write_report(tmp_path / "out", ["--samples", "1"])


def test_the_example_of_the_docs_runs_as_it_stands_there(tmp_path, monkeypatch):
    text = (ROOT / "docs/reports.md").read_text()
    commands = re.search(r"```bash\n(.*?)```", text, flags=re.S)[1].replace("\\\n", " ").splitlines()
    save_start(tmp_path / "model", "llama3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "refuse_lost_processes", lambda *_: None)
    for command in commands:
        argv = shlex.split(command.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "model"))
        {"train": train, "report": report}[argv[1]].main(argv[2:])
    page = check_page((tmp_path / "runs/first/report.html").read_text())
    assert "step 6 of 6." in page.text and "after, 40 tokens" in page.text


def test_the_docs_name_every_sign_with_its_numbers():
    text = (ROOT / "docs/reports.md").read_text()
    for name, rule, *_ in SIGNS:
        [row] = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        numbers = re.findall(r"[\d.]*\d", rule)
        assert numbers and all(number in row for number in numbers), (name, numbers)
