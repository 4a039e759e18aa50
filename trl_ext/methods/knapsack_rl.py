"""Knapsack RL (arXiv 2509.25849): exploration budgets by an integer knapsack."""

import heapq
import math
from dataclasses import dataclass, field

import torch

from ..core import MethodConfig, MethodTrainer, Rollouts
from ..core.rollouts import prompt_visits, success_rewards


@dataclass
class KnapsackRLConfig(MethodConfig):
    r"""
    Configuration of [`KnapsackRLTrainer`]. Defaults are those of the authors' code.

    Parameters:
        knapsack_min_rollouts (`int`, *optional*, defaults to `2`), knapsack_max_rollouts (`int`, *optional*, defaults
            to `128`):
            Bounds of the rollouts of a prompt that is sometimes solved.
        knapsack_zero_rollouts (`int`, *optional*, defaults to `2`), knapsack_one_rollouts (`int`, *optional*, defaults
            to `2`):
            Rollouts of a prompt that is never, or always, solved.
        knapsack_confidence (`float`, *optional*, defaults to `0.9`):
            Probability with which a sometimes-solved prompt shall show its rarer outcome; what is left then goes to
            the unsolved prompts.
        knapsack_history (`int`, *optional*, defaults to `16`):
            Newest outcomes from which a success rate is estimated.
        knapsack_min_history (`int`, *optional*, defaults to `8`):
            Outcomes below which a prompt counts as unseen.
        knapsack_fallback (`bool`, *optional*, defaults to `True`):
            Whether the surplus goes to unsolved prompts.
        knapsack_advantage_clip (`float`, *optional*, defaults to `5.0`):
            Bound of the advantages' size, since one success among many rollouts would weigh a lot; None for no bound.
        knapsack_success_threshold (`float`, *optional*, defaults to `0.5`):
            A rollout is a success if its reward is above.
    """

    knapsack_min_rollouts: int = field(default=2, metadata={"help": "Least rollouts of a sometimes-solved prompt."})
    knapsack_max_rollouts: int = field(default=128, metadata={"help": "Most rollouts of a sometimes-solved prompt."})
    knapsack_zero_rollouts: int = field(default=2, metadata={"help": "Rollouts of a never-solved prompt."})
    knapsack_one_rollouts: int = field(default=2, metadata={"help": "Rollouts of an always-solved prompt."})
    knapsack_confidence: float = field(default=0.9, metadata={"help": "Chance to see the rarer outcome."})
    knapsack_history: int = field(default=16, metadata={"help": "Outcomes that a success rate is estimated from."})
    knapsack_min_history: int = field(default=8, metadata={"help": "Outcomes below which a prompt is unseen."})
    knapsack_fallback: bool = field(default=True, metadata={"help": "Give the surplus to unsolved prompts."})
    knapsack_advantage_clip: float | None = field(default=5.0, metadata={"help": "Bound of the advantages' size."})
    knapsack_success_threshold: float = field(default=0.5, metadata={"help": "A success has a reward above this."})

    def __post_init__(self):
        super().__post_init__()
        group = self.num_generations
        self.check_range("num_generations", group >= 2, "at least 2 for Knapsack RL, which divides its total")
        self.check_range("knapsack_min_rollouts", self.knapsack_min_rollouts >= 2, "at least 2")
        self.check_range("knapsack_max_rollouts", self.knapsack_max_rollouts >= group, "at least num_generations")
        for name in ("knapsack_min_rollouts", "knapsack_zero_rollouts", "knapsack_one_rollouts"):
            self.check_range(name, 0 <= getattr(self, name) <= group, f"between 0 and num_generations ({group})")
        self.check_range("knapsack_confidence", 0 < self.knapsack_confidence < 1, "between 0 and 1, both excluded")
        self.check_range("knapsack_history", self.knapsack_history >= 1, "at least 1")
        self.check_range("knapsack_min_history", self.knapsack_min_history >= 0, "at least 0")
        clip = self.knapsack_advantage_clip
        self.check_range("knapsack_advantage_clip", clip is None or clip > 0, "positive or None")


def mixed_probability(n: int, p: float) -> float:
    """Chance that `n` outcomes of success rate `p` are not all equal: 1 - p^n - (1-p)^n."""
    return 1 - p**n - (1 - p) ** n


