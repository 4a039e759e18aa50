"""Group reward-Decoupled Normalization Policy Optimization (GDPO of NVIDIA; Liu et al., arXiv 2601.05242)."""

import math
import warnings
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather

from ..core import MethodConfig, MethodTrainer, Rollouts
from ..core.rollouts import group_advantages, normalized_sum_advantages, weighted_sum, zero_signal


@dataclass
class GDPONvidiaConfig(MethodConfig):
    r"""
    Configuration of [`GDPONvidiaTrainer`]. Defaults are those of TRL's `"normalize_then_sum"`, except that a single
    reward function is normalised once, as in the authors' fork of TRL. As in TRL's form `scale_rewards` has no effect.

    Parameters:
        gdpo_condition (`list`, *optional*, defaults to `[]`):
            Rewards that count only where another is high enough: `(easy, hard, threshold)`, or as text
            `"easy:hard:threshold"`, sets the reward `easy` to 0 wherever the reward `hard` is below the threshold or
            missing. Reward functions go by name or index.
        gdpo_batch_norm (`str`, *optional*, defaults to `"sequence"`):
            Statistics by which the sum is normalised over the batch: over rollouts (`"sequence"`), over tokens
            (`"token"`, as the authors' fork of verl; long rollouts weigh more) or not at all (`"none"`).
        gdpo_missing (`str`, *optional*, defaults to `"ignore"`):
            A reward of None is left out of the statistics and adds nothing (`"ignore"`), or counts as 0 (`"zero"`, as
            the authors' fork of TRL, even if a rollout has no reward at all).
        gdpo_eps (`float`, *optional*):
            Added to the standard deviations; by default 1e-4, or 1e-6 with `gdpo_batch_norm="token"`.
        gdpo_zero_flat (`bool`, *optional*, defaults to `False`):
            With `gdpo_batch_norm="token"`, whose mean is not 0: whether groups in which no reward varies get advantage
            0 all the same (ours). Otherwise they have it anyway.
    """

    gdpo_condition: list[str] = field(
        default_factory=list, metadata={"help": "Conditioned rewards, each as 'easy:hard:threshold'."}
    )
    gdpo_batch_norm: str = field(
        default="sequence",
        metadata={"help": "Statistics of the batch normalisation.", "choices": ["sequence", "token", "none"]},
    )
    gdpo_missing: str = field(
        default="ignore", metadata={"help": "What a missing reward counts as.", "choices": ["ignore", "zero"]}
    )
    gdpo_eps: float | None = field(default=None, metadata={"help": "Added to the standard deviations."})
    gdpo_zero_flat: bool = field(
        default=False, metadata={"help": "No advantage in groups without a signal, with 'token' too."}
    )

    def __post_init__(self):
        super().__post_init__()
        try:
            self.gdpo_condition = [_parse_condition(rule) for rule in self.gdpo_condition or []]
        except (TypeError, ValueError):
            need = "a list of (easy, hard, threshold) or 'easy:hard:threshold' with a finite threshold"
            self.check_range("gdpo_condition", False, need)
        self.check_choices("gdpo_batch_norm", "gdpo_missing")
        self.check_range("gdpo_eps", self.gdpo_eps is None or self.gdpo_eps > 0, "positive or None")


def _parse_condition(rule) -> tuple[str | int, str | int, float]:
    easy, hard, threshold = rule.split(":") if isinstance(rule, str) else rule
    if not all(isinstance(name, (str, int)) for name in (easy, hard)) or not math.isfinite(float(threshold)):
        raise ValueError
    return easy, hard, float(threshold)


def gdpo_conditioned(rewards: torch.Tensor, rules: list[tuple[int, int, float]]) -> torch.Tensor:
    """
    Set easy rewards to 0 where a hard one is not reached. All rules look at the rewards as they were.

    Args:
        rewards (`torch.Tensor`):
            Shape `(N, K)`; NaN = not scored, which stays NaN in an easy column and is not reached in a hard one.
        rules (`list[tuple[int, int, float]]`):
            Column of the easy reward, column of the hard one, threshold of the hard one.

    Returns:
        `torch.Tensor`: Shape `(N, K)`.
    """
    shaped = rewards.clone()
    for easy, hard, threshold in rules:
        kept = (rewards[:, hard] >= threshold) | rewards[:, easy].isnan()
        shaped[:, easy] = torch.where(kept, shaped[:, easy], 0.0)
    return shaped


