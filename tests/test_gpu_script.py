"""benchmarks.gpu: tried on a CPU with small models, and what it says where packages or time are missing."""

import json
import sys

import pytest

from benchmarks import gpu

COMMAND = ["--device", "cpu", "--quick"]


@pytest.mark.slow
def test_every_section_that_needs_no_gpu_runs_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "runs/gpu.json"
    assert gpu.main([*COMMAND, "--minutes", "15", "--output", str(path)]) == 0
    sections = json.loads(path.read_text())["sections"]
    assert list(sections) == list(gpu.SECTIONS)
    ran = {name: result for name, result in sections.items() if result["status"] == "ok"}
    always = {name for name, s in gpu.SECTIONS.items() if s.needs[-1] in ("tqdm", "pytest") and not s.only_cuda}
    assert ran.keys() >= always and len(always) == 10
    assert sections["FlexAttention"] == {"status": "skipped", "reason": "FlexAttention has no backward on CPUs"}
    # The same dtype in the same layout is the very same computation; the other layout is not.
    figures = ran["layouts"]["figures"]
    assert figures["float64, rows, gradient"] == 0 < figures["float64, shared, gradient"] < 1e-6
    assert 1e-7 < figures["float32, shared, gradient"] < figures["bfloat16, shared, gradient"]
    parts, whole = ran["7B LoRA, K = 16, in parts"]["figures"], ran["7B LoRA, K = 16"]["figures"]
    assert parts["prompts/s over that of 7B LoRA, K = 16"] == parts["prompts/s"] / whole["prompts/s"]
    assert parts["estimate, GiB"] < whole["estimate, GiB"]
    assert whole["tokens/s, each once"] == pytest.approx((16 + 16 * 8) / whole["s per step"])
    assert {name.split(",")[0] for name in ran["all trainers"]["figures"]} == {"SWEPO", "EMDPO"}
    assert "| 7B LoRA, K = 4 | ok | prompts/s | " in capsys.readouterr().out


def test_missing_packages_skip_their_sections_and_are_named_with_the_way_to_bring_them(tmp_path, capsys, monkeypatch):
    missing = ("trl", "bitsandbytes")
    monkeypatch.setattr(gpu, "version", lambda name: None if name in missing else "1.0")
    assert gpu.main([*COMMAND, "--output", str(tmp_path / "gpu.json")]) == 0
    said = capsys.readouterr().out
    assert "missing: trl, bitsandbytes" in said and "wheels of about 42 MiB" in said
    assert "pip download" in said and "-d wheels trl bitsandbytes" in said
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {result["status"] for result in sections.values()} == {"skipped"}
    assert sections["layouts"]["reason"] == "trl not installed"
    assert sections["QLoRA, two layers"]["reason"] == "trl, bitsandbytes not installed"


def test_a_section_that_fails_or_finds_no_time_is_recorded_and_the_next_one_goes_on(tmp_path, monkeypatch):
    calls = []

    def run_job(job, seconds):
        calls.append(job["function"])
        if job["function"] == "product":
            return {"status": "failed", "reason": "RuntimeError: no"}
        return {"status": "ok", "figures": {"prompts/s": 3.0, "peak, GiB": 2.0}, "limits": {}}

    monkeypatch.setattr(gpu, "run_job", run_job)
    output = ["--output", str(tmp_path / "gpu.json")]
    assert gpu.main([*COMMAND, *output]) == 1
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert sections["matrix product"]["reason"] == "RuntimeError: no" and sections["layouts"]["status"] == "ok"
    assert sections["7B LoRA, TRL, all pairs"]["figures"]["prompts/s over that of 7B LoRA, K = 4"] == 1
    assert calls[0] == "product" and calls[-1] == "lora"
    assert gpu.main([*COMMAND, *output, "--minutes", "0", "--only", "layouts"]) == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["sections"] == {
        "layouts": {"status": "left out", "reason": "no time left"}
    }


def test_an_error_in_a_process_a_figure_beyond_its_limit_and_a_process_that_hangs(monkeypatch):
    result = gpu.run_job({"function": "no such", "device": "cpu", "quick": True}, 300)
    assert result["status"] == "failed" and result["reason"] == "KeyError: 'no such'" and "Traceback" in result["log"]
    for figure, status in ((0.2, "wrong"), (float("nan"), "wrong"), (0.05, "ok")):
        printed = json.dumps([{"a": figure}, {"a": 0.1}])
        monkeypatch.setattr(gpu, "COMMAND", [sys.executable, "-c", f"print({printed!r})"])
        result = gpu.run_job({}, 60)
        assert result["status"] == status and result.get("reason") == {"wrong": "beyond its limit: a"}.get(status)
    monkeypatch.setattr(gpu, "COMMAND", [sys.executable, "-c", "import time; time.sleep(60)"])
    assert gpu.run_job({}, 0.5)["status"] == "left out"


def test_a_cpu_is_spared_the_7b_shape(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "--device cpu needs --quick" in capsys.readouterr().err
