"""The experiment with SGPO, whole, on a tiny model."""

import json

import pytest
import yaml

from experiments import sgpo as experiment
from sgpo_rows import ANSWERS, PROMPTS, command, write_inputs


@pytest.mark.slow
def test_runs_share_stages_and_the_tables_hold_every_policy(tmp_path, monkeypatch):
    inputs, data = write_inputs(tmp_path), tmp_path / "data.jsonl"
    extra = [{"prompt": f"{p} {i}", "response": ANSWERS[i % 5] + " a b c"} for i in (0, 1) for p in PROMPTS]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*extra, {"prompt": "too short", "response": "a"}]))
    flags = command(
        inputs, tmp_path / "runs/self", dataset_name=tmp_path / "runs/rows.jsonl", sft_target_source="response",
        dataset_train_split="train[:12]", preference_split="train[12:18]", dataset_test_split="train[18:]", sft=None,
        scorer=None, use_peft=True, lora_r=2, lora_target_modules="all-linear", dtype="float32", filter_factor=0.2,
    )  # fmt: skip
    recipe = {name.removeprefix("--"): yaml.safe_load(v) for name, v in zip(flags[::2], flags[1::2], strict=True)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(experiment, "RECIPE", tmp_path / "recipe.yaml")
    monkeypatch.setattr("sys.argv", ["sgpo.py", "--data", str(data)])
    experiment.main()
    results = json.loads((tmp_path / "runs/results.json").read_text())
    assert len(results["improvers"]) == 3 * 4 and len(results["policies"]) == 2 + 2 * 4
    found, start = results["policies"]["self: after DPO"], results["policies"]["start"]
    assert found["gain"]["mean"] == pytest.approx(found["after"]["mean"] - start["after"]["mean"])
    assert found["reference_logp_gain"]["count"] == 6 and start["reference_logp_gain"]["mean"] == 0
    hashes = [json.loads((tmp_path / f"runs/{name}/round-00/current/manifest.json").read_text())["hash"]
              for name in ("self", "reference")]  # fmt: skip
    assert hashes[0] == hashes[1]
    text = (tmp_path / "runs/results.md").read_text()
    assert text.count("\n| self") == 3 + 3 and "| start |" in text
    before = (tmp_path / "runs/results.json").read_bytes()
    experiment.main()  # everything is there already
    assert (tmp_path / "runs/results.json").read_bytes() == before
