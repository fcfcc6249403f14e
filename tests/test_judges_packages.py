"""alpaca_eval computes win rates on our file, and lm-eval runs a trained policy and an adapter as they lie on disk.

The packages pin and import what training need not have, so they live in an environment of their own, whose Python
POLYPO_JUDGES names (docs/judges.md).
"""

import csv
import json
import math
import os
import re
import subprocess

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import save_start, write_rows
from servers import serving
from trainers import DPOConfig, DPOTrainer
from trainers.cli import generate

PYTHON = os.environ.get("POLYPO_JUDGES")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="POLYPO_JUDGES names no Python of an environment with alpaca_eval and lm-eval (docs/judges.md)"
)
COUNT = 60
ROWS = [
    {"question": "the quick brown fox jumps over the", "choices": [" lazy dog", " bad day", " friend"], "label": 0},
    {"question": "what is the capital of", "choices": [" the dog", " France", " user"], "label": 1},
    {"question": "say something kind to a", "choices": [" model", " system", " friend"], "label": 2},
]


def run(*command, **environment) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Our answers to questions like AlpacaEval's, and mostly longer ones of a reference."""
    folder = tmp_path_factory.mktemp("alpaca")
    save_start(folder / "model", "llama3")
    reference = [
        {"instruction": f"say something kind {i}", "output": "a day " * (1 + i % 20), "generator": "other"}
        for i in range(COUNT)
    ]
    (folder / "reference.json").write_text(json.dumps(reference))
    generate.generate(generate.GenerateArguments(
        model=str(folder / "model"), prompts=str(folder / "reference.json"), output=str(folder / "tiny.json"),
        answers="alpaca_eval", max_new_tokens=24, batch_size=COUNT,
    ))  # fmt: skip
    # The one file that it takes from the hub holds answers made long or short on purpose. A neutral one stands in.
    rows = [f"neutral,{i},0.5,0.0,0.0,False" for i in range(COUNT)]
    head = "model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"
    repository = folder / "cache/hub/datasets--tatsu-lab--alpaca_eval"
    for path, text in (("refs/main", "0" * 40), (f"snapshots/{'0' * 40}/df_gamed.csv", "\n".join([head, *rows]))):
        (repository / path).parent.mkdir(parents=True)
        (repository / path).write_text(text)
    return folder


def alpaca_eval(folder, prefers) -> dict:
    """The line of our policy, by a judge that prefers the first of two texts with the probability `prefers(a, b)`."""

    def judge(path, content, count):
        first, second = re.findall(r'"output": """(.*?)"""\n    }', content["messages"][-1]["content"], re.DOTALL)
        share = prefers(first, second)
        tokens = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in (("m", share), ("M", 1 - share))]
        said = {"content": [{**tokens[0], "top_logprobs": tokens}]}
        choice = {"index": 0, "message": {"role": "assistant", "content": "m"}, "finish_reason": "length"}
        return 200, {"id": "0", "object": "chat.completion", "created": 0, "model": content["model"],
                     "choices": [choice | {"logprobs": said}], "usage": {"prompt_tokens": 1, "completion_tokens": 1,
                                                                        "total_tokens": 2}}  # fmt: skip

    with serving(judge) as server:
        run(PYTHON, "-W", "ignore", "-m", "alpaca_eval.main", "evaluate", "--model_outputs", folder / "tiny.json",
            "--reference_outputs", folder / "reference.json", "--output_path", folder, "--caching_path", "None",
            "--metric_kwargs", "{'save_weights_dir': None}", HF_HOME=str(folder / "cache"),
            OPENAI_API_BASE=server.url, OPENAI_API_KEY="none")  # fmt: skip
        assert len(server.requests) == COUNT
        assert {content["model"] for _, content in server.requests} == {"gpt-4-1106-preview"}
    with open(folder / "weighted_alpaca_eval_gpt4_turbo/leaderboard.csv") as file:
        [row] = [row for row in csv.DictReader(file) if row[""] == "tiny"]
    return {name: float(value) for name, value in row.items() if name not in ("", "mode")}