def knapsack_value(n: int, p: float) -> float:
    """Value of `n` rollouts of a prompt of success rate `p`: the chance of a signal times p (1-p)^2."""
    return mixed_probability(n, p) * p * (1 - p) ** 2


def knapsack_gain(n: int, p: float) -> float:
    """`knapsack_value(n + 1, p) - knapsack_value(n, p)` in a form that does not cancel for large `n`."""
    return p * (1 - p) ** 2 * (p**n * (1 - p) + (1 - p) ** n * p)


def knapsack_budgets(
    rates: list[float | None],
    group: int,
    low: int = 2,
    high: int = 128,
    zero: int = 2,
    one: int = 2,
    confidence: float = 0.9,
    fallback: bool = True,
) -> list[int]:
    """
    Rollouts per prompt that maximise the summed value at the total of `group` per prompt. The value is concave in the
    number of rollouts, so giving them one by one to the largest gain is optimal.

    Args:
        rates (`list[float | None]`):
            Estimated success rate of each prompt; None for an unseen one, which gets `group`.
        group (`int`):
            Average number of rollouts G.
        low (`int`, *optional*, defaults to `2`), high (`int`, *optional*, defaults to `128`):
            Bounds for prompts with a rate strictly between 0 and 1.
        zero (`int`, *optional*, defaults to `2`), one (`int`, *optional*, defaults to `2`):
            Rollouts of prompts with rate 0 and 1.
        confidence (`float`, *optional*, defaults to `0.9`):
            See [`KnapsackRLConfig`].
        fallback (`bool`, *optional*, defaults to `True`):
            Whether a surplus goes to prompts of rate 0, or if there are none to all without a signal.

    Returns:
        `list[int]`: budgets with the sum `group * len(rates)`.

    Raises:
        ValueError: if the least budgets already exceed the total.
    """
    unseen, never, always, effective = ([] for _ in range(4))
    for i, rate in enumerate(rates):
        kind = unseen if rate is None else never if rate == 0 else always if rate == 1 else effective
        kind.append(i)
    budgets = [0] * len(rates)
    for kind, n in ((unseen, group), (never, zero), (always, one), (effective, low)):
        for i in kind:
            budgets[i] = n
    rest = group * len(rates) - sum(budgets)
    if rest < 0:
        raise ValueError(
            f"the least budgets of {len(rates)} prompts exceed their total of {group * len(rates)} rollouts: lower "
            "`knapsack_min_rollouts`, `knapsack_zero_rollouts` or `knapsack_one_rollouts`."
        )

    def spread(amount: int, receivers: list[int]) -> None:
        for position, i in enumerate(sorted(receivers)):
            budgets[i] += amount // len(receivers) + (position < amount % len(receivers))

    if not effective:
        if not never:
            return [group] * len(rates)
        spread(rest, never)
        return budgets
    usable = sum(
        math.floor(min(high, math.log(1 - confidence) / math.log1p(-min(rates[i], 1 - rates[i])))) for i in effective
    )
    receivers = never or always + unseen
    if fallback and usable < rest and receivers:
        spread(rest - usable, receivers)
        rest = usable
    gains = [(-knapsack_gain(budgets[i], rates[i]), i) for i in effective if budgets[i] < high]
    heapq.heapify(gains)
    while rest and gains:
        _, i = heapq.heappop(gains)
        budgets[i] += 1
        rest -= 1
        if budgets[i] < high:
            heapq.heappush(gains, (-knapsack_gain(budgets[i], rates[i]), i))
    if rest:
        spread(rest, never or always + unseen or effective)
    return budgets


def knapsack_rate(visit: list[float], earlier: list[float], window: int = 16) -> float:
    """
    Success rate of a prompt after a visit: the mean of the visit if it is as long as the window, else of the newest
    `window` outcomes.

    Args:
        visit (`list[float]`):
            Outcomes (0 or 1) of this visit, in row order; at least one.
        earlier (`list[float]`):
            Earlier outcomes, oldest first.
        window (`int`, *optional*, defaults to `16`):
            Outcomes to look back.

    Returns:
        `float`: in [0, 1].
    """
    outcomes = visit if len(visit) >= window else (earlier + visit)[-window:]
    return sum(outcomes) / len(outcomes)


