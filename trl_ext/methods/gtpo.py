"""Group-relative Trajectory-based Policy Optimization (GTPO; arXiv 2508.03772)."""

import math
import warnings
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather

from ..core import MethodConfig, MethodTrainer, Rollouts, TokenBatch
from ..core.rollouts import group_advantages, group_table, zero_signal
from ..core.trainer import strictly_on_policy


@dataclass
class GTPOConfig(MethodConfig):
    r"""
    Configuration of [`GTPOTrainer`]. Defaults are those of the paper; where the authors' code differs, its choice is a
    setting. There is no clip (`epsilon`), advantages are never scaled (`scale_rewards`), and `beta` above 0 is allowed
    but not the paper's.

    Parameters:
        gtpo_conflict_weight (`float`, *optional*, defaults to `2.0`):
            Weight of a conflict token's positive updates; its negative ones are skipped.
        gtpo_entropy_coef (`float`, *optional*, defaults to `0.1`):
            What a completion's mean entropy takes off its advantage, per nat.
        gtpo_entropy_threshold (`float`, *optional*, defaults to `ln 2`):
            Completions of larger mean entropy are dropped (0.7 in the code).
        gtpo_use_initial_entropy (`bool`, *optional*, defaults to `True`):
            Whether none is dropped if the policy's mean entropy was above the threshold at the start of training. It
            takes one forward pass over the first generation to know that. The code always drops.
        gtpo_divide_by_conflicts (`bool`, *optional*, defaults to `False`):
            Whether, as in the code, a completion's loss is divided by the length of its longer run of conflict tokens,
            and a group's losses are summed.
        gtpo_skip_equal_rewards (`bool`, *optional*, defaults to `False`):
            Whether groups of equal rewards have no loss. By the formula they still lower the entropy (ours).
    """

    loss_type: str = field(
        default="grpo", metadata={"help": "A mean over each completion's tokens, then over rollouts."}
    )
    gtpo_conflict_weight: float = field(default=2.0, metadata={"help": "Weight of positive updates in conflict."})
    gtpo_entropy_coef: float = field(default=0.1, metadata={"help": "What a nat of entropy takes off an advantage."})
    gtpo_entropy_threshold: float = field(
        default=math.log(2), metadata={"help": "Mean entropy above which a completion is dropped, in nats."}
    )
    gtpo_use_initial_entropy: bool = field(
        default=True, metadata={"help": "Drop nothing if the initial policy's entropy is above the threshold."}
    )
    gtpo_divide_by_conflicts: bool = field(
        default=False, metadata={"help": "Divide by the number of conflict tokens and sum over the group."}
    )
    gtpo_skip_equal_rewards: bool = field(default=False, metadata={"help": "No loss for groups of equal rewards."})

    def __post_init__(self):
        super().__post_init__()
        self.check_range("num_generations", self.num_generations >= 2, "at least 2 to compare rollouts")
        self.check_range("gtpo_conflict_weight", 1 <= self.gtpo_conflict_weight < math.inf, "at least 1 and finite")
        self.check_range("gtpo_entropy_coef", 0 <= self.gtpo_entropy_coef < math.inf, "at least 0 and finite")
        self.check_range("gtpo_entropy_threshold", self.gtpo_entropy_threshold > 0, "positive")


