"""SGPO: a model learns to improve its own answers, and then to prefer the improved ones (DPO).

Paper: "SGPO: Self-Generated Preference Optimization based on Self-Improver", arXiv 2507.20181. This is a
reconstruction from the abstract and the figure caption: neither the paper's text nor its code was available to us, so
every template, filter, hyper-parameter and equation beyond DPO is ours. docs/results/sgpo.md lists what is unknown.

`SGPOTrainer` is the DPO stage. `SGPOTrainer.run`, which the launcher calls, runs all stages; their parts are in
this folder: prompts, filters, reviser, improver training, stages on disk, what is watched.
"""

from pathlib import Path

from datasets import Dataset
from torch import Tensor

from ..data.load import name_of
from ..dpo import DPOTrainer, dpo_loss
from ..forward.policy import load_tokenizer
from ..forward.run import agreement
from ..generation.start import load_start
from ..metrics import best_and_worst
from ..rounds import refuse_unsupported
from ..runs.checkpoints import last_checkpoint
from ..runs.settings import policy_settings
from .checks import check_models, refuse_options, refuse_vllm
from .config import SGPOConfig
from .data import read_rows, without
from .filters import filter_statistic, iqr_keep
from .health import Watch
from .pipeline import run_stages
from .run import Run
from .text import improver_prompt, reviser_prompt
from .training import pair

HELD_OUT = "their prompts are held out"

__all__ = [
    "SGPOConfig", "SGPOTrainer", "filter_statistic", "improver_prompt", "iqr_keep", "reviser_prompt", "sgpo_loss",
]  # fmt: skip


def sgpo_loss(
    logratios: Tensor,
    scores: Tensor,
    mask: Tensor,
    *,
    logps: Tensor | None = None,
    lengths: Tensor | None = None,
    beta: float = 0.1,
    sft_weight: float = 0.0,
    **options,
) -> Tensor:
    """DPO loss of each prompt, plus `sft_weight` times the chosen response's negative log-likelihood per token.

    Args:
        logratios, scores, mask, options: as in `dpo_loss`, under the plain prompt for every response.
        logps, lengths: (B,K) log pi(y|x) summed over the tokens, and their number; needed with `sft_weight`.

    Returns:
        (B,) losses; the term is about the first of the best responses.

    Raises:
        ValueError: `logps` or `lengths` is missing, or an option is outside its range.
    """
    losses = dpo_loss(logratios, scores, mask, beta=beta, **options)
    if not sft_weight:
        return losses
    if logps is None or lengths is None:
        raise ValueError("sft_weight needs logps and lengths.")
    best = best_and_worst(scores, mask)[0].unsqueeze(-1)
    return losses - sft_weight * (logps.gather(-1, best) / lengths.gather(-1, best).clamp(min=1)).squeeze(-1)