def gdpo_token_whitening(totals: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """
    Normalise by mean and Bessel-corrected variance over tokens, each with its rollout's value (the authors' verl).

    Args:
        totals (`torch.Tensor`):
            Shape `(N,)`; NaN = not scored, no part in the statistics.
        lengths (`torch.Tensor`):
            Tokens in the loss, shape `(N,)`.

    Returns:
        `torch.Tensor`: Shape `(N,)`; NaN stays NaN.
    """
    lengths = lengths.to(totals).masked_fill(totals.isnan(), 0.0)
    count = lengths.sum()
    mean = (lengths * totals).nansum() / count.clamp(min=1)
    variance = (lengths * (totals - mean) ** 2).nansum() / (count - 1).clamp(min=1)
    return (totals - mean) * (variance + 1e-8).rsqrt()


def gdpo_advantages(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    group_ids: torch.Tensor,
    batch_norm: str = "sequence",
    missing: str = "ignore",
    eps: float | None = None,
    lengths: torch.Tensor | None = None,
    zero_flat: bool = False,
) -> torch.Tensor:
    """
    Standardise each reward within its group, sum with weights, normalise over the batch. With a single reward function
    and not `batch_norm="token"`: GRPO's advantages.

    Args:
        rewards (`torch.Tensor`):
            Shape `(N, K)`; NaN = not scored.
        weights (`torch.Tensor`):
            Shape `(K,)`.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.
        batch_norm, missing, eps, zero_flat:
            See [`GDPONvidiaConfig`].
        lengths (`torch.Tensor`, *optional*):
            Tokens in the loss, shape `(N,)`; for `batch_norm="token"`.

    Returns:
        `torch.Tensor`: Shape `(N,)`; 0 for rollouts without any reward, unless `missing="zero"`.
    """
    if missing == "zero":
        rewards = torch.nan_to_num(rewards, nan=0.0)
    if eps is None:
        eps = 1e-6 if batch_norm == "token" else 1e-4
    flat = torch.stack([zero_signal(column, group_ids) for column in rewards.unbind(1)], dim=1)
    # Equal rewards may differ from their own mean by a rounding error, which two normalisations would blow up.
    rewards = rewards.masked_fill(flat & ~rewards.isnan(), 0.0)
    if rewards.shape[1] == 1 and batch_norm != "token":
        return group_advantages(weighted_sum(rewards, weights), group_ids, eps=eps)
    if batch_norm == "sequence":
        return normalized_sum_advantages(rewards, weights, group_ids, eps)
    parts = [group_advantages(column, group_ids, eps=eps) for column in rewards.unbind(1)]
    totals = weighted_sum(torch.stack(parts, dim=1), weights)
    totals = totals.masked_fill(rewards.isnan().all(dim=1), torch.nan)
    if batch_norm == "token":
        totals = gdpo_token_whitening(totals, lengths)
        if zero_flat:
            totals = totals.masked_fill((flat | (weights == 0).to(flat.device)).all(dim=1), 0.0)
    return torch.nan_to_num(totals, nan=0.0)


class GDPONvidiaTrainer(MethodTrainer):
    """
    GDPO: Group reward-Decoupled Normalization Policy Optimization ([arXiv
    2601.05242](https://huggingface.co/papers/2601.05242)); other papers use the same short name. Every reward is
    normalised within its group before they are summed, so that different outcomes with the same sum are told apart.
    What TRL's `multi_objective_aggregation="normalize_then_sum"` lacks is here: rewards that count only if another is
    reached, statistics over tokens, other ways with missing rewards, a single reward function treated as in GRPO.

    Logs `gdpo_nvidia/flat` (share of rollouts in groups in which no reward varies) and `gdpo_nvidia/conditioned`
    (share of rewards that a condition set to 0, of those that have one).
    """

    config_class = GDPONvidiaConfig
    replaces = ("compute_advantages",)
    _name = "GDPO (NVIDIA)"
    _paper = {
        "title": "GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization",
        "id": "2601.05242",
        "citation": """\
@article{liu2026gdpo,
    title  = {{GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization}},
    author = {Liu and others},
    year   = 2026,
    eprint = {arXiv:2601.05242},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gdpo_rules = [
            (self._gdpo_column(easy), self._gdpo_column(hard), threshold)
            for easy, hard, threshold in self.args.gdpo_condition
        ]
        if self.scale_rewards != "group":
            warnings.warn(
                f"`scale_rewards` is {self.scale_rewards!r}, which has no effect: GDPO divides every reward by its "
                "group's standard deviation, as TRL's 'normalize_then_sum' does.",
                stacklevel=2,
            )

    def _gdpo_column(self, name: str | int) -> int:
        names = self.reward_func_names
        if names.count(name) == 1:
            return names.index(name)
        if str(name).isdecimal() and int(name) < len(names):
            return int(name)
        raise ValueError(
            f"`gdpo_condition` names the reward function {name!r}, which "
            f"{'is the name of several' if name in names else 'there is not'}: choose one of "
            f"{', '.join(map(repr, names))}, or an index below {len(names)}."
        )

    def _gdpo_columns(self, rewards: torch.Tensor) -> torch.Tensor:
        if rewards.dim() == 1:
            raise ValueError(
                "GDPO needs one column per reward function, but a mixed method's shape_rewards returned their sum: "
                "leave one of the two out."
            )
        return rewards

    def shape_rewards(self, rollouts: Rollouts):
        rewards = super().shape_rewards(rollouts)
        if not self.gdpo_rules:
            return rewards
        shaped = gdpo_conditioned(self._gdpo_columns(rewards), self.gdpo_rules)
        easy = sorted({rule[0] for rule in self.gdpo_rules})
        changed, scored = (shaped != rewards)[:, easy] & ~rewards[:, easy].isnan(), ~rewards[:, easy].isnan()
        self.log_metric("gdpo_nvidia/conditioned", changed.sum() / scored.sum().clamp(min=1))
        return shaped

    def compute_advantages(self, rollouts: Rollouts):
        args, rewards, weights = self.args, self._gdpo_columns(rollouts.shaped), rollouts.reward_weights
        if args.gdpo_missing == "zero":
            rewards = torch.nan_to_num(rewards, nan=0.0)
        flat = torch.stack([zero_signal(column, rollouts.group_ids) for column in rewards.unbind(1)], dim=1)
        self.log_metric("gdpo_nvidia/flat", (flat | (weights == 0)).all(dim=1).float().mean())
        lengths = gather(rollouts.mask.sum(dim=1)) if args.gdpo_batch_norm == "token" else None
        return gdpo_advantages(
            rewards,
            weights,
            rollouts.group_ids,
            args.gdpo_batch_norm,
            args.gdpo_missing,
            args.gdpo_eps,
            lengths,
            args.gdpo_zero_flat,
        )
