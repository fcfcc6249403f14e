"""Shows what the masks of a SparsePO run say: token heat-maps of some rows, and sparsity over training.

    python scripts/show_masks.py --config configs/sparsepo/demo.yaml --checkpoint runs/sparsepo-demo --rows 0 3

`--config` is the recipe of the run, so model, data and mask options are the same; any field can be given as a flag.
`--checkpoint` is a checkpoint or the output folder, `--rows` count the rows of the split that were kept. The page
(`--page`, by default masks.html in the checkpoint) needs nothing but itself.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.utils import logging
from trl import TrlParser

from .. import SparsePOConfig, SparsePOTrainer
from ..forward import policy as policies
from ..generation.start import load_start
from ..metrics import best_and_worst
from ..precision import settle_dtype
from ..runs.checkpoints import last_checkpoint
from ..runs.files import write_atomic
from ..sparsepo.learned import read_heads
from .arguments import DataArguments, ModelArguments, load_split
from .masks_page import Heatmap, render


@dataclass
class ShowArguments:
    """What to show."""

    checkpoint: str = field(metadata={"help": "Folder of the trained policy and its masks."})
    rows: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Rows to show, counted from 0."})
    split: str = field(default="train", metadata={"help": "Rows of the training or the test split.",
                                                  "choices": ["train", "test"]})  # fmt: skip
    page: str | None = field(default=None, metadata={"help": "The page; masks.html in the checkpoint by default."})


def main(argv: list[str]) -> Path:
    parser = TrlParser((ShowArguments, DataArguments, SparsePOConfig, ModelArguments), allow_abbrev=False)
    show, data, args, model = parser.parse_args_and_config(argv)
    folder = Path(show.checkpoint)
    if not folder.is_dir():
        raise ValueError(f"--checkpoint {folder} is not a folder: name the output folder or a checkpoint of a run.")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        last = last_checkpoint(folder)
        raise ValueError(f"--checkpoint {folder} holds no policy{f': name {last}' if last else ''}.")
    rows = load_split(data, args, show.split)
    wrong = [row for row in show.rows if not 0 <= row < len(rows)]
    if wrong:
        raise ValueError(f"--rows {wrong[0]} does not exist: the {show.split} split has {len(rows)} rows.")
    with tempfile.TemporaryDirectory() as scratch:
        args.output_dir, args.model_init_kwargs, args.precompute_ref_logps = scratch, None, False
        args.push_to_hub, args.report_to = False, []
        trainer = load_trainer(args, model, folder, rows.select(show.rows))
        if len(trainer.eval_dataset) < len(show.rows):
            raise ValueError("Some of --rows were dropped, for the reasons above: name others, or raise max_length.")
        heatmaps = [heatmap(trainer, n, row) for n, row in zip(show.rows, trainer.eval_dataset, strict=True)]
    page = Path(show.page) if show.page else folder / "masks.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    title = f"{args.mask} masks, {'independent' if args.independent else 'common'}: {folder.name}"
    write_atomic(page, render(title, heatmaps, history(folder)).encode())
    print(f"{page} is ready.")
    return page


def load_trainer(args: SparsePOConfig, model: ModelArguments, folder: Path, rows) -> SparsePOTrainer:
    """A trainer with the policy and the masks of `folder`, and the model that the run started from as reference."""
    init_kwargs = {"revision": model.model_revision, "dtype": settle_dtype(model.dtype, args.device)[0]}
    reference = policies.load_policy(model.model_name_or_path, init_kwargs=init_kwargs)
    trainer = SparsePOTrainer(
        load_start(model.model_name_or_path, folder, init_kwargs=init_kwargs),
        ref_model=reference,
        args=args,
        eval_dataset=rows,
        processing_class=policies.load_tokenizer(reference),
    )
    if trainer.mask_heads is not None:
        trainer.mask_heads.restore(read_heads(folder)[1])
    return trainer


def heatmap(trainer: SparsePOTrainer, number: int, row: dict) -> Heatmap:
    """The best and the worst response of a tokenised row with their per-token values."""
    if len(set(row["scores"])) == 1:
        raise ValueError(f"--rows {number}: its scores are all equal, so nothing is chosen or rejected. Name another.")
    terms = trainer.token_values([row])
    decode = trainer.processing_class.decode
    mask = torch.ones(1, len(row["scores"]), dtype=torch.bool)
    sides = {}
    for side, slot in zip(("chosen", "rejected"), best_and_worst(torch.tensor([row["scores"]]), mask), strict=True):
        ids = row["response_ids"][int(slot)]
        values = {name: value[0, int(slot), : len(ids)].tolist() for name, value in terms.items()}
        sides[side] = (token_texts(ids, decode), values)
    return Heatmap(number, decode(row["prompt_ids"]), sides)


def token_texts(ids: list[int], decode) -> list[str]:
    """The text that each token adds; the last token of a character that needs several has all of it."""
    texts, done = [], ""
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        whole = not text.endswith("\ufffd") or end == len(ids)
        texts.append(text[len(done) :] if whole else "")
        done = text if whole else done
    return texts


def history(folder: Path) -> list[dict]:
    """The log of the run: of the folder, or of its newest checkpoint."""
    state = folder / "trainer_state.json"
    if not state.is_file():
        last = last_checkpoint(folder)
        if last is None:
            return []
        state = Path(last) / "trainer_state.json"
    return json.loads(state.read_text())["log_history"]


if __name__ == "__main__":
    logging.set_verbosity_error()
    main(sys.argv[1:])
