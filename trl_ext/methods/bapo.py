"""Balanced Policy Optimization with Adaptive Clipping (BAPO; Xi et al., arXiv 2510.18927)."""

import math
from dataclasses import dataclass, field

import torch

from ..core import MethodConfig, MethodTrainer, TokenBatch
from ..core.config import Undecided
from ..core.trainer import strictly_on_policy


@dataclass
class BAPOConfig(MethodConfig):
    r"""
    Configuration of [`BAPOTrainer`]. Defaults are the paper's. The authors' released code has
    `bapo_order="lower_first"`, `bapo_target=0.5`, `bapo_low_max=0.8`, `bapo_high_max=2.0`, `bapo_low_step=0.05` and
    `bapo_dual_clip=3.0`; what it calls `adv_ratio_target` is `bapo_target / (1 - bapo_target)`. TRL's `epsilon` and
    `epsilon_high` play no part.

    Parameters:
        bapo_target (`float`, *optional*, defaults to `0.4`):
            Share of the loss that tokens of positive advantage are to supply.
        bapo_low_start (`float`, *optional*, defaults to `0.6`), bapo_low_max (`float`, *optional*, defaults to `0.9`):
            Where the lower bound of the ratio starts in every update, and how far it may rise.
        bapo_high_start (`float`, *optional*, defaults to `1.2`):
            Where the upper bound starts.
        bapo_high_max (`float`, *optional*, defaults to `3.0`):
            How far it may rise.
        bapo_high_step (`float`, *optional*, defaults to `0.05`):
            Step of the upper bound.
        bapo_low_step (`float`, *optional*, defaults to `0.02`):
            Step of the lower bound.
        bapo_order (`str`, *optional*, defaults to `"upper_first"`):
            Which bound is moved first: the paper's `"upper_first"`, or the code's `"lower_first"`.
        bapo_dual_clip (`float`, *optional*):
            Ratio above which a token of negative advantage has no gradient, from the code.
    """

    bapo_target: float = field(default=0.4, metadata={"help": "Share of the loss due to positive advantages."})
    bapo_low_start: float = field(default=0.6, metadata={"help": "Start of the lower bound of the ratio."})
    bapo_low_max: float = field(default=0.9, metadata={"help": "End of the lower bound of the ratio."})
    bapo_high_start: float = field(default=1.2, metadata={"help": "Start of the upper bound of the ratio."})
    bapo_high_max: float = field(default=3.0, metadata={"help": "End of the upper bound of the ratio."})
    bapo_high_step: float = field(default=0.05, metadata={"help": "Step of the upper bound."})
    bapo_low_step: float = field(default=0.02, metadata={"help": "Step of the lower bound."})
    bapo_order: str = field(
        default="upper_first",
        metadata={"help": "Which bound is moved first.", "choices": ["upper_first", "lower_first"]},
    )
    bapo_dual_clip: float | None = field(
        default=None, metadata={"help": "Largest ratio that has a gradient at a negative advantage."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("epsilon", "epsilon_high"):
            default = self.__dataclass_fields__[name].default  # in a mix, that of the other method
            untouched = isinstance(default, Undecided) or getattr(self, name) == default
            self.check_range(name, untouched, f"left at {default!r}: `bapo_low_*` and `bapo_high_*` bound the ratio")
        self.check_choices("bapo_order")
        self.check_range("bapo_target", 0 < self.bapo_target < 1, "in (0, 1)")
        self.check_range("bapo_low_start", 0 < self.bapo_low_start <= 1, "in (0, 1]")
        self.check_range("bapo_low_max", self.bapo_low_start <= self.bapo_low_max <= 1, "in [bapo_low_start, 1]")
        self.check_range("bapo_high_start", self.bapo_high_start >= 1, "at least 1")
        self.check_range("bapo_high_max", self.bapo_high_max >= self.bapo_high_start, "at least bapo_high_start")
        self.check_range("bapo_high_step", self.bapo_high_step > 0, "positive")
        self.check_range("bapo_low_step", self.bapo_low_step > 0, "positive")
        self.check_range("bapo_dual_clip", self.bapo_dual_clip is None or self.bapo_dual_clip > 1, "above 1, or None")


def bapo_candidates(start: float, stop: float, step: float, order: str = "upper_first") -> list[float]:
    """
    The values that a bound may take.

    Args:
        start (`float`), stop (`float`), step (`float`):
            Range and step; a step of 0 leaves the bound at its start.
        order (`str`, *optional*, defaults to `"upper_first"`):
            The paper takes whole steps only; the code (`"lower_first"`) ends with what is left of the range.

    Returns:
        `list[float]`: ascending, the first is `start`.
    """
    if step == 0:
        return [start]
    # Counted, since repeated addition would lose the last step.
    values = [min(start + i * step, stop) for i in range(math.floor((stop - start) / step + 1e-9) + 1)]
    if order == "lower_first" and stop - values[-1] > 1e-9 * step:
        values.append(stop)
    return values


def bapo_sums(
    ratio: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, lows: list[float], highs: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What tokens of positive and of negative advantage contribute to the clipped loss (the two parts of equation 8),
    for every candidate of a bound at once: the former depends on the upper bound alone, the latter on the lower one.
    Sums of several batches may be added.

    Args:
        ratio (`torch.Tensor`):
            Importance ratios, shape `(B, T)`, or `(B, 1)` per sequence.
        advantages (`torch.Tensor`), mask (`torch.Tensor`):
            Shape `(B, T)`; masked positions may hold anything.
        lows (`list[float]`), highs (`list[float]`):
            Candidates, ascending.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: in float64, `sum(min(ratio, high) * A)` over A > 0 for every upper bound,
        shape `(len(highs),)`, and `sum(max(ratio, low) * -A)` over A < 0 for every lower bound, shape `(len(lows),)`.
    """
    valid = mask.bool()
    dtype = torch.float32 if valid.device.type == "mps" else torch.float64
    ratio = torch.where(valid, ratio.detach(), 1.0).to(dtype).flatten()
    advantages = torch.where(valid, advantages, 0.0).to(dtype).flatten()

    def below(weights, bounds, right):
        """Sums of weights and of weights * ratio over the ratios below every bound, and over all."""
        bins = torch.bucketize(ratio, bounds, right=right)
        parts = weights.new_zeros(len(bounds) + 1, 2)
        parts.index_add_(0, bins, torch.stack([weights, weights * ratio], dim=1))
        sums = parts.cumsum(0)
        return *sums[:-1].unbind(1), *sums[-1]

    upper, lower = (torch.tensor(bounds, dtype=dtype, device=valid.device) for bounds in (highs, lows))
    weight, product, all_weight, _ = below(advantages.clamp(min=0), upper, right=False)
    positive = product + upper * (all_weight - weight)
    weight, product, _, all_product = below((-advantages).clamp(min=0), lower, right=True)
    return positive, lower * weight + (all_product - product)


def bapo_search(
    positive: list[float], negative: list[float], target: float = 0.4, order: str = "upper_first"
) -> tuple[int, int]:
    """
    Move the bounds until tokens of positive advantage supply the target share of the loss, or no step is left.

    Args:
        positive (`list[float]`), negative (`list[float]`):
            From [`bapo_sums`].
        target (`float`, *optional*, defaults to `0.4`):
            The share.
        order (`str`, *optional*, defaults to `"upper_first"`):
            `"upper_first"` is Algorithm 1, which ends as soon as the lower bound has no step left, so without any for
            it the upper one stays where it is too. `"lower_first"` moves the lower bound as far as need be, then the
            upper one.

    Returns:
        `tuple[int, int]`: steps of the lower and of the upper bound.
    """
    i = j = 0

    def short():
        # A share that only rounding keeps below the target has reached it; nothing at all is not short of anything.
        return positive[i] < target * (positive[i] + negative[j]) * (1 - 1e-6)

    if order == "upper_first":
        while j < len(negative) - 1 and short():
            if i < len(positive) - 1:
                i += 1
            else:
                j += 1
        return j, i
    while j < len(negative) - 1 and short():
        j += 1
    while i < len(positive) - 1 and short():
        i += 1
    return j, i


def dual_clipped(loss: torch.Tensor, advantages: torch.Tensor, bound: float | None) -> torch.Tensor:
    """
    Limit the loss of tokens of negative advantage to that of a ratio of `bound`, beyond which they have no gradient.

    Args:
        loss (`torch.Tensor`), advantages (`torch.Tensor`):
            Shape `(B, T)`.
        bound (`float`, *optional*):
            The ratio; None changes nothing.

    Returns:
        `torch.Tensor`: Shape `(B, T)`.
    """
    if bound is None:
        return loss
    return torch.where((advantages < 0) & (loss > -advantages * bound), -advantages * bound, loss)


class BAPOTrainer(MethodTrainer):
    """
    BAPO: Balanced Policy Optimization with Adaptive Clipping ([arXiv
    2510.18927](https://huggingface.co/papers/2510.18927)). In every update the clip bounds start anew and move until
    tokens of positive advantage supply a target share of the loss: a higher upper bound lets more of their rare tokens
    in, a higher lower bound cuts more of the others' off.

    As in the authors' code the bounds are chosen for every micro-batch, from its tokens on all processes (one
    message), since they need the current ratios; so the update depends on how a batch is split into micro-batches,
    though not on how these are shared by processes. They look at all tokens, also those that a mixed method's token
    weights take out of the loss afterwards (`token_mask` takes them out before).

    Logs `bapo/c_low`, `bapo/c_high` (the bounds) and `bapo/rho` (the share that they give).
    """

    config_class = BAPOConfig
    replaces = ("clip_range",)
    contradicts = {
        "gppo": "BAPO moves the clip bounds to let more tokens have a gradient, which with GPPO they have beyond them",
        "ttt_discover": "TTT-Discover's surrogate has no clip",
    }
    needs_off_policy = "has no effect, because every ratio is 1,"
    _name = "BAPO"
    _paper = {
        "title": "BAPO: Stabilizing Off-Policy Reinforcement Learning for LLMs via Balanced Policy Optimization with "
        "Adaptive Clipping",
        "id": "2510.18927",
        "citation": """\
@article{xi2025bapo,
    title  = {{BAPO: Stabilizing Off-Policy Reinforcement Learning for LLMs via Balanced Policy Optimization with
              Adaptive Clipping}},
    author = {Zhiheng Xi and others},
    year   = 2025,
    eprint = {arXiv:2510.18927},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        args = self.args
        self.bapo_lows = bapo_candidates(args.bapo_low_start, args.bapo_low_max, args.bapo_low_step, args.bapo_order)
        self.bapo_highs = bapo_candidates(
            args.bapo_high_start, args.bapo_high_max, args.bapo_high_step, args.bapo_order
        )

    def log_ratio(self, tokens: TokenBatch):
        return super().log_ratio(tokens).clamp(-20.0, 20.0)

    def clip_range(self, tokens: TokenBatch):
        args, lows, highs = self.args, self.bapo_lows, self.bapo_highs
        if not tokens.training or strictly_on_policy(args):  # every ratio is 1: no bound changes anything
            return lows[0], highs[0]
        sums = bapo_sums(tokens.log_ratio.detach().exp(), tokens.advantages, tokens.mask, lows, highs)
        sums = self.accelerator.reduce(torch.cat(sums), reduction="sum").tolist()
        positive, negative = sums[: len(highs)], sums[len(highs) :]
        j, i = bapo_search(positive, negative, args.bapo_target, args.bapo_order)
        self.log_metric("bapo/c_low", lows[j])
        self.log_metric("bapo/c_high", highs[i])
        if total := positive[i] + negative[j]:
            self.log_metric("bapo/rho", positive[i] / total)
        return lows[j], highs[i]

    def policy_loss(self, tokens: TokenBatch):
        return dual_clipped(super().policy_loss(tokens), tokens.advantages, self.args.bapo_dual_clip)
