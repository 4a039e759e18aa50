"""Single-stream Policy Optimization (Xu & Ding, arXiv 2509.13232)."""

from dataclasses import dataclass, field

import torch

from ..core import MethodConfig, MethodTrainer, Rollouts
from ..core.rollouts import prompt_visits, weighted_sum


@dataclass
class SPOConfig(MethodConfig):
    r"""
    Configuration of [`SPOTrainer`]. Defaults are those of the authors' code (verl-recipe `spo`).

    Parameters:
        spo_rho_mode (`str`, *optional*, defaults to `"kl"`):
            `"kl"` forgets old evidence by how far the policy has drifted on the prompt; `"constant"` forgets by
            `spo_rho_min` at every visit and needs neither stored rollouts nor extra forward passes.
        spo_rho_min (`float`, *optional*, defaults to `0.875`), spo_rho_max (`float`, *optional*, defaults to `0.96`):
            Bounds of the share of old evidence that is kept at a visit.
        spo_d_half (`float`, *optional*, defaults to `0.06`):
            Drift (mean absolute log-ratio per token) at which half of the evidence is forgotten.
        spo_offline_n (`int`, *optional*, defaults to `8`):
            Rollouts per prompt that initialise the tracker before the first step; 0 starts from no evidence.
        spo_prioritize (`bool`, *optional*, defaults to `True`):
            Whether prompts of uncertain outcome are drawn more often; False keeps TRL's order.
        spo_explore_eps (`float`, *optional*, defaults to `0.05`):
            Added to every prompt's sampling weight.
        spo_neff_power (`float`, *optional*, defaults to `0.0`):
            Power of the evidence by which sampling weights are divided (in the paper, not in the code).
        spo_adv_eps (`float`, *optional*, defaults to `1e-8`):
            Added to the standard deviation of the advantages.
        spo_reward_min (`float`, *optional*, defaults to `0.0`):
            Lowest reward.
        spo_reward_max (`float`, *optional*, defaults to `1.0`):
            Highest reward. The (weighted sum of) rewards is mapped from this range to [0, 1].
    """

    num_generations: int = field(default=1, metadata={"help": "Rollouts per prompt; SPO needs no group."})
    spo_rho_mode: str = field(
        default="kl",
        metadata={"help": "Forget by the policy's drift ('kl') or by a constant.", "choices": ["kl", "constant"]},
    )
    spo_rho_min: float = field(default=0.875, metadata={"help": "Least share of old evidence kept at a visit."})
    spo_rho_max: float = field(default=0.96, metadata={"help": "Largest share of old evidence kept at a visit."})
    spo_d_half: float = field(default=0.06, metadata={"help": "Drift at which half of the evidence is forgotten."})
    spo_offline_n: int = field(default=8, metadata={"help": "Rollouts per prompt before the first step."})
    spo_prioritize: bool = field(default=True, metadata={"help": "Draw prompts of uncertain outcome more often."})
    spo_explore_eps: float = field(default=0.05, metadata={"help": "Added to every prompt's sampling weight."})
    spo_neff_power: float = field(default=0.0, metadata={"help": "Power of the evidence in the sampling weights."})
    spo_adv_eps: float = field(default=1e-8, metadata={"help": "Added to the advantages' standard deviation."})
    spo_reward_min: float = field(default=0.0, metadata={"help": "Lowest possible reward."})
    spo_reward_max: float = field(default=1.0, metadata={"help": "Highest possible reward."})

    def __post_init__(self):
        super().__post_init__()
        self.check_choices("spo_rho_mode")
        self.check_range("spo_rho_min", 0 < self.spo_rho_min < 1, "between 0 and 1, both excluded")
        self.check_range("spo_rho_max", self.spo_rho_min <= self.spo_rho_max <= 1, "in [spo_rho_min, 1]")
        self.check_range("spo_d_half", self.spo_d_half > 0, "positive")
        self.check_range("spo_offline_n", self.spo_offline_n >= 0, "at least 0")
        self.check_range("spo_explore_eps", self.spo_explore_eps >= 0, "at least 0")
        self.check_range("spo_neff_power", 0 <= self.spo_neff_power <= 1, "in [0, 1]")
        self.check_range("spo_adv_eps", self.spo_adv_eps > 0, "positive")
        self.check_range("spo_reward_max", self.spo_reward_max > self.spo_reward_min, "above spo_reward_min")


