"""Negative-enhanced Group Relative Policy Optimization (NGRPO; Nan et al., arXiv 2509.18851)."""

import math
import warnings
from dataclasses import dataclass, field

import torch

from ..core import MethodConfig, MethodTrainer, Rollouts
from ..core.rollouts import group_table


ROUNDING = 1e-6  # of a weighted sum of rewards


@dataclass
class NGRPOConfig(MethodConfig):
    r"""
    Configuration of [`NGRPOTrainer`]. Defaults are those of the paper and its code.

    Parameters:
        ngrpo_reward_max (`float`, *optional*, defaults to `1.0`):
            Largest possible (weighted sum of) rewards: what the imaginary rollouts get.
        ngrpo_num_virtual (`int`, *optional*, defaults to `1`):
            Imaginary rollouts per group; 0 is GRPO with another small number in the denominator.
        ngrpo_eps (`float`, *optional*, defaults to `1e-6`):
            Added to the standard deviation.
        ngrpo_drop_all_max (`bool`, *optional*, defaults to `True`):
            Whether rollouts of groups in which all have the largest reward leave the batch. The authors' scripts
            generate others in their place; that is dynamic sampling's part, which would drop all-wrong groups too.
    """

    epsilon: float = field(default=0.16, metadata={"help": "Clip range for negative advantages."})
    epsilon_high: float | None = field(default=0.24, metadata={"help": "Clip range for positive advantages."})
    ngrpo_reward_max: float = field(default=1.0, metadata={"help": "Largest possible reward."})
    ngrpo_num_virtual: int = field(default=1, metadata={"help": "Imaginary rollouts per group."})
    ngrpo_eps: float = field(default=1e-6, metadata={"help": "Added to the standard deviation."})
    ngrpo_drop_all_max: bool = field(default=True, metadata={"help": "Leave out groups of largest rewards."})

    def __post_init__(self):
        super().__post_init__()
        self.check_range("ngrpo_reward_max", math.isfinite(self.ngrpo_reward_max), "finite")
        self.check_range("ngrpo_num_virtual", self.ngrpo_num_virtual >= 0, "at least 0")
        self.check_range("ngrpo_eps", self.ngrpo_eps > 0, "positive")


def ngrpo_advantages(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    reward_max: float = 1.0,
    num_virtual: int = 1,
    eps: float = 1e-6,
) -> torch.Tensor:
    """
    Group-normalised advantages of groups to which imaginary rollouts of the largest reward are added.

    Args:
        rewards (`torch.Tensor`):
            Shape `(N,)`; NaN = not scored.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.
        reward_max (`float`, *optional*, defaults to `1.0`):
            Reward of the imaginary rollouts.
        num_virtual (`int`, *optional*, defaults to `1`):
            Imaginary rollouts per group.
        eps (`float`, *optional*, defaults to `1e-6`):
            Added to the sample standard deviation.

    Returns:
        `torch.Tensor`: Shape `(N,)`; 0 for unscored rollouts, and for a lone reward without imaginary ones.
    """
    rewards = torch.where((rewards - reward_max).abs() <= ROUNDING, reward_max, rewards)
    table, row, _ = group_table(rewards, group_ids)
    table = torch.cat([table, table.new_full((len(table), num_virtual), reward_max)], dim=1)
    flat = (table.nan_to_num(torch.inf).amin(1) >= table.nan_to_num(-torch.inf).amax(1))[row]
    count = (~table.isnan()).sum(1)
    mean = torch.nanmean(table, dim=1)
    deviation = (((table - mean.unsqueeze(1)) ** 2).nansum(1) / (count - 1).clamp(min=1)).sqrt()
    advantages = (rewards - mean[row]) / (deviation[row] + eps)
    # By equality: rounding in the mean of equal rewards is not small beside `eps`.
    return advantages.masked_fill(rewards.isnan() | flat, 0.0)


def all_maximal(rewards: torch.Tensor, group_ids: torch.Tensor, reward_max: float = 1.0) -> torch.Tensor:
    """
    Rollouts of groups in which every scored rollout has the largest reward.

    Args:
        rewards (`torch.Tensor`):
            Shape `(N,)`; NaN = not scored.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.
        reward_max (`float`, *optional*, defaults to `1.0`):
            The largest reward.

    Returns:
        `torch.Tensor`: Boolean, shape `(N,)`; False for a group without a scored rollout.
    """
    table, row, _ = group_table(rewards, group_ids)
    known = ~table.isnan()
    return (known.any(1) & ((table >= reward_max - ROUNDING) | ~known).all(1))[row]


class NGRPOTrainer(MethodTrainer):
    """
    NGRPO: Negative-enhanced Group Relative Policy Optimization ([arXiv
    2509.18851](https://huggingface.co/papers/2509.18851)). An imaginary rollout of the largest reward joins every
    group when its mean and standard deviation are taken, so groups in which all fail learn from it; clipping is
    tighter for negative advantages.

    Logs `ngrpo/all_max` (share of rollouts in groups of largest rewards) and `ngrpo/nonzero_advantage`.
    """

    config_class = NGRPOConfig
    replaces = ("compute_advantages",)
    contradicts = {"dynamic_sampling": "it would replace the all-wrong groups that NGRPO learns from"}
    _name = "NGRPO"
    _paper = {
        "title": "NGRPO: Negative-enhanced Group Relative Policy Optimization",
        "id": "2509.18851",
        "citation": """\
@article{nan2025ngrpo,
    title  = {{NGRPO: Negative-enhanced Group Relative Policy Optimization}},
    author = {Gongrui Nan and others},
    year   = 2025,
    eprint = {arXiv:2509.18851},
}""",
    }

    _ngrpo_warned = False

    def compute_advantages(self, rollouts: Rollouts):
        args, rewards = self.args, rollouts.rewards
        if (rewards > args.ngrpo_reward_max + ROUNDING).any() and not self._ngrpo_warned:
            self._ngrpo_warned = True
            warnings.warn(
                f"a reward of {rewards.nan_to_num(-torch.inf).max().item()} exceeds `ngrpo_reward_max` "
                f"({args.ngrpo_reward_max}), so the imaginary rollout is not the best of its group: set it to the "
                "largest weighted sum of your reward functions.",
                stacklevel=2,
            )
        advantages = ngrpo_advantages(
            rewards, rollouts.group_ids, args.ngrpo_reward_max, args.ngrpo_num_virtual, args.ngrpo_eps
        )
        self.log_metric("ngrpo/nonzero_advantage", (advantages != 0).float().mean())
        return advantages

    def select_rollouts(self, rollouts: Rollouts):
        kept, args = super().select_rollouts(rollouts), self.args
        maximal = all_maximal(rollouts.rewards, rollouts.group_ids, args.ngrpo_reward_max)
        self.log_metric("ngrpo/all_max", maximal.float().mean())
        return kept & ~maximal if args.ngrpo_drop_all_max else kept
