"""SGPO: a model learns to improve its own answers, and then to prefer the improved ones (DPO).

Paper: "SGPO: Self-Generated Preference Optimization based on Self-Improver", arXiv 2507.20181. This is a
reconstruction from the abstract and the figure caption: neither the paper's text nor its code was available to us, so
every template, filter, hyper-parameter and equation beyond DPO is ours. docs/sgpo.md lists what is unknown.

`SGPOTrainer` is the DPO stage; `SGPOTrainer.run` runs all stages, whose parts are in this folder.
"""

import itertools

from datasets import Dataset
from torch import Tensor

from ..config import PreferenceConfig
from ..data.drops import collected_reports
from ..data.load import name_of
from ..dpo import DPOTrainer, dpo_loss
from ..forward.run import agreement
from ..generation.scorer import check_scorer
from ..metrics import best_and_worst
from ..rounds import refuse_unsupported
from .config import SGPOConfig
from .data import read_data
from .sampling import load_reviser
from .stages import Run, pair


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
    """
    losses = dpo_loss(logratios, scores, mask, beta=beta, **options)
    if not sft_weight:
        return losses
    assert logps is not None and lengths is not None
    best = best_and_worst(scores, mask)[0].unsqueeze(-1)
    return losses - sft_weight * (logps.gather(-1, best) / lengths.gather(-1, best).clamp(min=1)).squeeze(-1)


class SGPOTrainer(DPOTrainer):
    """The DPO stage of SGPO: rows of an improved response over the response it was made of.

    The prompt is the plain one on both sides, and the reference is the policy as it starts: the improver's checkpoint.
    The constructor takes pairs that are there already; `run` makes them.

    Raises:
        ValueError: `ref` is `initial` without a `ref_model`.
    """

    config_class = SGPOConfig
    args: SGPOConfig
    method = "SGPO"
    single_training = False
    paper = ("SGPO: Self-Generated Preference Optimization based on Self-Improver", "2507.20181")

    def __init__(self, model, ref_model=None, args: SGPOConfig | None = None, *more, **kwargs):
        if args is not None and args.ref == "initial" and ref_model is None:
            raise ValueError("ref='initial' has no effect without ref_model: hand over the model before all rounds.")
        super().__init__(model, ref_model, args, *more, **kwargs)
        assert self.reference is not None
        self._starts_at_reference = not self.reference.given

    def loss(self, batch, policy, reference):
        args, scores, mask = self.args, batch["scores"], batch["mask"]
        logratios = policy.logps.sum(-1) - reference.logps.sum(-1)
        self._check_start(logratios.detach(), batch["response_mask"].sum(-1))
        options = {"beta": args.beta, "pairs": args.pairs, "label_smoothing": args.label_smoothing}
        losses = sgpo_loss(logratios, scores, mask, **options)  # the base adds the SFT term
        return losses, self.ranking_metrics(batch, args.beta * logratios.detach())

    def _check_start(self, logratios: Tensor, lengths: Tensor) -> None:
        """Before its first step the policy is its reference, so the loss of DPO is ln 2: a stale one would show here.

        Raises:
            RuntimeError: it is not.
        """
        if not (self._starts_at_reference and self.untouched and self.model.training):
            return
        self._starts_at_reference = False  # once is enough
        difference = float((logratios.abs() / lengths.clamp(min=1)).max())
        if difference > agreement(self.model):
            raise RuntimeError(
                f"Before the first step the policy differs from its reference by {difference:.2g} per token, so the "
                "reference is not the checkpoint that the policy starts from."
            )

    @classmethod
    def run(cls, args: PreferenceConfig, data, model: str, *, quantization_config=None, peft_config=None) -> None:
        """All stages in `args.output_dir`, where the last policy lies in the end; it goes on from what is done.

        Args:
            data: `{"train": rows, "preferences": rows}`: rows with a prompt and a reference answer for the improver
                (`args.sft_target_source` names its column), and prompts of the pairs. Optional are "test", prompts to
                measure on, and "sft", conversations to fine-tune on first. Or the launcher's data arguments.
            model: path or hub id, loaded with `args.model_init_kwargs`.

        Raises:
            ValueError: what cannot be run; a stage of other settings; no row is left.
        """
        assert isinstance(args, SGPOConfig)
        refuse_unsupported(args, cls.method)
        if args.save_only_model:
            raise ValueError("save_only_model=True leaves out what a killed stage goes on from: set it to false.")
        # Before hours of work for them.
        if args.scorer is not None:
            check_scorer(args.scorer, ["reference"])
        if args.reviser_function is not None:
            load_reviser(args.reviser_function)
        with collected_reports(of="rows of all stages") as left_out:
            rows = read_data(args, data)
        Run(cls, args, model, rows, quantization_config, peft_config, name_of(data), left_out).run()

    @classmethod
    def probed(cls, args: PreferenceConfig, rows: Dataset):
        """The DPO stage; the model before all rounds, which `ref: initial` asks for, is there in the run alone."""
        assert isinstance(args, SGPOConfig)
        args.ref = "improved"
        return cls, args, rows

    @classmethod
    def planned_rows(cls, args: PreferenceConfig, data) -> tuple[Dataset, list[str]]:
        """Rows in place of the pairs, which do not exist before the run, and what to know of them; for `--dry_run`.

        Each prompt of the pairs has two reference answers of the improver's rows for its two responses.
        """
        assert isinstance(args, SGPOConfig)
        rows = read_data(args, data)
        answers = [row["reference"] for row in rows.improver]
        pairs = [
            pair({"prompt": row["prompt"], "chosen": answers[i], "rejected": answers[i - 1]})
            for i, row in zip(itertools.cycle(range(len(answers))), rows.preferences, strict=False)
        ]
        return Dataset.from_list(pairs), [
            f"Described is the DPO stage of one of {args.rounds} round(s). Its pairs do not exist yet: reference "
            f"answers of the improver's rows stand for their responses, and none of the {len(pairs):,} is dropped.",
            f"Not in time and memory: SFT on {len(rows.conversations or []):,} conversations, the improver's training "
            f"on {len(answers):,} rows, and sampling: {2 * len(answers):,} answers for the improver, "
            f"{2 * len(pairs):,} for pairs, and five times {len(rows.held_out):,} to measure.",
        ]