class SGPOTrainer(DPOTrainer):
    """The DPO stage of SGPO: rows of an improved response over the response it was made of.

    The prompt is the plain one on both sides, and the reference is the policy as it starts: the improver's checkpoint.
    From Python it trains on pairs that are there already; `run` makes them.

    Raises:
        ValueError: an option of the other stages is set, which would have no effect, or `ref` is `initial` without a
            `ref_model`.
    """

    config_class = SGPOConfig
    method = "SGPO"
    paper = ("SGPO: Self-Generated Preference Optimization based on Self-Improver", "2507.20181")
    unsupported_engines = ("fsdp", "zero3")

    def __init__(self, model, ref_model=None, args: SGPOConfig | None = None, *more, **kwargs):
        if isinstance(args, SGPOConfig):
            _refuse_stages(args, ref_model)
        super().__init__(model, ref_model, args, *more, **kwargs)
        self._starts_at_reference = not self.reference.given

    def loss(self, batch, policy, reference):
        args, scores, mask = self.args, batch["scores"], batch["mask"]
        logps, lengths = policy.logps.sum(-1), batch["response_mask"].sum(-1)
        logratios = logps - reference.logps.sum(-1)
        self._check_start(logratios.detach(), lengths)
        options = {"pairs": args.pairs, "label_smoothing": args.label_smoothing}
        losses = sgpo_loss(
            logratios,
            scores,
            mask,
            logps=logps,
            lengths=lengths,
            beta=args.beta,
            sft_weight=args.sft_weight,
            **options,
        )
        return losses, self.ranking_metrics(batch, args.beta * logratios.detach())

    def _check_start(self, logratios: Tensor, lengths: Tensor) -> None:
        """Before its first step the policy is its reference, so the loss of DPO is ln 2: a stale one would show here.

        Raises:
            RuntimeError: it is not.
        """
        if not (self._starts_at_reference and self._untouched and self.model.training):
            return
        self._starts_at_reference = False  # once is enough
        difference = float((logratios.abs() / lengths.clamp(min=1)).max())
        if difference > agreement(self.model):
            raise RuntimeError(
                f"Before the first step the policy differs from its reference by {difference:.2g} per token, so the "
                "reference is not the checkpoint that the policy starts from."
            )

    @classmethod
    def planned_rows(cls, args: SGPOConfig, data) -> tuple[Dataset, list[str]]:
        """Rows in place of the pairs, which do not exist before the run, and what to know of them; for `--dry_run`.

        Each prompt of the pairs has two reference answers of the improver's rows for its two responses.
        """
        refuse_options(args)
        rows, prompts, held_out, conversations = _read_data(args, data)
        answers = [row["reference"] for row in rows]
        pairs = [
            pair({"prompt": row["prompt"], "chosen": answers[i % len(rows)], "rejected": answers[(i + 1) % len(rows)]})
            for i, row in enumerate(prompts)
        ]
        first = "" if conversations is None else f"fine-tuning on {len(conversations):,} conversations, "
        return Dataset.from_list(pairs), [
            f"Described is the DPO stage of one of {args.rounds} round(s). Its pairs do not exist yet: the reference "
            f"answers of the improver's rows stand for their responses, and none of the {len(prompts):,} is dropped.",
            f"Not in time and memory: {first}the improver's training on {len(rows):,} rows of at most "
            f"{args.improver['max_length']} tokens, without a reference; and sampling: about {2 * len(rows):,} "
            f"answers for the improver, {2 * len(prompts):,} for pairs, and {len(held_out):,} often to measure.",
        ]

    @classmethod
    def run(cls, args: SGPOConfig, data, model: str, *, quantization_config=None, peft_config=None) -> None:
        """All stages from one recipe, in `args.output_dir`, where the last model lies in the end.

        Raises:
            ValueError: what cannot be run; a stage of other settings; no row is left.
        """
        refuse_unsupported(args, "SGPO")
        refuse_options(args)
        refuse_vllm(args, full=peft_config is None and quantization_config is None)
        check_models(args)
        keywords = {"init_kwargs": args.model_init_kwargs, "quantization_config": quantization_config}

        def load(start: Path | None) -> tuple:
            return load_start(model, start, trainable=True, **keywords), peft_config if start is None else None

        def train_dpo(rows: list[dict], start: Path | None, reference: tuple, folder: Path, seed: int) -> None:
            policy, adapter = load(start)
            trainer = cls(
                policy,
                ref_model=load_start(model, *reference, **keywords) if reference else None,
                args=args.of_dpo(folder, seed),
                train_dataset=Dataset.from_list(rows),
                peft_config=adapter,
                processing_class=load_tokenizer(policy),
                callbacks=[Watch()],
            )
            trainer.train_and_save(last_checkpoint(folder), name_of(data))

        rows, prompts, held_out, conversations = _read_data(args, data)
        options = policy_settings(model, quantization_config, peft_config)
        run_stages(Run(
            args, model, rows, prompts, held_out, conversations, load, train_dpo, options, quantization_config,
        ))  # fmt: skip


def _refuse_stages(args: SGPOConfig, ref_model) -> None:
    if unread := args.of_other_stages():
        raise ValueError(
            f"{', '.join(unread)} would have no effect: SGPOTrainer is the DPO stage alone, on pairs that are there "
            "already. scripts/train.py runs all stages; leave these options out, or take args.of_dpo()."
        )
    if args.ref == "initial" and ref_model is None:
        raise ValueError("ref='initial' has no effect without ref_model: hand over the model before all rounds.")


def _read_data(args: SGPOConfig, data) -> tuple[list[dict], list[dict], list[dict], list[dict] | None]:
    """Rows of the improver, of the pairs, to measure on, and for supervised fine-tuning; no prompt in two of them."""
    source = {"source": args.sft_target_source, "as_chat": args.as_chat, "invalid": args.invalid_rows}
    if len(data.names) > 1 or data.dataset_weights is not None:
        raise ValueError("SGPO reads one data set: name one in dataset_name, without dataset_weights.")
    own = source | {"data_format": data.data_format, "config": data.dataset_config}  # of dataset_name
    with args.main_process_first(desc="reading the data"):
        held_out = []
        if data.dataset_test_split:
            held_out = read_rows(data.dataset_name, data.dataset_test_split, needs_reference=False, **own)
        rows = read_rows(data.dataset_name, data.dataset_train_split, limit=data.max_train_rows, **own)
        rows = without(rows, held_out, "improver prompts", HELD_OUT)
        if args.preference_dataset is None and args.preference_split is None:
            raise ValueError("preference_split is missing: name the prompts that the pairs are made of.")
        prompts = read_rows(
            args.preference_dataset or data.dataset_name, args.preference_split, limit=args.max_preference_rows,
            needs_reference=args.reference_in_input, **(source if args.preference_dataset else own),
        )  # fmt: skip
        prompts = without(prompts, held_out, "preference prompts", HELD_OUT)
        prompts = without(prompts, rows, "preference prompts", "the improver is trained on them")
        conversations = None
        if args.sft is not None:
            options = {"limit": args.sft.get("max_rows"), "repeats": True}
            conversations = read_rows(args.sft["dataset_name"], args.sft.get("dataset_split"), **options, **source)
            conversations = without(conversations, held_out, "conversations", HELD_OUT)
    for what, found in (("improver", rows), ("preference", prompts)):
        if not found:
            raise ValueError(f"no {what} prompt is left: its data set has the prompts of the others.")
    return rows, prompts, held_out, conversations
