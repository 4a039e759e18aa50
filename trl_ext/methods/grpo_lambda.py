"""GRPO-lambda (Dai et al., Stable Reinforcement Learning for Efficient Reasoning, arXiv 2505.18086)."""

import math
import warnings
from dataclasses import dataclass, field

import torch

from ..core import MethodConfig, MethodTrainer, Rollouts
from ..core.rollouts import group_table


@dataclass
class GRPOLambdaConfig(MethodConfig):
    r"""
    Configuration of [`GRPOLambdaTrainer`]. The paper names 20 percent for `lambda_top`; its penalty strength is not
    known, 0.6 is that of a third-party implementation.

    Parameters:
        lambda_top (`float`, *optional*, defaults to `0.2`):
            Share of the batch's groups, those with the most correct answers, whose rewards shrink with length.
        lambda_length_alpha (`float`, *optional*, defaults to `0.6`):
            Strength of the length penalty.
        lambda_correctness_reward (`str`, *optional*):
            Name of the reward function that tells correct answers; the first one by default.
        lambda_correct_threshold (`float`, *optional*, defaults to `1.0`):
            Least reward of a correct answer.
        lambda_length_std (`str`, *optional*, defaults to `"population"`):
            Standard deviation of the lengths, `"population"` or `"sample"`.
    """

    lambda_top: float = field(default=0.2, metadata={"help": "Share of groups with a length-aware reward."})
    lambda_length_alpha: float = field(default=0.6, metadata={"help": "Strength of the length penalty."})
    lambda_correctness_reward: str | None = field(
        default=None, metadata={"help": "Reward function that tells correct answers; None: the first."}
    )
    lambda_correct_threshold: float = field(default=1.0, metadata={"help": "Least reward of a correct answer."})
    lambda_length_std: str = field(
        default="population",
        metadata={"help": "Standard deviation of the lengths.", "choices": ["population", "sample"]},
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_range("lambda_top", 0 <= self.lambda_top <= 1, "in [0, 1]")
        self.check_range("lambda_length_alpha", 0 <= self.lambda_length_alpha < 1, "in [0, 1)")
        self.check_choices("lambda_length_std")


def grpo_lambda_top_groups(correct: torch.Tensor, group_ids: torch.Tensor, top: float = 0.2) -> torch.Tensor:
    """
    The groups with the largest share of correct answers: `ceil(top * groups)` of them, at least one unless `top` is 0;
    at a tie the group that comes first.

    Args:
        correct (`torch.Tensor`):
            Boolean, shape `(N,)`.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.
        top (`float`, *optional*, defaults to `0.2`):
            Share of the groups.

    Returns:
        `torch.Tensor`: Whether each rollout's group is one of them, boolean, shape `(N,)`.
    """
    table, row, _ = group_table(correct.double(), group_ids)
    first = torch.full((len(table),), len(row), device=row.device)
    first = first.scatter_reduce(0, row, torch.arange(len(row), device=row.device), "amin")
    order = first.argsort()  # groups as the batch has them
    shares = torch.nanmean(table, dim=1)[order]
    # The small number undoes a float excess such as 0.07 * 100.
    count = max(math.ceil(top * len(table) - 1e-9), 1) if top > 0 else 0
    best = order[shares.argsort(descending=True, stable=True)[:count]]
    return torch.isin(row, best)


def grpo_lambda_rewards(
    correct: torch.Tensor,
    lengths: torch.Tensor,
    group_ids: torch.Tensor,
    top: float = 0.2,
    alpha: float = 0.6,
    std: str = "population",
) -> torch.Tensor:
    """
    1 for a correct answer, less a sigmoid of its standardised length in the best groups; 0 for a wrong one.

    Args:
        correct (`torch.Tensor`):
            Boolean, shape `(N,)`.
        lengths (`torch.Tensor`):
            Tokens of each answer, shape `(N,)`.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.
        top (`float`, *optional*, defaults to `0.2`):
            Share of the groups that are penalised for length.
        alpha (`float`, *optional*, defaults to `0.6`):
            Strength of the penalty.
        std (`str`, *optional*, defaults to `"population"`):
            `"population"` or `"sample"`; taken over the correct answers of the group.

    Returns:
        `torch.Tensor`: Shape `(N,)`, float64.
    """
    of_correct = torch.where(correct, lengths.double(), torch.nan)
    table, row, _ = group_table(of_correct, group_ids)
    mean = torch.nanmean(table, dim=1, keepdim=True)
    count = (~table.isnan()).sum(1)
    squares = ((table - mean) ** 2).nansum(1)
    deviation = (squares / (count - int(std == "sample")).clamp(min=1)).sqrt()[row]
    z = torch.where(squares[row] > 0, (of_correct - mean[row, 0]) / deviation, 0.0)
    penalised = grpo_lambda_top_groups(correct, group_ids, top)
    reward = torch.where(penalised, 1 - alpha * torch.sigmoid(z), 1.0)
    return torch.where(correct, reward, 0.0)


class GRPOLambdaTrainer(MethodTrainer):
    """
    GRPO-lambda, from Stable Reinforcement Learning for Efficient Reasoning ([arXiv
    2505.18086](https://huggingface.co/papers/2505.18086)). Only groups that already answer well are rewarded for
    short answers; a wrong answer is never penalised for its length.

    Logs `grpo_lambda/threshold` (least share of correct answers among the chosen groups) and
    `grpo_lambda/penalty` (mean reduction of the reward of correct answers).
    """

    config_class = GRPOLambdaConfig
    _name = "GRPO-lambda"
    _paper = {
        "title": "Stable Reinforcement Learning for Efficient Reasoning",
        "id": "2505.18086",
        "citation": """\
@article{dai2025stable,
    title  = {{Stable Reinforcement Learning for Efficient Reasoning}},
    author = {Muzhi Dai and Shixuan Liu and Qingyi Si},
    year   = 2025,
    eprint = {arXiv:2505.18086},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lambda_column = self.reward_column("lambda_correctness_reward")
        if self.args.lambda_top > 0 and self.args.generation_batch_size == self.args.num_generations:
            warnings.warn(
                "A generation holds a single group, which is always among the best: GRPO-lambda becomes a plain "
                "length penalty. Raise `generation_batch_size`.",
                stacklevel=2,
            )

    def shape_rewards(self, rollouts: Rollouts):
        rewards, args = super().shape_rewards(rollouts).clone(), self.args
        correctness = rewards[:, self.lambda_column]
        correct, scored = correctness >= args.lambda_correct_threshold, ~correctness.isnan()
        top = args.lambda_top if rollouts.training else 0.0
        shaped = grpo_lambda_rewards(
            correct, rollouts.lengths, rollouts.group_ids, top, args.lambda_length_alpha, args.lambda_length_std
        )
        if top > 0:
            chosen = grpo_lambda_top_groups(correct, rollouts.group_ids, top)
            table, row, _ = group_table(correct.double(), rollouts.group_ids)
            self.log_metric("grpo_lambda/threshold", torch.nanmean(table, dim=1)[row][chosen].min())
            self.log_metric("grpo_lambda/penalty", (1 - shaped[correct]).mean() if correct.any() else 0.0)
        rewards[:, self.lambda_column] = shaped.to(rewards)
        rewards[~scored] = torch.nan  # an answer of unknown correctness is unscorable, whatever else it earned
        return rewards
