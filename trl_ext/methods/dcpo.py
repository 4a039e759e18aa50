"""Dynamic Clipping Policy Optimization (DCPO; Yang et al., arXiv 2509.02333)."""

import math
from dataclasses import dataclass, field

import torch

from ..core import MethodConfig, MethodTrainer, Rollouts, TokenBatch
from ..core.loss import aggregate
from ..core.rollouts import group_table


@dataclass
class DCPOConfig(MethodConfig):
    r"""
    Configuration of [`DCPOTrainer`]. Defaults are the paper's; the authors' scripts have DAPO's 0.2 and 0.28 in
    place of its 0.16 and 0.2.

    Parameters:
        dcpo_eps_low (`float`, *optional*, defaults to `0.16`), dcpo_eps_high (`float`, *optional*, defaults to `0.2`):
            Width of the clip interval below and above.
        dcpo_ratio_max (`float`, *optional*, defaults to `10.0`):
            Bound of the upper clip bound, and ratio above which a token of negative advantage has no gradient.
        dcpo_use_sas (`bool`, *optional*, defaults to `True`):
            Whether advantages are smoothed over a prompt's visits (smooth advantage standardisation); else they are
            TRL's.
        dcpo_use_dac (`bool`, *optional*, defaults to `True`):
            Whether clip bounds follow the tokens' old probabilities (dynamic adaptive clipping); else they are
            `epsilon` and `epsilon_high`.
        dcpo_use_otm (`bool`, *optional*, defaults to `True`):
            Whether the loss is a mean over each rollout's tokens, summed over a group (only token mean); else it is
            aggregated by `loss_type`.
        dcpo_sas_std (`str`, *optional*, defaults to `"sample"`):
            `"sample"` standard deviation, as the code and TRL have it, or the paper's of the `"population"`.
        dcpo_history_weight (`float`, *optional*, defaults to `1.0`):
            Factor of a prompt's former mean and standard deviation, from the code.
        dcpo_otm_scale (`str`, *optional*, defaults to `"sum_over_group"`):
            The paper's `"sum_over_group"`, or the `"mean"` over rollouts, `num_generations` times smaller.
    """

    dcpo_eps_low: float = field(default=0.16, metadata={"help": "Width of the clip interval below."})
    dcpo_eps_high: float = field(default=0.2, metadata={"help": "Width of the clip interval above."})
    dcpo_ratio_max: float = field(default=10.0, metadata={"help": "Largest ratio that has a gradient."})
    dcpo_use_sas: bool = field(default=True, metadata={"help": "Smooth advantages over a prompt's visits."})
    dcpo_use_dac: bool = field(default=True, metadata={"help": "Clip by the old probability of each token."})
    dcpo_use_otm: bool = field(default=True, metadata={"help": "Mean over tokens, sum over the group."})
    dcpo_sas_std: str = field(
        default="sample",
        metadata={"help": "Standard deviation of the sample or the population.", "choices": ["sample", "population"]},
    )
    dcpo_history_weight: float = field(default=1.0, metadata={"help": "Factor of a prompt's former statistics."})
    dcpo_otm_scale: str = field(
        default="sum_over_group",
        metadata={"help": "Sum over the group, or mean over rollouts.", "choices": ["sum_over_group", "mean"]},
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_choices("dcpo_sas_std", "dcpo_otm_scale")
        self.check_range("num_generations", self.num_generations >= 2, "at least 2: a lone rollout has no spread")
        self.check_range("dcpo_eps_low", self.dcpo_eps_low > 0, "positive")
        self.check_range("dcpo_eps_high", self.dcpo_eps_high > 0, "positive")
        self.check_range("dcpo_ratio_max", self.dcpo_ratio_max > 1, "above 1")
        self.check_range("dcpo_history_weight", 0 <= self.dcpo_history_weight <= 1, "in [0, 1]")


def dcpo_advantages(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    visits: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    estimator: str = "sample",
    history_weight: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Smooth advantage standardisation of one visit: rewards standardised by their group's statistics and by those of
    all visits, blended by the number of visits, whichever is smaller.

    Args:
        rewards (`torch.Tensor`):
            Shape `(N,)`; NaN = not scored.
        group_ids (`torch.Tensor`):
            Shape `(N,)`; M groups, each of another prompt.
        visits (`torch.Tensor`), mean (`torch.Tensor`), std (`torch.Tensor`):
            Former visits of each group's prompt, and mean and standard deviation of their rewards, shape `(M,)`, by
            ascending group id.
        estimator (`str`, *optional*, defaults to `"sample"`):
            Standard deviation of the `"sample"` or the `"population"`.
        history_weight (`float`, *optional*, defaults to `1.0`):
            Factor of `mean` and `std`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]`: advantages `(N,)`, 0 for unscored rollouts;
        and visits, mean and standard deviation `(M,)` after this visit. A group with fewer than two scored rollouts
        has no advantages and is no visit.
    """
    table, row, _ = group_table(rewards, group_ids)
    scored = ~table.isnan()
    count = scored.sum(1)
    valid = count > 1
    lowest = table.masked_fill(~scored, torch.inf).amin(1)
    constant = lowest == table.masked_fill(~scored, -torch.inf).amax(1)
    # Rounding must not tell equal rewards apart: without an epsilon any difference would be blown up.
    new_mean = torch.where(constant, lowest, torch.nanmean(table, 1))
    squares = ((table - new_mean.unsqueeze(1)) ** 2).nansum(1)
    new_std = (squares / (count - int(estimator == "sample")).clamp(min=1)).sqrt().masked_fill(constant, 0.0)

    old_mean, old_std = history_weight * mean, history_weight * std
    i = visits + 1.0
    total_mean = old_mean + (new_mean - old_mean) / i
    spread = (visits / i) * (old_mean - new_mean) ** 2
    total_std = ((new_std**2 + visits * old_std**2 + spread) / i).sqrt()

    def standardised(center, scale):
        return torch.where(scale[row] > 0, (rewards - center[row]) / scale[row], 0.0)

    share = (1 / i)[row]
    of_group, of_all = standardised(new_mean, new_std), standardised(total_mean, total_std)
    smooth_group = (1 - share) * of_group + share * of_all
    smooth_all = share * of_group + (1 - share) * of_all
    advantages = torch.where(smooth_group.abs() < smooth_all.abs(), smooth_group, smooth_all)
    return (
        advantages.masked_fill(rewards.isnan() | ~valid[row], 0.0),
        visits + valid,
        torch.where(valid, total_mean, mean),
        torch.where(valid, total_std, std),
    )


def dcpo_bounds(
    old_logps: torch.Tensor, eps_low: float = 0.16, eps_high: float = 0.2, ratio_max: float = 10.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Clip bounds by the old probability q: `1/2 + sqrt(max(1 - 4 eps_low / q, 0)) / 2` and `1/2 + sqrt(1 + 4 eps_high /
    q) / 2`, the latter at most `ratio_max`.

    Args:
        old_logps (`torch.Tensor`):
            Log-probabilities under the policy that generated, any shape.
        eps_low (`float`, *optional*, defaults to `0.16`), eps_high (`float`, *optional*, defaults to `0.2`):
            Widths.
        ratio_max (`float`, *optional*, defaults to `10.0`):
            Largest upper bound.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: lower and upper bound of the ratio, same shape, without gradient.
    """
    inverse = torch.exp(-old_logps.detach().clamp(max=0.0))
    low = 0.5 + 0.5 * (1 - 4 * eps_low * inverse).clamp(min=0.0).sqrt()
    high = 0.5 + 0.5 * (1 + 4 * eps_high * inverse).sqrt()
    return low, high.clamp(max=ratio_max)


class DCPOTrainer(MethodTrainer):
    """
    DCPO: Dynamic Clipping Policy Optimization ([arXiv 2509.02333](https://huggingface.co/papers/2509.02333)). Rewards
    are standardised with those of a prompt's former visits, so a group of equal rewards still teaches; clipping leaves
    rare tokens more room; the loss is a mean over each rollout's tokens, summed over the group.

    State: visits, and mean and standard deviation of the rewards, of every prompt.

    Logs `dcpo/nonzero_advantage` (share of rollouts), `dcpo/visited` (share of the training set) and `dcpo/clipped`
    (share of tokens without gradient because of their ratio).
    """

    config_class = DCPOConfig
    replaces = ("compute_advantages", "clip_range", "aggregate_loss")
    contradicts = {"dynamic_sampling": "it would replace the groups of equal rewards that DCPO learns from"}
    needs_off_policy = "never clips a token"
    _name = "DCPO"
    _paper = {
        "title": "DCPO: Dynamic Clipping Policy Optimization",
        "id": "2509.02333",
        "citation": """\
@article{yang2025dcpo,
    title  = {{DCPO: Dynamic Clipping Policy Optimization}},
    author = {Shihui Yang and others},
    year   = 2025,
    eprint = {arXiv:2509.02333},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.dcpo_use_dac and (self.loss_type == "cispo" or self.importance_sampling_level == "sequence"):
            raise ValueError(
                "`dcpo_use_dac` bounds the ratio of each token from both sides, which `loss_type="
                f"{self.loss_type!r}` with `importance_sampling_level={self.importance_sampling_level!r}` does not "
                "have: use 'dapo' with 'token', or set `dcpo_use_dac` to False."
            )
        # Visits, mean and standard deviation of every prompt's rewards.
        self.dcpo_history = torch.zeros(3, len(self.train_dataset), dtype=torch.float64)

    def _dcpo_visit(self, rewards: torch.Tensor, rollouts: Rollouts) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantages of a generation and the history after it."""
        rewards, group_ids, history = rewards.cpu().double(), rollouts.group_ids.cpu(), self.dcpo_history.clone()
        ids, row = group_ids.unique(return_inverse=True)
        prompts = torch.zeros_like(ids).index_copy(0, row, rollouts.prompt_index.cpu())
        known = prompts >= 0  # in evaluation none is
        # Groups of the same prompt are one visit after the other.
        turns = torch.where(known, group_table(prompts.double(), prompts)[2], 0)
        advantages = torch.zeros_like(rewards)
        for turn in range(int(turns.max()) + 1):
            due = turns == turn
            rows, keys = due[row], prompts[due].clamp(min=0)
            advantages[rows], *after = dcpo_advantages(
                rewards[rows],
                group_ids[rows],
                *torch.where(known[due], history[:, keys], 0.0),
                self.args.dcpo_sas_std,
                self.args.dcpo_history_weight,
            )
            history[:, keys] = torch.stack(after)
        return advantages.to(rollouts.reward_matrix), history

    def compute_advantages(self, rollouts: Rollouts):
        if not self.args.dcpo_use_sas:
            return super().compute_advantages(rollouts)
        advantages, _ = self._dcpo_visit(rollouts.rewards, rollouts)
        self.log_metric("dcpo/nonzero_advantage", (advantages != 0).float().mean())
        return advantages

    def observe(self, rollouts: Rollouts):
        super().observe(rollouts)
        if self.args.dcpo_use_sas:
            # An answer to another prompt says nothing about this one.
            rewards = rollouts.rewards.masked_fill(rollouts.changed_prompt, torch.nan)
            _, self.dcpo_history = self._dcpo_visit(rewards, rollouts)
            self.log_metric("dcpo/visited", (self.dcpo_history[0] > 0).double().mean())

    def log_ratio(self, tokens: TokenBatch):
        log_ratio = super().log_ratio(tokens)
        # No gradient above for negative advantages; for positive ones the upper bound lies below.
        return log_ratio.clamp(max=math.log(self.args.dcpo_ratio_max)) if self.args.dcpo_use_dac else log_ratio

    def clip_range(self, tokens: TokenBatch):
        args = self.args
        if not args.dcpo_use_dac:
            return super().clip_range(tokens)
        low, high = dcpo_bounds(tokens.old_logps, args.dcpo_eps_low, args.dcpo_eps_high, args.dcpo_ratio_max)
        ratio = (tokens.logps - tokens.old_logps).detach().exp()
        falling = (tokens.advantages < 0) & ((ratio < low) | (ratio > args.dcpo_ratio_max))
        clipped = falling | ((tokens.advantages > 0) & (ratio > high))
        self.log_token_metric("dcpo/clipped", (clipped * tokens.mask).sum(), tokens.mask.sum())
        return low, high

    def aggregate_loss(self, per_token_loss: torch.Tensor, tokens: TokenBatch):
        if not self.args.dcpo_use_otm:
            return super().aggregate_loss(per_token_loss, tokens)
        mean = aggregate(per_token_loss, tokens.mask, "grpo", tokens.items, tokens.rows, self.max_completion_length)
        return mean * self.num_generations if self.args.dcpo_otm_scale == "sum_over_group" else mean

    def prompt_table(self):
        columns = zip(("visits", "mean", "std"), self.dcpo_history, strict=True)
        return super().prompt_table() | {f"dcpo/{name}": column for name, column in columns}

    def method_state(self):
        return super().method_state() | {"dcpo": self.dcpo_history}

    def load_method_state(self, state):
        super().load_method_state(state)
        self.dcpo_history = state["dcpo"]