class KnapsackRLTrainer(MethodTrainer):
    """
    Knapsack RL ([arXiv 2509.25849](https://huggingface.co/papers/2509.25849)). The rollouts of a step move, at a
    constant total, from prompts that are always or never solved to those where they are likely to show both outcomes.
    Advantages are GRPO's over groups of different sizes (with TRL's 1e-4 in the denominator, where the code has 1e-6),
    clipped. An answer that was cut off is a failure, or is not counted with `mask_truncated_completions`.

    State: success rate, newest outcomes and number of outcomes of every prompt, the same on all processes.

    Logs `knapsack/max_budget`, `knapsack/effective` (share of the batch's prompts with a rate strictly between 0 and
    1), `knapsack/nonzero_advantage` (share of the rollouts) and `knapsack/clipped_advantage`.
    """

    config_class = KnapsackRLConfig
    replaces = ("prompt_budgets",)
    _name = "Knapsack RL"
    _paper = {
        "title": "Knapsack RL: Unlocking Exploration of LLMs via Optimizing Budget Allocation",
        "id": "2509.25849",
        "citation": """\
@article{li2025knapsack,
    title  = {{Knapsack RL: Unlocking Exploration of LLMs via Optimizing Budget Allocation}},
    author = {Ziniu Li and others},
    year   = 2025,
    eprint = {arXiv:2509.25849},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        size = len(self.train_dataset)
        self.knapsack_rates = torch.zeros(size, dtype=torch.float64)
        self.knapsack_counts = torch.zeros(size, dtype=torch.long)
        # The newest outcomes, oldest first, right-aligned.
        self.knapsack_outcomes = torch.zeros(size, self.args.knapsack_history, dtype=torch.bool)

    def prompt_budgets(self, rows: torch.Tensor):
        args = self.args
        seen = self.knapsack_counts[rows] >= max(args.knapsack_min_history, 1)
        rates = [rate if known else None for rate, known in zip(self.knapsack_rates[rows].tolist(), seen, strict=True)]
        budgets = knapsack_budgets(
            rates,
            args.num_generations,
            args.knapsack_min_rollouts,
            args.knapsack_max_rollouts,
            args.knapsack_zero_rollouts,
            args.knapsack_one_rollouts,
            args.knapsack_confidence,
            args.knapsack_fallback,
        )
        self.log_metric("knapsack/max_budget", max(budgets))
        self.log_metric("knapsack/effective", sum(r is not None and 0 < r < 1 for r in rates) / len(rates))
        return torch.tensor(budgets)

    def compute_advantages(self, rollouts: Rollouts):
        advantages, clip = super().compute_advantages(rollouts), self.args.knapsack_advantage_clip
        if rollouts.training:
            self.log_metric("knapsack/nonzero_advantage", (advantages != 0).float().mean())
            self.log_metric("knapsack/clipped_advantage", (advantages.abs() > (clip or torch.inf)).float().mean())
        return advantages if clip is None else advantages.clamp(-clip, clip)

    def observe(self, rollouts: Rollouts):
        super().observe(rollouts)
        window, threshold = self.args.knapsack_history, self.args.knapsack_success_threshold
        outcomes = success_rewards(rollouts.everything, self.mask_truncated_completions)
        for row, rewards in zip(*prompt_visits(rollouts.everything, outcomes), strict=True):
            row = int(row)
            visit = (rewards[~rewards.isnan()] > threshold).tolist()
            kept = min(int(self.knapsack_counts[row]), window)
            earlier = self.knapsack_outcomes[row, window - kept :].tolist()
            self.knapsack_rates[row] = knapsack_rate(visit, earlier, window)
            newest = (earlier + visit)[-window:]
            self.knapsack_outcomes[row, window - len(newest) :] = torch.tensor(newest)
            self.knapsack_counts[row] += len(visit)

    def prompt_table(self):
        rates = torch.where(self.knapsack_counts > 0, self.knapsack_rates, torch.nan)
        columns = {"knapsack/rollouts": self.knapsack_counts, "knapsack/rate": rates}
        return super().prompt_table() | columns

    def method_state(self):
        state = {"rates": self.knapsack_rates, "counts": self.knapsack_counts, "outcomes": self.knapsack_outcomes}
        return super().method_state() | {"knapsack_rl": state}

    def load_method_state(self, state):
        super().load_method_state(state)
        state = state["knapsack_rl"]
        self.knapsack_rates, self.knapsack_counts = state["rates"], state["counts"]
        self.knapsack_outcomes = state["outcomes"]
