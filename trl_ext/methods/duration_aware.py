"""Duration-aware gradient updates (Yang et al., arXiv 2509.01684)."""

import warnings
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object

from ..core import MethodConfig, MethodTrainer, Rollouts
from ..core.rollouts import step_numbers


@dataclass
class DurationAwareConfig(MethodConfig):
    r"""
    Configuration of [`DurationAwareTrainer`]. The paper divides by the batch's mean duration; floor, cap and running
    mean are ours.

    Parameters:
        duration_key (`str`, *optional*, defaults to `"duration"`):
            Column with the time that the environment spent on each rollout's action, in seconds: returned by a
            `rollout_func`, logged by a reward function (`log_extra`) or of the data set. A number, or a list with one
            number per step; None or NaN where it is not known.
        duration_normalize (`str`, *optional*, defaults to `"batch_mean"`):
            What durations are divided by: the mean over the actions of the batch (`"batch_mean"`), a running mean of
            it (`"ema"`) or nothing (`"none"`).
        duration_ema_decay (`float`, *optional*, defaults to `0.9`):
            Share of the running mean that is kept at a generation.
        duration_weight_cap (`float`, *optional*):
            Bound of the weights, which are not normalised again.
        duration_min (`float`, *optional*, defaults to `1e-3`):
            Durations below it count as it, before the mean is taken.
        duration_require_async (`bool`, *optional*, defaults to `True`):
            Whether to warn that rollouts are not collected within a time budget. TRL's trainer cannot know whether a
            `rollout_func` or an environment does so: False says that it does.
    """

    duration_key: str = field(default="duration", metadata={"help": "Column with the durations in seconds."})
    duration_normalize: str = field(
        default="batch_mean",
        metadata={"help": "What durations are divided by.", "choices": ["batch_mean", "none", "ema"]},
    )
    duration_ema_decay: float = field(default=0.9, metadata={"help": "Share of the running mean that is kept."})
    duration_weight_cap: float | None = field(default=None, metadata={"help": "Bound of the weights."})
    duration_min: float = field(default=1e-3, metadata={"help": "Shortest duration in seconds."})
    duration_require_async: bool = field(default=True, metadata={"help": "Warn that rollouts have no time budget."})

    def __post_init__(self):
        super().__post_init__()
        key, cap = self.duration_key, self.duration_weight_cap
        self.check_range("duration_key", isinstance(key, str) and key != "", "the name of a column")
        self.check_choices("duration_normalize")
        self.check_range("duration_ema_decay", 0 <= self.duration_ema_decay < 1, "in [0, 1)")
        self.check_range("duration_weight_cap", cap is None or cap > 1, "above 1 or None")
        self.check_range("duration_min", 0 <= self.duration_min < float("inf"), "at least 0 and finite")


