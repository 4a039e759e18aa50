"""The entropy-performance law (Cui et al., The Entropy Mechanism of Reinforcement Learning, arXiv 2505.22617)."""

import math
import os
import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate.utils import broadcast
from transformers import TrainerCallback

from ..evaluation import student_quantile


ALARMS = ("collapse", "explosion")
SPENT = 0.05  # share of the entropy at the start at which it counts as spent, where no floor is set


@dataclass
class EntropyLawConfig:
    r"""
    Configuration of [`EntropyLawCallback`].

    Parameters:
        reward_key (`str`, *optional*, defaults to `"reward"`):
            Metric to explain. The law is about validation accuracy, so `"eval_reward"` or another metric of an
            evaluation is the better choice where there is one; with a metric of training, the noise of a batch is in
            entropy and reward alike.
        fit_min_points (`int`, *optional*, defaults to `3`):
            Points from which on the law is fitted.
        fit_window (`int`, *optional*):
            Fit the first `fit_window` optimizer steps only and predict the rest (the paper's early prediction uses
            15 % of the run); all points if None.
        eval_every (`int`, *optional*, defaults to `4`):
            With a metric of training, every so many logs make one point, their mean (the paper evaluates every 4
            rollout steps). With a metric of an evaluation, every evaluation is a point.
        entropy_floor_warn (`float`, *optional*):
            Entropy in nats below which a collapse is reported and which counts as spent. The paper gives none; if
            None, 5 % of the entropy at the start counts as spent.
        alarm_window (`int`, *optional*, defaults to `10`):
            Logs that are averaged before they are compared with the first ones.
        collapse_share (`float`, *optional*, defaults to `0.5`):
            Entropy, as a share of that at the start, from which on down a collapse is reported.
        explosion_share (`float`, *optional*, defaults to `2.0`):
            Entropy, as a multiple of that at the start, from which on up an explosion is reported.
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of all intervals.
        stop_on (`tuple[str, ...]`, *optional*, defaults to `()`):
            Alarms that end the training, of `"collapse"` and `"explosion"`.
        control_coef (`float`, *optional*):
            Coefficient to hand to TRL's adaptive entropy control (`use_adaptive_entropy`) as long as a collapse is
            reported, at most `entropy_coef_max` (TRL applies it while the entropy is at or below `entropy_target`); in
            an explosion it gets `entropy_coef_min`. None leaves the control alone.
    """

    reward_key: str = "reward"
    fit_min_points: int = 3
    fit_window: int | None = None
    eval_every: int = 4
    entropy_floor_warn: float | None = None
    alarm_window: int = 10
    collapse_share: float = 0.5
    explosion_share: float = 2.0
    confidence: float = 0.95
    stop_on: tuple[str, ...] = field(default=())
    control_coef: float | None = None

    def __post_init__(self):
        self.stop_on = (self.stop_on,) if isinstance(self.stop_on, str) else tuple(self.stop_on)
        for name, fine, range_ in (
            ("fit_min_points", self.fit_min_points >= 3, "at least 3"),
            ("fit_window", self.fit_window is None or self.fit_window >= 1, "at least 1, or None"),
            ("eval_every", self.eval_every >= 1, "at least 1"),
            (
                "entropy_floor_warn",
                self.entropy_floor_warn is None or self.entropy_floor_warn > 0,
                "positive, or None",
            ),
            ("alarm_window", self.alarm_window >= 1, "at least 1"),
            ("collapse_share", 0 < self.collapse_share < 1, "between 0 and 1"),
            ("explosion_share", self.explosion_share > 1, "above 1"),
            ("confidence", 0 < self.confidence < 1, "between 0 and 1"),
            ("stop_on", set(self.stop_on) <= set(ALARMS), f"of {ALARMS}"),
            ("control_coef", self.control_coef is None or self.control_coef > 0, "positive, or None"),
        ):
            if not fine:
                raise ValueError(f"`{name}` must be {range_}, but is {getattr(self, name)!r}.")