def spo_initial_counts(
    successes: torch.Tensor, n: torch.Tensor, rho_min: float = 0.875
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Pseudo-counts from an offline estimate, with the code's smoothing: evidence of `1 / (1 - rho_min)` rollouts.

    Args:
        successes (`torch.Tensor`), n (`torch.Tensor`):
            Successes among `n` scored rollouts, shape `(P,)`.
        rho_min (`float`, *optional*, defaults to `0.875`):
            Least share of evidence kept at a visit.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: alpha and beta, shape `(P,)`; 1/2 each where `n` is 0.
    """
    mean = (successes + 0.5) / (n + 1)
    evidence = torch.ones_like(mean).masked_fill(n > 0, 1 / (1 - rho_min))
    return evidence * mean, evidence * (1 - mean)


def spo_drift(stored_logps: torch.Tensor, logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Drift of the policy on stored rollouts: the mean absolute log-ratio over their tokens.

    Args:
        stored_logps (`torch.Tensor`), logps (`torch.Tensor`):
            Log-probabilities when the rollout was made and now, shape `(..., T)`.
        mask (`torch.Tensor`):
            1 for tokens written by the model, shape `(..., T)`.

    Returns:
        `torch.Tensor`: Shape `(...)`; 0 if every token is masked.
    """
    gap = torch.where(mask.bool(), (stored_logps - logps).abs(), 0.0)
    return gap.sum(-1) / (mask.sum(-1) + 1e-8)


def spo_rho(drift: torch.Tensor, d_half: float = 0.06, rho_min: float = 0.875, rho_max: float = 0.96) -> torch.Tensor:
    """
    Share of old evidence that survives a drift: `2 ** (-drift / d_half)`, clipped.

    Args:
        drift (`torch.Tensor`):
            Drift of each prompt; 0 at a first visit, which therefore keeps `rho_max`.
        d_half (`float`, *optional*, defaults to `0.06`):
            Drift at which half survives.
        rho_min (`float`, *optional*, defaults to `0.875`), rho_max (`float`, *optional*, defaults to `0.96`):
            Bounds.

    Returns:
        `torch.Tensor`: Same shape.
    """
    return torch.exp2(-drift / d_half).clamp(rho_min, rho_max)


def spo_update(
    alpha: torch.Tensor, beta: torch.Tensor, rho: torch.Tensor, reward_sum: torch.Tensor, count: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Tracker update: decay once, then add the visit's scored rewards.

    Args:
        alpha (`torch.Tensor`), beta (`torch.Tensor`), rho (`torch.Tensor`):
            Pseudo-counts and share kept, shape `(...)`.
        reward_sum (`torch.Tensor`), count (`torch.Tensor`):
            Sum and number of the visit's scored rewards in [0, 1], shape `(...)`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: new alpha and beta.
    """
    return rho * alpha + reward_sum, rho * beta + count - reward_sum


def spo_advantages(rewards: torch.Tensor, values: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """
    Rewards minus baselines, standardised once over the global batch (sample standard deviation, rollouts as units).

    Args:
        rewards (`torch.Tensor`):
            Shape `(N,)`; NaN = not scored.
        values (`torch.Tensor`):
            Baselines before this batch's update, shape `(N,)`.
        eps (`float`, *optional*, defaults to `1e-8`):
            Added to the standard deviation.

    Returns:
        `torch.Tensor`: Shape `(N,)`; 0 for unscored rollouts, and for all if fewer than two are scored or the scored
        ones are all as far from their baselines.
    """
    raw = rewards.double() - values.double()
    scored = raw[~raw.isnan()]
    # By equality: rounding in the mean of equal numbers is not small beside `eps`.
    if scored.numel() < 2 or scored.min() == scored.max():
        return torch.zeros_like(rewards)
    return ((raw - scored.mean()) / (scored.std() + eps)).nan_to_num(nan=0.0).to(rewards)


def spo_weights(alpha: torch.Tensor, beta: torch.Tensor, eps: float = 0.05, neff_power: float = 0.0) -> torch.Tensor:
    """
    Sampling weights: the standard deviation of the outcome, optionally over the evidence, plus exploration.

    Args:
        alpha (`torch.Tensor`), beta (`torch.Tensor`):
            Pseudo-counts, shape `(P,)`.
        eps (`float`, *optional*, defaults to `0.05`):
            Exploration weight.
        neff_power (`float`, *optional*, defaults to `0.0`):
            Power of the evidence.

    Returns:
        `torch.Tensor`: Unnormalised weights, shape `(P,)`.
    """
    evidence = alpha + beta
    value = (alpha / evidence).clamp(0, 1)
    return (value * (1 - value)).sqrt() / evidence**neff_power + eps


class SPOTrainer(MethodTrainer):
    """
    Single-stream Policy Optimization ([arXiv 2509.13232](https://huggingface.co/papers/2509.13232)), not Segment
    Policy Optimization. One rollout per prompt against a persistent estimate of the prompt's success rate.

    State: pseudo-counts and visits of every prompt, the same on all processes; in mode `"kl"` also each prompt's last
    rollouts with their log-probabilities, held by the process that made them.

    Logs `spo/value` (mean baseline of the batch), `spo/drift`, `spo/rho`, `spo/evidence` (means over the batch's
    prompts) and `spo/visited` (share of the training set visited).
    """

    config_class = SPOConfig
    replaces = ("prompt_weights", "compute_advantages")
    contradicts = {"dynamic_sampling": "without groups there is no group to filter by its spread of rewards"}
    _name = "SPO"
    _paper = {
        "title": "Single-stream Policy Optimization",
        "id": "2509.13232",
        "citation": """\
@article{xu2025single,
    title  = {{Single-stream Policy Optimization}},
    author = {Zhongwen Xu and Zihan Ding},
    year   = 2025,
    eprint = {arXiv:2509.13232},
}""",
    }

    @classmethod
    def needs(cls, args):
        return {"old_logps"} if args.spo_rho_mode == "kl" else set()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        size = len(self.train_dataset)
        self.spo_alpha = torch.full((size,), 0.5, dtype=torch.float64)
        self.spo_beta = torch.full((size,), 0.5, dtype=torch.float64)
        self.spo_visits = torch.zeros(size, dtype=torch.long)
        self.spo_stored: dict[int, list[dict]] = {}  # by row; every process keeps the rollouts that it made

    def prepare(self):
        super().prepare()
        rows = torch.arange(len(self.spo_alpha))
        matrix = self.score_prompts(rows, self.args.spo_offline_n).cpu()
        rewards = self._spo_rescale(weighted_sum(matrix.flatten(0, 1), self.reward_weights)).view(matrix.shape[:2])
        successes, scored = (rewards > 0).sum(1), (~rewards.isnan()).sum(1)
        self.spo_alpha, self.spo_beta = spo_initial_counts(successes.double(), scored.double(), self.args.spo_rho_min)

    def _spo_rescale(self, rewards):
        low, high = self.args.spo_reward_min, self.args.spo_reward_max
        slack = 1e-6 * (high - low)  # of a weighted sum in float32
        outside = (rewards < low - slack) | (rewards > high + slack)
        if outside.any():
            raise ValueError(
                f"a reward of {rewards[outside][0].item()} lies outside of [`spo_reward_min`, `spo_reward_max`] = "
                f"[{low}, {high}]: set both to the range of the weighted sum of your reward functions."
            )
        return ((rewards - low) / (high - low)).clamp(0, 1)

    def prompt_weights(self):
        if not self.args.spo_prioritize:
            return super().prompt_weights()
        return spo_weights(self.spo_alpha, self.spo_beta, self.args.spo_explore_eps, self.args.spo_neff_power)

    def compute_advantages(self, rollouts: Rollouts):
        values = torch.full((len(rollouts),), 0.5, dtype=torch.float64)  # an unknown prompt, in evaluation
        known = rollouts.prompt_index.cpu() >= 0
        rows = rollouts.prompt_index.cpu()[known]
        values[known] = self.spo_alpha[rows] / (self.spo_alpha[rows] + self.spo_beta[rows])
        self.log_metric("spo/value", values.mean())
        rewards = self._spo_rescale(rollouts.rewards)
        return spo_advantages(rewards, values.to(rewards.device), self.args.spo_adv_eps)

    def observe(self, rollouts: Rollouts):
        super().observe(rollouts)
        # Failures that a hinted success replaces count as well; of their rewards only the unshaped ones are known.
        scored = rollouts.everything
        rewards = rollouts.rewards if len(scored) == len(rollouts) else scored.raw_rewards
        rows, rewards = prompt_visits(scored, self._spo_rescale(rewards))
        if self.args.spo_rho_mode == "kl":
            drift = self._spo_drift(rows)
            rho = spo_rho(drift, self.args.spo_d_half, self.args.spo_rho_min, self.args.spo_rho_max)
            self._spo_store(rollouts, rows)
            if len(rows):
                self.log_metric("spo/drift", drift.mean())
        else:
            rho = torch.full((len(rows),), self.args.spo_rho_min, dtype=torch.float64)
        self.spo_alpha[rows], self.spo_beta[rows] = spo_update(
            self.spo_alpha[rows], self.spo_beta[rows], rho, rewards.nansum(1), (~rewards.isnan()).sum(1)
        )
        self.spo_visits[rows] += 1
        if len(rows):
            self.log_metric("spo/rho", rho.mean())
            self.log_metric("spo/evidence", (self.spo_alpha[rows] + self.spo_beta[rows]).mean())
        self.log_metric("spo/visited", (self.spo_visits > 0).double().mean())

    def _spo_drift(self, rows: torch.Tensor) -> torch.Tensor:
        """Drift of each row, averaged over its stored rollouts on all processes; 0 at a first visit."""
        stored = [(i, rollout) for i, row in enumerate(rows.tolist()) for rollout in self.spo_stored.get(row, ())]
        logps = self.sequence_logps(
            [rollout["prompt_ids"] for _, rollout in stored], [rollout["completion_ids"] for _, rollout in stored]
        )
        sums = torch.zeros(2, len(rows), dtype=torch.float64)
        for (i, rollout), now in zip(stored, logps, strict=True):
            sums[0, i] += spo_drift(rollout["logps"], now, rollout["mask"])
            sums[1, i] += 1
        total, count = self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum").cpu()
        return total / count.clamp(min=1)

    def _spo_store(self, rollouts: Rollouts, rows: torch.Tensor) -> None:
        for row in rows.tolist():
            self.spo_stored.pop(row, None)  # the new visit replaces the old, whichever process made it
        usable = ~rollouts.rewards.isnan() & ~rollouts.changed_prompt  # an answer to a hint is no evidence
        for i, row in enumerate(rollouts.prompt_index[rollouts.local].tolist()):
            tokens = int(rollouts.completion_mask[i].sum())
            if not usable[rollouts.local.start + i] or tokens == 0:  # a masked truncated completion has no drift
                continue
            self.spo_stored.setdefault(row, []).append(
                {
                    "prompt_ids": rollouts.prompt_ids[i][rollouts.prompt_mask[i].bool()].tolist(),
                    "completion_ids": rollouts.completion_ids[i, :tokens].tolist(),
                    # Copies, or each would keep the whole batch alive.
                    "mask": rollouts.mask[i, :tokens].to("cpu", copy=True),
                    "logps": rollouts.old_logps[i, :tokens].to("cpu", copy=True),
                }
            )

    def prompt_table(self):
        evidence = self.spo_alpha + self.spo_beta
        weights = spo_weights(self.spo_alpha, self.spo_beta, self.args.spo_explore_eps, self.args.spo_neff_power)
        columns = {"visits": self.spo_visits, "rate": self.spo_alpha / evidence, "evidence": evidence}
        columns["weight"] = weights / weights.sum()
        return super().prompt_table() | {f"spo/{name}": column for name, column in columns.items()}

    def method_state(self):
        tracker = {"alpha": self.spo_alpha, "beta": self.spo_beta, "visits": self.spo_visits}
        return super().method_state() | {"spo": tracker}

    def load_method_state(self, state):
        super().load_method_state(state)
        tracker = state["spo"]
        self.spo_alpha, self.spo_beta, self.spo_visits = tracker["alpha"], tracker["beta"], tracker["visits"]

    def local_state(self):
        return super().local_state() | {"spo": self.spo_stored}

    def load_local_state(self, state):
        super().load_local_state(state)
        for row, stored in state["spo"].items():
            self.spo_stored.setdefault(row, []).extend(stored)