def duration_table(values: list) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Lay durations out with one rollout per row.

    Args:
        values (`list`):
            One entry per rollout: its duration, or a list with those of its steps; None or NaN = not known.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: durations `(N, S)` in float64, NaN = not known or no such step; and
        whether the (only) duration is that of the whole rollout, boolean, `(N,)`.

    Raises:
        ValueError: if one is negative, infinite or not a number; the message shows it.
    """
    rows = [value.tolist() if hasattr(value, "tolist") else value for value in values]
    whole = [not isinstance(row, (list, tuple)) for row in rows]
    rows = [[row] if single else row for row, single in zip(rows, whole, strict=True)]
    table = torch.full((len(rows), max(map(len, rows), default=0)), torch.nan, dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            try:
                number = torch.nan if value is None else None if isinstance(value, str) else float(value)
            except (TypeError, ValueError):
                number = None
            if number is None or number < 0 or number == float("inf"):
                raise ValueError(f"a duration must be a finite number of at least 0 seconds, or None; got {value!r}.")
            table[i, j] = number
    return table, torch.tensor(whole, dtype=torch.bool)


def duration_mean(durations: torch.Tensor, floor: float = 1e-3) -> torch.Tensor:
    """
    Mean duration of the actions of a batch.

    Args:
        durations (`torch.Tensor`):
            In seconds, any shape; NaN = not known.
        floor (`float`, *optional*, defaults to `1e-3`):
            Shorter ones count as it.

    Returns:
        `torch.Tensor`: Scalar; NaN if none is known.
    """
    return torch.nanmean(durations.clamp(min=floor))


def duration_running_mean(previous: float | None, batch_mean: float, decay: float = 0.9) -> float | None:
    """
    Running mean with a batch taken in; the first batch's mean starts it.

    Args:
        previous (`float`, *optional*):
            Running mean so far; None at the start.
        batch_mean (`float`):
            From [`duration_mean`]; NaN leaves the running mean as it is.
        decay (`float`, *optional*, defaults to `0.9`):
            Share of `previous` that is kept.

    Returns:
        `float` or `None`: the new running mean.
    """
    if batch_mean != batch_mean:
        return previous
    return batch_mean if previous is None else decay * previous + (1 - decay) * batch_mean


def duration_weights(
    durations: torch.Tensor,
    normalize: str = "batch_mean",
    running_mean: float | None = None,
    floor: float = 1e-3,
    cap: float | None = None,
) -> torch.Tensor:
    """
    Weight of each action: its duration over the mean duration. Within a fixed time an action of duration d is done
    about 1/d times as often, which the factor d undoes.

    Args:
        durations (`torch.Tensor`):
            Of all actions of the batch, in seconds, any shape; NaN = not known.
        normalize (`str`, *optional*, defaults to `"batch_mean"`):
            See [`DurationAwareConfig`].
        running_mean (`float`, *optional*):
            For `"ema"`: the running mean, this batch included.
        floor (`float`, *optional*, defaults to `1e-3`):
            Shorter durations count as it.
        cap (`float`, *optional*):
            Bound of the weights, applied last.

    Returns:
        `torch.Tensor`: Same shape. An action of unknown duration weighs as one of the mean duration: 1, or with
        `"none"` that mean (1 if none is known).
    """
    known, mean = durations.clamp(min=floor), duration_mean(durations, floor)
    if normalize == "none":
        weights = torch.where(known.isnan(), mean.nan_to_num(nan=1.0), known)
    else:
        divisor = mean if normalize == "batch_mean" or running_mean is None else mean.new_tensor(running_mean)
        weights = torch.where(known.isnan() | (divisor == 0), 1.0, known / divisor)
    return weights if cap is None else weights.clamp(max=cap)


def duration_token_weights(weights: torch.Tensor, steps: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """
    Deal the weights of actions to the tokens that caused them.

    Args:
        weights (`torch.Tensor`):
            Shape `(n, S + 1)`; the last column is for tokens of no action, such as those after the last answer.
        steps (`torch.Tensor`):
            Step of each token, -1 outside of steps, shape `(n, T)`.
        whole (`torch.Tensor`):
            Whether the rollout's first weight is that of all its tokens, boolean, shape `(n,)`.

    Returns:
        `torch.Tensor`: Shape `(n, T)`.
    """
    last = weights.shape[1] - 1
    action = torch.where(steps < 0, last, torch.where(whole.unsqueeze(1), 0, steps.clamp(max=last)))
    return weights.gather(1, action)


def duration_aware_advantages(advantages: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    Advantages times weights; 0 where there is no advantage (NaN).

    Args:
        advantages (`torch.Tensor`):
            Shape `(n,)` or `(n, T)`, already normalised.
        weights (`torch.Tensor`):
            Shape `(n,)` or `(n, T)`.

    Returns:
        `torch.Tensor`: Shape `(n,)`, or `(n, T)` if one of them has it.
    """
    if advantages.dim() != weights.dim():
        advantages, weights = (x.unsqueeze(1) if x.dim() == 1 else x for x in (advantages, weights))
    return torch.nan_to_num(advantages, nan=0.0) * weights.to(advantages)


