"""What the hooks see: the scored rollouts of a generation, and the tokens of a micro-batch."""

import dataclasses
from dataclasses import dataclass

import torch
from trl.trainer.utils import nanstd


@dataclass(frozen=True)
class Scored:
    """
    What is known of generated and scored rollouts: GLOBAL quantities, equal on every process, so a state that is
    updated from them agrees everywhere without messages.

    Attributes:
        prompt_index (`torch.Tensor`):
            Row of each rollout's prompt in the training set, shape `(N,)`; -1 in evaluation.
        group_ids (`torch.Tensor`):
            Group of each rollout, shape `(N,)`. Rollouts of one drawn prompt share a group; a prompt that is drawn
            twice makes two groups. Groups may differ in size.
        reward_matrix (`torch.Tensor`):
            What the K reward functions returned, shape `(N, K)`; NaN where a function returned None.
        reward_weights (`torch.Tensor`):
            Weight of each reward function, shape `(K,)`.
        lengths (`torch.Tensor`):
            Tokens written by the model, shape `(N,)`.
        truncated (`torch.Tensor`):
            Whether the rollout ended without an end-of-sequence token, boolean, shape `(N,)`.
        changed_prompt (`torch.Tensor`):
            Whether the rollout answers another prompt than the data set's (a hint was added), boolean, shape `(N,)`.
    """

    prompt_index: torch.Tensor
    group_ids: torch.Tensor
    reward_matrix: torch.Tensor
    reward_weights: torch.Tensor
    lengths: torch.Tensor
    truncated: torch.Tensor
    changed_prompt: torch.Tensor

    def __len__(self) -> int:
        return len(self.group_ids)

    def replace(self, **changes):
        """A copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

    @property
    def scored(self) -> torch.Tensor:
        """Rollouts that at least one reward function scored, boolean, shape `(N,)`."""
        return ~self.reward_matrix.isnan().all(dim=1)

    @property
    def raw_rewards(self) -> torch.Tensor:
        """Weighted sum of the reward functions before shaping, shape `(N,)`; NaN where nothing was scored."""
        return weighted_sum(self.reward_matrix, self.reward_weights)

    def join(self, other: "Scored") -> "Scored":
        """These rollouts followed by others."""
        parts = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in PER_ROLLOUT}
        return Scored(reward_weights=self.reward_weights, **parts)


PER_ROLLOUT = tuple(field.name for field in dataclasses.fields(Scored) if field.name != "reward_weights")


@dataclass(frozen=True)
class Requests:
    """
    Rollouts that `more_rollouts` asks for, the same on every process.

    Attributes:
        prompt_index (`torch.Tensor`):
            Rows of the training set, shape `(R,)`; one rollout each.
        group_ids (`torch.Tensor`):
            The group that each rollout will belong to, shape `(R,)`.
        prompts (`list`, *optional*):
            Prompts to use in place of the data set's (reward functions still see the original), one per rollout.
    """

    prompt_index: torch.Tensor
    group_ids: torch.Tensor
    prompts: list | None = None


@dataclass
class Sample:
    """
    A rollout made outside a training step.

    Attributes:
        prompt_ids (`list[int]`), completion_ids (`list[int]`):
            Its tokens.
        completion (`str` or `list[dict]`):
            What was written, as the reward functions saw it.
        truncated (`bool`):
            Whether it ended without an end-of-sequence token.
        tool_mask (`list[int]`, *optional*):
            1 for the completion's tokens that the model wrote; None if it wrote all.
        rewards (`list[float]`):
            What the K reward functions returned; NaN for None.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    completion: "str | list[dict]"
    truncated: bool
    tool_mask: list[int] | None = None
    rewards: list[float] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class Rollouts(Scored):
    """
    The scored rollouts of one generation that are to be trained on.

    The attributes of [`Scored`] are GLOBAL. Quantities per token are LOCAL, of shape `(n, T)`: gathering them could
    cost hundreds of megabytes. The rows of this process are `local`.

    Attributes:
        everything ([`Scored`]):
            All rollouts scored in this generation, also those that extra rounds generated and that are not trained
            on; without extra rounds the same as this.
        local (`slice`):
            This process's rows of the global tensors.
        prompt_ids (`torch.Tensor`), prompt_mask (`torch.Tensor`):
            Tokens of the local prompts, padded on the left, shape `(n, T_prompt)`.
        completion_ids (`torch.Tensor`):
            Tokens of the local completions, padded on the right, shape `(n, T)`.
        completion_mask (`torch.Tensor`):
            1 for the tokens of the completion, those of tools included, shape `(n, T)`.
        mask (`torch.Tensor`):
            1 for tokens written by the model that enter the loss, shape `(n, T)`.
        completions (`list`), examples (`list[dict]`):
            The local completions, and the rows of the training set with what a `rollout_func` or an environment added
            to them, as the reward functions saw them.
        logged (`dict[str, list]`):
            What the reward functions logged of the local rollouts with `log_extra`, by column.
        training (`bool`):
            Whether this is a training generation. In evaluation, state is read but never written.
        generation (`int`):
            Number of training generations before this one.
        step (`int`), max_steps (`int`):
            Optimizer steps done, and planned.
        old_logps, entropies, ref_logps (`torch.Tensor`, *optional*):
            Of the acting policy (log-probabilities, full-vocabulary entropies in nats) and of the reference model at
            the local tokens, shape `(n, T)`; present if TRL computes them or a method `needs` them.
        shaped (`torch.Tensor`, *optional*):
            Result of `shape_rewards`, `(N, K)` or `(N,)`; set when that hook has run.
        advantages (`torch.Tensor`, *optional*):
            Result of `compute_advantages`, global `(N,)` or local per token `(n, T)`; set when that hook has run.
        selected (`torch.Tensor`, *optional*):
            Result of `select_rollouts`, boolean, shape `(N,)`; set when that hook has run. After `token_mask` without
            the rollouts of which it left no token.
    """

    everything: Scored
    local: slice
    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    mask: torch.Tensor
    completions: list
    examples: list[dict]
    logged: dict[str, list]
    training: bool
    generation: int
    step: int
    max_steps: int
    old_logps: torch.Tensor | None = None
    entropies: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    shaped: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    selected: torch.Tensor | None = None

    @property
    def rewards(self) -> torch.Tensor:
        """Weighted sum of the (shaped) rewards, shape `(N,)`; NaN where nothing was scored."""
        if self.shaped is None:
            return self.raw_rewards
        return self.shaped if self.shaped.dim() == 1 else weighted_sum(self.shaped, self.reward_weights)

    def column(self, name: str) -> list:
        """
        A local column by name: of the data set, of what a `rollout_func` returned, or of what a reward function
        logged.

        Args:
            name (`str`):
                Name of the column.

        Returns:
            `list`: One value per local rollout; None where a row has none.

        Raises:
            ValueError: if no row has it; the message lists those there are.
        """
        if name in self.logged:
            return self.logged[name]
        known = {key for example in self.examples for key in example}
        if name not in known:
            raise ValueError(
                f"there is no column {name!r}: the data set, `rollout_func` or a reward function's `log_extra` must "
                f"provide it; there are {', '.join(map(repr, sorted(known | self.logged.keys())))}."
            )
        return [example.get(name) for example in self.examples]