@dataclass(frozen=True)
class EntropyFit:
    """
    Least-squares fit of `R = -a * exp(H) + b`.

    Attributes:
        a (`float`), b (`float`):
            The coefficients.
        rmse (`float`):
            Root of the mean squared residual, over the number of points.
        points (`int`):
            Number of points.
        covariance (`np.ndarray`):
            Of a and b, shape `(2, 2)`, for independent residuals of equal variance; infinite with two points, which
            say nothing about it.
        noise (`float`):
            Variance of a residual, from `points - 2` degrees of freedom.
        quantile (`float`):
            Half the width of an interval in standard errors.
    """

    a: float
    b: float
    rmse: float
    points: int
    covariance: np.ndarray
    noise: float
    quantile: float

    @property
    def law_holds(self) -> bool:
        """Whether reward is traded for entropy at all."""
        return self.a > 0

    @property
    def ceiling(self) -> float:
        """Reward at zero entropy, as fitted; it may lie outside of the reward's range."""
        return self.b - self.a

    @property
    def ceiling_interval(self) -> tuple[float, float]:
        """Confidence interval of the ceiling."""
        low, high = self.band(0.0)
        return float(low), float(high)

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Confidence intervals of a and b."""
        widths = self.quantile * np.sqrt(np.diag(self.covariance))
        return {n: (v - w, v + w) for n, v, w in zip("ab", (self.a, self.b), widths.tolist(), strict=True)}

    def reward(self, entropy):
        """Fitted reward at entropies in nats, of any shape."""
        return self.b - self.a * np.exp(entropy)

    def rate(self, entropy):
        """Slope of the reward in the entropy, of any shape."""
        return -self.a * np.exp(entropy)

    def band(self, entropy, observed: bool = False):
        """
        Confidence band at entropies in nats.

        Args:
            entropy (`float` or `np.ndarray`):
                Where.
            observed (`bool`, *optional*, defaults to `False`):
                Whether to bound a new observation, with its own noise, instead of the curve.

        Returns:
            `tuple`: lower and upper bound, of the shape of `entropy`.
        """
        x, cov = np.exp(entropy), self.covariance
        if self.points == 2:
            width = np.full_like(x, math.inf)
        else:
            variance = x * x * cov[0, 0] - 2 * x * cov[0, 1] + cov[1, 1]
            width = self.quantile * np.sqrt(np.maximum(variance, 0) + (self.noise if observed else 0))
        middle = self.reward(entropy)
        return middle - width, middle + width


def entropy_law_fit(entropy, reward, confidence: float = 0.95) -> EntropyFit | None:
    """
    Fit `R = -a * exp(H) + b` (Eq. 6) by ordinary least squares, in which it is linear.

    Args:
        entropy (sequence of `float`), reward (sequence of `float`):
            Entropy in nats and reward, of the same length; pairs that are not both finite are left out.
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the intervals (Student's t).

    Returns:
        [`EntropyFit`] or `None`: None unless two entropies differ.
    """
    x, y = np.exp(np.asarray(entropy, dtype=np.float64)), np.asarray(reward, dtype=np.float64)
    valid = np.isfinite(x) & np.isfinite(y)
    x, y = x[valid], y[valid]
    if len(x) < 2 or x.min() == x.max():
        return None
    n, middle = len(x), x.mean()
    spread = ((x - middle) ** 2).sum()
    a = -((x - middle) * (y - y.mean())).sum() / spread
    b = y.mean() + a * middle
    squares = ((y - b + a * x) ** 2).sum()
    noise = squares / (n - 2) if n > 2 else math.inf
    covariance = noise * np.array([[1 / spread, middle / spread], [middle / spread, 1 / n + middle**2 / spread]])
    quantile = student_quantile(confidence, n - 2)
    return EntropyFit(float(a), float(b), math.sqrt(squares / n), n, covariance, float(noise), quantile)


def steps_left(steps, entropy, spent: float, confidence: float = 0.95) -> tuple[float, float, float]:
    """
    Optimizer steps until the entropy is spent, if it goes on falling by the same factor per step: a line through the
    logarithm of the entropy.

    Args:
        steps (sequence of `float`), entropy (sequence of `float`):
            Optimizer step and entropy of the logs to extrapolate; entropies that are not positive and finite are left
            out.
        spent (`float`):
            Entropy at which it counts as spent.
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the interval, which is that of the rate.

    Returns:
        `tuple[float, float, float]`: estimate, lower and upper bound; infinite where it does not fall.
    """
    steps, entropy = np.asarray(steps, dtype=np.float64), np.asarray(entropy, dtype=np.float64)
    valid = np.isfinite(entropy) & (entropy > 0)
    x, y = steps[valid], np.log(entropy[valid])
    if len(x) < 2 or x.min() == x.max():
        return math.inf, 0.0, math.inf
    spread = ((x - x.mean()) ** 2).sum()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / spread
    residuals = y - y.mean() - slope * (x - x.mean())
    left = y.mean() + slope * (x[-1] - x.mean()) - math.log(spent)
    if left <= 0:
        return 0.0, 0.0, 0.0
    error = math.inf
    if len(x) > 2:
        error = student_quantile(confidence, len(x) - 2) * math.sqrt((residuals**2).sum() / (len(x) - 2) / spread)

    def until(rate):
        return float(left / -rate) if rate < 0 else math.inf

    return until(slope), until(slope - error), until(slope + error)


def entropy_level(entropy, window: int = 10) -> float | None:
    """
    Entropy of the last logs as a multiple of that of the first ones.

    Args:
        entropy (sequence of `float`):
            Entropy of every log; those that are not finite are left out.
        window (`int`, *optional*, defaults to `10`):
            Number of logs that are averaged, first and last.

    Returns:
        `float` or `None`: None as long as there are not more than `window` logs; 0 if there was no entropy to lose.
    """
    values = np.asarray(entropy, dtype=np.float64)
    values = values[np.isfinite(values)]
    if len(values) <= window:
        return None
    start = values[:window].mean()
    return float(values[-window:].mean() / start) if start > 0 else 0.0


def entropy_alarm(
    entropy, window: int = 10, collapse: float = 0.5, explosion: float = 2.0, floor: float | None = None
) -> str | None:
    """
    The alarm that a history of entropies gives rise to.

    Args:
        entropy (sequence of `float`):
            Entropy of every log so far; those that are not finite are left out.
        window (`int`, *optional*, defaults to `10`):
            Number of logs that are averaged.
        collapse (`float`, *optional*, defaults to `0.5`), explosion (`float`, *optional*, defaults to `2.0`):
            Multiples of the entropy at the start at and beyond which there is an alarm.
        floor (`float`, *optional*):
            Entropy in nats at and below which there is an alarm whatever the start was.

    Returns:
        `str` or `None`: `"collapse"`, `"explosion"` or None.
    """
    level = entropy_level(entropy, window)
    if level is None:
        return None
    values = np.asarray(entropy, dtype=np.float64)
    now = values[np.isfinite(values)][-window:].mean()
    if level <= collapse or (floor is not None and now <= floor):
        return "collapse"
    return "explosion" if level >= explosion else None


def entropy_drift(logps, advantages, group_ids):
    """
    The statistic that drives the entropy (Eq. 9): covariance of `log p` and `p * A` over the responses to a prompt,
    averaged over prompts. The entropy falls in proportion to it.

    Args:
        logps (`torch.Tensor`):
            Mean log-probability per token of every response, shape `(N,)`.
        advantages (`torch.Tensor`):
            Advantage of every response, shape `(N,)`; NaN where it was not scored.
        group_ids (`torch.Tensor`):
            Prompt of every response, shape `(N,)`.

    Returns:
        `torch.Tensor`: scalar, detached; NaN if nothing was scored.
    """
    scored = ~advantages.isnan()
    logps, advantages = logps.detach()[scored], advantages.detach()[scored]
    _, group = group_ids[scored].unique(return_inverse=True)
    count = torch.bincount(group).to(logps.dtype)

    def mean(values):
        return torch.zeros_like(count).index_add_(0, group, values) / count

    weighted = logps.exp() * advantages
    return mean((logps - mean(logps)[group]) * (weighted - mean(weighted)[group])).mean()


def entropy_law_points(log_history: list[dict], reward_key: str = "reward", every: int = 4) -> list[tuple]:
    """
    The points of the law in a trainer's logs. A metric of an evaluation (`eval_...`) goes with the entropy of the last
    training log at or before it; for a metric of training, means are taken over consecutive logs.

    Args:
        log_history (`list[dict]`):
            `trainer.state.log_history`.
        reward_key (`str`, *optional*, defaults to `"reward"`):
            Name of the metric.
        every (`int`, *optional*, defaults to `4`):
            Training logs that make one point.

    Returns:
        `list[tuple]`: step, entropy and reward of every point. Logs without a number are left out.
    """
    collector = Collector(reward_key, every)
    collector.follow(log_history)
    return collector.points


class Collector:
    """Entropies and points of a growing `log_history`, each entry of which is read once."""

    def __init__(self, reward_key: str, every: int):
        self.reward_key, self.every, self._history = reward_key, every, None

    def follow(self, log_history: list[dict]) -> bool:
        """Read what is new; whether the last entry completed a point."""
        if log_history is not self._history or len(log_history) < self._read:  # a new run, or a resumed one
            self._history, self._read = log_history, 0
            self.logs, self.entropy, self.rewards, self.points, self._block = [], [], [], [], []
        before = 0
        for entry in log_history[self._read :]:
            before = len(self.points)
            self._add(entry)
        self._read = len(log_history)
        return len(self.points) > before

    def _add(self, entry: dict) -> None:
        entropy, reward = entry.get("entropy"), entry.get(self.reward_key)
        if is_number(entropy):
            self.logs.append(entry)
            self.entropy.append(entropy)
        if not is_number(reward):
            return
        self.rewards.append(reward)
        if self.reward_key.startswith("eval_"):
            if self.entropy:
                self.points.append((entry["step"], self.entropy[-1], reward))
        elif is_number(entropy):
            self._block.append((entropy, reward))
            if len(self._block) == self.every:
                means = (sum(values) / self.every for values in zip(*self._block, strict=True))
                self.points.append((entry["step"], *means))
                self._block = []


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


class EntropyLawCallback(TrainerCallback):
    """
    Follows the entropy that TRL logs, and the reward, of any TRL trainer. It fits how reward is bought with entropy,
    says what reward is left to gain and when the entropy will be spent, and warns when the entropy collapses or
    explodes. From The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models ([arXiv
    2505.22617](https://huggingface.co/papers/2505.22617)), which found the law in runs without an entropy bonus or KL
    term; with them, or another start, read the fit as a yardstick.

    Training does not change, unless `stop_on` or `control_coef` is set. Everything is kept in the trainer's
    `log_history`, so a resumed run goes on with it: `entropy_law/a`, `b`, `rmse`, `residual` (of the newest point),
    `ceiling`, `ceiling_low` and `ceiling_high` (only where a > 0), `steps_left`, `alarm`, and `reason` where an alarm
    begins. `entropy_law.png` in `output_dir` is drawn at every checkpoint and at the end.

    The intervals take the points' noise as independent and the entropy as known; noise of the entropy itself, which is
    larger with fewer rollouts per log, draws `a` towards 0.

    Args:
        config ([`EntropyLawConfig`], *optional*):
            Settings.
        trainer (`Trainer`, *optional*):
            The trainer, so that its trackers get the metrics too; `control_coef` needs it.

    Example:
    ```python
    trainer = GRPOTrainer(...)
    trainer.add_callback(EntropyLawCallback(EntropyLawConfig(reward_key="eval_reward"), trainer))
    ```
    """

    def __init__(self, config: EntropyLawConfig | None = None, trainer=None):
        self.config = config or EntropyLawConfig()
        self.trainer = trainer
        self._seen = Collector(self.config.reward_key, self.config.eval_every)
        if self.config.control_coef is not None and not getattr(trainer, "use_adaptive_entropy", False):
            raise ValueError(
                f"`control_coef={self.config.control_coef}` hands a coefficient to TRL's adaptive entropy control: "
                "give the callback a `trainer` with `use_adaptive_entropy=True`, or leave `control_coef` None."
            )

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer is not None:
            # Ahead of the trackers; in a new list, since the old one is being gone through.
            others = [callback for callback in self.trainer.callback_handler.callbacks if callback is not self]
            self.trainer.callback_handler.callbacks = [self, *others]

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.log_history:
            return
        entry = state.log_history[-1]
        self._look(entry, args, state, control)
        if logs is not None:
            logs.update({k: v for k, v in entry.items() if k.startswith("entropy_law/") and is_number(v)})

    def _look(self, entry, args, state, control) -> None:
        config, window = self.config, self.config.alarm_window
        if self._seen.follow(state.log_history):
            entry.update(self._fit())
        if "entropy" not in entry:
            return
        alarm, left = self._judge(entry) if is_number(entry["entropy"]) else (None, math.inf)
        if config.stop_on or config.control_coef is not None:
            alarm = decided_by_main(alarm, args)
        if alarm is None:
            return
        entry["entropy_law/alarm"] = alarm
        before = [past for past in self._seen.logs[-window - 1 :] if past is not entry]
        if state.is_world_process_zero and all(past.get("entropy_law/alarm") != alarm for past in before):
            entry["entropy_law/reason"] = self._reason(alarm, left)
            warnings.warn(entry["entropy_law/reason"], stacklevel=2)
        if config.control_coef is not None:
            low, high = args.entropy_coef_min, args.entropy_coef_max
            coefficient = max(self.trainer.entropy_coef, config.control_coef) if alarm == "collapse" else low
            self.trainer.entropy_coef = min(max(coefficient, low), high)
        if alarm in config.stop_on:
            control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            draw_entropy_law(state.log_history, os.path.join(args.output_dir, "entropy_law.png"), self.config)

    def on_train_end(self, args, state, control, **kwargs):
        self.on_save(args, state, control)
        for key in ("entropy", self.config.reward_key):
            if state.is_world_process_zero and not any(is_number(entry.get(key)) for entry in state.log_history):
                warnings.warn(
                    f"EntropyLawCallback: no number was logged as {key!r}, so there is no fit.", stacklevel=2
                )

    def _fit(self) -> dict[str, float]:
        """The fit after a new point, as metrics."""
        fit = fit_points(self._seen.points, self.config)
        if fit is None:
            return {}
        _, entropy, reward = self._seen.points[-1]
        metrics = {"a": fit.a, "b": fit.b, "rmse": fit.rmse, "residual": float(reward - fit.reward(entropy))}
        if fit.law_holds:
            low, high = fit.ceiling_interval
            metrics |= {"ceiling": fit.ceiling, "ceiling_low": low, "ceiling_high": high}
        return {f"entropy_law/{name}": value for name, value in metrics.items()}

    def _judge(self, entry: dict) -> tuple[str | None, float]:
        """The alarm after a training log, and the steps until the entropy is spent, which are logged."""
        config, window, entropy = self.config, self.config.alarm_window, self._seen.entropy
        left = math.inf
        if len(entropy) > window:
            spent = config.entropy_floor_warn or SPENT * float(np.mean(entropy[:window]))
            if spent > 0:
                steps = [past["step"] for past in self._seen.logs[-3 * window :]]
                left = steps_left(steps, entropy[-3 * window :], spent, config.confidence)[0]
            if math.isfinite(left):
                entry["entropy_law/steps_left"] = left
        ends = entropy if len(entropy) < 2 * window else entropy[:window] + entropy[-window:]
        levels = (config.collapse_share, config.explosion_share, config.entropy_floor_warn)
        return entropy_alarm(ends, window, *levels), left

    def _reason(self, alarm: str, left: float) -> str:
        """The alarm in words."""
        seen, window, key = self._seen, self.config.alarm_window, self.config.reward_key
        step, start, now = seen.logs[-1]["step"], np.mean(seen.entropy[:window]), np.mean(seen.entropy[-window:])
        words = [f"Entropy {alarm} at step {step}: over the last {window} logs {now:.3g} nats, {start:.3g} at first."]
        if len(seen.rewards) >= 2:
            part = min(window, len(seen.rewards) // 2)
            first, last = np.mean(seen.rewards[:part]), np.mean(seen.rewards[-part:])
            words.append(f"`{key}` went from {first:.3g} to {last:.3g}.")
        if alarm == "explosion":
            words.append("The policy drifts towards random tokens: lower the entropy bonus or the learning rate.")
            return " ".join(words)
        if math.isfinite(left):
            words.append(f"At this rate the entropy is spent in about {left:.0f} steps.")
        fit = fit_points(seen.points, self.config)
        if fit is not None and fit.law_holds:
            gain = max(fit.ceiling - fit.reward(now), 0)
            words.append(f"By the fitted law {gain:.3g} of reward is left to gain until then.")
        words.append("Remedies: a lower learning rate, a higher `epsilon_high`, Clip-Cov or KL-Cov, an entropy bonus.")
        return " ".join(words)


def fit_points(points, config: EntropyLawConfig) -> EntropyFit | None:
    """The fit of the points that the settings admit, None if they are too few."""
    used = [point for point in points if config.fit_window is None or point[0] <= config.fit_window]
    if len(used) < config.fit_min_points:
        return None
    _, entropy, reward = zip(*used, strict=True)
    return entropy_law_fit(entropy, reward, config.confidence)


def decided_by_main(alarm: str | None, args) -> str | None:
    """The main process's alarm on every process: they must stop together, whatever a trainer logs on the others."""
    if args.world_size == 1:
        return alarm
    number = torch.tensor(0 if alarm is None else 1 + ALARMS.index(alarm), device=args.device)
    return (None, *ALARMS)[int(broadcast(number))]


def draw_entropy_law(log_history: list[dict], path: str, config: EntropyLawConfig | None = None) -> bool:
    """
    Draw the entropy over training with the alarms, and the reward over the entropy with the fitted law.

    Args:
        log_history (`list[dict]`):
            Of any TRL trainer; alarms are those that an [`EntropyLawCallback`] found.
        path (`str`):
            Where to write the picture.
        config ([`EntropyLawConfig`], *optional*):
            Settings of the fit.

    Returns:
        `bool`: whether there was anything to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    config = config or EntropyLawConfig()
    seen = Collector(config.reward_key, config.eval_every)
    seen.follow(log_history)
    if not seen.logs:
        return False
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot([entry["step"] for entry in seen.logs], seen.entropy, color="tab:blue", label="entropy")
    colours = dict(zip(ALARMS, ("tab:red", "tab:orange"), strict=True))
    for alarm, colour in colours.items():
        begins = [e["step"] for e in log_history if e.get("entropy_law/alarm") == alarm and "entropy_law/reason" in e]
        for i, step in enumerate(begins):
            left.axvline(step, color=colour, linestyle="--", label=None if i else f"alarm: {alarm}")
    left.set(xlabel="optimizer steps", ylabel="entropy (nats per token)", ylim=(0, None))
    left.legend()

    points = seen.points
    right.set(xlabel="entropy (nats per token)", ylabel=config.reward_key)
    if points:
        step, x, y = np.array(points).T
        dots = right.scatter(x, y, c=step, cmap="viridis", s=14, zorder=3)
        figure.colorbar(dots, label="optimizer steps")
        fit = fit_points(points, config)
        if fit is not None:
            grid = np.linspace(0, 1.05 * x.max(), 200)
            right.plot(grid, fit.reward(grid), color="black", label=f"R = {-fit.a:.3g} exp(H) {fit.b:+.3g}")
            low, high = fit.band(grid)
            if np.isfinite(low).all():
                right.fill_between(grid, low, high, color="black", alpha=0.15, label=f"{config.confidence:.0%} band")
            title = "reward does not rise as entropy falls: no ceiling"
            if fit.law_holds:
                ceiling = min(max(fit.ceiling, 0.0), 1.0) if y.min() >= 0 and y.max() <= 1 else fit.ceiling
                title = f"predicted ceiling {ceiling:.3f}"
            right.set_title(title)
            margin = 0.25 * max(y.max() - y.min(), 0.05)  # a wide band must not hide the points
            right.set_ylim(
                min(y.min(), fit.reward(grid).min()) - margin, max(y.max(), fit.reward(grid).max()) + margin
            )
            right.legend()
    figure.savefig(path, dpi=120)
    return True
