"""Entropic objective of TTT-Discover (Yuksekgonul, Koceja, Li et al., arXiv 2601.16175)."""

import math
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather
from peft import PeftModel

from ..core import MethodConfig, MethodTrainer, Rollouts, TokenBatch
from ..core.rollouts import group_table


@dataclass
class TTTDiscoverConfig(MethodConfig):
    r"""
    Configuration of [`TTTDiscoverTrainer`]. Defaults are those of the paper and its code; the coefficient of the KL
    penalty that the paper uses per task could not be verified.

    Parameters:
        entropic_kl_budget (`float`, *optional*, defaults to `ln 2`):
            KL divergence from uniform of each group's tilted weights, in nats; below the logarithm of
            `num_generations`.
        entropic_beta (`float`, *optional*):
            A fixed inverse temperature (2.0 in the code's fixed mode) in place of the one found for each group.
        entropic_beta_max (`float`, *optional*, defaults to `1e6`), entropic_iters (`int`, *optional*, defaults to
            `60`):
            Where the search for the inverse temperature stops doubling, and its bisection steps.
        entropic_eps (`float`, *optional*, defaults to `1e-12`):
            Added to the leave-one-out normaliser.
        entropic_kl_coef (`float`, *optional*, defaults to `0.0`):
            Coefficient of the KL penalty to the frozen start model, which is put into the advantages. Above 0 it costs
            one forward pass of that model per generation, and its memory (none with LoRA).
        entropic_surrogate (`str`, *optional*, defaults to `"is_sum"`):
            `"is_sum"`: importance sampling without a clip, summed over all tokens of the optimizer's batch; `"trl"`:
            the loss that TRL's settings describe (not `loss_type` `"cispo"`, `"sapo"` or `"vespo"`).
    """

    entropic_kl_budget: float = field(
        default=math.log(2), metadata={"help": "KL divergence of a group's weights from uniform, in nats."}
    )
    entropic_beta: float | None = field(default=None, metadata={"help": "Fixed inverse temperature; None: adaptive."})
    entropic_beta_max: float = field(default=1e6, metadata={"help": "Where the search stops doubling."})
    entropic_iters: int = field(default=60, metadata={"help": "Bisection steps of the search."})
    entropic_eps: float = field(default=1e-12, metadata={"help": "Added to the leave-one-out normaliser."})
    entropic_kl_coef: float = field(default=0.0, metadata={"help": "KL penalty to the start model, in advantages."})
    entropic_surrogate: str = field(
        default="is_sum",
        metadata={"help": "Unclipped importance sampling, or TRL's loss.", "choices": ["is_sum", "trl"]},
    )

    def __post_init__(self):
        super().__post_init__()
        group, beta, coef = self.num_generations, self.entropic_beta, self.entropic_kl_coef
        self.check_range("num_generations", group >= 3, "at least 3 for leave-one-out weights with a KL budget")
        self.check_range(
            "entropic_kl_budget",
            0 < self.entropic_kl_budget < math.log(group),
            f"between 0 and ln(num_generations) = {math.log(group):.4f}, both excluded",
        )
        self.check_range("entropic_beta", beta is None or 0 < beta < math.inf, "positive and finite, or None")
        self.check_range("entropic_beta_max", 1 <= self.entropic_beta_max < math.inf, "at least 1 and finite")
        self.check_range("entropic_iters", self.entropic_iters >= 1, "at least 1")
        self.check_range("entropic_eps", self.entropic_eps > 0, "positive")
        self.check_range("entropic_kl_coef", 0 <= coef < math.inf, "at least 0 and finite")
        self.check_choices("entropic_surrogate")
        self.check_range(
            "beta", not (self.beta and coef), f"0 with `entropic_kl_coef` {coef}, which penalises the same divergence"
        )


def _below_best(table: torch.Tensor) -> torch.Tensor:
    """Rewards minus the best of their row."""
    return table - table.nan_to_num(nan=-torch.inf).amax(dim=1, keepdim=True)


