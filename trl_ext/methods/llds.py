"""Likelihood-preserving regularizer against lazy likelihood displacement (LLDS, arXiv 2512.04220)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..core import MethodConfig, MethodTrainer, Rollouts, TokenBatch
from ..core.rollouts import nonzero, step_numbers, zero_signal


@dataclass
class LLDSConfig(MethodConfig):
    r"""
    Configuration of [`LLDSTrainer`]. Defaults are the paper's.

    Parameters:
        llds_coef (`float`, *optional*, defaults to `0.2`):
            Weight of the regularizer (0.3 for Qwen2.5-7B-Instruct in the paper).
        llds_gate (`str`, *optional*, defaults to `"action"`):
            Where tokens are only penalised if their summed log-likelihood fell: in each `"action"` (the model's tokens
            between two tool outputs), in the whole `"response"`, or nowhere (`"token"`).
        llds_adv_threshold (`float`, *optional*, defaults to `0.0`):
            Responses with at least this advantage are preserved.
        llds_answer_weight (`float` or `str`, *optional*):
            Weight of answer tokens in [0, 1], or `"schedule"` for the mean number of tool calls over
            `llds_target_calls`. Needs `answer_mask` on the trainer; by default answers weigh as much as the rest.
        llds_target_calls (`float`, *optional*, defaults to `2.0`):
            Tool calls per rollout at which the schedule reaches 1.
    """

    llds_coef: float = field(default=0.2, metadata={"help": "Weight of the regularizer."})
    llds_gate: str = field(
        default="action",
        metadata={"help": "Unit whose summed log-likelihood decides.", "choices": ["action", "response", "token"]},
    )
    llds_adv_threshold: float = field(default=0.0, metadata={"help": "Least advantage of a preserved response."})
    llds_answer_weight: str | None = field(
        default=None, metadata={"help": "Weight of answer tokens: a number in [0, 1] or 'schedule'."}
    )
    llds_target_calls: float = field(default=2.0, metadata={"help": "Tool calls at which the schedule reaches 1."})

    def __post_init__(self):
        super().__post_init__()
        self.check_range("llds_coef", self.llds_coef >= 0, "at least 0")
        self.check_choices("llds_gate")
        if self.llds_answer_weight not in (None, "schedule"):
            try:
                self.llds_answer_weight = float(self.llds_answer_weight)
            except ValueError:
                self.check_range("llds_answer_weight", False, "a number in [0, 1], 'schedule' or None")
            self.check_range("llds_answer_weight", 0 <= self.llds_answer_weight <= 1, "in [0, 1]")
        self.check_range("llds_target_calls", self.llds_target_calls > 0, "positive")


def llds_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    mask: torch.Tensor,
    preserved: torch.Tensor,
    gate: str = "action",
    weights: "torch.Tensor | float" = 1.0,
    count: "torch.Tensor | None" = None,
) -> torch.Tensor:
    """
    Mean fall of the log-probability over the tokens of preserved responses, of those tokens that fell in units that
    fell (Eq. 4-6, 9, 10).

    Args:
        logps (`torch.Tensor`):
            With gradient, shape `(B, T)`.
        old_logps (`torch.Tensor`), mask (`torch.Tensor`):
            Shape `(B, T)`; masked positions may hold anything.
        preserved (`torch.Tensor`):
            Responses to preserve, boolean, shape `(B,)`.
        gate (`str`, *optional*, defaults to `"action"`):
            `"action"`, `"response"` or `"token"`.
        weights (`torch.Tensor` or `float`, *optional*, defaults to `1.0`):
            Weight of each token, shape `(B, T)`.
        count (`torch.Tensor`, *optional*):
            What to divide by; by default the tokens of the preserved responses.

    Returns:
        `torch.Tensor`: Scalar; 0, connected to the graph, if nothing is preserved.
    """
    valid = mask.bool()
    fall = torch.where(valid, old_logps - logps, 0.0)
    if gate == "token":
        opened = valid
    elif gate == "response":
        opened = (fall.detach().sum(1, keepdim=True) > 0) & valid
    else:
        steps = step_numbers(mask)
        size = int(steps.max()) + 1 if steps.numel() else 0
        sums = fall.new_zeros(len(fall), size + 1)
        column = torch.where(steps >= 0, steps, size)
        opened = (sums.scatter_add(1, column, fall.detach()).gather(1, column) > 0) & valid
    kept = opened & preserved.unsqueeze(1)
    if count is None:
        count = (valid & preserved.unsqueeze(1)).sum()
    # relu, whose gradient at 0 is 0: a token that has not moved is not penalised, and clamp's gradient there is 1.
    return torch.where(kept, weights * torch.relu(fall), 0.0).sum() / nonzero(count)


class LLDSTrainer(MethodTrainer):
    """
    LLDS, from On Group Relative Policy Optimization Collapse in Agent Search: The Lazy Likelihood-Displacement
    ([arXiv 2512.04220](https://huggingface.co/papers/2512.04220)). Tokens of good or neutral responses that became
    less likely than when they were generated are pulled back up.

    `answer_mask` may be set on the trainer to a function from completion ids `(B, T)` to a mask `(B, T)` of answer
    tokens, for `llds_answer_weight`.

    Logs `llds/loss` and `llds/preserved` (share of the tokens that belong to preserved responses).
    """

    config_class = LLDSConfig
    needs_off_policy = "has no effect, because no likelihood can have fallen,"
    _name = "LLDS"
    _paper = {
        "title": "On Group Relative Policy Optimization Collapse in Agent Search: The Lazy Likelihood-Displacement",
        "id": "2512.04220",
        "citation": """\
@article{deng2025group,
    title  = {{On Group Relative Policy Optimization Collapse in Agent Search: The Lazy Likelihood-Displacement}},
    author = {Wenlong Deng and Yushu Li and Boying Gong and Yi Ren and Christos Thrampoulidis and Xiaoxiao Li},
    year   = 2025,
    eprint = {arXiv:2512.04220},
}""",
    }
    answer_mask: Callable | None = None

    def carry(self, rollouts: Rollouts):
        advantages, mask, local = rollouts.advantages, rollouts.mask, rollouts.local
        if advantages.dim() == 2:
            advantages = (advantages * mask).sum(1) / mask.sum(1).clamp(min=1)
        else:
            # Rounding in reward - mean must not drop a whole group without a signal.
            rounded = zero_signal(rollouts.rewards, rollouts.group_ids) & (advantages.abs() < 1e-5)
            advantages = advantages.masked_fill(rounded, 0.0)[local]
        preserved = (advantages >= self.args.llds_adv_threshold) & rollouts.scored[local]
        kept = torch.ones_like(preserved) if rollouts.selected is None else rollouts.selected[local]
        sums = torch.stack([mask.sum(), (mask * (preserved & kept).unsqueeze(1)).sum()])
        all_tokens, tokens = self.accelerator.reduce(sums.float(), reduction="sum")
        self.log_metric("llds/preserved", tokens / all_tokens.clamp(min=1))
        carried = {"llds/preserved": preserved, "llds/tokens": tokens}
        if self.args.llds_answer_weight == "schedule":
            calls = (step_numbers(rollouts.completion_mask * (1 - mask)).amax(1) + 1).float()  # outputs of tools
            both = self.accelerator.reduce(torch.stack([calls.sum(), calls.new_tensor(float(len(calls)))]), "sum")
            carried["llds/calls"] = both[0] / both[1]
        return super().carry(rollouts) | carried

    def regularizers(self, tokens: TokenBatch):
        args, weights = self.args, 1.0
        if args.llds_answer_weight is not None:
            if self.answer_mask is None:
                raise ValueError(
                    "`llds_answer_weight` is set, but the trainer does not know which tokens are the answer: set "
                    "`trainer.answer_mask` to a function from completion ids (B, T) to a mask (B, T)."
                )
            weight = args.llds_answer_weight
            if weight == "schedule":
                weight = (tokens.carried["llds/calls"] / args.llds_target_calls).clamp(max=1.0)
            weights = torch.where(self.answer_mask(tokens.token_ids).bool(), weight, 1.0)
        value = llds_loss(
            tokens.logps,
            tokens.old_logps,
            tokens.model_mask,
            tokens.carried["llds/preserved"],
            args.llds_gate,
            weights,
            tokens.share(tokens.carried["llds/tokens"]),
        )
        return super().regularizers(tokens) | {"llds/loss": args.llds_coef * value}
