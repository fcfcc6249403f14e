"""SparsePO: token weights, many of them exactly 0, on the log-ratio and on the KL of each response token.

Paper: "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks", arXiv 2410.05102. No version of its
text was available to us: the objective and both kinds of masks follow the authors' code of October 2024
(github.com/huawei-noah/HEBO), with its mistakes corrected. TDPO1 and TDPO2 are of arXiv 2404.11999. More than two
responses are our extension.

Left out: the dropout of the mask head, which the released code switches off, and the other activations of its
ablations ("binary" masks have no gradient and never train).
"""

import logging
import math
from typing import Literal

import torch
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled

from ..base import PreferenceTrainer
from ..dpo import dpo_loss, score_pairs
from ..forward import policy as policies
from ..forward.divergence import check_vocabulary, frozen_head
from ..forward.layout import to_responses
from ..forward.run import Forward
from ..metrics import best_and_worst, scores_differ
from ..plackett_luce import plackett_luce_loss
from .activations import activation_mask, find_sites
from .config import SparsePOConfig
from .learned import ATTRIBUTE, MaskHeads, check_engine, regroup, split_state
from .readings import ReadPolicy, ReadReference, activation_means

logger = logging.getLogger(__name__)

DEAD = (
    "The mask is 0 on every token since the last log (%s): nothing is learned through it, and a head whose mixer is "
    "negative stays dead. Raise mask_init_std or set mask_init to dense."
)
SPARSE_AFTER, SPARSE = 100, 1.0  # a mask that shall be sparse has so many percent of zeros after so many steps
DENSE = (
    "The mask (%s) is 0 on %.2g percent of the tokens after %d steps, though an L1 penalty or the released start asks "
    "for zeros: no token is left out. Raise reward_l1, kl_l1 or mask_learning_rate."
)
NORM_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")


def sparsepo_loss(
    logratios: Tensor,
    kls: Tensor,
    reward_mask: Tensor,
    kl_mask: Tensor,
    token_mask: Tensor,
    scores: Tensor,
    mask: Tensor,
    *,
    beta: float,
    reward_l1: float = 0.0,
    kl_l1: float = 0.0,
    ranking: Literal["best_worst", "plackett_luce"] = "best_worst",
) -> Tensor:
    """SparsePO's loss of each prompt: softplus(-beta (f_best - f_worst)) with f = sum_t (m_u logratio + m_d KL).

    The L1 penalties are added to it, and sums over tokens are plain sums. With m_u = m_d = 1 this is TDPO1, with
    m_d = 0 DPO. `plackett_luce` is the likelihood of the whole ranking under beta f. Two responses give the paper's
    loss with either.

    Args:
        logratios: (B,K,R) log pi(y_t) - log pi_ref(y_t).
        kls: (B,K,R) KL(pi_ref || pi) at the positions that predict y_t.
        reward_mask, kl_mask: (B,K,R) weights m_u and m_d, 0 or more.
        token_mask: (B,K,R) true for response tokens; elsewhere the four tensors above may hold anything.
        scores: (B,K) data rewards, higher is better.
        mask: (B,K) true for real responses.
        reward_l1, kl_l1: penalty on the sums of the masks over all tokens of the responses that are compared.

    Returns:
        (B,) losses, exactly 0 and without gradient for prompts whose scores are all equal.
    """
    tokens = token_mask & mask.unsqueeze(-1)
    values = [x.masked_fill(~tokens, 0) for x in (logratios, kls, reward_mask, kl_mask)]
    logratios, kls, reward_mask, kl_mask = values
    f = (reward_mask * logratios + kl_mask * kls).sum(-1)
    sizes = (reward_l1 * reward_mask.abs() + kl_l1 * kl_mask.abs()).sum(-1)
    if ranking == "plackett_luce":
        differ = scores_differ(scores, mask)
        return plackett_luce_loss(f, scores, mask, beta=beta) + torch.where(differ, sizes.sum(-1), 0.0)
    pairs = score_pairs(scores, mask, "best_worst")
    penalties = ((sizes.unsqueeze(-1) + sizes.unsqueeze(-2)) * pairs).sum((-2, -1)) / pairs.sum((-2, -1)).clamp(min=1)
    return dpo_loss(f, scores, mask, beta=beta) + penalties


def tdpo2_loss(
    logratios: Tensor, kls: Tensor, token_mask: Tensor, scores: Tensor, mask: Tensor, *, beta: float, alpha: float
) -> Tensor:
    """TDPO2 (arXiv 2404.11999), best against worst: the KL weighs alpha, and that of the better response is constant.

    Arguments as in `sparsepo_loss`. Returns (B,) losses.
    """
    tokens = token_mask & mask.unsqueeze(-1)
    best = score_pairs(scores, mask, "best_worst").any(-1).unsqueeze(-1)
    kls = torch.where(best, kls.detach(), kls)
    f = (logratios + alpha * kls).masked_fill(~tokens, 0).sum(-1)
    return dpo_loss(f, scores, mask, beta=beta)