@dataclass(frozen=True)
class TokenBatch:
    """
    The tokens of one LOCAL micro-batch, from the forward pass that the loss makes anyway.

    Attributes:
        logps (`torch.Tensor`):
            Log-probabilities under the current policy, with gradient, shape `(B, T)`.
        old_logps (`torch.Tensor`):
            Log-probabilities under the policy that generated (equal to `logps`, detached, when strictly on-policy),
            shape `(B, T)`.
        ref_logps (`torch.Tensor`, *optional*):
            Log-probabilities under the reference model, shape `(B, T)`; present if `beta` is not 0.
        sampling_logps (`torch.Tensor`, *optional*):
            Log-probabilities that the generation engine reported, shape `(B, T)`; NaN where it reported none.
        entropies (`torch.Tensor`):
            Entropies of the current policy in nats, with gradient, shape `(B, T)`.
        advantages (`torch.Tensor`):
            Advantages, shape `(B, T)`.
        mask (`torch.Tensor`):
            1 for tokens that enter the loss, shape `(B, T)`.
        model_mask (`torch.Tensor`):
            1 for tokens written by the model, shape `(B, T)`: `mask` before the `token_mask` hook took some out.
        token_ids (`torch.Tensor`):
            The tokens, shape `(B, T)`.
        group_ids (`torch.Tensor`), prompt_index (`torch.Tensor`), rewards (`torch.Tensor`):
            As in [`Rollouts`], of these rows, shape `(B,)`; group -1 for rows that only fill up a micro-batch.
        row_ids (`torch.Tensor`):
            Position of these rows in the global generation batch, shape `(B,)`.
        items (`torch.Tensor`):
            Tokens of an average micro-batch of this generation over all processes, scalar: what a sum over tokens is
            divided by, so that the update does not depend on how the batch is split.
        rows (`float`):
            Rollouts of an average micro-batch: what a sum over rollouts is divided by. Below B where rollouts were
            dropped, since rows without tokens then fill up some micro-batches.
        parts (`int`):
            Micro-batches of this generation over all processes (one per process in evaluation).
        step (`int`), micro_step (`int`):
            Optimizer steps done, and micro-batches done since the start of training.
        training (`bool`):
            Whether a training loss is computed.
        carried (`dict[str, torch.Tensor]`):
            What the `carry` hook returned, for these rows.
        hidden_states (`torch.Tensor`, *optional*):
            Final hidden states that predict the tokens (what the LM head sees), without gradient, shape `(B, T, H)`;
            present if a method `needs` them.
        log_ratio (`torch.Tensor`, *optional*):
            Result of the `log_ratio` hook, `(B, T)` or `(B, 1)`.
        ratio_low (`float` or `torch.Tensor`, *optional*), ratio_high (`float` or `torch.Tensor`, *optional*):
            Result of the `clip_range` hook; None means no bound.
    """

    logps: torch.Tensor
    old_logps: torch.Tensor
    entropies: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    model_mask: torch.Tensor
    token_ids: torch.Tensor
    group_ids: torch.Tensor
    prompt_index: torch.Tensor
    rewards: torch.Tensor
    row_ids: torch.Tensor
    items: torch.Tensor
    rows: float
    parts: int
    step: int
    micro_step: int
    training: bool
    carried: dict[str, torch.Tensor]
    ref_logps: torch.Tensor | None = None
    sampling_logps: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None
    log_ratio: torch.Tensor | None = None
    ratio_low: "float | torch.Tensor | None" = None
    ratio_high: "float | torch.Tensor | None" = None

    def replace(self, **changes) -> "TokenBatch":
        """A copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

    def share(self, total: torch.Tensor) -> torch.Tensor:
        """An average micro-batch's share of a quantity of the whole generation, as `items` is of its tokens."""
        return total / self.parts

    @property
    def token_keys(self) -> torch.Tensor:
        """A number for every token that tells it apart in the whole generation, however it is split, `(B, T)`."""
        return (self.row_ids.unsqueeze(1) << 32) + torch.arange(self.mask.shape[1], device=self.row_ids.device)


