"""Shows what the masks of a SparsePO run say: token heat-maps of some rows, above what every run's page has.

    polypo masks --checkpoint runs/sparsepo-demo --config configs/sparsepo/demo.yaml --rows 0 3

`--config` is the recipe of the run, so model, data and mask options are the same; any field can be given as a flag.
`--checkpoint` is a checkpoint or the output folder, `--rows` count the rows of the split that were kept. The page
(`--page`, by default masks.html in the checkpoint) needs nothing but itself. `polypo report FOLDER --config ...` does
the same.
"""

import tempfile
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, replace
from itertools import compress
from pathlib import Path

from datasets import Dataset

from polypo.recipes import holds_policy

from .. import SparsePOConfig, SparsePOTrainer
from ..config import option
from ..data.rows import trained_tokens
from ..forward import policy as policies
from ..generation.start import load_start
from ..pages.page import blocks, write
from ..pages.training import sections
from ..runs.checkpoints import STATE
from ..runs.record import RECORD, read_run
from ..sparsepo.learned import FILE
from . import config_files
from .arguments import DataArguments, ModelArguments, set_model_options

MAPS: dict[str, Callable[[dict], list[float]]] = {  # title: the values of the tokens from their terms
    "reward mask m_u": lambda v: v["reward_mask"],
    "KL mask m_d": lambda v: v["kl_mask"],
    "m_u × log-ratio": lambda v: [m * x for m, x in zip(v["reward_mask"], v["logratios"], strict=True)],
    "m_d × KL": lambda v: [m * x for m, x in zip(v["kl_mask"], v["kls"], strict=True)],
}


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
        ValueError: the run's recipe was not given, the folder holds no policy or no masks, or a row cannot be shown.
    """
    show, data, args, model = config_files.read(argv, ShowArguments, DataArguments, SparsePOConfig, ModelArguments)
    folder = Path(show.checkpoint)
    if not holds_policy(folder):
        raise ValueError(f"{folder} holds no policy: name the output folder of a finished run, or a checkpoint.")
    if not (model.model_name_or_path and data.dataset_name):
        raise ValueError("The masks are read with the run's own model and data: give its recipe with --config.")
    with tempfile.TemporaryDirectory() as scratch:
        args.output_dir, args.precompute_ref_logps, args.push_to_hub = scratch, False, False
        args.report_to, args.invalid_rows = [], "error"
        trainer = load_trainer(args, model, folder, shown_rows(show, data, args))
        rows = trainer.eval_dataset
        assert isinstance(rows, Dataset)
        shown = {f"Row {n}": row_parts(trainer, n, row) for n, row in zip(show.rows, rows, strict=True)}
    title = f"{args.mask} masks, {'independent' if args.independent else 'common'}: {folder.name}"
    target = Path(show.page) if show.page else folder / "masks.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    logged = any((folder / name).is_file() for name in (STATE, RECORD))  # not of a policy that was saved elsewhere
    shared = sections([read_run(folder)]) if logged else {}
    return write(target, title, {"": shared.pop("", [])} | shown | shared)


def shown_rows(show: ShowArguments, data: DataArguments, args: SparsePOConfig) -> Dataset:
    """Raises ValueError where the split, or a row of it, is not there."""
    rows = replace(data, streaming=False).load(args, show.split)
    if rows is None:
        raise ValueError("--split test: the recipe names no test split: give --dataset_test_split.")
    assert isinstance(rows, Dataset)
    if outside := [n for n in show.rows if not 0 <= n < len(rows)]:
        raise ValueError(f"--rows {outside[0]}: the {show.split} split has the rows 0 to {len(rows) - 1}.")
    return rows.select(show.rows)


def load_trainer(args: SparsePOConfig, model: ModelArguments, folder: Path, rows) -> SparsePOTrainer:
    """A trainer with the policy and the masks of `folder`, and the model that the run started from as reference."""
    set_model_options(args, model)
    init_kwargs, args.model_init_kwargs = args.model_init_kwargs, None  # which no loaded model takes
    reference = policies.load_policy(model.model_name_or_path, init_kwargs=init_kwargs)
    trainer = SparsePOTrainer(
        load_start(model.model_name_or_path, folder, init_kwargs=init_kwargs),
        ref_model=reference,
        args=args,
        eval_dataset=rows,
        processing_class=policies.load_tokenizer(reference),
    )
    if trainer.mask_heads is not None:
        if not (folder / FILE).is_file():
            raise ValueError(f"{folder} is no SparsePO run with a learned mask: it holds no {FILE}.")
        trainer.mask_heads.restore(folder)
    return trainer


def row_parts(trainer: SparsePOTrainer, number: int, row: dict) -> list[str]:
    """The prompt of a tokenised row, and what is trained on of its best and worst response, once per map."""
    scores = row["scores"]
    if len(set(scores)) == 1:
        raise ValueError(f"--rows {number}: its scores are all equal, so nothing is chosen or rejected. Name another.")
    terms, decode, sides = trainer.token_values([row]), trainer.processing_class.decode, {}
    for side, slot in (("chosen", scores.index(max(scores))), ("rejected", scores.index(min(scores)))):
        texts, shown = token_texts(row["response_ids"][slot], decode), trained_tokens(row)[slot]
        values = {name: list(compress(value[0, slot].tolist(), shown)) for name, value in terms.items()}
        sides[side] = list(compress(texts, shown)), values
    return [blocks.prompt(decode(row["prompt_ids"])), *(heatmap(title, sides, value) for title, value in MAPS.items())]


def heatmap(title: str, sides: dict[str, tuple[list[str], dict]], value: Callable[[dict], list[float]]) -> str:
    """Tokens on a coloured ground; both sides share a scale, white at 0, blue upwards, red downwards."""
    values = {side: value(terms) for side, (_, terms) in sides.items()}
    flat = [x for side in values.values() for x in side]
    top = max(map(abs, flat))
    ends = [-top, 0.0, top] if min(flat) < 0 else [0.0, top]
    shown = [
        (side, summary(values[side]), [
            (text.replace("\n", "↵\n") or "∅", f"{x:.4g}", colour(x, top))
            for text, x in zip(texts, values[side], strict=True)
        ])
        for side, (texts, _) in sides.items()
    ]  # fmt: skip
    return blocks.heatmap(title, [(f"{end:.3g}", colour(end, top)) for end in ends], shown)


def colour(value: float, top: float) -> str:
    rgb = "31,111,235" if value >= 0 else "209,36,47"
    return f"rgba({rgb},{0.75 * abs(value) / top if top else 0.0:.3f})"


def summary(values: list[float]) -> str:
    total = sum(values)
    return f"{100 * values.count(0) / len(values):.0f} % zeros, mean {total / len(values):.3g}, sum {total:.3g}"


def token_texts(ids: list[int], decode) -> list[str]:
    """The text that each token adds; the last token of a character that needs several has all of it."""
    texts, done = [], ""
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        whole = not text.endswith("\ufffd") or end == len(ids)
        texts.append(text[len(done) :] if whole else "")
        done = text if whole else done
    return texts
