"""The experiment with SGPO, whole, on a tiny model."""

import json

import pytest
import yaml

from experiments import sgpo as sgpo_experiment
from sgpo_rows import ANSWERS, PROMPTS, arguments, write_inputs


@pytest.mark.slow
def test_runs_share_stages_and_the_tables_hold_every_policy(tmp_path, monkeypatch, capsys):
    inputs = write_inputs(tmp_path)
    data = tmp_path / "data.jsonl"
    extra = [{"prompt": f"{p} {i}", "response": ANSWERS[i % 5] + " a b c"} for i in (0, 1) for p in PROMPTS]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*extra, {"prompt": "too short", "response": "a"}]))
    flags = arguments(
        inputs, tmp_path / "runs/self", dataset_name=tmp_path / "runs/rows.jsonl", sft_target_source="response",
        dataset_train_split="train[:12]", preference_split="train[12:18]", dataset_test_split="train[18:]",
        use_peft=True, lora_r=2, lora_target_modules="all-linear", dtype="float32", filter_factor=0.2,
    )  # fmt: skip
    recipe = {
        name.removeprefix("--"): yaml.safe_load(value) for name, value in zip(flags[::2], flags[1::2], strict=True)
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(sgpo_experiment, "RECIPE", tmp_path / "recipe.yaml")
    monkeypatch.setattr("sys.argv", ["sgpo_experiment.py", "--data", str(data)])
    sgpo_experiment.main()
    results = json.loads((tmp_path / "runs/results.json").read_text())
    assert list(results["improvers"]) == ["self", *sgpo_experiment.RUNS] and len(results["policies"]) == 9
    found = results["policies"]["self: after DPO"]
    assert found["gain"]["mean"] == pytest.approx(found["rouge_l"]["mean"] - results["start"]["rouge_l"]["mean"])
    assert found["reference_logp_gain"]["count"] == 6 and found["prompts"] == 6
    manifests = [
        json.loads((tmp_path / f"runs/{n}/round-00/current/manifest.json").read_text()) for n in ("self", "reference")
    ]
    assert manifests[0] == manifests[1]
    text = (tmp_path / "runs/results.md").read_text()
    assert text.count("\n| self") == 3 + 3 and "| start |" in text
    before = (tmp_path / "runs/results.json").read_bytes()
    sgpo_experiment.main()  # everything is there already
    assert (tmp_path / "runs/results.json").read_bytes() == before