def gtpo_advantages(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """
    Rewards minus the mean of their group, not divided by a standard deviation.

    Args:
        rewards (`torch.Tensor`):
            Shape `(N,)`; NaN = not scored.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.

    Returns:
        `torch.Tensor`: Shape `(N,)`; exactly 0 in groups of equal rewards, whose sign would else be that of a rounding
        error, and for unscored rollouts.
    """
    return group_advantages(rewards, group_ids, "none").masked_fill(zero_signal(rewards, group_ids), 0.0)


def _leading_runs(token_ids: torch.Tensor, mask: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """Leading positions at which another row of the group, of the opposite sign, has the same token; `(M, G, T)`."""
    groups, size, length = token_ids.shape
    runs = torch.zeros_like(mask)
    opposite = (sign.unsqueeze(2) * sign.unsqueeze(1) < 0).unsqueeze(3)
    alive = opposite.any(2)
    block = max(1, 2**22 // max(1, groups * size * size))  # of positions: bounds the memory, and runs end early
    for start in range(0, length, block):
        ids, valid = token_ids[..., start : start + block], mask[..., start : start + block]
        same = (ids.unsqueeze(2) == ids.unsqueeze(1)) & opposite & valid.unsqueeze(1)
        run = (same.any(2) & valid & alive).cummin(2).values
        runs[..., start : start + block] = run
        alive = run[..., -1:]
        if not alive.any():
            break
    return runs


def conflict_runs(
    token_ids: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
    group_ids: torch.Tensor,
    truncated: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Conflict tokens: those that a completion of the opposite sign has too, at the same position, in an unbroken run
    from the start (prefix), or counted backwards from both last tokens (suffix). The partner may change from one
    position to the next, and need not be inside a run itself.

    Args:
        token_ids (`torch.Tensor`), mask (`torch.Tensor`):
            Tokens, and 1 for those written by the model, shape `(N, T)`; others break a run.
        advantages (`torch.Tensor`):
            Only their signs count, shape `(N,)`; 0 takes no part.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.
        truncated (`torch.Tensor`, *optional*):
            Completions without an end, which take no part in suffixes, boolean, shape `(N,)`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: prefix and suffix, boolean, shape `(N, T)`.
    """
    valid, sign = mask.bool(), advantages.sign()
    positions = torch.arange(mask.shape[1], device=mask.device)
    # Counted from the last token; the same gather leads there and back.
    mirrored = torch.where(valid, positions, -1).amax(1, keepdim=True) - positions
    inside, mirrored = mirrored >= 0, mirrored.clamp(min=0)

    _, row, column = group_table(torch.zeros_like(advantages), group_ids)
    shape = (int(row.max()) + 1, int(column.max()) + 1)

    def runs(ids, valid, sign):
        tables = []
        for values in (ids, valid, sign):
            table = values.new_zeros(*shape, *values.shape[1:])
            table[row, column] = values
            tables.append(table)
        return _leading_runs(*tables)[row, column]

    prefix = runs(token_ids, valid, sign)
    ended = sign if truncated is None else sign.masked_fill(truncated, 0.0)
    suffix = runs(token_ids.gather(1, mirrored), valid.gather(1, mirrored) & inside, ended)
    return prefix, suffix.gather(1, mirrored) & inside


def conflict_weights(
    prefix: torch.Tensor, suffix: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, weight: float = 2.0
) -> torch.Tensor:
    """
    Weight of every token: in a run `weight` if the advantage is positive and 0 if it is negative, in both runs the
    product; 1 elsewhere.

    Args:
        prefix (`torch.Tensor`), suffix (`torch.Tensor`), mask (`torch.Tensor`):
            Shape `(N, T)`.
        advantages (`torch.Tensor`):
            Shape `(N,)`.
        weight (`float`, *optional*, defaults to `2.0`):
            The weight.

    Returns:
        `torch.Tensor`: Shape `(N, T)`, in the advantages' dtype.
    """
    inside = torch.where(advantages > 0, weight, torch.where(advantages < 0, 0.0, 1.0)).to(advantages).unsqueeze(1)
    return torch.where(prefix, inside, 1.0) * torch.where(suffix, inside, 1.0) * mask


def conflict_counts(prefix: torch.Tensor, suffix: torch.Tensor) -> torch.Tensor:
    """Length of the longer run of each completion, `(N,)`: what the authors' code divides by, if it is above 1."""
    return torch.maximum(prefix.sum(1), suffix.sum(1))


def mean_entropy(entropies: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Mean entropy of each completion.

    Args:
        entropies (`torch.Tensor`), mask (`torch.Tensor`):
            Shape `(B, T)`; masked positions may hold anything.

    Returns:
        `torch.Tensor`: Shape `(B,)`, detached; 0 for a completion without tokens.
    """
    return torch.where(mask.bool(), entropies.detach(), 0.0).sum(1) / mask.sum(1).clamp(min=1)


def entropy_filter(
    entropy: torch.Tensor, initial: float | None = None, threshold: float = math.log(2)
) -> torch.Tensor:
    """
    Completions that are kept: all, if the initial policy's entropy was above the threshold, else those below it.

    Args:
        entropy (`torch.Tensor`):
            Mean entropy of each completion, shape `(B,)`.
        initial (`float`, *optional*):
            Mean entropy of the initial policy; None for the code's rule, which does not ask for it.
        threshold (`float`, *optional*, defaults to `ln 2`):
            In nats.

    Returns:
        `torch.Tensor`: Boolean, shape `(B,)`.
    """
    return entropy <= (math.inf if initial is not None and initial > threshold else threshold)


def gtpo_loss(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    entropy: torch.Tensor,
    kept: torch.Tensor,
    entropy_coef: float = 0.1,
) -> torch.Tensor:
    """
    The unclipped surrogate with entropy-shaped advantages, before the conflict weights.

    Args:
        log_ratio (`torch.Tensor`):
            Log importance ratio, 0 with gradient when on-policy, shape `(B, T)`.
        advantages (`torch.Tensor`):
            Shape `(B,)`, or `(B, T)`.
        entropy (`torch.Tensor`), kept (`torch.Tensor`):
            Mean entropy of each completion, and whether it is kept, shape `(B,)`.
        entropy_coef (`float`, *optional*, defaults to `0.1`):
            What a nat of entropy takes off the advantage.

    Returns:
        `torch.Tensor`: Loss per token, shape `(B, T)`; 0 where dropped.
    """
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    shaped = (advantages - entropy_coef * entropy.unsqueeze(1)).masked_fill(~kept.unsqueeze(1), 0.0)
    return -torch.exp(log_ratio) * shaped


class GTPOTrainer(MethodTrainer):
    """
    GTPO: Group-relative Trajectory-based Policy Optimization ([arXiv
    2508.03772](https://huggingface.co/papers/2508.03772)). Tokens that good and bad completions of a group share at
    their beginnings and ends are no longer pushed down by the bad ones, and pushed up twice by the good ones;
    uncertain completions have a smaller advantage, and the most uncertain are dropped. No clip, no KL, no reference
    model; meant for one optimizer step per generation. Which tokens conflict is decided when the generation is scored,
    for whole groups, however these are spread over processes and micro-batches. Unscored rollouts have no loss.

    State: the mean entropy of the policy over the first generation.

    Logs `gtpo/conflicts` (share of the tokens), `gtpo/entropy` (mean over completions), `gtpo/kept` (share of the
    completions that the filter keeps) and `gtpo/initial_entropy`.
    """

    config_class = GTPOConfig
    replaces = ("compute_advantages", "policy_loss")
    ignores = ("clip_range",)
    contradicts = {
        "clip_cov": "Clip-Cov picks tokens by their clip and their advantage, but GTPO has no clip and completes its "
        "advantages in the loss"
    }
    _name = "GTPO"
    _paper = {
        "title": "GTPO: Trajectory-Based Policy Optimization in Large Language Models",
        "id": "2508.03772",
        "citation": """\
@article{simoni2025gtpo,
    title  = {{GTPO: Trajectory-Based Policy Optimization in Large Language Models}},
    author = {Marco Simoni and Aleksandar Fontana and Giulio Rossolini and Andrea Saracino},
    year   = 2025,
    eprint = {arXiv:2508.03772},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        args = self.args
        if args.importance_sampling_level != "token":
            raise ValueError(
                f"`importance_sampling_level` is {args.importance_sampling_level!r}, but GTPO skips single tokens, "
                "which a ratio of the whole sequence would still move: use 'token'."
            )
        if args.beta > 0:
            warnings.warn(f"GTPO works without a KL term, but `beta` is {args.beta}: it is added.", stacklevel=2)
        if not strictly_on_policy(args):
            warnings.warn(
                "GTPO does not clip the ratio and is meant for one optimizer step per generation: set "
                f"`num_iterations` (now {args.num_iterations}) to 1 and `steps_per_generation` (now "
                f"{args.steps_per_generation}) to `gradient_accumulation_steps` (now "
                f"{args.gradient_accumulation_steps}).",
                stacklevel=2,
            )
        self.gtpo_initial_entropy = None

    def compute_advantages(self, rollouts: Rollouts):
        return gtpo_advantages(rollouts.rewards, rollouts.group_ids)

    def observe(self, rollouts: Rollouts):
        super().observe(rollouts)
        if self.args.gtpo_use_initial_entropy and self.gtpo_initial_entropy is None:
            self.gtpo_initial_entropy = self._gtpo_entropy_of(rollouts)
        if self.gtpo_initial_entropy is not None:
            self.log_metric("gtpo/initial_entropy", self.gtpo_initial_entropy)

    def _gtpo_entropy_of(self, rollouts: Rollouts) -> float | None:
        """Mean over the completions of all processes of their mean entropy under the current policy."""
        means = mean_entropy(self.completion_entropies(rollouts).double(), rollouts.mask)
        sums = torch.stack([means.sum(), rollouts.mask.any(1).sum()])
        total, number = gather(sums.unsqueeze(0)).sum(0).tolist()
        return total / number if number else None

    def carry(self, rollouts: Rollouts):
        args, local = self.args, rollouts.local
        advantages, mask = rollouts.advantages, rollouts.mask
        if advantages.dim() == 2:  # another method's, per token
            advantages = gather((advantages * mask).sum(1) / mask.sum(1).clamp(min=1))
        held = rollouts.group_ids.view(self.accelerator.num_processes, -1)
        groups = len(rollouts.group_ids.unique())
        parts, rows, mine = (rollouts.completion_ids, mask), local, slice(None)
        if sum(len(part.unique()) for part in held) > groups:  # some group lies on several processes
            parts = [gather(self.accelerator.pad_across_processes(part, dim=1)) for part in parts]
            rows, mine = slice(None), local
        signs = advantages[rows]
        prefix, suffix = conflict_runs(*parts, signs, rollouts.group_ids[rows], rollouts.truncated[rows])
        prefix, suffix = (runs[mine, : mask.shape[1]] for runs in (prefix, suffix))
        weights = conflict_weights(prefix, suffix, advantages[local], mask, args.gtpo_conflict_weight)
        if args.gtpo_divide_by_conflicts:
            counts = conflict_counts(prefix, suffix).clamp(min=1).unsqueeze(1)
            weights = weights * len(rollouts) / groups / counts
        inside, tokens = gather(torch.stack([(prefix | suffix).sum(), mask.sum()]).unsqueeze(0)).sum(0).tolist()
        self.log_metric("gtpo/conflicts", inside / max(tokens, 1))
        active = ~rollouts.rewards.isnan()
        if args.gtpo_skip_equal_rewards:
            active = active & ~zero_signal(rollouts.rewards, rollouts.group_ids)
        return super().carry(rollouts) | {"gtpo/weights": weights, "gtpo/active": active[local]}

    def policy_loss(self, tokens: TokenBatch):
        args, mask = self.args, tokens.model_mask
        entropy = mean_entropy(tokens.entropies, mask)
        initial = self.gtpo_initial_entropy if args.gtpo_use_initial_entropy else None
        kept = entropy_filter(entropy, initial, args.gtpo_entropy_threshold)
        present = mask.any(1)
        self.log_token_metric("gtpo/entropy", entropy.sum(), present.sum())
        self.log_token_metric("gtpo/kept", (kept & present).sum(), present.sum())
        active = tokens.carried["gtpo/active"] & kept
        return gtpo_loss(tokens.log_ratio, tokens.advantages, entropy, active, args.gtpo_entropy_coef)

    def token_weights(self, tokens: TokenBatch):
        weights, before = tokens.carried["gtpo/weights"], super().token_weights(tokens)
        return weights if before is None else before * weights

    def method_state(self):
        return super().method_state() | {"gtpo": {"initial_entropy": self.gtpo_initial_entropy}}

    def load_method_state(self, state):
        super().load_method_state(state)
        self.gtpo_initial_entropy = state["gtpo"]["initial_entropy"]