def weighted_sum(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    Weighted sum over reward functions, as TRL takes it.

    Args:
        rewards (`torch.Tensor`):
            Shape `(N, K)`; NaN entries are left out of the sum.
        weights (`torch.Tensor`):
            Shape `(K,)`.

    Returns:
        `torch.Tensor`: Shape `(N,)`; NaN for a row without any reward.
    """
    total = (rewards * weights.to(rewards).unsqueeze(0)).nansum(dim=1)
    return total.masked_fill(rewards.isnan().all(dim=1), torch.nan)


def group_table(values: torch.Tensor, group_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Lay values out with one group per row, whatever the group sizes.

    Args:
        values (`torch.Tensor`):
            Shape `(N, ...)`, floating point.
        group_ids (`torch.Tensor`):
            Group of each value, shape `(N,)`, any integers.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: the table `(M, largest group, ...)`, rows by ascending group
        id, padded with NaN; and the row `(N,)` and column `(N,)` of each value in it.
    """
    ids, row = group_ids.unique(return_inverse=True)
    order = row.argsort(stable=True)
    counts = torch.bincount(row, minlength=len(ids))
    column = torch.empty_like(row)
    column[order] = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row[order]]
    table = values.new_full((len(ids), int(counts.max()) if len(row) else 1, *values.shape[1:]), torch.nan)
    table[row, column] = values
    return table, row, column


