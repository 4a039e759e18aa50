"""Stratified GRPO (Zhu et al., arXiv 2510.06214): advantages among rollouts with as many tool calls."""

from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object
from trl.trainer.utils import nanstd

from ..core import MethodConfig, MethodTrainer, Rollouts
from ..core.config import import_function
from ..core.rollouts import group_table, zero_signal


@dataclass
class StratifiedGRPOConfig(MethodConfig):
    r"""
    Configuration of [`StratifiedGRPOTrainer`]. The paper's blend, standard deviation and small number could not be
    verified; the defaults of the latter two are TRL's.

    Parameters:
        stratified_blend (`float`, *optional*, defaults to `0.8`):
            Share of the advantage within the stratum; the rest is GRPO's within the group. 1 is the pure stratified
            advantage, which does not tell the policy that one stratum pays more than another; 0 is GRPO.
        stratified_key (`str` or `Callable`, *optional*, defaults to `"tool_calls"`):
            What the stratum of a rollout is: `"tool_calls"` (how often tools or the environment answered),
            `"column:<name>"` (what a `rollout_func`, an environment or a reward function's `log_extra` says of it), or
            a function from the completion to a hashable label, as itself or as `"<module>:<function>"`. A function is
            kept by that name in the field and in checkpoints.
        stratified_max_stratum (`int`, *optional*):
            Label from which on rollouts share a stratum; None for no bound.
        stratified_std (`str`, *optional*, defaults to `"sample"`):
            Standard deviation in both parts: `"sample"` (divisor n - 1) or `"population"`.
        stratified_eps (`float`, *optional*, defaults to `1e-4`):
            Added to the standard deviations.
    """

    stratified_blend: float = field(default=0.8, metadata={"help": "Share of the advantage within the stratum."})
    stratified_key: str = field(
        default="tool_calls",
        metadata={"help": "Stratum of a rollout: 'tool_calls', 'column:<name>' or '<module>:<function>'."},
    )
    stratified_max_stratum: int | None = field(default=None, metadata={"help": "Largest label; None: no bound."})
    stratified_std: str = field(
        default="sample", metadata={"help": "Standard deviation.", "choices": ["sample", "population"]}
    )
    stratified_eps: float = field(default=1e-4, metadata={"help": "Added to the standard deviations."})

    def __post_init__(self):
        super().__post_init__()
        self.check_range("num_generations", self.num_generations >= 2, "at least 2 for Stratified GRPO")
        self.check_range("stratified_blend", 0 <= self.stratified_blend <= 1, "in [0, 1]")
        key, self._stratified_function = self.stratified_key, None
        if callable(key):
            self._stratified_function = key
            name = getattr(key, "__qualname__", f"{type(key).__qualname__}()")  # the latter cannot be imported
            self.stratified_key = f"{key.__module__}:{name}"
        else:
            kind, _, name = key.partition(":") if isinstance(key, str) else ("", "", "")
            need = "'tool_calls', 'column:<name>', '<module>:<function>' or a function"
            self.check_range("stratified_key", key == "tool_calls" or (kind and name), need)
        highest = self.stratified_max_stratum
        self.check_range("stratified_max_stratum", highest is None or highest >= 1, "at least 1 or None")
        self.check_choices("stratified_std")
        self.check_range("stratified_eps", self.stratified_eps >= 0, "at least 0")
        need = "'group' or 'none' for Stratified GRPO (a standard deviation of the batch would mix strata)"
        self.check_range("scale_rewards", self.scale_rewards != "batch", need)

    def __getstate__(self):
        # Checkpoints hold the name, since a function that is defined inside another cannot be pickled.
        return self.__dict__ | {"_stratified_function": None}

    def stratified_function(self):
        """
        The function that labels a completion, imported if `stratified_key` only names it.

        Returns:
            `Callable` or `None`: None if labels do not come from a function.

        Raises:
            ValueError: if the name in `stratified_key` cannot be imported.
        """
        if self._stratified_function is not None or self.stratified_key.partition(":")[0] in ("tool_calls", "column"):
            return self._stratified_function
        return import_function(self.stratified_key, "stratified_key")


