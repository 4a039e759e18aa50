"""Gradient-Preserving Clipping Policy Optimization (GPPO; Klear-Reasoner, arXiv 2508.07629)."""

from dataclasses import dataclass, field

import torch

from ..core import MethodConfig, MethodTrainer, Rollouts, TokenBatch


@dataclass
class GPPOConfig(MethodConfig):
    r"""
    Configuration of [`GPPOTrainer`]. Defaults are the paper's; its scripts add a dual clip of 10.

    Parameters:
        gppo_beta_low (`float`, *optional*, defaults to `1.0`):
            Gradient of a token that is cut off below, in units of the gradient at the bound; 0 is PPO's clip.
        gppo_beta_high (`float`, *optional*, defaults to `1.0`):
            The same above.
        gppo_dual_clip (`float`, *optional*):
            Ratio above which a token of negative advantage has no gradient; by default none, as in the paper's
            equation. The authors' scripts have 10.
        gppo_pos_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the likelihood term on correct rollouts.
        gppo_correct_reward (`str`, *optional*):
            Name of the reward function that decides whether a rollout is correct: it is if that reward is at least 1.
            By default the first.
    """

    epsilon: float = field(default=0.2, metadata={"help": "Clip range below 1."})
    epsilon_high: float | None = field(default=0.28, metadata={"help": "Clip range above 1."})
    gppo_beta_low: float = field(default=1.0, metadata={"help": "Gradient kept below the clip range."})
    gppo_beta_high: float = field(default=1.0, metadata={"help": "Gradient kept above the clip range."})
    gppo_dual_clip: float | None = field(
        default=None, metadata={"help": "Largest ratio that has a gradient at a negative advantage."}
    )
    gppo_pos_coef: float = field(default=0.1, metadata={"help": "Weight of the likelihood of correct rollouts."})
    gppo_correct_reward: str | None = field(
        default=None, metadata={"help": "Reward function that is 1 for a correct rollout; default: the first."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_range("epsilon", 0 < self.epsilon < 1, "in (0, 1)")
        self.check_range("epsilon_high", self.epsilon_high is None or self.epsilon_high > 0, "positive, or None")
        self.check_range("gppo_beta_low", self.gppo_beta_low >= 0, "at least 0")
        self.check_range("gppo_beta_high", self.gppo_beta_high >= 0, "at least 0")
        self.check_range("gppo_dual_clip", self.gppo_dual_clip is None or self.gppo_dual_clip > 1, "above 1, or None")
        self.check_range("gppo_pos_coef", self.gppo_pos_coef >= 0, "at least 0")


def gppo_clipped(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    ratio_low: "float | torch.Tensor",
    ratio_high: "float | torch.Tensor",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Tokens that PPO's clip would leave without a gradient.

    Args:
        log_ratio (`torch.Tensor`):
            Shape `(B, T)`, or `(B, 1)` per sequence.
        advantages (`torch.Tensor`):
            Broadcasts to `(B, T)`.
        ratio_low (`float` or `torch.Tensor`), ratio_high (`float` or `torch.Tensor`):
            Bounds of the ratio.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: boolean, shape `(B, T)`: of negative advantage below the lower bound, and
        of positive advantage above the upper one.
    """
    ratio = log_ratio.detach().clamp(-20.0, 20.0).exp()
    return (advantages < 0) & (ratio < ratio_low), (advantages > 0) & (ratio > ratio_high)


def gppo_loss(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    ratio_low: "float | torch.Tensor" = 0.8,
    ratio_high: "float | torch.Tensor" = 1.28,
    beta_low: float = 1.0,
    beta_high: float = 1.0,
    dual_clip: float | None = None,
) -> torch.Tensor:
    """
    PPO's clipped surrogate, whose value is unchanged, but a token beyond the clip keeps `beta` times the gradient that
    it would have at the bound.

    Args:
        log_ratio (`torch.Tensor`):
            With gradient, shape `(B, T)`, or `(B, 1)` per sequence; limited to +-20 where the ratio itself counts.
        advantages (`torch.Tensor`):
            Broadcasts to `(B, T)`.
        ratio_low (`float` or `torch.Tensor`, *optional*, defaults to `0.8`):
            Lower bound of the ratio.
        ratio_high (`float` or `torch.Tensor`, *optional*, defaults to `1.28`):
            Upper bound of the ratio.
        beta_low (`float`, *optional*, defaults to `1.0`), beta_high (`float`, *optional*, defaults to `1.0`):
            Share of the gradient at the bound that is kept below and above.
        dual_clip (`float`, *optional*):
            Ratio above which the loss of a token of negative advantage is constant.

    Returns:
        `torch.Tensor`: Loss per token, shape `(B, T)`.
    """
    below, above = gppo_clipped(log_ratio, advantages, ratio_low, ratio_high)
    ratio = log_ratio.clamp(-20.0, 20.0).exp()
    # 0, with the gradient of the log-ratio: the paper's r / sg(r) without a division that could overflow.
    change = log_ratio - log_ratio.detach()
    kept = torch.where(above, ratio_high * (1 + beta_high * change), ratio)
    kept = torch.where(below, ratio_low * (1 + beta_low * change), kept)
    if dual_clip is not None:
        kept = torch.where((advantages < 0) & (ratio > dual_clip), dual_clip, kept)
    return -advantages * kept


def positive_likelihood_loss(logps: torch.Tensor, mask: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    """
    Mean negative log-probability of the tokens of correct rollouts.

    Args:
        logps (`torch.Tensor`):
            With gradient, shape `(B, T)`.
        mask (`torch.Tensor`):
            Shape `(B, T)`; masked positions may hold anything.
        correct (`torch.Tensor`):
            Boolean, shape `(B,)`.

    Returns:
        `torch.Tensor`: Scalar; 0, connected to the graph, if no rollout is correct.
    """
    kept = mask.bool() & correct.unsqueeze(1)
    return -torch.where(kept, logps, 0.0).sum() / kept.sum().clamp(min=1)


class GPPOTrainer(MethodTrainer):
    """
    GPPO, from Klear-Reasoner: Advancing Reasoning Capability via Gradient-Preserving Clipping Policy Optimization
    ([arXiv 2508.07629](https://huggingface.co/papers/2508.07629)). The clipped surrogate, but a token that the clip
    cuts off keeps the gradient that it would have at the bound. Correct rollouts are also made more likely, whatever
    their advantage.

    The likelihood term is a mean over the tokens of the correct rollouts of each process's micro-batch, as in the
    authors' code, so it depends on how a batch is split; with `gppo_pos_coef=0` nothing does.

    Logs `gppo/clipped_low` and `gppo/clipped_high` (shares of the tokens that are beyond the clip and keep a gradient
    there), and `gppo/positive_loss` (times its weight).
    """

    config_class = GPPOConfig
    replaces = ("policy_loss",)
    contradicts = {
        "bapo": "BAPO moves the clip bounds to let more tokens have a gradient, which with GPPO they have beyond them",
        "clip_cov": "Clip-Cov passes over the tokens that the clip has left without a gradient, but with GPPO none is",
    }
    needs_off_policy = "clips no token, so only its likelihood term acts,"
    _name = "GPPO"
    _paper = {
        "title": "Klear-Reasoner: Advancing Reasoning Capability via Gradient-Preserving Clipping Policy Optimization",
        "id": "2508.07629",
        "citation": """\
@article{su2025klear,
    title  = {{Klear-Reasoner: Advancing Reasoning Capability via Gradient-Preserving Clipping Policy Optimization}},
    author = {Zhenpeng Su and others},
    year   = 2025,
    eprint = {arXiv:2508.07629},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gppo_column = self.reward_column("gppo_correct_reward")

    def carry(self, rollouts: Rollouts):
        correct = rollouts.reward_matrix[rollouts.local, self.gppo_column] >= 1  # False for NaN
        return super().carry(rollouts) | {"gppo/correct": correct}

    def policy_loss(self, tokens: TokenBatch):
        args = self.args
        bounds = tokens.log_ratio, tokens.advantages, tokens.ratio_low, tokens.ratio_high
        count = tokens.mask.sum()
        for name, cut in zip(("low", "high"), gppo_clipped(*bounds), strict=True):
            self.log_token_metric(f"gppo/clipped_{name}", (cut * tokens.mask).sum(), count)
        return gppo_loss(*bounds, args.gppo_beta_low, args.gppo_beta_high, args.gppo_dual_clip)

    def regularizers(self, tokens: TokenBatch):
        terms = super().regularizers(tokens)
        if self.args.gppo_pos_coef == 0:
            return terms
        value = positive_likelihood_loss(tokens.logps, tokens.model_mask, tokens.carried["gppo/correct"])
        return terms | {"gppo/positive_loss": self.args.gppo_pos_coef * value}
