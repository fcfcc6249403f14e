"""Shows what the masks of a SparsePO run say: token heat-maps of some rows, and sparsity over training.

    polypo report runs/sparsepo-demo --config configs/sparsepo/demo.yaml --rows 0 3

`--config` is the recipe of the run, so model, data and mask options are the same; any field can be given as a flag.
`--checkpoint` (the folder of `polypo report`) is a checkpoint or the output folder, `--rows` count the rows of the
split that were kept. The page (`--page`, by default masks.html in the checkpoint) needs nothing but itself.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers.utils import logging

from .. import SparsePOConfig, SparsePOTrainer
from ..config import option
from ..forward import policy as policies
from ..generation.start import load_start
from ..metrics import best_and_worst
from ..pages import page, plots
from ..precision import settle_dtype
from ..runs.checkpoints import last_checkpoint
from . import config_files
from .arguments import DataArguments, ModelArguments

MAPS: dict[str, Callable[[dict], list[float]]] = {  # title: the values of the tokens from their terms
    "reward mask m_u": lambda v: v["reward_mask"],
    "KL mask m_d": lambda v: v["kl_mask"],
    "m_u × log-ratio": lambda v: [m * x for m, x in zip(v["reward_mask"], v["logratios"], strict=True)],
    "m_d × KL": lambda v: [m * x for m, x in zip(v["kl_mask"], v["kls"], strict=True)],
}
CURVES = {
    "mask_sparsity": "Exact zeros among response tokens, %",
    "mask_mean": "Mean mask value",
    "kl": "KL of a response, nats",
    "masked_kl": "Masked KL of a response, nats",
}
LINES = {"reward_chosen": ("-", plots.AFTER), "reward_rejected": ("--", plots.AFTER), "kl_chosen": ("-", "#d1242f"),
         "kl_rejected": ("--", "#d1242f"), "chosen": ("-", plots.INK), "rejected": ("--", plots.INK)}  # fmt: skip
BLUE, RED = (31, 111, 235), (209, 36, 47)


@dataclass
class ShowArguments:
    """What to show."""

    checkpoint: str = option(MISSING, "Folder of the trained policy and its masks.")
    rows: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Rows to show, counted from 0."})
    split: str = option("train", "Rows of the training or the test split.", choices=["train", "test"])
    page: str | None = option(None, "The page; masks.html in the checkpoint by default.")


def main(argv: list[str]) -> None:
    print(f"{write_report(argv)} is ready.")


def write_report(argv: list[str]) -> Path:
    """Writes the page and returns its path.

    Raises:
        ValueError: the folder holds no policy, or a row cannot be shown.
    """
    show, data, args, model = config_files.read(argv, ShowArguments, DataArguments, SparsePOConfig, ModelArguments)
    folder = Path(show.checkpoint)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{folder} holds no policy: name the output folder of a finished run, or a checkpoint.")
    with tempfile.TemporaryDirectory() as scratch:
        args.output_dir, args.model_init_kwargs, args.precompute_ref_logps = scratch, None, False
        args.push_to_hub, args.report_to, args.invalid_rows = False, [], "error"
        trainer = load_trainer(args, model, folder, data.load(args, show.split).select(show.rows))
        rows = trainer.eval_dataset
        assert isinstance(rows, Dataset)
        parts = [part for n, row in zip(show.rows, rows, strict=True) for part in row_parts(trainer, n, row)]
    title = f"{args.mask} masks, {'independent' if args.independent else 'common'}: {folder.name}"
    target = Path(show.page) if show.page else folder / "masks.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    return page.write(target, title, *curves(folder), *parts)


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
        trainer.mask_heads.restore(folder)
    return trainer


def row_parts(trainer: SparsePOTrainer, number: int, row: dict) -> list[str]:
    """The prompt of a tokenised row, and its best and worst response side by side, once per map."""
    if len(set(row["scores"])) == 1:
        raise ValueError(f"--rows {number}: its scores are all equal, so nothing is chosen or rejected. Name another.")
    terms, decode = trainer.token_values([row]), trainer.processing_class.decode
    best, worst = best_and_worst(torch.tensor([row["scores"]]), torch.ones(1, len(row["scores"]), dtype=torch.bool))
    sides = {}
    for side, slot in (("chosen", int(best)), ("rejected", int(worst))):
        ids = row["response_ids"][slot]
        sides[side] = token_texts(ids, decode), {n: v[0, slot, : len(ids)].tolist() for n, v in terms.items()}
    maps = [heatmap(title, sides, value) for title, value in MAPS.items()]
    return [page.heading(f"Row {number}"), page.prompt(str(decode(row["prompt_ids"]))), *maps]


def heatmap(title: str, sides: dict[str, tuple[list[str], dict]], value: Callable[[dict], list[float]]) -> str:
    """Tokens on a coloured ground; both sides share a scale, white at 0, blue upwards, red downwards."""
    values = {side: value(terms) for side, (_, terms) in sides.items()}
    flat = [x for side in values.values() for x in side]
    top = max(map(abs, flat), default=0.0)
    ends = [-top, 0.0, top] if min(flat, default=0.0) < 0 else [0.0, top]
    shown = [
        (side, summary(values[side]), [
            (text.replace("\n", "↵\n") or "∅", f"{x:.4g}", colour(x, top))
            for text, x in zip(texts, values[side], strict=True)
        ])
        for side, (texts, _) in sides.items()
    ]  # fmt: skip
    return page.heatmap(title, [(f"{end:.3g}", colour(end, top)) for end in ends], shown)


def colour(value: float, top: float) -> str:
    share = abs(value) / top if top > 0 else 0.0
    red, green, blue = BLUE if value >= 0 else RED
    return f"rgba({red},{green},{blue},{0.75 * share:.3f})"


def summary(values: list[float]) -> str:
    count = max(1, len(values))
    zeros = sum(value == 0 for value in values)
    return f"{100 * zeros / count:.0f} % zeros, mean {sum(values) / count:.3g}, sum {sum(values):.3g}"


def token_texts(ids: list[int], decode) -> list[str]:
    """The text that each token adds; the last token of a character that needs several has all of it."""
    texts, done = [], ""
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        whole = not text.endswith("\ufffd") or end == len(ids)
        texts.append(text[len(done) :] if whole else "")
        done = text if whole else done
    return texts


def curves(folder: Path) -> list[str]:
    """What was logged of the masks, in the folder's log or in that of its newest checkpoint."""
    states = [Path(path) / "trainer_state.json" for path in (folder, last_checkpoint(folder)) if path]
    state = next((path for path in states if path.is_file()), None)
    logs = json.loads(state.read_text())["log_history"] if state else []
    charts = []
    for prefix, title in CURVES.items():
        series = [
            plots.logged(logs, f"{prefix}/{name}", name.replace("_", ", "), *look) for name, look in LINES.items()
        ]
        charts.append(plots.chart(title, "step", series, ylim=(0, None)))
    return [page.heading("Over training"), page.figures(charts)] if any(charts) else []


if __name__ == "__main__":
    logging.set_verbosity_error()
    main(sys.argv[1:])