def prompt_visits(scored: Scored, rewards: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What a generation says about its prompts: the rewards of each, over all its groups, without unscored rollouts and
    answers to a changed prompt.

    Args:
        scored ([`Scored`]):
            A training generation; `rollouts.everything` for also what is not trained on.
        rewards (`torch.Tensor`, *optional*):
            Shape `(N,)`; the weighted sum of the unshaped rewards by default.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: rows of the training set `(U,)`, ascending, and their rewards `(U, most)`,
        padded with NaN; in float64 on the CPU.
    """
    rewards = (scored.raw_rewards if rewards is None else rewards).cpu().double()
    usable = ~rewards.isnan() & ~scored.changed_prompt.cpu()
    rows = scored.prompt_index.cpu()[usable]
    return rows.unique(), group_table(rewards[usable], rows)[0]


def success_rewards(scored: Scored, masked: bool) -> torch.Tensor:
    """
    Rewards for counting successes: an answer that was cut off is a failure, whatever it got.

    Args:
        scored ([`Scored`]):
            A training generation.
        masked (`bool`):
            TRL's `mask_truncated_completions`, with which such an answer is not counted at all.

    Returns:
        `torch.Tensor`: Shape `(N,)`; NaN = does not count, -inf = cut off.
    """
    rewards = scored.raw_rewards
    return rewards.masked_fill(scored.truncated & ~rewards.isnan(), torch.nan if masked else -torch.inf)


def positive_variance(table: torch.Tensor) -> torch.Tensor:
    """
    Mean squared excess over the mean, counted above it only (the positive-sided variance of arXiv 2306.13085): for
    outcomes of 0 and 1 with success rate p it is p(1 - p)^2, for graded rewards its generalisation.

    Args:
        table (`torch.Tensor`):
            Rewards with one prompt per row, NaN = not scored, shape `(M, G)`.

    Returns:
        `torch.Tensor`: Shape `(M,)`; NaN for a row without a reward.
    """
    return ((table - table.nanmean(1, keepdim=True)).clamp(min=0) ** 2).nanmean(1)


def zero_signal(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """
    Rollouts of groups without a learning signal: all their scored rewards are equal (by equality, since a float
    standard deviation of equal numbers can be positive).

    Args:
        rewards (`torch.Tensor`):
            Shape `(N,)`; NaN = not scored.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.

    Returns:
        `torch.Tensor`: Boolean, shape `(N,)`. A group with fewer than two scored rollouts has no signal.
    """
    table, row, _ = group_table(rewards, group_ids)
    unscored = table.isnan()
    lowest = table.masked_fill(unscored, torch.inf).amin(dim=1)
    highest = table.masked_fill(unscored, -torch.inf).amax(dim=1)
    return (lowest >= highest)[row]


def group_advantages(
    rewards: torch.Tensor, group_ids: torch.Tensor, scale: str = "group", eps: float = 1e-4
) -> torch.Tensor:
    """
    GRPO's advantages (DeepSeekMath, arXiv 2402.03300) over groups of any sizes; with equal sizes bit for bit TRL's.

    Args:
        rewards (`torch.Tensor`):
            Shape `(N,)`; NaN = not scored.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.
        scale (`str`, *optional*, defaults to `"group"`):
            Divide by the standard deviation of the `"group"`, of the `"batch"`, or by nothing (`"none"`).
        eps (`float`, *optional*, defaults to `1e-4`):
            Added to the standard deviation.

    Returns:
        `torch.Tensor`: Shape `(N,)`; 0 for unscored rollouts and for groups of one.
    """
    table, row, _ = group_table(rewards, group_ids)
    advantages = rewards - torch.nanmean(table, dim=1)[row]
    if scale == "group":
        advantages = advantages / (nanstd(table, dim=1)[row] + eps)
    elif scale == "batch":
        advantages = advantages / (nanstd(rewards) + eps)
    return torch.nan_to_num(advantages, nan=0.0)


def normalized_sum_advantages(
    rewards: torch.Tensor, weights: torch.Tensor, group_ids: torch.Tensor, eps: float = 1e-4
) -> torch.Tensor:
    """
    TRL's `multi_objective_aggregation="normalize_then_sum"` (GDPO, arXiv 2601.05242) over groups of any sizes: each
    reward function is standardised within the group, the weighted sum over the batch.

    Args:
        rewards (`torch.Tensor`):
            Shape `(N, K)`; NaN = not scored.
        weights (`torch.Tensor`):
            Shape `(K,)`.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.
        eps (`float`, *optional*, defaults to `1e-4`):
            Added to the standard deviations.

    Returns:
        `torch.Tensor`: Shape `(N,)`; 0 for unscored rollouts.
    """
    table, row, column = group_table(rewards, group_ids)
    mean = torch.nanmean(table, dim=1, keepdim=True)
    std = nanstd(table, dim=1, keepdim=True) if table.shape[1] > 1 else torch.zeros_like(mean)
    standardised = ((table - mean) / (std + eps))[row, column]
    # A lone score of its group has no standard deviation, but its rollout is scored and counts in the batch.
    total = (standardised * weights.to(rewards)).nansum(dim=1).masked_fill(rewards.isnan().all(dim=1), torch.nan)
    std = nanstd(total) if total.numel() > 1 else torch.zeros_like(total)
    return torch.nan_to_num((total - torch.nanmean(total)) / (std + eps), nan=0.0)


def nonzero(count: "torch.Tensor | float") -> torch.Tensor:
    """
    A divisor for a sum over nothing. A share of a count ([`TokenBatch.share`]) may be below 1, so it is not clamped.

    Args:
        count (`torch.Tensor` or `float`):
            At least 0.

    Returns:
        `torch.Tensor`: the count, or 1 where it is 0.
    """
    count = torch.as_tensor(count)
    return count.masked_fill(count == 0, 1)


def step_numbers(mask: torch.Tensor) -> torch.Tensor:
    """
    Number the steps of each rollout: a step is a run of tokens written by the model, between the outputs of tools.

    Args:
        mask (`torch.Tensor`):
            1 for tokens written by the model, shape `(n, T)`.

    Returns:
        `torch.Tensor`: 0, 1, ... at the tokens of each rollout's steps, -1 elsewhere, shape `(n, T)`.
    """
    mask = mask.bool()
    starts = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return torch.where(mask, starts.cumsum(1) - 1, -1)


def step_means(values: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """
    Mean of a per-token quantity over each step.

    Args:
        values (`torch.Tensor`):
            Shape `(n, T)`; anything outside of steps.
        steps (`torch.Tensor`):
            From [`step_numbers`], shape `(n, T)`.

    Returns:
        `torch.Tensor`: Shape `(n, S)`, NaN where a rollout has fewer than S steps.
    """
    size = int(steps.max()) + 1 if steps.numel() else 0
    sums = values.new_zeros(len(values), size + 1)  # the last column takes what lies outside
    column = torch.where(steps >= 0, steps, size)
    counts = sums.scatter_add(1, column, torch.ones_like(values))
    sums = sums.scatter_add(1, column, torch.where(steps >= 0, values, 0.0))
    return torch.where(counts > 0, sums / counts, torch.nan)[:, :size]