class DurationAwareTrainer(MethodTrainer):
    """
    Duration-aware gradient updates, from Reinforcement Learning for Machine Learning Engineering Agents ([arXiv
    2509.01684](https://huggingface.co/papers/2509.01684)). Where rollouts are collected within a time budget, fast
    actions finish more often and draw the policy to them; every advantage is therefore multiplied by the duration of
    its action over the mean duration of the batch, after everything else that forms advantages. Where every prompt
    gets its rollouts however long they take, there is no such bias and the weights would favour slow actions.

    State: with `duration_normalize="ema"` the running mean duration.

    Logs `duration_aware/mean` (seconds, over the actions of the batch), `duration_aware/max_weight` and
    `duration_aware/effective_actions` (the square of the weights' sum over the sum of their squares).
    """

    config_class = DurationAwareConfig
    runs_after = ("empg", "knapsack_rl")
    _name = "Duration-aware updates"
    _paper = {
        "title": "Reinforcement Learning for Machine Learning Engineering Agents",
        "id": "2509.01684",
        "citation": """\
@article{yang2025reinforcement,
    title  = {{Reinforcement Learning for Machine Learning Engineering Agents}},
    author = {Sherry Yang and Joy He-Yueya and Percy Liang},
    year   = 2025,
    eprint = {arXiv:2509.01684},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.duration_running = self.duration_next = None
        if self.args.duration_require_async:
            warnings.warn(
                "Duration weights undo that slow actions are sampled less often within a time budget, but TRL's "
                "trainer waits for every rollout of a generation, so that the weights favour slow actions instead. If "
                "your `rollout_func` or environment collects for a fixed time or drops late rollouts, say so by "
                "`duration_require_async=False`.",
                stacklevel=2,
            )

    def _durations(self, rollouts: Rollouts) -> tuple[torch.Tensor, torch.Tensor]:
        """[`duration_table`] of all processes' rollouts, the same everywhere."""
        key, local, problem = self.args.duration_key, None, None
        try:
            local = rollouts.column(key)
        except ValueError as error:  # another process may have the column, and would wait for this one
            problem = error
        parts = gather_object([local])
        if all(part is None for part in parts):
            raise ValueError(f"`duration_key` is {key!r}, but {problem}")
        missing = [None] * len(rollouts.examples)
        try:
            return duration_table([value for part in parts for value in (missing if part is None else part)])
        except ValueError as error:
            raise ValueError(f"in the column {key!r} (`duration_key`) {error}") from error

    def compute_advantages(self, rollouts: Rollouts):
        base, args, device = super().compute_advantages(rollouts), self.args, rollouts.group_ids.device
        durations, whole = self._durations(rollouts)
        mean = duration_mean(durations, args.duration_min).item()
        running = duration_running_mean(self.duration_running, mean, args.duration_ema_decay)
        if rollouts.training:
            self.duration_next = running
        weights = duration_weights(
            torch.nn.functional.pad(durations, (0, 1), value=torch.nan),  # for tokens of no action
            args.duration_normalize,
            running if args.duration_normalize == "ema" else None,
            args.duration_min,
            args.duration_weight_cap,
        )
        of_actions = weights[:, :-1][~durations.isnan()]
        if len(of_actions):
            self.log_metric("duration_aware/mean", mean)
            self.log_metric("duration_aware/max_weight", of_actions.max())
            squares = (of_actions**2).sum()
            self.log_metric("duration_aware/effective_actions", of_actions.sum() ** 2 / squares if squares else 0.0)
        weights, whole = weights.to(device), whole.to(device)
        if whole.all():
            weights = weights[:, 0]
            return duration_aware_advantages(base, weights if base.dim() == 1 else weights[rollouts.local])
        steps = step_numbers(rollouts.mask)
        weights = duration_token_weights(weights[rollouts.local], steps, whole[rollouts.local])
        return duration_aware_advantages(base[rollouts.local] if base.dim() == 1 else base, weights)

    def observe(self, rollouts: Rollouts):
        super().observe(rollouts)
        self.duration_running = self.duration_next

    def method_state(self):
        if self.args.duration_normalize != "ema":
            return super().method_state()
        return super().method_state() | {"duration_aware": {"running_mean": self.duration_running}}

    def load_method_state(self, state):
        super().load_method_state(state)
        # Absent if the run was begun without a running mean.
        self.duration_running = state.get("duration_aware", {}).get("running_mean")