def _has_signal(table: torch.Tensor) -> torch.Tensor:
    """Rows with at least three scored rewards that are not all equal."""
    return ((~table.isnan()).sum(1) >= 3) & (_below_best(table) < 0).any(1)


def tilted_weights(table: torch.Tensor, betas: torch.Tensor) -> torch.Tensor:
    """
    Weights proportional to exp(beta r) in each group.

    Args:
        table (`torch.Tensor`):
            Rewards, one group per row, padded with NaN, shape `(M, K)`.
        betas (`torch.Tensor`):
            Shape `(M,)`.

    Returns:
        `torch.Tensor`: Shape `(M, K)`; rows sum to 1, 0 where the reward is NaN.
    """
    return torch.softmax((betas.unsqueeze(1) * _below_best(table)).nan_to_num(nan=-torch.inf), dim=1)


def tilted_kl(table: torch.Tensor, betas: torch.Tensor) -> torch.Tensor:
    """KL divergence of [`tilted_weights`] from uniform, in nats, shape `(M,)`; arguments as there."""
    weights = tilted_weights(table, betas)
    return torch.xlogy(weights, weights).sum(1) + (~table.isnan()).sum(1).to(table).log()


def adaptive_beta(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    kl_budget: float = math.log(2),
    beta_max: float = 1e6,
    iters: int = 60,
) -> torch.Tensor:
    """
    Inverse temperature at which each group's tilted weights diverge from uniform by the budget: doubled from 1 until
    they do, or until it reaches `beta_max` (where ties at the top keep them from it), then found by bisection.

    Args:
        rewards (`torch.Tensor`):
            Shape `(N,)`; NaN = not scored.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.
        kl_budget (`float`, *optional*, defaults to `ln 2`):
            In nats.
        beta_max (`float`, *optional*, defaults to `1e6`):
            Where doubling stops.
        iters (`int`, *optional*, defaults to `60`):
            Bisection steps.

    Returns:
        `torch.Tensor`: By ascending group id, shape `(M,)`, in float64 on the CPU. 0 where all rewards are equal,
        fewer than three are scored, or too few for the budget: it must be below the logarithm of their number, else a
        lone best rollout would get all the weight, and an advantage without bound.
    """
    table, _, _ = group_table(rewards.detach().cpu().double(), group_ids.cpu())
    usable = _has_signal(table) & ((~table.isnan()).sum(1).double().log() > kl_budget)
    low, high = torch.zeros(len(table), dtype=torch.float64), usable.double()
    while (short := usable & (high < beta_max) & (tilted_kl(table, high) < kl_budget)).any():
        high = torch.where(short, 2 * high, high)
    bracketed = usable & (tilted_kl(table, high) >= kl_budget)
    for _ in range(iters):
        middle = (low + high) / 2
        short = tilted_kl(table, middle) < kl_budget
        low = torch.where(bracketed & short, middle, low)
        high = torch.where(bracketed & ~short, middle, high)
    return high


def entropic_advantages(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    kl_budget: float = math.log(2),
    beta: "float | torch.Tensor | None" = None,
    beta_max: float = 1e6,
    iters: int = 60,
    eps: float = 1e-12,
) -> torch.Tensor:
    """
    Leave-one-out entropic advantages: exp(beta r) over its mean over the others of the group, minus 1. They do not
    change when rewards are shifted, and with the adaptive beta neither when they are scaled.

    Args:
        rewards (`torch.Tensor`):
            Shape `(N,)`; NaN = not scored.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.
        kl_budget (`float`, *optional*, defaults to `ln 2`), beta_max (`float`, *optional*, defaults to `1e6`), iters
            (`int`, *optional*, defaults to `60`):
            See [`adaptive_beta`].
        beta (`float` or `torch.Tensor`, *optional*):
            Inverse temperature, of all groups or by ascending group id, shape `(M,)`; by default [`adaptive_beta`].
        eps (`float`, *optional*, defaults to `1e-12`):
            Added to the mean over the others.

    Returns:
        `torch.Tensor`: Shape `(N,)`, in the rewards' dtype, from float64; 0 for unscored rollouts and for groups of
        equal rewards, with fewer than three scored rollouts or with a beta of 0.
    """
    values, ids = rewards.detach().cpu().double(), group_ids.cpu()
    table, row, column = group_table(values, ids)
    betas = adaptive_beta(values, ids, kl_budget, beta_max, iters) if beta is None else torch.as_tensor(beta).double()
    betas = betas.expand(len(table))
    terms = torch.exp(betas.unsqueeze(1) * _below_best(table))
    others = (terms.nansum(1, keepdim=True) - terms) / ((~terms.isnan()).sum(1, keepdim=True) - 1).clamp(min=1)
    advantages = terms / (others + eps) - 1
    advantages[~_has_signal(table) | (betas == 0)] = 0.0
    return advantages[row, column].nan_to_num(nan=0.0).to(rewards)


