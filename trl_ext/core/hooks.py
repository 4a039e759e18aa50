"""The hooks: one method for every joint of the GRPO step at which papers differ, with TRL's own behaviour in it."""

import torch

from . import loss
from .config import MethodConfig
from .prompts import draw_rows
from .rollouts import Requests, Rollouts, Scored, TokenBatch, group_advantages, normalized_sum_advantages


class Hooks:
    """
    What a method may override, in the order in which a step runs it. An override either refines the result of
    `super()` or replaces it, and then says so in `replaces`.

    Class attributes:
        config_class (`type`):
            The method's [`MethodConfig`].
        slug (`str`):
            The method's name in `trl_ext.mix`: by default the name of its file.
        replaces (`tuple[str, ...]`):
            Hooks that this class answers without `super()`.
        ignores (`tuple[str, ...]`):
            Hooks whose result this method never looks at; mixing it with a method that provides one is refused.
        contradicts (`dict[str, str]`):
            Methods that it must not be mixed with, and why.
        runs_after (`tuple[str, ...]`):
            Methods whose results it refines, whatever the alphabetical order says.
        blend (`dict[str, float]`):
            Weights of the advantages that a blend sums, by method; [`mix`] sets it.
        needs_off_policy (`str`):
            What the method cannot do when strictly on-policy; a warning says so when such a trainer is built.
        whole_groups (`bool`):
            Whether a micro-batch must hold complete groups.
    """

    config_class = MethodConfig
    slug = ""
    replaces: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    contradicts: dict[str, str] = {}
    runs_after: tuple[str, ...] = ()
    blend: dict[str, float] = {}
    needs_off_policy = ""
    whole_groups = False
    _tag_names = ["trl", "grpo", "trl-ext"]

    @classmethod
    def needs(cls, args) -> set[str]:
        """
        What this class wants: a subset of `{"old_logps", "ref_logps", "entropies"}` at generation time and of
        `{"hidden_states"}` in the loss. All mixed classes are asked (no `super()`), and together they cost at most one
        extra forward pass, none if TRL already makes it; hidden states are those of the loss's own pass.
        """
        return set()

    def prepare(self) -> None:
        """Runs once in a new run, before its first generation; not when a run is resumed. Add through `super()`."""

    def choose_prompts(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """
        Choose the prompts of a generation. By default drawn without replacement by [`prompt_weights`], or in TRL's
        order if there are none.

        Args:
            n (`int`):
                Number of prompts.
            generator (`torch.Generator`):
                Seeded by the run's seed and the generation counter, so every process draws the same.

        Returns:
            `torch.Tensor`: Rows of the training set, shape `(n,)`.
        """
        weights = self.prompt_weights()
        return self._order.rows(self._generation) if weights is None else draw_rows(weights, n, generator)

    def prompt_weights(self) -> torch.Tensor | None:
        """Sampling weight of every prompt of the training set, shape `(P,)`, or None for TRL's order."""
        return None

    def prompt_budgets(self, rows: torch.Tensor) -> torch.Tensor:
        """
        Decide how many rollouts each chosen prompt gets.

        Args:
            rows (`torch.Tensor`):
                The chosen rows, shape `(n,)`.

        Returns:
            `torch.Tensor`: Rollouts per prompt, shape `(n,)`, at least 0, with the sum `n * num_generations`.
        """
        return torch.full((len(rows),), self.num_generations)

    def edit_examples(self, examples: list[dict], group_ids: torch.Tensor) -> list[dict]:
        """
        Change what this process is about to generate from: another prompt (a state to go on from, part of a solution),
        or columns for the reward functions, which see the edited examples. Must give the same examples if it is called
        again in the same generation.

        Args:
            examples (`list[dict]`):
                Rows of the training set, one per local rollout; copies, to change or replace.
            group_ids (`torch.Tensor`):
                Their groups, shape `(n,)`.

        Returns:
            `list[dict]`: The examples, in the same order.
        """
        return examples

    def more_rollouts(self, scored: Scored, rounds: int) -> Requests | None:
        """
        Ask for another round of rollouts, given everything that was scored so far.

        Args:
            scored ([`Scored`]):
                All rollouts of this generation so far, in the order in which they were asked for; the first
                `generation_batch_size` are the ordinary ones.
            rounds (`int`):
                Rounds done, the first included.

        Returns:
            [`Requests`] or `None`: what to generate next, or None to stop. Must be the same on every process, hence
            decided from `scored` and replicated state.
        """
        return None

    def pick_rollouts(self, scored: Scored) -> torch.Tensor:
        """
        Pick the rollouts to train on from everything that was scored; they keep their group ids.

        Args:
            scored ([`Scored`]):
                All rollouts of this generation.

        Returns:
            `torch.Tensor`: Positions in `scored`, shape `(N,)` with N = `generation_batch_size`.
        """
        return torch.arange(self.args.generation_batch_size)

    def shape_rewards(self, rollouts: Rollouts) -> torch.Tensor:
        """
        Change the rewards before advantages are computed.

        Args:
            rollouts ([`Rollouts`]):
                The scored generation.

        Returns:
            `torch.Tensor`: Rewards `(N, K)`, or `(N,)` already summed; NaN stays NaN.
        """
        return rollouts.reward_matrix

    def compute_advantages(self, rollouts: Rollouts) -> torch.Tensor:
        """
        Compute advantages.

        Args:
            rollouts ([`Rollouts`]):
                The scored generation, with shaped rewards.

        Returns:
            `torch.Tensor`: Global `(N,)`, or per token of the local rollouts `(n, T)`; 0 for unscored rollouts.
        """
        if self.multi_objective_aggregation == "normalize_then_sum":
            shaped = rollouts.shaped
            if shaped.dim() == 1:
                raise ValueError(
                    "`multi_objective_aggregation='normalize_then_sum'` needs one column per reward function, but "
                    f"{type(self).__name__}.shape_rewards returned their sum: use 'sum_then_normalize'."
                )
            return normalized_sum_advantages(shaped, rollouts.reward_weights, rollouts.group_ids)
        return group_advantages(rollouts.rewards, rollouts.group_ids, self.scale_rewards)

    def select_rollouts(self, rollouts: Rollouts) -> torch.Tensor:
        """
        Choose the rollouts that are trained on; the others leave the batch and cost no forward or backward pass.

        Args:
            rollouts ([`Rollouts`]):
                The scored generation with its advantages.

        Returns:
            `torch.Tensor`: Boolean, shape `(N,)`, the same on every process.
        """
        return torch.ones(len(rollouts), dtype=torch.bool, device=rollouts.group_ids.device)

    def token_mask(self, rollouts: Rollouts) -> torch.Tensor | None:
        """
        Choose the tokens that are trained on. Unlike tokens of weight 0 the others leave the normaliser too, and a
        rollout that loses all its tokens leaves the batch.

        Args:
            rollouts ([`Rollouts`]):
                The scored generation with its advantages and selection.

        Returns:
            `torch.Tensor`: 1 to keep a token, local, shape `(n, T)`; None keeps all.
        """
        return None

    def carry(self, rollouts: Rollouts) -> dict[str, torch.Tensor]:
        """
        Quantities that the loss will need, from what is only known when the generation is scored. They are shuffled
        and split with the rollouts and arrive as `tokens.carried`. Add through `super()`.

        Args:
            rollouts ([`Rollouts`]):
                The scored generation with its advantages and selection.

        Returns:
            `dict[str, torch.Tensor]`: local tensors of shape `(n, ...)`, or scalars, under the method's name.
        """
        return {}

    def observe(self, rollouts: Rollouts) -> None:
        """
        Learn from what was scored in a training generation (`rollouts.everything`): update the method's state. Add
        through `super()`.

        Args:
            rollouts ([`Rollouts`]):
                The scored generation with its advantages, which were computed from the state before this update.
        """

    def kl_weight(self, tokens: TokenBatch) -> float:
        """Weight of TRL's KL term: `beta`, which must not be 0 for there to be a reference model."""
        return self.beta

    def log_ratio(self, tokens: TokenBatch) -> torch.Tensor:
        """Log importance ratio, shape `(B, T)` per token or `(B, 1)` per sequence."""
        ratio = tokens.logps - tokens.old_logps
        return loss.sequence_log_ratio(ratio, tokens.mask) if self.importance_sampling_level == "sequence" else ratio

    def clip_range(self, tokens: TokenBatch) -> "tuple[float | torch.Tensor | None, float | torch.Tensor]":
        """
        Bounds of the importance ratio, numbers or tensors that broadcast to the log-ratio's shape; None = no bound.
        With `loss_type="cispo"` there is only the upper one.
        """
        if self.loss_type == "cispo":
            return None, self.epsilon_high
        return 1 - self.epsilon_low, 1 + self.epsilon_high

    def policy_loss(self, tokens: TokenBatch) -> torch.Tensor:
        """The surrogate, shape `(B, T)` or `(B, 1)`, from `tokens.log_ratio`, its bounds and the advantages."""
        if self.loss_type == "cispo":
            return loss.cispo_loss(tokens.log_ratio, tokens.advantages, tokens.logps, tokens.ratio_high)
        if self.loss_type == "sapo":
            return loss.sapo_loss(
                tokens.log_ratio, tokens.advantages, self.args.sapo_temperature_pos, self.args.sapo_temperature_neg
            )
        return loss.clipped_loss(
            tokens.log_ratio, tokens.advantages, tokens.ratio_low, tokens.ratio_high, self.args.delta
        )

    def token_weights(self, tokens: TokenBatch) -> torch.Tensor | None:
        """
        Non-negative factors of the policy loss, shape `(B, T)`, without gradient; None = all 1. The normaliser of the
        loss does not change: a token of weight 0 still counts in it.
        """
        return None

    def aggregate_loss(self, per_token_loss: torch.Tensor, tokens: TokenBatch) -> torch.Tensor:
        """
        Reduce the policy loss of a micro-batch to a scalar (the seam divides by the accumulation steps).

        Args:
            per_token_loss (`torch.Tensor`):
                Shape `(B, T)` or `(B, 1)`.
            tokens ([`TokenBatch`]):
                The micro-batch.

        Returns:
            `torch.Tensor`: Scalar.
        """
        length = self.max_completion_length
        return loss.aggregate(per_token_loss, tokens.mask, self.loss_type, tokens.items, tokens.rows, length)

    def regularizers(self, tokens: TokenBatch) -> dict[str, torch.Tensor]:
        """
        Extra losses of a micro-batch by the name under which they are logged (`<method>/loss`): scalars with gradient
        that are added to the loss (the seam divides by the accumulation steps). Add through `super()`.
        """
        return {}

    def prompt_table(self) -> dict:
        """
        What the method knows of every prompt, by `<method>/<quantity>`: tensors or lists of length P. Written beside
        every checkpoint as a table, for people to look at. Add through `super()`.
        """
        return {}

    def method_state(self) -> dict:
        """
        Everything that must survive a stop and is the same on every process: tensors, numbers, strings, lists and
        dicts, under the method's name. Add through `super()`.
        """
        return {}

    def load_method_state(self, state: dict) -> None:
        """Restore what `method_state` returned. Add through `super()`."""

    def local_state(self) -> dict:
        """Like `method_state`, for this process's own share of a state. Add through `super()`."""
        return {}

    def load_local_state(self, state: dict) -> None:
        """
        Restore one share. Called once per share that falls to this process: its own, or after a change of the number
        of processes W every share of an old process `p` with `p % W` equal to its index. Add through `super()`.
        """