def mask_statistics(values: Tensor, token_mask: Tensor) -> dict[str, Tensor]:
    """Of mask values (B,R) at response tokens: percent of exact zeros, mean, L1 norm, 1 if all are 0; (B,) each.

    NaN for a response without tokens.
    """
    counts = token_mask.sum(-1)
    values = values.masked_fill(~token_mask, 0)
    zeros = (token_mask & (values == 0)).sum(-1)
    norm = values.abs().sum(-1)
    statistics = {"sparsity": 100 * zeros.to(norm) / counts, "mean": norm / counts, "l1": norm,
                  "dead": (zeros == counts).to(norm)}  # fmt: skip
    return {name: value.masked_fill(counts == 0, math.nan) for name, value in statistics.items()}


class SparsePOTrainer(PreferenceTrainer):
    """Trains with `sparsepo_loss` (or `tdpo2_loss`) on rows of two or more scored responses.

    A learned mask is part of the policy while it trains. `save_model` writes it to a file of its own; the saved policy
    is an ordinary model or adapter, since masks are not used for generation.

    Raises:
        ValueError: beyond those of `PreferenceTrainer`, a model, adapter or engine that a mask or the KL cannot use.
    """

    config_class = SparsePOConfig
    args: SparsePOConfig
    method = "SparsePO"
    paper = ("SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks", "2410.05102")
    reference_per_token = True

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.mask_heads: MaskHeads | None = None
        self._frozen = None
        self._called_dense: set[str] = set()
        if self.args.needs_states:
            self._prepare_masks()

    # Loss.

    def forward(self, model, batch) -> Forward:
        """What the reference says: log-probabilities, and what masks and KL need of its states."""
        kind = self.args.mask
        if not self.args.needs_states:
            return self.runner(model, batch)
        reading = ReadReference(self._frozen, layers=kind == "learned", activations=kind == "activations")
        return self.runner(model, batch, reading)

    def policy_forward(self, model, batch, reference) -> Forward:
        frozen = None if self.args.kl_term == "none" else self._frozen
        return self.runner(model, batch, ReadPolicy(reference.values, frozen))

    def loss(self, batch, policy, reference):
        args, scores, mask, tokens = self.args, batch["scores"], batch["mask"], batch["response_mask"]
        terms = self.token_terms(batch, policy, reference)
        if args.kl_term == "tdpo2":
            both = terms["logratios"], terms["kls"]
            losses = tdpo2_loss(*both, tokens, scores, mask, beta=args.beta, alpha=args.tdpo2_alpha)
        else:
            losses = sparsepo_loss(
                **terms, token_mask=tokens, scores=scores, mask=mask, beta=args.beta, ranking=args.ranking,
                **args.penalties,
            )  # fmt: skip
        return losses, self._metrics(batch, {name: value.detach() for name, value in terms.items()})

    def token_terms(self, batch, policy: Forward, reference: Forward) -> dict[str, Tensor]:
        """Per-token log-ratios, KLs and both masks, each (B,K,R) and 0 where there is no token."""
        tokens, args = batch["response_mask"], self.args
        kls = policy.values.get("kls")
        terms = {
            "logratios": policy.logps - reference.logps,
            "kls": torch.zeros_like(policy.logps) if kls is None else to_responses(kls, tokens),
        }
        masks = self._masks(tokens, policy, reference)
        shared = masks.get("common")
        for name in ("reward", "kl"):
            constant = float(name == "reward" or args.kl_term != "none")
            found = masks.get(name, shared) if name in args.masked else None
            terms[f"{name}_mask"] = tokens * constant if found is None else found
        return terms

    @torch.no_grad()
    def token_values(self, rows: list[dict]) -> dict[str, Tensor]:
        """`token_terms` of tokenised rows, as they are in a data set of this trainer."""
        batch = self._prepare_inputs(self.collate(rows))
        self.model.eval()
        reference = self._reference_forward(self.model, batch)
        with self.accelerator.autocast():
            policy = self.policy_forward(self.model, batch, reference)
        return self.token_terms(batch, policy, reference)

    def _masks(self, tokens: Tensor, policy: Forward, reference: Forward) -> dict[str, Tensor]:
        """The masks (B,K,R) by name: "common", or "reward" and "kl"; empty where all are constant."""
        kind = self.args.mask
        if kind == "learned":
            return {name: to_responses(policy.values[name], tokens) for name in self.args.head_names}
        if kind == "activations":
            return {"common": activation_mask(activation_means(reference.values, tokens), tokens)}
        if kind == "random":
            names = self.args.masked if self.args.independent else ["common"]
            return {name: torch.rand_like(policy.logps) * tokens for name in names}
        return {}

    def _metrics(self, batch, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        args, tokens = self.args, batch["response_mask"]
        scale = args.tdpo2_alpha if args.kl_term == "tdpo2" else 1.0
        masked_kls = scale * terms["kl_mask"] * terms["kls"]
        rewards = args.beta * (terms["reward_mask"] * terms["logratios"] + masked_kls).sum(-1)
        metrics = self.ranking_metrics(batch, rewards)
        plain = self.ranking_metrics(batch, args.beta * terms["logratios"].sum(-1))
        metrics |= {f"dpo_{name}": plain[name] for name in ("rewards/margins", "rewards/accuracies")}
        best, worst = best_and_worst(batch["scores"], batch["mask"])
        prompts = torch.arange(len(best), device=best.device)
        for side, slot in (("chosen", best), ("rejected", worst)):
            if args.kl_term != "none":  # rounding can leave a KL just below 0
                metrics[f"kl/{side}"] = terms["kls"].clamp(min=0).sum(-1)[prompts, slot]
                metrics[f"masked_kl/{side}"] = masked_kls.clamp(min=0).sum(-1)[prompts, slot]
            for name in args.masked:
                found = mask_statistics(terms[f"{name}_mask"][prompts, slot], tokens[prompts, slot])
                metrics |= {f"mask_{what}/{name}_{side}": value for what, value in found.items()}
        return metrics

    def log(self, logs, *arguments, **keywords):
        """Also warns of a learned mask that was 0 on every token of the best and worst responses, and once of one that
        is 0 on less than `SPARSE` percent of them after `SPARSE_AFTER` steps, where it was meant to be sparse."""
        super().log(logs, *arguments, **keywords)
        args, step, logged = self.args, self.state.global_step, self.state.log_history[-1]
        for name in args.masked if args.head_names and f"mask_mean/{args.masked[0]}_chosen" in logged else ():
            mean, sparsity = (
                sum(logged[f"mask_{kind}/{name}_{side}"] for side in ("chosen", "rejected")) / 2
                for kind in ("mean", "sparsity")
            )
            asked = args.mask_init == "released" or args.penalties[f"{name}_l1"] > 0
            if mean == 0:
                logger.warning(DEAD, name)
            elif asked and step >= SPARSE_AFTER and sparsity < SPARSE and name not in self._called_dense:
                self._called_dense.add(name)
                logger.warning(DENSE, name, sparsity, step)

    # The reference's head and the mask heads.

    def _prepare_masks(self) -> None:
        args, policy, given = self.args, policies.base_model(self.model), self.reference
        assert given is not None
        source = self.accelerator.unwrap_model(given.model) if given.own else self.model
        reference = policies.base_model(source)
        with_adapter = given.own and source is not reference or given.adapter is not None
        self._frozen = frozen_head(reference, args.device, with_adapter=with_adapter)
        check_vocabulary(policy, reference)
        if args.mask == "activations":
            find_sites(reference)
        if args.head_names:
            check_engine(self.accelerator, self.optimizer)
            of = reference.config.get_text_config()
            eps = next((getattr(of, name) for name in NORM_EPSILONS if getattr(of, name, None)), 1e-5)
            self.mask_heads = MaskHeads(
                args.head_names, of.num_hidden_layers, of.hidden_size, eps=eps, seed=args.seed,
                std=args.mask_init_std, start=args.mask_init,
            )  # fmt: skip
            one_dtype = is_deepspeed_zero3_enabled() or self.is_fsdp_enabled  # sharding keeps it in a group of weights
            dtype = policy.dtype if one_dtype else torch.promote_types(policy.dtype, torch.float32)
            policy.add_module(ATTRIBUTE, self.mask_heads.to(policy.device, dtype))  # before an engine wraps it

    def create_optimizer(self, model=None):
        """The Trainer's optimizer, with the mask heads in groups of their own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.mask_heads is not None:
            rate = self.args.learning_rate if self.args.mask_learning_rate is None else self.args.mask_learning_rate
            policy = self.model if model is None else model
            regroup(optimizer, policy, learning_rate=rate, weight_decay=self.args.mask_weight_decay)
        return optimizer

    # Saving.

    def _save(self, output_dir=None, state_dict=None):
        if self.mask_heads is None:
            return super()._save(output_dir, state_dict)
        state_dict, heads = split_state(self.model.state_dict() if state_dict is None else state_dict)
        super()._save(output_dir, state_dict)
        if self.args.should_save and heads:  # empty where DeepSpeed keeps the weights in its own files only
            self.mask_heads.save(self.args.output_dir if output_dir is None else output_dir, heads)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore_masks(resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        self._restore_masks(self.state.best_model_checkpoint)

    def _restore_masks(self, folder: str) -> None:
        if self.mask_heads is not None and not self.is_deepspeed_enabled:
            self.mask_heads.restore(folder)

    def _issue_warnings_after_load(self, load_result):
        """The mask heads are missing from the policy's file on purpose."""
        missing = [name for name in load_result.missing_keys if f"{ATTRIBUTE}." not in name]
        super()._issue_warnings_after_load(type(load_result)(missing, load_result.unexpected_keys))
