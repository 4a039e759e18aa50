"""Entropy-regularized Policy Optimization for agents (EPO; Xu et al., arXiv 2509.22576)."""

import math
from dataclasses import dataclass, field
from statistics import fmean

import torch

from ..core import MethodConfig, MethodTrainer, Rollouts, TokenBatch
from ..core.rollouts import step_numbers


@dataclass
class EPOConfig(MethodConfig):
    r"""
    Configuration of [`EPOTrainer`]. Defaults are those of the paper's ScienceWorld runs. TRL's own entropy bonus must
    be off.

    Parameters:
        epo_coef (`float`, *optional*, defaults to `0.001`):
            Weight of the entropy bonus and of the smoothing term.
        epo_alpha (`float`, *optional*, defaults to `0.05`):
            Weight of the penalty outside the corridor (0.1 for ALFWorld).
        epo_kappa_low (`float`, *optional*, defaults to `0.0`):
            Lower end of the corridor, in units of the mean entropy of all earlier generations.
        epo_kappa_high (`float`, *optional*, defaults to `2.0`):
            Upper end of the corridor.
        epo_gamma (`float`, *optional*, defaults to `3.0`):
            How fast the smoothing term's weight decays from 2 to 1.
        epo_total_steps (`int`, *optional*):
            Generations after half of which that weight has almost decayed; by default those of the run.
        epo_penalty (`str`, *optional*, defaults to `"hinge"`):
            The paper's distance to the corridor, or the code's `"indicator"`, a constant that has no gradient and so
            changes only the reported loss.
        epo_smooth_coef (`float`, *optional*, defaults to `1.0`):
            Factor of the smoothing term, from the code.
        epo_average (`str`, *optional*, defaults to `"trajectory"`):
            The paper's mean over tokens, then turns, then trajectories; or the code's over all `"token"`s.
    """

    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of TRL's entropy bonus, which must be off."})
    epo_coef: float = field(default=0.001, metadata={"help": "Weight of the entropy terms."})
    epo_alpha: float = field(default=0.05, metadata={"help": "Weight of the penalty outside the corridor."})
    epo_kappa_low: float = field(default=0.0, metadata={"help": "Lower end of the corridor."})
    epo_kappa_high: float = field(default=2.0, metadata={"help": "Upper end of the corridor."})
    epo_gamma: float = field(default=3.0, metadata={"help": "Decay of the smoothing weight."})
    epo_total_steps: int | None = field(default=None, metadata={"help": "Generations of the schedule."})
    epo_penalty: str = field(
        default="hinge", metadata={"help": "Distance or constant.", "choices": ["hinge", "indicator"]}
    )
    epo_smooth_coef: float = field(default=1.0, metadata={"help": "Factor of the smoothing term."})
    epo_average: str = field(
        default="trajectory", metadata={"help": "How entropies are averaged.", "choices": ["trajectory", "token"]}
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_choices("epo_penalty", "epo_average")
        self.check_range("epo_coef", self.epo_coef >= 0, "at least 0")
        self.check_range("epo_alpha", self.epo_alpha >= 0, "at least 0")
        self.check_range("epo_kappa_low", self.epo_kappa_low >= 0, "at least 0")
        self.check_range("epo_kappa_high", self.epo_kappa_high > self.epo_kappa_low, "above epo_kappa_low")
        self.check_range("epo_gamma", self.epo_gamma >= 0, "at least 0")
        self.check_range(
            "epo_total_steps", self.epo_total_steps is None or self.epo_total_steps >= 1, "at least 1, or None"
        )
        self.check_range("epo_smooth_coef", self.epo_smooth_coef >= 0, "at least 0")
        self.check_range("entropy_coef", self.entropy_coef == 0, "0: EPO has an entropy bonus of its own, `epo_coef`")
        self.check_range("use_adaptive_entropy", not self.use_adaptive_entropy, "False: EPO has an entropy bonus")


def trajectory_mean(
    values: torch.Tensor,
    mask: torch.Tensor,
    average: str = "trajectory",
    count: "torch.Tensor | float | None" = None,
) -> torch.Tensor:
    """
    Mean of a per-token quantity over the tokens of every turn, then over a trajectory's turns, then over trajectories
    (equation 3). Turns lie between tool outputs; trajectories without tokens do not count.

    Args:
        values (`torch.Tensor`):
            With or without gradient, shape `(B, T)`; masked positions may hold anything.
        mask (`torch.Tensor`):
            1 for tokens written by the model, shape `(B, T)`.
        average (`str`, *optional*, defaults to `"trajectory"`):
            `"token"` for a plain mean over tokens.
        count (`torch.Tensor` or `float`, *optional*):
            What to divide the sum over trajectories (or tokens) by; by default their number.

    Returns:
        `torch.Tensor`: Scalar; 0, connected to the graph, if there are no tokens.
    """
    valid = mask.bool()
    weights = valid.to(values.dtype)
    number = valid.sum()
    if average == "trajectory":
        turns = step_numbers(mask)
        column = torch.where(valid, turns, mask.shape[1])
        sizes = weights.new_zeros(len(mask), mask.shape[1] + 1).scatter_add(1, column, weights).gather(1, column)
        weights = weights / (sizes * (turns.amax(1, keepdim=True) + 1)).clamp(min=1)
        number = valid.any(1).sum()
    divisor = torch.as_tensor(number if count is None else count).clamp(min=1e-9)
    return (weights * torch.where(valid, values, 0.0)).sum() / divisor


def epo_beta(step: int, total_steps: int, gamma: float = 3.0) -> float:
    """
    Weight of the smoothing term (equation 5).

    Args:
        step (`int`):
            Generations done.
        total_steps (`int`):
            Generations of the schedule.
        gamma (`float`, *optional*, defaults to `3.0`):
            Decay.

    Returns:
        `float`: 2 at the start, `1 + exp(-gamma)` halfway, towards 1 later.
    """
    middle = total_steps // 2
    if middle == 0:
        return 2.0 if step == 0 else 1 + math.exp(-gamma)
    return 1 + math.exp(-gamma * step / middle)


def epo_penalty(
    entropies: torch.Tensor,
    reference: float,
    kappa_low: float = 0.0,
    kappa_high: float = 2.0,
    form: str = "hinge",
) -> torch.Tensor:
    """
    Penalty of entropies outside `kappa_low * reference` to `kappa_high * reference` (equation 4).

    Args:
        entropies (`torch.Tensor`):
            In nats, any shape.
        reference (`float`):
            Mean entropy of the earlier generations.
        kappa_low (`float`, *optional*, defaults to `0.0`), kappa_high (`float`, *optional*, defaults to `2.0`):
            The corridor.
        form (`str`, *optional*, defaults to `"hinge"`):
            Distance to the corridor, or the code's `"indicator"`: 1 outside of its interior, without gradient.

    Returns:
        `torch.Tensor`: Same shape.
    """
    low, high = kappa_low * reference, kappa_high * reference
    if form == "indicator":
        return ((entropies <= low) | (entropies >= high)).to(entropies.dtype)
    return torch.relu(low - entropies) + torch.relu(entropies - high)


def epo_loss(
    entropies: torch.Tensor,
    mask: torch.Tensor,
    history: list[float],
    step: int,
    total_steps: int,
    coef: float = 0.001,
    alpha: float = 0.05,
    kappa_low: float = 0.0,
    kappa_high: float = 2.0,
    gamma: float = 3.0,
    smooth_coef: float = 1.0,
    penalty: str = "hinge",
    average: str = "trajectory",
    count: "torch.Tensor | float | None" = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The two terms that are added to the policy loss (equation 6).

    Args:
        entropies (`torch.Tensor`):
            In nats, with gradient, shape `(B, T)`.
        mask (`torch.Tensor`):
            1 for tokens written by the model, shape `(B, T)`.
        history (`list[float]`):
            Mean entropy of every earlier generation; without any, or if it is 0, nothing is smoothed.
        step (`int`), total_steps (`int`), gamma (`float`, *optional*, defaults to `3.0`):
            See [`epo_beta`].
        coef (`float`, *optional*, defaults to `0.001`):
            Weight of both terms.
        alpha (`float`, *optional*, defaults to `0.05`), smooth_coef (`float`, *optional*, defaults to `1.0`):
            Further factors of the smoothing term.
        kappa_low (`float`, *optional*, defaults to `0.0`), kappa_high (`float`, *optional*, defaults to `2.0`):
            The corridor, see [`epo_penalty`].
        penalty (`str`, *optional*, defaults to `"hinge"`):
            Its form.
        average (`str`, *optional*, defaults to `"trajectory"`), count (`torch.Tensor` or `float`, *optional*):
            See [`trajectory_mean`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: scalars, the bonus (negative) and the smoothing term.
    """
    bonus = -coef * trajectory_mean(entropies, mask, average, count)
    reference = fmean(history) if history else 0.0
    if reference <= 1e-8:  # a corridor of no width would penalise any entropy at all
        return bonus, torch.zeros_like(bonus)
    outside = epo_penalty(entropies, reference, kappa_low, kappa_high, penalty)
    scale = coef * smooth_coef * epo_beta(step, total_steps, gamma) * alpha
    return bonus, scale * trajectory_mean(outside, mask, average, count)


class EPOTrainer(MethodTrainer):
    """
    EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning ([arXiv
    2509.22576](https://huggingface.co/papers/2509.22576)). An entropy bonus averaged over tokens, then turns, then
    trajectories, and a penalty of tokens whose entropy leaves a corridor around the mean of all earlier generations.
    Both act on every token that the model wrote, also where a method selects tokens.

    Sums over trajectories are divided by the trajectories of an average micro-batch of the generation, so the update
    does not depend on how the batch is split; with equal micro-batches that is the mean over each one's. A mean
    entropy of 0 so far means no penalty.

    State: the mean entropy of every generation, as its first pass sees it, and of one under way the sums so far.

    Logs `epo/entropy` (averaged as in the bonus), `epo/bonus` and `epo/smoothing` (the loss terms), and from the
    second generation on `epo/reference` (mean of the history), `epo/beta` (weight of the smoothing term) and
    `epo/outside` (share of the tokens outside the corridor).
    """

    config_class = EPOConfig
    _name = "EPO"
    _paper = {
        "title": "EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning",
        "id": "2509.22576",
        "citation": """\
@article{xu2025epo,
    title  = {{EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning}},
    author = {Wujiang Xu and others},
    year   = 2025,
    eprint = {arXiv:2509.22576},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.epo_history: list[float] = []
        self.epo_step = 0  # generations before the present one
        self.epo_total_steps = self.args.epo_total_steps
        # Sum of the entropies, and number of tokens, of this process in the present generation.
        self.epo_sums = torch.zeros(2, device=self.accelerator.device)

    def observe(self, rollouts: Rollouts):
        super().observe(rollouts)
        args = self.args
        total, count = self.accelerator.reduce(self.epo_sums, reduction="sum").tolist()
        if count:
            self.epo_history.append(total / count)
        self.epo_sums = torch.zeros_like(self.epo_sums)
        self.epo_step = rollouts.generation
        if self.epo_total_steps is None:
            micro_batches = rollouts.max_steps * args.gradient_accumulation_steps
            self.epo_total_steps = math.ceil(micro_batches / (args.steps_per_generation * args.num_iterations))

    def carry(self, rollouts: Rollouts):
        mask = rollouts.mask.bool()
        if rollouts.selected is not None:
            mask = mask & rollouts.selected[rollouts.local].unsqueeze(1)
        number = mask.any(1).sum() if self.args.epo_average == "trajectory" else mask.sum()
        return super().carry(rollouts) | {"epo/count": self.accelerator.reduce(number.float(), reduction="sum")}

    def regularizers(self, tokens: TokenBatch):
        args, mask = self.args, tokens.model_mask
        detached = torch.where(mask.bool(), tokens.entropies.detach(), 0.0)
        size = args.steps_per_generation
        if tokens.training and tokens.micro_step % (size * self.num_iterations) < size:
            self.epo_sums += torch.stack([detached.sum(), mask.sum()]).to(self.epo_sums)
        bonus, smoothing = epo_loss(
            tokens.entropies,
            mask,
            self.epo_history,
            self.epo_step,
            self.epo_total_steps or 1,  # an evaluation before the first step
            args.epo_coef,
            args.epo_alpha,
            args.epo_kappa_low,
            args.epo_kappa_high,
            args.epo_gamma,
            args.epo_smooth_coef,
            args.epo_penalty,
            args.epo_average,
            tokens.share(tokens.carried["epo/count"]),
        )
        number = mask.any(1).sum() if args.epo_average == "trajectory" else mask.sum()
        self.log_token_metric("epo/entropy", number * trajectory_mean(detached, mask, args.epo_average), number)
        if self.epo_history:
            reference = fmean(self.epo_history)
            self.log_metric("epo/reference", reference)
            self.log_metric("epo/beta", epo_beta(self.epo_step, self.epo_total_steps, args.epo_gamma))
            low, high = args.epo_kappa_low * reference, args.epo_kappa_high * reference
            outside = ((detached < low) | (detached > high)) & mask.bool()
            self.log_token_metric("epo/outside", outside.sum(), mask.sum())
        return super().regularizers(tokens) | {"epo/bonus": bonus, "epo/smoothing": smoothing}

    def method_state(self):
        own = {"history": self.epo_history, "step": self.epo_step, "total_steps": self.epo_total_steps}
        return super().method_state() | {"epo": own}

    def load_method_state(self, state):
        super().load_method_state(state)
        own = state["epo"]
        self.epo_history, self.epo_step = own["history"], own["step"]
        if self.args.epo_total_steps is None:
            self.epo_total_steps = own["total_steps"]

    def local_state(self):
        return super().local_state() | {"epo": self.epo_sums.tolist()}

    def load_local_state(self, state):
        super().load_local_state(state)
        self.epo_sums += torch.tensor(state["epo"], device=self.epo_sums.device)
