"""Risk-based Policy Optimization (RiskPO, arXiv 2510.00911)."""

import warnings
from dataclasses import dataclass, field

import torch
from trl.trainer.utils import nanstd

from ..core import MethodConfig, MethodTrainer, Rollouts
from ..core.prompts import make_generator
from ..core.rollouts import group_table


@dataclass
class RiskPOConfig(MethodConfig):
    r"""
    Configuration of [`RiskPOTrainer`]. Defaults are the paper's; the paper's surrogate is TRL's with
    `importance_sampling_level="sequence"` and `loss_type="grpo"`.

    Parameters:
        riskpo_alpha (`float`, *optional*, defaults to `0.2`), riskpo_beta (`float`, *optional*, defaults to `0.8`):
            Levels of the two quantiles of the bundle scores: below the first lies the lower tail, above the second no
            difference is made.
        riskpo_omega (`float`, *optional*, defaults to `0.5`):
            Extra weight of the lower tail.
        riskpo_bundle_size (`int`, *optional*, defaults to `5`):
            Prompts whose responses are scored together. If it does not divide the prompts of a generation, the last
            set is smaller and its scores lie lower than the others'.
        riskpo_lr_q (`float`, *optional*, defaults to `0.1`):
            Step of the tracked quantiles, in units of the reward, which should lie in about [0, 1].
        riskpo_form (`str`, *optional*, defaults to `"paper"`):
            `"paper"` weighs tail and middle as they are, `"code"` divides them by their probabilities, which makes the
            tail three times as heavy.
        riskpo_credit (`str`, *optional*, defaults to `"uniform"`):
            A response's part in its bundle's advantage: `"uniform"` (all of it), `"std"` (over the standard deviation
            of the prompt's rewards), `"score"` (half of it for a positive reward, else one and a half) or `"sum-mean"`
            (in proportion to the reward above the prompt's mean).
        riskpo_norm_by_std (`bool`, *optional*, defaults to `False`):
            Whether to divide by the standard deviation of the set's bundle scores, as the code does.
        riskpo_natural_baseline (`bool`, *optional*, defaults to `True`):
            Whether the advantage of a score above the upper quantile is 0; False leaves that constant out.
        riskpo_permute (`bool`, *optional*, defaults to `True`):
            Whether bundles are drawn; False joins responses by their position in the group.
        riskpo_quantile_source (`str`, *optional*, defaults to `"track"`):
            `"track"` (over training), `"batch"` (of the set's own bundle scores) or `"mix"` (mean of both).
    """

    riskpo_alpha: float = field(default=0.2, metadata={"help": "Level of the lower quantile."})
    riskpo_beta: float = field(default=0.8, metadata={"help": "Level of the upper quantile."})
    riskpo_omega: float = field(default=0.5, metadata={"help": "Extra weight of the lower tail."})
    riskpo_bundle_size: int = field(default=5, metadata={"help": "Prompts whose responses are scored together."})
    riskpo_lr_q: float = field(default=0.1, metadata={"help": "Step of the tracked quantiles."})
    riskpo_form: str = field(
        default="paper",
        metadata={"help": "Weights of tail and middle: the paper's or the code's.", "choices": ["paper", "code"]},
    )
    riskpo_credit: str = field(
        default="uniform",
        metadata={
            "help": "A response's part in its bundle's advantage.",
            "choices": ["uniform", "std", "score", "sum-mean"],
        },
    )
    riskpo_norm_by_std: bool = field(default=False, metadata={"help": "Divide by the scores' standard deviation."})
    riskpo_natural_baseline: bool = field(default=True, metadata={"help": "Advantage 0 above the upper quantile."})
    riskpo_permute: bool = field(default=True, metadata={"help": "Draw bundles; False joins by position."})
    riskpo_quantile_source: str = field(
        default="track",
        metadata={"help": "Where the quantiles come from.", "choices": ["track", "batch", "mix"]},
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_range("riskpo_alpha", 0 < self.riskpo_alpha < 1, "between 0 and 1, both excluded")
        self.check_range("riskpo_beta", self.riskpo_alpha < self.riskpo_beta < 1, "above riskpo_alpha and below 1")
        self.check_range("riskpo_omega", self.riskpo_omega >= 0, "at least 0")
        self.check_range("riskpo_bundle_size", self.riskpo_bundle_size >= 1, "at least 1")
        self.check_range("riskpo_lr_q", self.riskpo_lr_q > 0, "positive")
        self.check_choices("riskpo_form", "riskpo_credit", "riskpo_quantile_source")


def make_bundles(
    group_ids: torch.Tensor, size: int = 5, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Join one response each of `size` prompts to a bundle, so that every response is used once. Prompts are taken by
    ascending group id; the last set of prompts may be smaller. A set has as many bundles as its smallest group has
    responses.

    Args:
        group_ids (`torch.Tensor`):
            Shape `(N,)`.
        size (`int`, *optional*, defaults to `5`):
            Prompts per set.
        generator (`torch.Generator`, *optional*):
            Draws a permutation of each prompt's responses; None keeps their order.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the bundle of each response, `(N,)`, -1 for one that is left over; and the
        set of each of the M bundles, `(M,)`.
    """
    counts = group_ids.unique(return_counts=True)[1].tolist()
    groups = group_ids.argsort(stable=True).split(counts)
    if generator is not None:
        groups = [rows[torch.randperm(len(rows), generator=generator)] for rows in groups]
    bundles, sets = torch.full_like(group_ids, -1), []
    for number, start in enumerate(range(0, len(groups), size)):
        joined = groups[start : start + size]
        least = min(map(len, joined))
        for rows in joined:
            bundles[rows[:least]] = torch.arange(len(sets), len(sets) + least)
        sets += [number] * least
    return bundles, torch.tensor(sets, dtype=torch.long)


def bundle_scores(rewards: torch.Tensor, bundles: torch.Tensor) -> torch.Tensor:
    """
    Sum of the rewards of each bundle.

    Args:
        rewards (`torch.Tensor`):
            Shape `(N,)`; NaN = not scored.
        bundles (`torch.Tensor`):
            From [`make_bundles`], shape `(N,)`.

    Returns:
        `torch.Tensor`: Shape `(M,)`; NaN for a bundle with an unscored response.
    """
    member = bundles >= 0
    return rewards.new_zeros(int(bundles.max()) + 1).index_add(0, bundles[member], rewards[member])


def empirical_quantiles(scores: torch.Tensor, levels: tuple[float, float]) -> torch.Tensor:
    """
    Quantiles of scores by linear interpolation.

    Args:
        scores (`torch.Tensor`):
            Shape `(M,)`; NaN is left out.
        levels (`tuple[float, float]`):
            The two levels.

    Returns:
        `torch.Tensor`: Shape `(2,)`; NaN without a score.
    """
    if len(scores) == 0:
        return scores.new_full((2,), torch.nan)
    return torch.nanquantile(scores, scores.new_tensor(levels))


def track_quantiles(
    quantiles: torch.Tensor, scores: torch.Tensor, levels: tuple[float, float] = (0.2, 0.8), lr: float = 0.1
) -> torch.Tensor:
    """
    One step of the stochastic approximation of quantiles: up by the level, down by the share of scores below.

    Args:
        quantiles (`torch.Tensor`):
            Before the step, shape `(2,)`; NaN starts from the empirical ones.
        scores (`torch.Tensor`):
            Bundle scores, shape `(M,)`; NaN is left out.
        levels (`tuple[float, float]`, *optional*, defaults to `(0.2, 0.8)`):
            The two levels.
        lr (`float`, *optional*, defaults to `0.1`):
            Size of the step.

    Returns:
        `torch.Tensor`: Shape `(2,)`.
    """
    scores = scores[~scores.isnan()]
    if quantiles.isnan().any():
        return empirical_quantiles(scores, levels)
    if len(scores) == 0:
        return quantiles
    below = (scores.unsqueeze(0) < quantiles.unsqueeze(1)).to(quantiles).mean(1)
    return quantiles + lr * (quantiles.new_tensor(levels) - below)


def bundle_quantiles(
    scores: torch.Tensor,
    sets: torch.Tensor,
    tracked: torch.Tensor,
    levels: tuple[float, float] = (0.2, 0.8),
    source: str = "track",
) -> torch.Tensor:
    """
    The quantiles that each bundle is measured by.

    Args:
        scores (`torch.Tensor`), sets (`torch.Tensor`):
            Scores and set of the bundles, shape `(M,)`.
        tracked (`torch.Tensor`):
            Tracked quantiles before this batch, shape `(2,)`; NaN stands for the empirical ones of all scores.
        levels (`tuple[float, float]`, *optional*, defaults to `(0.2, 0.8)`):
            The two levels.
        source (`str`, *optional*, defaults to `"track"`):
            See [`RiskPOConfig`].

    Returns:
        `torch.Tensor`: Lower and upper quantile of each bundle, shape `(M, 2)`.
    """
    if tracked.isnan().any():
        tracked = empirical_quantiles(scores, levels)
    tracked = tracked.to(scores).expand(len(scores), 2)
    if source == "track":
        return tracked
    table, row, _ = group_table(scores, sets)
    own = torch.stack([empirical_quantiles(values, levels) for values in table])[row]
    return own if source == "batch" else (tracked + own) / 2


def risk_advantages(
    scores: torch.Tensor,
    low: "torch.Tensor | float",
    high: "torch.Tensor | float",
    omega: float = 0.5,
    form: str = "paper",
    natural_baseline: bool = True,
    alpha: float = 0.2,
    beta: float = 0.8,
) -> torch.Tensor:
    """
    Advantages of bundle scores under the mixed value at risk: slope 1 between the quantiles, `1 + omega` below, none
    above. With the natural baseline they are at most 0.

    Args:
        scores (`torch.Tensor`):
            Shape `(M,)`.
        low (`torch.Tensor` or `float`), high (`torch.Tensor` or `float`):
            Lower and upper quantile, shape `(M,)` or numbers.
        omega (`float`, *optional*, defaults to `0.5`):
            Extra weight of the lower tail.
        form (`str`, *optional*, defaults to `"paper"`):
            `"paper"`, or `"code"`: tail and middle over their probabilities, and their weighted mean.
        natural_baseline (`bool`, *optional*, defaults to `True`):
            Whether the constant `low - high` is in it.
        alpha (`float`, *optional*, defaults to `0.2`), beta (`float`, *optional*, defaults to `0.8`):
            Levels of the quantiles, for the code's form.

    Returns:
        `torch.Tensor`: Shape `(M,)`.
    """
    tail = -(low - scores).clamp(min=0)
    middle = (scores - low).clamp(min=0) - (scores - high).clamp(min=0)
    if natural_baseline:
        middle = middle + (low - high)
    if form == "paper":
        return (1 + omega) * tail + middle
    tail, middle = tail / (alpha + 1e-6), middle / (beta - alpha + 1e-6)
    return ((1 + omega) * tail + middle) / (2 + omega)


def divide_by_std(advantages: torch.Tensor, scores: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
    """
    Divide by the sample standard deviation of the scores of a set's bundles; by 1 if it is 0 or there is one bundle.

    Args:
        advantages (`torch.Tensor`), scores (`torch.Tensor`), sets (`torch.Tensor`):
            Of the bundles, shape `(M,)`; NaN scores are left out.

    Returns:
        `torch.Tensor`: Shape `(M,)`.
    """
    table, row, _ = group_table(scores, sets)
    return advantages / (_std_or_one(table, 1e-6)[row] + 1e-6)


def _std_or_one(table: torch.Tensor, least: float) -> torch.Tensor:
    deviation = nanstd(table, dim=1)
    return torch.where(deviation > least, deviation, 1.0)  # NaN, of a single value, is not larger


def assign_credit(
    advantages: torch.Tensor,
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    bundles: torch.Tensor,
    credit: str = "uniform",
) -> torch.Tensor:
    """
    Advantages of responses from those of their bundles.

    Args:
        advantages (`torch.Tensor`):
            Of the bundles, shape `(M,)`; NaN for one that is dropped.
        rewards (`torch.Tensor`), group_ids (`torch.Tensor`), bundles (`torch.Tensor`):
            Of the responses, shape `(N,)`.
        credit (`str`, *optional*, defaults to `"uniform"`):
            See [`RiskPOConfig`].

    Returns:
        `torch.Tensor`: Shape `(N,)`; 0 for responses without a bundle or in a dropped one.
    """
    mine = torch.where(bundles >= 0, advantages[bundles], torch.nan)
    table, row, _ = group_table(rewards, group_ids)
    if credit == "std":
        mine = mine / (_std_or_one(table, 1e-3)[row] + 1e-6)
    elif credit == "score":
        mine = mine * torch.where(rewards > 0, 0.5, 1.5)
    elif credit == "sum-mean":
        above = rewards - torch.nanmean(table, dim=1)[row]
        total, count = bundle_scores(above, bundles), bundle_scores(torch.ones_like(above), bundles)
        small = total.abs() <= 1e-6
        share = torch.where(small[bundles], 1 / count[bundles], above / torch.where(small, 1.0, total)[bundles])
        mine = mine * share
    return mine.nan_to_num(nan=0.0)


class RiskPOTrainer(MethodTrainer):
    """
    RiskPO ([arXiv 2510.00911](https://huggingface.co/papers/2510.00911)). One response each of several prompts make a
    bundle, which is rewarded as a whole by how it lies between two quantiles of all bundle scores; the lower tail
    weighs more. There is no mean of the group, so prompts that nobody solves have a signal too. A bundle with an
    unscored response is dropped.

    State: the two quantiles, NaN before the first generation, which uses its own. (The authors' code tracks them, but
    as far as can be read its advantages always take each set's own; here the tracked ones are used.)

    Logs `riskpo/quantile_low` and `riskpo/quantile_high` (those used, averaged over the bundles), and
    `riskpo/nonzero_advantage`.
    """

    config_class = RiskPOConfig
    replaces = ("compute_advantages",)
    contradicts = {
        "dynamic_sampling": "it would replace the all-wrong and all-right groups that belong in the bundles"
    }
    _name = "RiskPO"
    _paper = {
        "title": "RiskPO: Risk-based Policy Optimization with Verifiable Reward for LLM Post-Training",
        "id": "2510.00911",
        "citation": """\
@article{riskpo2025,
    title  = {{RiskPO: Risk-based Policy Optimization with Verifiable Reward for LLM Post-Training}},
    year   = 2025,
    eprint = {arXiv:2510.00911},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.riskpo_quantiles = torch.full((2,), torch.nan, dtype=torch.float64)
        prompts, size = self.args.generation_batch_size // self.args.num_generations, self.args.riskpo_bundle_size
        if prompts > size and prompts % size:
            warnings.warn(
                f"{prompts} prompts per generation do not make sets of `riskpo_bundle_size` ({size}): the last "
                f"{prompts % size} make a smaller one, whose scores lie lower than the others'. Use a divisor.",
                stacklevel=2,
            )

    @property
    def _riskpo_levels(self) -> tuple[float, float]:
        return self.args.riskpo_alpha, self.args.riskpo_beta

    def _riskpo_bundles(self, rollouts: Rollouts):
        """Rewards, bundles, their sets and scores: on the CPU, the same on every process and at every call."""
        rewards, args = rollouts.rewards.double().cpu(), self.args
        generator = make_generator(args.seed, "riskpo", rollouts.generation) if args.riskpo_permute else None
        bundles, sets = make_bundles(rollouts.group_ids.cpu(), args.riskpo_bundle_size, generator)
        return rewards, bundles, sets, bundle_scores(rewards, bundles)

    def compute_advantages(self, rollouts: Rollouts):
        args, levels = self.args, self._riskpo_levels
        rewards, bundles, sets, scores = self._riskpo_bundles(rollouts)
        quantiles = bundle_quantiles(scores, sets, self.riskpo_quantiles, levels, args.riskpo_quantile_source)
        low, high = quantiles.unbind(1)
        advantages = risk_advantages(
            scores, low, high, args.riskpo_omega, args.riskpo_form, args.riskpo_natural_baseline, *levels
        )
        if args.riskpo_norm_by_std:
            advantages = divide_by_std(advantages, scores, sets)
        result = assign_credit(advantages, rewards, rollouts.group_ids.cpu(), bundles, args.riskpo_credit)
        if not quantiles.isnan().all():
            self.log_metric("riskpo/quantile_low", low.nanmean())
            self.log_metric("riskpo/quantile_high", high.nanmean())
        self.log_metric("riskpo/nonzero_advantage", (result != 0).double().mean())
        return result.to(rollouts.rewards)

    def observe(self, rollouts: Rollouts):
        super().observe(rollouts)
        *_, scores = self._riskpo_bundles(rollouts)
        self.riskpo_quantiles = track_quantiles(
            self.riskpo_quantiles, scores, self._riskpo_levels, self.args.riskpo_lr_q
        )

    def method_state(self):
        return super().method_state() | {"riskpo": self.riskpo_quantiles}

    def load_method_state(self, state):
        super().load_method_state(state)
        self.riskpo_quantiles = state["riskpo"]
