"""The page of heat-maps, from a run that was trained and saved, and its parts on made-up values."""

import json
import re

import pytest
from datasets import Dataset
from peft import LoraConfig

from helpers import flags, save_start
from test_pages import check_page
from test_sparsepo_trainer import DENSE, config, pairs
from test_trainer import LORA
from trainers import SparsePOTrainer
from trainers.cli.masks import MAPS, colour, heatmap, token_texts
from trainers.cli.report import write_report


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_page_of_a_trained_run(tmp_path, adapter):
    save_start(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, pairs())))
    trainer = SparsePOTrainer(
        str(tmp_path / "base"),
        args=config(tmp_path / "out", independent=True),
        train_dataset=Dataset.from_list(pairs()),
        peft_config=LoraConfig(**LORA) if adapter else None,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    recipe = {"model_name_or_path": tmp_path / "base", "dtype": "float32", "dataset_name": tmp_path / "rows.jsonl",
              "output_dir": tmp_path / "unused", "use_cpu": True, "independent": True, **DENSE}  # fmt: skip
    options = flags(**recipe, streaming=True, max_steps=1)
    page = write_report(tmp_path / "out", [*options, "--rows", "1", "4"]).read_text()
    check_page(page)
    assert page.count("<h2>Row") == 2 and page.count("Exact zeros among") == 2
    # The numbers on the page are those of the run itself.
    values = trainer.token_values([trainer.train_dataset[4]])
    best = max(range(2), key=lambda k: trainer.train_dataset[4]["scores"][k])
    length = len(trainer.train_dataset[4]["response_ids"][best])
    shown = [float(x) for x in re.findall(r'title="([^"]*)"', page.split("<h2>Row 4")[1])][:length]
    assert shown == pytest.approx(values["reward_mask"][0, best, :length].tolist(), rel=1e-3) and max(shown) > 0
    assert not (tmp_path / "unused").exists()
    for folder, given, told in (
        (tmp_path, options, "holds no policy"),
        (tmp_path / "out", ["--rows", "1"], "give its recipe with --config"),
        (tmp_path / "out", [*options, "--independent", "false"], "independent"),
        (tmp_path / "base", options, "is no SparsePO run with a learned mask"),
        (tmp_path / "out", [*options, "--split", "test"], "--split test: .* give --dataset_test_split"),
        (tmp_path / "out", [*options, "--rows", "0", "8"], "--rows 8: the train split has the rows 0 to 7"),
        (tmp_path / "out", [*options, "--rows", "-1"], "--rows -1: the train split has the rows 0 to 7"),
    ):
        with pytest.raises(ValueError, match=told):
            write_report(folder, given)


def test_texts_are_escaped_and_colours_follow_the_values():
    values = {"reward_mask": [0.0, 2.0], "kl_mask": [1.0, 0.0], "logratios": [1.0, -1.0], "kls": [0.5, 0.5]}
    sides = {"chosen": (["<b>", "\n"], values), "rejected": (["x", "y"], values)}
    page = "".join(heatmap(title, sides, value) for title, value in MAPS.items())
    assert "<b>" not in page and "&lt;b&gt;" in page and "↵" in page and "50 % zeros, mean 1, sum 2" in page
    assert colour(0, 2) != colour(1, 2) != colour(2, 2) and colour(-2, 2).startswith("rgba(209")
    assert colour(0.0, 0.0).endswith("0.000)")


def test_token_texts_keep_spaces_and_put_characters_of_several_tokens_together():
    pieces = ["It", "'s", " really", b"\xf0\x9f", b"\x98\x80", " ok", b"\xe6"]

    def decode(ids):
        joined = b"".join(p if isinstance(p, bytes) else p.encode() for p in (pieces[i] for i in ids))
        return joined.decode(errors="replace")

    assert token_texts(list(range(7)), decode) == ["It", "'s", " really", "", "\U0001f600", " ok", "\ufffd"]
