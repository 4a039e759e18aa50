"""Entropy-Modulated Policy Gradients (Wang et al., arXiv 2509.09265)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather

from ..core import MethodConfig, MethodTrainer, Rollouts
from ..core.rollouts import step_means, step_numbers


@dataclass
class EMPGConfig(MethodConfig):
    r"""
    Configuration of [`EMPGTrainer`]. The paper's values are not known; these are those of public ports of its listing.

    Parameters:
        empg_k (`float`, *optional*, defaults to `1.0`):
            How strongly confident steps are amplified; 0 switches it off.
        empg_k_future (`float`, *optional*, defaults to `1.0`):
            How strongly the bonus favours a confident next step.
        empg_zeta (`float`, *optional*, defaults to `0.05`):
            Size of the bonus for the next step.
        empg_center (`bool`, *optional*, defaults to `True`):
            Whether the steps' advantages are centred over the batch.
        empg_eps (`float`, *optional*, defaults to `1e-8`):
            Added to denominators.
    """

    empg_k: float = field(default=1.0, metadata={"help": "How strongly confident steps are amplified."})
    empg_k_future: float = field(
        default=1.0, metadata={"help": "How strongly the bonus favours a confident next step."}
    )
    empg_zeta: float = field(default=0.05, metadata={"help": "Size of the bonus for the next step."})
    empg_center: bool = field(default=True, metadata={"help": "Centre the steps' advantages over the batch."})
    empg_eps: float = field(default=1e-8, metadata={"help": "Added to denominators."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("empg_k", "empg_k_future", "empg_zeta"):
            self.check_range(name, getattr(self, name) >= 0, "at least 0")
        self.check_range("empg_eps", self.empg_eps > 0, "positive")


def empg_advantages(
    entropies: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
    scored: torch.Tensor | None = None,
    k: float = 1.0,
    k_future: float = 1.0,
    zeta: float = 0.05,
    center: bool = True,
    eps: float = 1e-8,
    all_sum: Callable = lambda value: value,
    all_max: Callable = lambda value: value,
) -> torch.Tensor:
    """
    Modulate advantages by the entropy of each step, add a bonus for a confident next step, and centre (Eq. 7-12 of
    the paper's listing).

    Args:
        entropies (`torch.Tensor`):
            Of the acting policy at each token, in nats, shape `(n, T)`.
        mask (`torch.Tensor`):
            1 for tokens written by the model, shape `(n, T)`.
        advantages (`torch.Tensor`):
            Base advantages, `(n,)` or per token `(n, T)`.
        scored (`torch.Tensor`, *optional*):
            Rollouts that have a reward, boolean, shape `(n,)`; the others take no part and get 0.
        k, k_future, zeta, center, eps:
            See [`EMPGConfig`].
        all_sum (`Callable`, *optional*), all_max (`Callable`, *optional*):
            Sum and maximum of a tensor over processes; by default there is one.

    Returns:
        `torch.Tensor`: Advantages per token, shape `(n, T)`; 0 outside of steps.
    """
    if scored is not None:
        mask = mask * scored.unsqueeze(1)
    steps = step_numbers(mask)
    per_token = advantages if advantages.dim() == 2 else advantages.unsqueeze(1).expand(entropies.shape)
    entropy = step_means(entropies, steps)
    present = ~entropy.isnan()
    highest = all_max(
        torch.stack([entropy[present], -entropy[present]]).amax(1)
        if present.any()
        else entropies.new_full((2,), -torch.inf)
    )
    lowest, highest = -highest[1], highest[0]
    normal = (entropy - lowest) / (highest - lowest + eps)
    confidence = torch.where(present, torch.exp(-k * normal), 0.0)
    total, count = all_sum(torch.stack([confidence.sum(), present.sum().to(confidence.dtype)]))
    gain = confidence / (total / count.clamp(min=1) + eps)
    following = torch.nn.functional.pad(torch.exp(-k_future * normal), (0, 1), value=torch.nan)[:, 1:]
    bonus = torch.where(following.isnan(), 0.0, zeta * following)

    def at_tokens(values):
        return torch.where(steps >= 0, values.gather(1, steps.clamp(min=0)), 0.0) if values.shape[1] else 0.0

    modulated = per_token * at_tokens(gain) + at_tokens(bonus)
    if center:
        means = step_means(modulated, steps)
        total = all_sum(torch.where(present, means, 0.0).sum())
        modulated = modulated - total / count.clamp(min=1)
    return torch.where(steps >= 0, modulated, 0.0)


class EMPGTrainer(MethodTrainer):
    """
    Entropy-Modulated Policy Gradients ([arXiv 2509.09265](https://huggingface.co/papers/2509.09265)). Confident steps
    of a multi-turn rollout get a larger share of its advantage, uncertain ones a smaller, and leading to a confident
    next step is rewarded.

    Logs `empg/step_entropy` (mean over all steps) and `empg/steps` (mean number per rollout).
    """

    config_class = EMPGConfig
    runs_after = ("knapsack_rl",)
    _name = "EMPG"
    _paper = {
        "title": "Harnessing Uncertainty: Entropy-Modulated Policy Gradients for Long-Horizon LLM Agents",
        "id": "2509.09265",
        "citation": """\
@article{wang2025harnessing,
    title  = {{Harnessing Uncertainty: Entropy-Modulated Policy Gradients for Long-Horizon LLM Agents}},
    author = {Jiawei Wang and others},
    year   = 2025,
    eprint = {arXiv:2509.09265},
}""",
    }

    @classmethod
    def needs(cls, args):
        return {"entropies"}

    def compute_advantages(self, rollouts: Rollouts):
        base, args = super().compute_advantages(rollouts), self.args
        scored = rollouts.scored[rollouts.local]
        steps = step_numbers(rollouts.mask)
        entropy = step_means(rollouts.entropies, steps)
        sums = [
            entropy.nansum(),
            (~entropy.isnan()).sum().float(),
            torch.tensor(float(len(steps)), device=steps.device),
        ]
        total, count, rows = self.accelerator.reduce(torch.stack(sums), reduction="sum").tolist()
        self.log_metric("empg/step_entropy", total / max(count, 1))
        self.log_metric("empg/steps", count / rows)
        return empg_advantages(
            rollouts.entropies,
            rollouts.mask,
            base[rollouts.local] if base.dim() == 1 else base,
            scored,
            args.empg_k,
            args.empg_k_future,
            args.empg_zeta,
            args.empg_center,
            args.empg_eps,
            all_sum=lambda value: self.accelerator.reduce(value, reduction="sum"),
            all_max=lambda value: gather(value.unsqueeze(0)).amax(0),
        )
