"""Discriminative Constrained Optimization (DisCO; Li et al., arXiv 2505.12366)."""

import math
from dataclasses import dataclass, field

import torch

from ..core import MethodConfig, MethodTrainer, TokenBatch


@dataclass
class DisCOConfig(MethodConfig):
    r"""
    Configuration of [`DisCOTrainer`]. Defaults are those of the paper and its code.

    Parameters:
        disco_objective (`str`, *optional*, defaults to `"disco"`):
            `"disco"` contrasts correct answers with a soft maximum over wrong ones, `"disco_b"` with their mean.
        disco_score (`str`, *optional*, defaults to `"logL"`):
            Score of an answer: its mean token log-probability (`"logL"`) or mean token ratio (`"Lratio"`).
        disco_tau (`float`, *optional*):
            Temperature of the soft maximum; by default 10 for `"logL"` and 1 for `"Lratio"`.
        disco_beta (`float`, *optional*, defaults to `1000.0`):
            Weight of the constraint on the KL divergence to the policy that generated.
        disco_delta (`float`, *optional*, defaults to `1e-4`):
            Divergence up to which the constraint is silent.
        disco_kl_estimator (`str`, *optional*, defaults to `"kl"`):
            `"kl"` (k1) or `"low_var_kl"` (k3).
        disco_threshold (`float`, *optional*):
            Answers with at least this reward are correct, the others wrong. By default only rewards of exactly 1 and
            0 count.
    """

    vllm_importance_sampling_correction: bool = field(
        default=False, metadata={"help": "Weigh tokens by the mismatch with vLLM; DisCO has no weights of tokens."}
    )
    disco_objective: str = field(
        default="disco", metadata={"help": "Soft maximum or mean.", "choices": ["disco", "disco_b"]}
    )
    disco_score: str = field(default="logL", metadata={"help": "Score of an answer.", "choices": ["logL", "Lratio"]})
    disco_tau: float | None = field(default=None, metadata={"help": "Temperature; None: 10 (logL), 1 (Lratio)."})
    disco_beta: float = field(default=1e3, metadata={"help": "Weight of the constraint."})
    disco_delta: float = field(default=1e-4, metadata={"help": "Divergence that is allowed."})
    disco_kl_estimator: str = field(
        default="kl", metadata={"help": "Estimator of the divergence.", "choices": ["kl", "low_var_kl"]}
    )
    disco_threshold: float | None = field(default=None, metadata={"help": "Least reward of a correct answer."})

    def __post_init__(self):
        super().__post_init__()
        self.check_choices("disco_objective", "disco_score", "disco_kl_estimator")
        if self.disco_tau is None:
            self.disco_tau = 10.0 if self.disco_score == "logL" else 1.0
        self.check_range("disco_tau", self.disco_tau > 0, "positive")
        self.check_range("disco_beta", self.disco_beta >= 0, "at least 0")
        self.check_range("disco_delta", self.disco_delta >= 0, "at least 0")


def disco_objective(
    scores: torch.Tensor,
    positive: torch.Tensor,
    negative: torch.Tensor,
    group_ids: torch.Tensor,
    objective: str = "disco",
    tau: float = 10.0,
) -> torch.Tensor:
    """
    Mean over all questions of (mean score of correct answers) - (soft maximum, or mean, of the scores of wrong ones);
    a question without both counts as 0.

    Args:
        scores (`torch.Tensor`):
            With gradient, shape `(B,)`.
        positive (`torch.Tensor`), negative (`torch.Tensor`):
            Correct and wrong answers, boolean, shape `(B,)`.
        group_ids (`torch.Tensor`):
            Question of each answer, shape `(B,)`.
        objective (`str`, *optional*, defaults to `"disco"`):
            `"disco"` or `"disco_b"`.
        tau (`float`, *optional*, defaults to `10.0`):
            Temperature of the soft maximum.

    Returns:
        `torch.Tensor`: Scalar, to be maximised.
    """
    questions = group_ids.unique()
    total = scores.sum() * 0.0
    for question in questions:
        good, bad = (scores[(group_ids == question) & side] for side in (positive, negative))
        if len(good) == 0 or len(bad) == 0:
            continue
        if objective == "disco_b":
            total = total + good.mean() - bad.mean()
        else:
            log_mean = torch.logsumexp(bad / tau, 0) - math.log(len(bad))
            total = total + good.mean() - tau * log_mean
    return total / max(len(questions), 1)


def disco_scores(
    logps: torch.Tensor, old_logps: torch.Tensor, mask: torch.Tensor, score: str = "logL"
) -> torch.Tensor:
    """
    Score of each answer: mean over its tokens of the log-probability, or of the probability ratio.

    Args:
        logps (`torch.Tensor`):
            With gradient, shape `(B, T)`.
        old_logps (`torch.Tensor`), mask (`torch.Tensor`):
            Shape `(B, T)`.
        score (`str`, *optional*, defaults to `"logL"`):
            `"logL"` or `"Lratio"`.

    Returns:
        `torch.Tensor`: Shape `(B,)`; 0 for an answer without tokens.
    """
    valid = mask.bool()
    terms = logps if score == "logL" else torch.exp((logps - old_logps).clamp(-20, 20))
    return torch.where(valid, terms, 0.0).sum(1) / valid.sum(1).clamp(min=1)


