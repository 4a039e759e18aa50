"""Dynamic Dual-Level Down-Sampling (D3S, arXiv 2509.22115)."""

import math
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather

from ..core import MethodConfig, MethodTrainer, Rollouts


@dataclass
class D3SConfig(MethodConfig):
    r"""
    Configuration of [`D3STrainer`]. The paper's numbers are not known; the defaults are ours.

    Parameters:
        d3s_n_init (`int`, *optional*), d3s_n_final (`int`, *optional*):
            Rollouts kept per prompt at the start and at the end of training; by default a quarter of
            `num_generations` (at least 2), and all.
        d3s_k_init (`float`, *optional*, defaults to `0.2`), d3s_k_final (`float`, *optional*, defaults to `1.0`):
            Share of the kept rollouts' tokens that is trained on, at the start and at the end.
        d3s_schedule (`str`, *optional*, defaults to `"linear"`):
            `"linear"` from start to end, or `"constant"` at the start's values.
        d3s_level (`str`, *optional*, defaults to `"cross"`):
            Rollouts are chosen over the whole batch (`"cross"`), inside each group (`"within"`), or first inside and
            then over all (`"within_then_cross"`).
        d3s_within_rollouts (`int`, *optional*):
            Rollouts per group in the first part of `"within_then_cross"`; by default half of `num_generations`.
        d3s_token_scope (`str`, *optional*, defaults to `"set"`):
            Tokens are ranked over all kept rollouts (`"set"`) or inside each (`"response"`).
    """

    d3s_n_init: int | None = field(default=None, metadata={"help": "Rollouts kept per prompt at the start."})
    d3s_n_final: int | None = field(default=None, metadata={"help": "Rollouts kept per prompt at the end."})
    d3s_k_init: float = field(default=0.2, metadata={"help": "Share of tokens trained on at the start."})
    d3s_k_final: float = field(default=1.0, metadata={"help": "Share of tokens trained on at the end."})
    d3s_schedule: str = field(
        default="linear", metadata={"help": "How both change.", "choices": ["linear", "constant"]}
    )
    d3s_level: str = field(
        default="cross",
        metadata={"help": "Where rollouts are compared.", "choices": ["cross", "within", "within_then_cross"]},
    )
    d3s_within_rollouts: int | None = field(default=None, metadata={"help": "First cut of 'within_then_cross'."})
    d3s_token_scope: str = field(
        default="set", metadata={"help": "Where tokens are ranked.", "choices": ["set", "response"]}
    )

    def __post_init__(self):
        super().__post_init__()
        group = self.num_generations
        if self.d3s_n_init is None:
            self.d3s_n_init = min(group, max(2, group // 4))
        if self.d3s_n_final is None:
            self.d3s_n_final = group
        if self.d3s_within_rollouts is None:
            self.d3s_within_rollouts = min(group, max(2, group // 2))
        bound = f"in [1, num_generations] = [1, {group}]"
        self.check_range("d3s_n_init", 1 <= self.d3s_n_init <= group, bound)
        self.check_range("d3s_n_final", self.d3s_n_init <= self.d3s_n_final <= group, f"in [d3s_n_init, {group}]")
        self.check_range("d3s_within_rollouts", 1 <= self.d3s_within_rollouts <= group, bound)
        self.check_range("d3s_k_init", 0 < self.d3s_k_init <= 1, "in (0, 1]")
        self.check_range("d3s_k_final", self.d3s_k_init <= self.d3s_k_final <= 1, "in [d3s_k_init, 1]")
        self.check_choices("d3s_schedule", "d3s_level", "d3s_token_scope")


def d3s_schedule(progress: float, n_init: int, n_final: int, k_init: float, k_final: float) -> tuple[int, float]:
    """
    Rollouts per prompt and share of tokens to keep, linear in the progress.

    Args:
        progress (`float`):
            Optimizer steps done / planned; clamped to [0, 1].
        n_init (`int`), n_final (`int`), k_init (`float`), k_final (`float`):
            See [`D3SConfig`].

    Returns:
        `tuple[int, float]`: rollouts per prompt (rounded half to even) and share of tokens.
    """
    p = min(max(progress, 0.0), 1.0)
    return round((1 - p) * n_init + p * n_final), (1 - p) * k_init + p * k_final


def max_variance_subset(advantages: torch.Tensor, selectable: torch.Tensor, size: int) -> torch.Tensor:
    """
    The subset of `size` rollouts whose advantages have the largest variance: some lowest and some highest ones, so
    trying every split of the sorted list is exact. At a tie the fewest lowest ones.

    Args:
        advantages (`torch.Tensor`):
            Shape `(N,)`.
        selectable (`torch.Tensor`):
            Boolean, shape `(N,)`.
        size (`int`):
            Rollouts to keep; all selectable ones if there are fewer.

    Returns:
        `torch.Tensor`: Boolean, shape `(N,)`.
    """
    rows = selectable.nonzero().squeeze(1)
    chosen = torch.zeros_like(selectable)
    if len(rows) <= size:
        chosen[rows] = True
        return chosen
    order = rows[advantages[rows].argsort(stable=True)]
    values = advantages[order].double()
    # Centred and scaled, so that rounding cannot hide a tie.
    values = values - values.mean()
    values = values / values.abs().max().clamp(min=1e-300)

    def prefix(x):
        return torch.nn.functional.pad(x.cumsum(0), (1, 0))

    low = torch.arange(size + 1, device=values.device)
    high = len(values) - (size - low)  # where the upper part begins
    sums, squares = prefix(values), prefix(values**2)
    mean = (sums[low] + sums[-1] - sums[high]) / size
    variance = (squares[low] + squares[-1] - squares[high]) / size - mean**2
    best = int((variance >= variance.max() - 1e-12).nonzero()[0])
    chosen[order[:best]] = True
    chosen[order[len(order) - (size - best) :]] = True
    return chosen


def d3s_select(
    advantages: torch.Tensor,
    group_ids: torch.Tensor,
    selectable: torch.Tensor,
    n_keep: int,
    total: int,
    level: str = "cross",
    n_within: int = 2,
) -> torch.Tensor:
    """
    Select rollouts.

    Args:
        advantages (`torch.Tensor`):
            Shape `(N,)`.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.
        selectable (`torch.Tensor`):
            Boolean, shape `(N,)`.
        n_keep (`int`):
            Rollouts per group with level `"within"`.
        total (`int`):
            Rollouts in all with the other levels.
        level (`str`, *optional*, defaults to `"cross"`):
            See [`D3SConfig`].
        n_within (`int`, *optional*, defaults to `2`):
            Rollouts per group in the first part of `"within_then_cross"`.

    Returns:
        `torch.Tensor`: Boolean, shape `(N,)`.
    """
    if level != "cross":
        size = n_keep if level == "within" else n_within
        inside = torch.zeros_like(selectable)
        for group in group_ids.unique():
            inside |= max_variance_subset(advantages, selectable & (group_ids == group), size)
        if level == "within":
            return inside
        selectable = inside
    return max_variance_subset(advantages, selectable, total)


def d3s_tokens(keys: torch.Tensor, valid: torch.Tensor, share: float, scope: str = "set") -> torch.Tensor:
    """
    The tokens with the largest keys: `ceil(share * valid tokens)` of all, or of each rollout; at a tie the earliest in
    row-major order.

    Args:
        keys (`torch.Tensor`):
            |advantage| times entropy, shape `(n, T)`.
        valid (`torch.Tensor`):
            Boolean, shape `(n, T)`.
        share (`float`):
            Share of the tokens to keep.
        scope (`str`, *optional*, defaults to `"set"`):
            `"set"` or `"response"`.

    Returns:
        `torch.Tensor`: Boolean, shape `(n, T)`.
    """
    if scope == "response":
        rows = [d3s_tokens(k[None], v[None], share) for k, v in zip(keys, valid, strict=True)]
        return torch.cat(rows) if rows else torch.zeros_like(valid)
    count = math.ceil(share * int(valid.sum()) - 1e-9)  # the small number undoes a float excess such as 0.55 * 20
    order = keys.masked_fill(~valid, -torch.inf).flatten().argsort(descending=True, stable=True)
    kept = torch.zeros_like(valid)
    kept.view(-1)[order[:count]] = True
    return kept


class D3STrainer(MethodTrainer):
    """
    Dynamic Dual-Level Down-Sampling ([arXiv 2509.22115](https://huggingface.co/papers/2509.22115)). Only the rollouts
    whose advantages have the largest variance are trained on, and of them only the tokens with the largest |advantage|
    x entropy; both cuts are relaxed during training. Dropped rollouts cost no forward or backward pass.

    Logs `d3s/advantage_variance` (of the kept rollouts) and `d3s/token_share`.
    """

    config_class = D3SConfig
    _name = "D3S"
    _paper = {
        "title": "Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy "
        "Optimization",
        "id": "2509.22115",
        "citation": """\
@article{d3s2025,
    title  = {{Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy
              Optimization}},
    year   = 2025,
    eprint = {arXiv:2509.22115},
}""",
    }

    @classmethod
    def needs(cls, args):
        return {"entropies"}

    def __init__(self, model, reward_funcs=None, args=None, *more, **kwargs):
        if args is not None and args.top_entropy_quantile < 1.0:
            raise ValueError(
                f"`top_entropy_quantile` is {args.top_entropy_quantile}, but D3S selects tokens: leave it at 1.0."
            )
        super().__init__(model, reward_funcs, args, *more, **kwargs)

    def _d3s_now(self, rollouts: Rollouts) -> tuple[int, float]:
        args = self.args
        progress = rollouts.step / max(rollouts.max_steps, 1) if args.d3s_schedule == "linear" else 0.0
        return d3s_schedule(progress, args.d3s_n_init, args.d3s_n_final, args.d3s_k_init, args.d3s_k_final)

    def select_rollouts(self, rollouts: Rollouts):
        before, args = super().select_rollouts(rollouts), self.args
        advantages, mask = rollouts.advantages, rollouts.mask
        if advantages.dim() == 2:
            advantages = gather((advantages * mask).sum(1) / mask.sum(1).clamp(min=1))
        selectable = before & rollouts.scored & gather(mask.any(1))
        n_keep, _ = self._d3s_now(rollouts)
        # The share of `num_generations` also holds where prompts have different numbers of rollouts.
        total = max(2, round(len(rollouts) * n_keep / args.num_generations))
        selected = d3s_select(
            advantages, rollouts.group_ids, selectable, n_keep, total, args.d3s_level, args.d3s_within_rollouts
        )
        kept = advantages[selected]
        self.log_metric("d3s/advantage_variance", kept.var(unbiased=False) if len(kept) else 0.0)
        return selected

    def token_mask(self, rollouts: Rollouts):
        before, args = super().token_mask(rollouts), self.args
        advantages = rollouts.advantages
        if advantages.dim() == 1:
            advantages = advantages[rollouts.local].unsqueeze(1)
        valid = rollouts.mask.bool() & rollouts.selected[rollouts.local].unsqueeze(1)
        if before is not None:
            valid = valid & before.bool()
        keys = advantages.abs() * rollouts.entropies
        _, share = self._d3s_now(rollouts)
        self.log_metric("d3s/token_share", share)
        if args.d3s_token_scope == "response":
            return d3s_tokens(keys, valid, share, "response").int()
        everyones, start = self.gather_flat(keys[valid])  # in the order of the rows, which processes hold in turn
        kept = d3s_tokens(everyones, torch.ones_like(everyones, dtype=torch.bool), share)
        mask = torch.zeros_like(valid)
        mask[valid] = kept[start : start + valid.sum()]
        return mask.int()
