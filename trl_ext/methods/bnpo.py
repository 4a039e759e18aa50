"""Beta Normalization Policy Optimization (BNPO; Xiao et al., arXiv 2506.02864)."""

from dataclasses import dataclass, field

import torch

from ..core import MethodConfig, MethodTrainer, Rollouts
from ..core.rollouts import group_table


@dataclass
class BNPOConfig(MethodConfig):
    r"""
    Configuration of [`BNPOTrainer`]. Not to be confused with TRL's `loss_type="bnpo"`, a way to aggregate the loss
    that has nothing to do with this method.

    Parameters:
        beta_norm_reward_min (`float` or `list[float]`, *optional*, defaults to `[0.0]`), beta_norm_reward_max
            (`float` or `list[float]`, *optional*, defaults to `[1.0]`):
            Range of the rewards, mapped to [0, 1]: one number, or with `beta_norm_decompose` one per reward function.
        beta_norm_decompose (`bool`, *optional*, defaults to `False`):
            Whether each reward function is normalised on its own and the advantages are averaged by its weight.
        beta_norm_max_weight (`float`, *optional*, defaults to `1e6`):
            Bound of the weight 1 / density, from the authors' code.
        beta_norm_var_floor (`float`, *optional*, defaults to `1e-8`):
            Variance of the success rates up to which they count as equal, and nothing is fitted (ours).
    """

    beta_norm_reward_min: list[float] = field(default_factory=lambda: [0.0], metadata={"help": "Lowest rewards."})
    beta_norm_reward_max: list[float] = field(default_factory=lambda: [1.0], metadata={"help": "Highest rewards."})
    beta_norm_decompose: bool = field(default=False, metadata={"help": "Normalise reward functions separately."})
    beta_norm_max_weight: float = field(default=1e6, metadata={"help": "Bound of the weights."})
    beta_norm_var_floor: float = field(default=1e-8, metadata={"help": "Variance that counts as none."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("beta_norm_reward_min", "beta_norm_reward_max"):
            value = getattr(self, name)
            setattr(self, name, list(value) if isinstance(value, (list, tuple)) else [float(value)])
        low, high = self.beta_norm_reward_min, self.beta_norm_reward_max
        fits = len(low) == len(high) and all(a < b for a, b in zip(low, high, strict=False))
        self.check_range("beta_norm_reward_max", fits, f"above beta_norm_reward_min ({low}), one for one")
        self.check_range("beta_norm_max_weight", self.beta_norm_max_weight > 0, "positive")
        self.check_range("beta_norm_var_floor", self.beta_norm_var_floor >= 0, "at least 0")


def beta_parameters(rates: torch.Tensor, var_floor: float = 1e-8) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Parameters of the normalising Beta distribution from the spread of the success rates: `max(1, 1 + a / 3)` and
    `max(1, 1 + b / 3)` with the moment fit Beta(a, b).

    Args:
        rates (`torch.Tensor`):
            Success rate of each prompt that has a scored rollout, shape `(M,)`.
        var_floor (`float`, *optional*, defaults to `1e-8`):
            Sample variance up to which (1, 1) is returned, as for a single prompt.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: alpha and beta, scalars.
    """
    one = torch.ones((), dtype=rates.dtype, device=rates.device)
    if len(rates) < 2:
        return one, one
    mean, variance = rates.mean(), rates.var()
    if variance <= var_floor:
        return one, one
    kappa = mean * (1 - mean) / variance - 1
    return torch.maximum(one, 1 + kappa * mean / 3), torch.maximum(one, 1 + kappa * (1 - mean) / 3)


def beta_density(rates: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """
    Density of Beta(alpha, beta).

    Args:
        rates (`torch.Tensor`):
            In [0, 1], any shape.
        alpha (`torch.Tensor`), beta (`torch.Tensor`):
            Scalars of at least 1.

    Returns:
        `torch.Tensor`: Same shape.
    """
    log_norm = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    # xlogy: 0 * log 0 is 0, so that Beta(1, 1) has the density 1 at its ends.
    return (torch.xlogy(alpha - 1, rates) + torch.xlogy(beta - 1, 1 - rates) - log_norm).exp()


def success_rates(rewards: torch.Tensor, group_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Success rate of every prompt.

    Args:
        rewards (`torch.Tensor`):
            In [0, 1], shape `(N,)`; NaN = not scored.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: rates `(M,)`, by ascending group id, NaN without a scored rollout, and 0
        where every group has one rollout, since there is no rate to speak of; and the row of each rollout in them.
    """
    table, row, _ = group_table(rewards, group_ids)
    rates = torch.nanmean(table, dim=1)
    return rates if table.shape[1] > 1 else rates * 0.0, row


def bnpo_advantages(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    max_weight: float = 1e6,
    var_floor: float = 1e-8,
    parameters: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Reward minus success rate, over the density of the fitted Beta distribution at the success rate.

    Args:
        rewards (`torch.Tensor`):
            In [0, 1], shape `(N,)`; NaN = not scored.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.
        max_weight (`float`, *optional*, defaults to `1e6`):
            Bound of 1 / density.
        var_floor (`float`, *optional*, defaults to `1e-8`):
            See [`beta_parameters`].
        parameters (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
            Alpha and beta; by default those fitted to these groups.

    Returns:
        `torch.Tensor`: Shape `(N,)`; 0 for unscored rollouts.
    """
    rates, row = success_rates(rewards, group_ids)
    alpha, beta = beta_parameters(rates[~rates.isnan()], var_floor) if parameters is None else parameters
    weight = (1 / beta_density(rates, alpha, beta)).clamp(0, max_weight)
    return torch.nan_to_num(weight[row] * (rewards - rates[row]), nan=0.0)


class BNPOTrainer(MethodTrainer):
    """
    BNPO: Beta Normalization Policy Optimization ([arXiv 2506.02864](https://huggingface.co/papers/2506.02864)); TRL's
    `loss_type="bnpo"` is something else. Advantages are divided by a Beta density at the prompt's success rate; its
    parameters follow the spread of the success rates over the batch and thereby the policy, those of groups included
    that a mixed method replaces.

    Logs `bnpo/alpha` and `bnpo/beta` (of the first reward function if they are normalised separately).
    """

    config_class = BNPOConfig
    replaces = ("compute_advantages",)
    _name = "BNPO"
    _paper = {
        "title": "BNPO: Beta Normalization Policy Optimization",
        "id": "2506.02864",
        "citation": """\
@article{xiao2025bnpo,
    title  = {{BNPO: Beta Normalization Policy Optimization}},
    author = {Changyi Xiao and Mengdi Zhang and Yixin Cao},
    year   = 2025,
    eprint = {arXiv:2506.02864},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        count, functions = len(self.args.beta_norm_reward_min), len(self.reward_funcs)
        if count not in (1, functions if self.args.beta_norm_decompose else 1):
            raise ValueError(
                f"`beta_norm_reward_min` and `beta_norm_reward_max` have {count} values for {functions} reward "
                "functions: give one, or with `beta_norm_decompose` one per function."
            )

    def _bnpo_mapped(self, columns: torch.Tensor) -> torch.Tensor:
        args = self.args
        low, high = (columns.new_tensor(bound) for bound in (args.beta_norm_reward_min, args.beta_norm_reward_max))
        mapped = (columns - low) / (high - low)
        outside = (mapped < -1e-6) | (mapped > 1 + 1e-6)
        if outside.any():
            raise ValueError(
                f"a reward of {columns[outside][0].item()} lies outside of [`beta_norm_reward_min`, "
                f"`beta_norm_reward_max`] = [{low.tolist()}, {high.tolist()}]: set both to the range of your rewards."
            )
        return mapped.clamp(0, 1).double()

    def compute_advantages(self, rollouts: Rollouts):
        args, everything = self.args, rollouts.everything
        if args.beta_norm_decompose:
            columns, weights, others = rollouts.shaped, rollouts.reward_weights, everything.reward_matrix
            if columns.dim() == 1:
                raise ValueError(
                    "`beta_norm_decompose` needs one column per reward function, but a mixed method's shape_rewards "
                    "returned their sum: set it to False."
                )
        else:
            columns, others = rollouts.rewards.unsqueeze(1), everything.raw_rewards.unsqueeze(1)
            weights = columns.new_ones(1)
        mapped = self._bnpo_mapped(columns)
        # Of rollouts that are not trained on only the unshaped rewards are known.
        fitted, ids = mapped, rollouts.group_ids
        if len(everything) != len(rollouts):
            fitted, ids = self._bnpo_mapped(others), everything.group_ids
        parts = []
        for i, (column, all_of_it) in enumerate(zip(mapped.unbind(1), fitted.unbind(1), strict=True)):
            rates, _ = success_rates(all_of_it, ids)
            alpha, beta = beta_parameters(rates[~rates.isnan()], args.beta_norm_var_floor)
            if i == 0:
                self.log_metric("bnpo/alpha", alpha)
                self.log_metric("bnpo/beta", beta)
            parts.append(
                bnpo_advantages(column, rollouts.group_ids, args.beta_norm_max_weight, parameters=(alpha, beta))
            )
        weights = weights.double()
        return ((torch.stack(parts, dim=1) * weights).sum(1) / weights.sum()).to(rollouts.reward_matrix.dtype)