def disco_penalty(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    mask: torch.Tensor,
    beta: float = 1e3,
    delta: float = 1e-4,
    estimator: str = "kl",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Squared hinge on the KL divergence to the policy that generated: `beta / 2 * max(KL - delta, 0) ** 2`, whose
    gradient is the code's (the paper's is twice as large).

    Args:
        logps (`torch.Tensor`):
            With gradient, shape `(B, T)`.
        old_logps (`torch.Tensor`), mask (`torch.Tensor`):
            Shape `(B, T)`.
        beta (`float`, *optional*, defaults to `1000.0`), delta (`float`, *optional*, defaults to `1e-4`):
            Weight and allowance.
        estimator (`str`, *optional*, defaults to `"kl"`):
            `"kl"` (k1) or `"low_var_kl"` (k3), averaged over all tokens.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the penalty and the KL estimate, scalars.
    """
    valid = mask.bool()
    gap = torch.where(valid, logps - old_logps, 0.0)
    terms = -gap if estimator == "kl" else torch.where(valid, gap.exp() - 1 - gap, 0.0)
    kl = terms.sum() / valid.sum().clamp(min=1)
    return beta / 2 * (kl - delta).clamp(min=0) ** 2, kl


class DisCOTrainer(MethodTrainer):
    """
    DisCO: Discriminative Constrained Optimization ([arXiv 2505.12366](https://huggingface.co/papers/2505.12366)). The
    scores of correct answers are raised above those of wrong ones, every question weighing the same, while a
    constraint keeps the policy near the one that generated. Advantages, clipping and the aggregation of `loss_type`
    play no part, nor do weights of tokens, TRL's for a mismatch with vLLM included. Questions, and the divergence, are
    taken per micro-batch, as in the authors' code.

    Logs `disco/kl`, `disco/objective` and `disco/valid_questions` (share of the questions with correct and wrong
    answers).
    """

    config_class = DisCOConfig
    replaces = ("policy_loss", "aggregate_loss")
    ignores = ("compute_advantages", "clip_range", "token_weights")
    whole_groups = True
    _name = "DisCO"
    _paper = {
        "title": "DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained Optimization",
        "id": "2505.12366",
        "citation": """\
@inproceedings{li2025disco,
    title     = {{DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained Optimization}},
    author    = {Gang Li and Ming Lin and Tomer Galanti and Zhengzhong Tu and Tianbao Yang},
    booktitle = {Advances in Neural Information Processing Systems},
    year      = 2025,
    eprint    = {arXiv:2505.12366},
}""",
    }

    def __init__(self, model, reward_funcs=None, args=None, *more, **kwargs):
        if args is not None:
            for name, wanted in {
                "importance_sampling_level": "token",
                "off_policy_mask_threshold": None,
                "top_entropy_quantile": 1.0,
                "vllm_importance_sampling_correction": False,
            }.items():
                if getattr(args, name) != wanted:
                    raise ValueError(
                        f"`{name}` is {getattr(args, name)!r}, which has no meaning in DisCO's objective: leave it at "
                        f"{wanted!r}."
                    )
        super().__init__(model, reward_funcs, args, *more, **kwargs)

    def policy_loss(self, tokens: TokenBatch):
        return tokens.logps  # the objective is no sum over tokens: `aggregate_loss` builds it

    def aggregate_loss(self, per_token_loss: torch.Tensor, tokens: TokenBatch):
        args, rewards = self.args, tokens.rewards
        scores = disco_scores(tokens.logps, tokens.old_logps, tokens.mask, args.disco_score)
        answered = tokens.mask.any(1) & ~rewards.isnan()
        real = tokens.group_ids >= 0  # the others only fill up the micro-batch
        threshold = args.disco_threshold
        positive = answered & (rewards == 1 if threshold is None else rewards >= threshold)
        negative = answered & (rewards == 0 if threshold is None else rewards < threshold)
        scores, positive, negative, groups = (part[real] for part in (scores, positive, negative, tokens.group_ids))
        objective = disco_objective(scores, positive, negative, groups, args.disco_objective, args.disco_tau)
        penalty, kl = disco_penalty(
            tokens.logps, tokens.old_logps, tokens.mask, args.disco_beta, args.disco_delta, args.disco_kl_estimator
        )
        questions = groups.unique()
        both = torch.isin(questions, groups[positive]) & torch.isin(questions, groups[negative])
        count = torch.tensor(float(len(questions)))
        self.log_token_metric("disco/kl", kl * tokens.mask.sum(), tokens.mask.sum())
        self.log_token_metric("disco/objective", objective * count, count)
        self.log_token_metric("disco/valid_questions", both.sum(), count)
        return penalty - objective
