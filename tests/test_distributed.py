"""The same numbers on one process and on two, under every engine: a part of the table of distributed_matrix.py."""

import math

import pytest
import transformers
from packaging.version import Version

import distributed_matrix as matrix
from trainers.runs.record import read_run

# One launch per engine: starting processes and engines costs more than the steps do.
CHOSEN = {
    "ddp": [
        "SWEPO, probe",
        "SWEPO, token budget",
        "SWEPO, own sampler",
        "LIRE, full",
        "PlackettLuce, LoRA",
        "EMDPO, halves",
        "SWEPO, full, gone on",
        "SWEPO, stream, gone on",
    ],
    "zero2": ["SWEPO, probe", "SWEPO, LoRA, reference cache", "DPO, full, checkpointing", "NCA, LoRA"],
    "zero3": [
        "SWEPO, probe",
        "SWEPO, reference cache",
        "SparsePO, LoRA, checkpointing",
        "RRHF, full",
        "DPO, reference follows, gone on",
        "LIRE, in rounds",
        "EMDPO, LoRA",
    ],
    "fsdp2": [
        "SWEPO, probe",
        "DPO, LoRA, reference follows",
        "SWEPO, 9 rows",
        "SparsePO, full",
        "SparsePO, LoRA on the LM head",
        "InfoNCA, LoRA, checkpointing",
        "EMDPO, full",
        "SparsePO, LoRA, gone on",
        "SGPO, in stages",
    ],
}
# Not with older releases of transformers: their Trainer cannot go on in several processes on CPUs, and they lack a
# name that PEFT wants of them when an adapter is loaded in several processes.
NEWER = {("ddp", "SWEPO, full, gone on"), ("ddp", "SWEPO, stream, gone on"), ("zero3", "EMDPO, LoRA")}
CASES = [(engine, name) for engine, names in CHOSEN.items() for name in names]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """`results(engine)`: {cell: line} of the chosen cells."""
    folder, cells, done = tmp_path_factory.mktemp("matrix"), matrix.all_cells(), {}

    def run(engine):
        if engine not in done:
            names = CHOSEN.get(engine) or dict.fromkeys(name for _, name in CASES)
            done[engine] = matrix.run_engine(engine, [cells[name] for name in names], folder)
        return done[engine]

    return run


@pytest.mark.distributed
@pytest.mark.parametrize("engine, name", CASES)
def test_two_processes_give_the_numbers_of_one(engine, name, results):
    if (engine, name) in NEWER and Version(transformers.__version__) < Version("5.23"):
        pytest.skip(f"transformers {transformers.__version__} cannot do it")
    alone, found = results("single")[name], results(engine)[name]
    losses = [value for key, value in alone["found"].items() if key.endswith(" loss")]
    if name != "SWEPO, probe":
        assert len(losses) >= 3 and max(losses) - min(losses) > 0.01  # there is something to differ in
    text, good = matrix.verdict(found, alone, engine)
    assert good, found.get("failed", text)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("engine, option", [("zero3", "zero3_save_16bit_model"), ("fsdp2", "fsdp_state_dict_type")])
def test_em_without_whole_weights_on_disk_is_refused(engine, option, tmp_path):
    cell = {"name": "no whole weights", "trainer": "EMDPOTrainer", "gather": False}
    line = matrix.run_engine(engine, [cell], tmp_path)["no whole weights"]
    assert option in line["refused"]
    assert not list(tmp_path.rglob("emdpo.json"))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("engine", matrix.ENGINES)
def test_a_run_of_which_a_process_was_killed_goes_on_to_the_same_numbers(engine, tmp_path):
    common = {"trainer": "SWEPOTrainer", "cut": True, "peft": True}
    cells = [{"name": "whole", **common}, {"name": "killed", **common, "die": 5},
             {"name": "again", **common, "again": True, "out": "killed"}]  # fmt: skip
    lines = matrix.run_engine(engine, cells, tmp_path)
    assert lines["killed"]["failed"].startswith("crashed")
    assert len([name for name in lines["again"]["found"] if name.endswith(" loss")]) == 3
    assert matrix.difference(lines["again"]["found"], lines["whole"]["whole"]) <= 1e-6


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("engine", matrix.ENGINES)
def test_em_of_which_a_process_was_killed_in_an_m_step_goes_on_to_the_same_numbers(engine, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    common = {"trainer": "EMDPOTrainer", "settings": saving}
    cells = [{"name": "whole", **common}, {"name": "killed", **common, "die": 3},
             {"name": "again", **common, "out": "killed"}]  # fmt: skip
    lines = matrix.run_engine(engine, cells, tmp_path)
    assert lines["killed"]["failed"].startswith("crashed")
    assert "type-0/training/checkpoint-2." in (tmp_path / engine / "log").read_text()  # where it goes on
    assert matrix.difference(lines["again"]["found"], lines["whole"]["found"]) <= 1e-6


@pytest.mark.distributed
def test_text_alone_trains_a_multimodal_model_under_ddp_with_checkpointing(tmp_path):
    cell = {"name": "unused tower", "trainer": "DPOTrainer", "tower": True, "checkpointing": True,
            "settings": {"ddp_find_unused_parameters": None, "max_steps": 3}}  # fmt: skip
    alone, found = (matrix.run_engine(engine, [cell], tmp_path)[cell["name"]] for engine in ("single", "ddp"))
    text, good = matrix.verdict(found, alone, "ddp")
    assert good, found.get("failed", text)
    one, two = (read_run(tmp_path / engine / cell["name"]).record for engine in ("single", "ddp"))
    # What `polypo report` reads is written once, by processes that have all prepared the rows.
    assert one["left_out"] == two["left_out"] and [part["rows_in"] for part in one["left_out"]][0] > 0


@pytest.mark.parametrize(
    "changes, size",  # relative to 2.0, and to 0.1 where the number is smaller
    [({}, 0), ({"loss": 2.0002}, 1e-4), ({"margin": 1.1e-3}, 1e-3), ({"loss": math.nan}, math.nan),
     ({"margin": math.nan}, math.nan), ({"other": 1.0}, math.inf)],
)  # fmt: skip
def test_differences_are_seen(changes, size):
    expected = {"loss": 2.0, "margin": 1e-3}
    assert matrix.difference(expected | changes, expected) == pytest.approx(size, nan_ok=True)


@pytest.mark.parametrize(
    "engine, line, good",
    [("ddp", {"found": {"loss": 1.0}}, True), ("ddp", {"found": {"loss": 1.1}}, False),
     ("ddp", {"found": {"loss": math.nan}}, False), ("ddp", {"failed": "crashed\nhere"}, False),
     ("ddp", {"refused": "cannot"}, False)],
)  # fmt: skip
def test_a_cell_is_equal_or_wrong(engine, line, good):
    name, alone = "EMDPO, full", {"found": {"loss": 1.0}}
    line = {"cell": name, **line}
    assert matrix.verdict(line, alone, engine)[1] is good
    assert matrix.verdict(line, {"refused": "cannot"}, engine)[1] is False  # what runs nowhere proves nothing
    text = matrix.table({"single": {name: {"cell": name, **alone}}, engine: {name: line}})
    assert ("**" in text) is not good
    assert ("cannot" in text) == ("refused" in line) and ("here" in text) == ("failed" in line)