def groups_with_signal(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """
    Scored rollouts of groups with a signal: at least three scored rewards, not all equal. If there is no such group,
    those of the first with a scored rollout, so that there is something to step on.

    Args:
        rewards (`torch.Tensor`):
            Shape `(N,)`; NaN = not scored.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.

    Returns:
        `torch.Tensor`: Boolean, shape `(N,)`.
    """
    scored = ~rewards.isnan()
    table, row, _ = group_table(rewards, group_ids)
    kept = scored & _has_signal(table)[row]
    if not kept.any() and scored.any():
        return scored & (group_ids == group_ids[scored].min())
    return kept


def kl_shaped_advantages(
    advantages: torch.Tensor,
    logps: torch.Tensor,
    base_logps: torch.Tensor,
    mask: torch.Tensor,
    coef: float,
    mean: "torch.Tensor | float | None" = None,
) -> torch.Tensor:
    """
    Advantages with a KL penalty: at each token plus `coef` times (mean log-ratio of all tokens - its log-ratio).

    Args:
        advantages (`torch.Tensor`):
            Shape `(n,)`, or `(n, T)` per token.
        logps (`torch.Tensor`), base_logps (`torch.Tensor`):
            Log-probabilities of the sampling policy and of the base model, shape `(n, T)`; masked positions may hold
            anything.
        mask (`torch.Tensor`):
            1 for tokens that enter the loss, shape `(n, T)`.
        coef (`float`):
            Coefficient of the penalty.
        mean (`torch.Tensor` or `float`, *optional*):
            Mean log-ratio where these rows are only part of the batch; by default theirs.

    Returns:
        `torch.Tensor`: Shape `(n, T)`.
    """
    valid = mask.bool()
    gap = torch.where(valid, logps - base_logps, 0.0)
    if mean is None:
        mean = gap.sum() / valid.sum().clamp(min=1)
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    return advantages + coef * torch.where(valid, mean - gap, 0.0)


def is_loss(log_ratio: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """
    Importance sampling without a clip: minus the ratio times the advantage.

    Args:
        log_ratio (`torch.Tensor`):
            Log importance ratio, shape `(B, T)`.
        advantages (`torch.Tensor`):
            Shape `(B, T)`.

    Returns:
        `torch.Tensor`: Loss per token, shape `(B, T)`.
    """
    return -torch.exp(log_ratio) * advantages


class TTTDiscoverTrainer(MethodTrainer):
    """
    The entropic objective of TTT-Discover, from Learning to Discover at Test Time ([arXiv
    2601.16175](https://huggingface.co/papers/2601.16175)), which trains on one hard problem for the best single
    answer. The best rollouts of a group dominate, by as much as a KL budget allows whatever the rewards' scale; groups
    of equal rewards leave the batch; the loss is a plain importance-sampled sum over tokens. The paper's reuse of
    earlier solutions is a method of its own: `mix("ttt_discover", "puct")`.

    The sum makes gradients large: with Adam that only matters through `max_grad_norm`. `scale_rewards` plays no part.
    The ratio is taken to the trainer's own log-probabilities of the generation; what separates those from vLLM's is
    left to TRL's correction, so that nothing is corrected twice.

    Logs `entropic/beta`, `entropic/effective_size` (1 / sum of squared weights; both means over groups with a signal),
    `entropic/max_advantage`, and with `entropic_kl_coef` `entropic/kl` (mean log-ratio to the start model).
    """

    config_class = TTTDiscoverConfig
    replaces = ("compute_advantages", "policy_loss", "aggregate_loss")
    _name = "TTT-Discover entropic objective"
    _paper = {
        "title": "Learning to Discover at Test Time",
        "id": "2601.16175",
        "citation": """\
@article{yuksekgonul2026learning,
    title  = {{Learning to Discover at Test Time}},
    author = {Mert Yuksekgonul and Daniel Koceja and Xinhao Li and others},
    year   = 2026,
    eprint = {arXiv:2601.16175},
}""",
    }

    @classmethod
    def needs(cls, args):
        return {"old_logps"} if args.entropic_kl_coef > 0 else set()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.entropic_base = None
        policy = self.accelerator.unwrap_model(self.model)
        if self.args.entropic_kl_coef > 0 and not isinstance(policy, PeftModel):
            if not policy.config._name_or_path:
                raise ValueError(
                    f"`entropic_kl_coef` is {self.args.entropic_kl_coef}, but the policy does not say where its start "
                    "weights can be loaded from: pass the model as a path or an id, or load it with `from_pretrained`."
                )
            self.entropic_base = self.load_frozen_model(policy.config._name_or_path)

    def compute_advantages(self, rollouts: Rollouts):
        args, rewards, group_ids = self.args, rollouts.rewards, rollouts.group_ids
        betas = args.entropic_beta
        if betas is None:
            betas = adaptive_beta(
                rewards, group_ids, args.entropic_kl_budget, args.entropic_beta_max, args.entropic_iters
            )
        advantages = entropic_advantages(rewards, group_ids, beta=betas, eps=args.entropic_eps)
        self._entropic_log(rewards, group_ids, betas, advantages)
        if args.entropic_kl_coef == 0:
            return advantages
        kept = groups_with_signal(rewards, group_ids)[rollouts.local]
        mask, logps = rollouts.mask * kept.unsqueeze(1), rollouts.old_logps
        base_logps = self.frozen_logps(rollouts, self.entropic_base)
        gap = torch.where(mask.bool(), logps - base_logps, 0.0)
        total, tokens = gather(torch.stack([gap.sum().float(), mask.sum().float()])).view(-1, 2).sum(0)
        mean = total / tokens.clamp(min=1)
        self.log_metric("entropic/kl", mean)
        return kl_shaped_advantages(advantages[rollouts.local], logps, base_logps, mask, args.entropic_kl_coef, mean)

    def _entropic_log(self, rewards, group_ids, betas, advantages) -> None:
        table, _, _ = group_table(rewards.cpu().double(), group_ids.cpu())
        betas = torch.as_tensor(betas, dtype=torch.float64).expand(len(table))
        acting = _has_signal(table) & (betas > 0)
        self.log_metric("entropic/max_advantage", advantages.max())
        if acting.any():
            weights = tilted_weights(table[acting], betas[acting])
            self.log_metric("entropic/beta", betas[acting].mean())
            self.log_metric("entropic/effective_size", (1 / weights.square().sum(1)).mean())

    def select_rollouts(self, rollouts: Rollouts):
        kept = groups_with_signal(rollouts.rewards, rollouts.group_ids)
        return super().select_rollouts(rollouts) & kept

    def policy_loss(self, tokens: TokenBatch):
        if self.args.entropic_surrogate == "trl":
            return super().policy_loss(tokens)
        return is_loss(tokens.log_ratio, tokens.advantages)

    def aggregate_loss(self, per_token_loss: torch.Tensor, tokens: TokenBatch):
        if self.args.entropic_surrogate == "trl":
            return super().aggregate_loss(per_token_loss, tokens)
        # The loss is divided by the accumulation steps, and gradients are averaged over processes: undo both.
        parts = self.current_gradient_accumulation_steps * self.accelerator.num_processes if tokens.training else 1
        return torch.where(tokens.mask.bool(), per_token_loss, 0.0).sum() * parts