def tool_calls(completion_mask: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    How often something outside of the model wrote into each completion: calls that are answered together count once, a
    call without an answer does not count.

    Args:
        completion_mask (`torch.Tensor`):
            1 for the tokens of the completion, shape `(n, T)`.
        mask (`torch.Tensor`):
            1 for those written by the model, shape `(n, T)`.

    Returns:
        `torch.Tensor`: Shape `(n,)`.
    """
    outside = completion_mask.bool() & ~mask.bool()
    return (outside & ~torch.nn.functional.pad(outside, (1, 0))[:, :-1]).sum(1)


def number_labels(labels: list, highest: int | None = None) -> torch.Tensor:
    """
    Number labels in the order in which they first appear.

    Args:
        labels (`list`):
            N hashable labels.
        highest (`int`, *optional*):
            Larger labels, which must be numbers then, count as this one.

    Returns:
        `torch.Tensor`: Shape `(N,)`; equal numbers for equal labels.
    """
    numbers: dict = {}
    if highest is not None:
        if wrong := [label for label in labels if not isinstance(label, (int, float))]:
            raise ValueError(
                f"`stratified_max_stratum` bounds labels, which must be numbers, but `stratified_key` gives "
                f"{wrong[0]!r}: leave it unset."
            )
        labels = [min(label, highest) for label in labels]
    try:
        return torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels], dtype=torch.long)
    except TypeError as error:
        raise ValueError(f"`stratified_key` gives labels that are no labels ({error}).") from error


def stratum_ids(group_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Number the strata: the rollouts of one group with one label.

    Args:
        group_ids (`torch.Tensor`), labels (`torch.Tensor`):
            Integers, shape `(N,)`.

    Returns:
        `torch.Tensor`: Shape `(N,)`.
    """
    return torch.stack([group_ids, labels.to(group_ids)], dim=1).unique(dim=0, return_inverse=True)[1]


def normalized(
    rewards: torch.Tensor, ids: torch.Tensor, std: str = "sample", eps: float = 1e-4, scale: bool = True
) -> torch.Tensor:
    """
    Rewards minus the mean of those with the same id, over their standard deviation.

    Args:
        rewards (`torch.Tensor`):
            Shape `(N,)`; NaN = not scored.
        ids (`torch.Tensor`):
            Shape `(N,)`.
        std (`str`, *optional*, defaults to `"sample"`):
            `"sample"` or `"population"`.
        eps (`float`, *optional*, defaults to `1e-4`):
            Added to the standard deviation.
        scale (`bool`, *optional*, defaults to `True`):
            False leaves the differences as they are.

    Returns:
        `torch.Tensor`: Shape `(N,)`; 0 for unscored rollouts, and where the scored rewards of an id are one or equal.
    """
    table, row, _ = group_table(rewards, ids)
    result = rewards - torch.nanmean(table, dim=1)[row]
    if scale:
        deviation = nanstd(table, dim=1)
        if std == "population":
            count = (~table.isnan()).sum(1)
            deviation = deviation * ((count - 1) / count).sqrt()
        result = result / (deviation[row] + eps)
    return result.masked_fill(zero_signal(rewards, ids) | rewards.isnan(), 0.0)


def stratified_advantages(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    labels: torch.Tensor,
    blend: float = 0.8,
    std: str = "sample",
    eps: float = 1e-4,
    scale: bool = True,
) -> torch.Tensor:
    """
    Advantages within the stratum, blended with those within the group (Stratified Advantage Normalization).

    Args:
        rewards (`torch.Tensor`):
            Shape `(N,)`; NaN = not scored.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.
        labels (`torch.Tensor`):
            Integers, shape `(N,)`.
        blend (`float`, *optional*, defaults to `0.8`):
            Share of the advantage within the stratum.
        std, eps, scale:
            See [`normalized`].

    Returns:
        `torch.Tensor`: Shape `(N,)`; 0 for unscored rollouts. With one stratum per group it is GRPO's advantage.
    """
    within_group = normalized(rewards, group_ids, std, eps, scale)
    within_stratum = normalized(rewards, stratum_ids(group_ids, labels), std, eps, scale)
    return torch.lerp(within_group, within_stratum, blend)


class StratifiedGRPOTrainer(MethodTrainer):
    """
    Stratified GRPO ([arXiv 2510.06214](https://huggingface.co/papers/2510.06214)). A rollout is compared with those
    rollouts of its prompt that have the same structure, in the paper the same number of searches, and to a lesser part
    with all of them.

    The strata are outcomes of the policy. The comparison within a stratum therefore takes away the incentive to get
    into a better one: with `stratified_blend=1` the policy is not told that searching more pays, and a rollout alone
    in its stratum has no gradient. The share of GRPO's advantage carries both.

    With `scale_rewards="none"` both parts are plain differences. With `mask_truncated_completions` the tool calls of
    truncated rollouts cannot be counted; they are not trained on and make a stratum of their own.

    Logs `stratified/strata` (mean number per group) and `stratified/alone` (share of the scored rollouts that are
    alone in their stratum).
    """

    config_class = StratifiedGRPOConfig
    replaces = ("compute_advantages",)
    _name = "Stratified GRPO"
    _paper = {
        "title": "Stratified GRPO: Handling Structural Heterogeneity in Reinforcement Learning of LLM Search Agents",
        "id": "2510.06214",
        "citation": """\
@article{zhu2025stratified,
    title  = {{Stratified GRPO: Handling Structural Heterogeneity in Reinforcement Learning of LLM Search Agents}},
    author = {Zhu and Chen and Yu and Zhao and Jia},
    year   = 2025,
    eprint = {arXiv:2510.06214},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._stratified_label = self.args.stratified_function()

    def _stratified_labels(self, rollouts: Rollouts) -> torch.Tensor:
        """Number of the label of every rollout, shape `(N,)`, the same on every process."""
        kind, _, name = self.args.stratified_key.partition(":")
        if self._stratified_label is not None:
            labels = [self._stratified_label(completion) for completion in rollouts.completions]
        elif kind == "column":
            labels = rollouts.column(name)
        else:
            labels = tool_calls(rollouts.completion_mask, rollouts.mask)
            if self.args.mask_truncated_completions:
                labels = labels.masked_fill(rollouts.truncated[rollouts.local], -1)
            labels = labels.tolist()
        return number_labels(gather_object(list(labels)), self.args.stratified_max_stratum)

    def compute_advantages(self, rollouts: Rollouts):
        args, rewards, group_ids = self.args, rollouts.rewards, rollouts.group_ids
        labels = self._stratified_labels(rollouts).to(group_ids.device)
        strata = stratum_ids(group_ids, labels)
        scored = ~rewards.isnan()
        sizes = torch.bincount(strata[scored], minlength=len(strata))
        self.log_metric("stratified/strata", len(strata.unique()) / len(group_ids.unique()))
        if scored.any():
            self.log_metric("stratified/alone", (sizes[strata[scored]] == 1).float().mean())
        return stratified_advantages(
            rewards,
            group_ids,
            labels,
            args.stratified_blend,
            args.stratified_std,
            args.stratified_eps,
            self.scale_rewards != "none",
        )