def test_alpaca_eval_computes_the_win_rate_of_our_file(files):
    ours = [row["output"] for row in json.loads((files / "tiny.json").read_text())]
    theirs = [row["output"] for row in json.loads((files / "reference.json").read_text())]

    def likes_length(a, b):
        return 1 / (1 + math.exp((len(b) - len(a)) / 50))

    by_length = alpaca_eval(files, likes_length)
    shares = [likes_length(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert by_length["n_total"] == COUNT
    assert by_length["win_rate"] == pytest.approx(100 * sum(shares) / COUNT, abs=1e-6)
    # A judge that goes by length alone has nothing against our shorter answers once length is controlled for.
    assert by_length["win_rate"] < 40 and abs(by_length["length_controlled_winrate"] - 50) < 3, by_length
    blind = alpaca_eval(files, lambda a, b: 0.8 if a in ours else 0.2)
    assert blind["win_rate"] == pytest.approx(80, abs=1e-6)
    assert blind["length_controlled_winrate"] == pytest.approx(80, abs=1), blind


@pytest.fixture(scope="module", params=["policy", "adapter"])
def trained(request, tmp_path_factory):
    """Start and output folder of a short run, whose output is a whole policy or an adapter."""
    folder = tmp_path_factory.mktemp(request.param)
    save_start(folder / "start")
    prompts = [row["question"] for row in ROWS]
    data = {"train": Dataset.from_list([{"prompt": p, "responses": [" a friend", " dog"], "scores": [1.0, 0.0]}
                                        for p in prompts])}  # fmt: skip
    args = DPOConfig(
        output_dir=str(folder / "run"), max_steps=3, learning_rate=0.02, report_to=[], use_cpu=True, save_strategy="no"
    )
    adapter = LoraConfig(r=4, task_type="CAUSAL_LM") if request.param == "adapter" else None
    DPOTrainer.run(args, data, str(folder / "start"), peft_config=adapter)
    return folder / "start", folder / "run", adapter is not None


def test_lm_eval_runs_what_a_run_left(trained, tmp_path):
    start, folder, adapter = trained
    task = {
        "task": "tiny_choice", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": write_rows(tmp_path / "rows.jsonl", ROWS)}},
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "label",
        "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "tiny_choice.yaml").write_text(yaml.safe_dump(task))
    model = f"pretrained={start},peft={folder}" if adapter else f"pretrained={folder}"
    run(PYTHON, "-W", "ignore", "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"{model},dtype=float32",
        "--tasks", "tiny_choice", "--include_path", tmp_path, "--device", "cpu", "--log_samples",
        "--output_path", tmp_path / "out", HF_HOME=str(tmp_path / "cache"))  # fmt: skip

    tokenizer = AutoTokenizer.from_pretrained(start)
    policy = AutoModelForCausalLM.from_pretrained(start if adapter else folder)
    policy = PeftModel.from_pretrained(policy, folder) if adapter else policy
    begin = AutoModelForCausalLM.from_pretrained(start)
    expected = [[logp(policy, tokenizer, row["question"], text) for text in row["choices"]] for row in ROWS]
    before = [[logp(begin, tokenizer, row["question"], text) for text in row["choices"]] for row in ROWS]
    assert abs(torch.tensor(expected) - torch.tensor(before)).min() > 0.1  # the run has moved them
    [path] = (tmp_path / "out").rglob("samples_tiny_choice_*.jsonl")
    lines = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda line: line["doc_id"])
    found = [[float(answer[0]) for answer in line["filtered_resps"]] for line in lines]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-3, rtol=0)
    [path] = (tmp_path / "out").rglob("results_*.json")
    hits = [row["label"] == max(range(3), key=values.__getitem__) for row, values in zip(ROWS, expected, strict=True)]
    assert json.loads(path.read_text())["results"]["tiny_choice"]["acc,none"] == pytest.approx(sum(hits) / 3)


def logp(model, tokenizer, prompt: str, text: str) -> float:
    """Sum of the log-probabilities of the tokens of `text` after `prompt`."""
    ids, start = tokenizer(prompt + text)["input_ids"], len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(ids[start:])[:, None]).sum().item()
