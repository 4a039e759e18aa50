"""Variance-Aware Dynamic sampling (VADE, arXiv 2511.18902)."""

from dataclasses import dataclass, field

import numpy as np
import torch

from ..core import MethodConfig, MethodTrainer, Rollouts
from ..core.prompts import top_rows
from ..core.rollouts import prompt_visits, success_rewards


@dataclass
class VADEConfig(MethodConfig):
    r"""
    Configuration of [`VADETrainer`]. The authors' code could not be obtained: both decay rates are read off a numeric
    example in the paper's main figure, which they reproduce.

    Parameters:
        vade_lambda_selected (`float`, *optional*, defaults to `0.2`):
            Share of the evidence that a prompt keeps when it is visited.
        vade_lambda_unselected (`float`, *optional*, defaults to `0.999`):
            Share that the other prompts keep at every generation.
        vade_score (`str`, *optional*, defaults to `"info_gain"`):
            What makes a prompt of success probability p worth a visit: `"info_gain"` p(1 - p)^2, or `"variance"`
            p(1 - p).
        vade_selection (`str`, *optional*, defaults to `"thompson"`):
            `"thompson"` scores a draw from each prompt's posterior, `"greedy"` its mean.
        vade_init (`float`, *optional*, defaults to `0.0`):
            Successes and failures that every prompt starts with, beside one of each that is never forgotten.
        vade_uniform_fraction (`float`, *optional*, defaults to `0.0`):
            Share of the prompts drawn uniformly from the others (ours).
        vade_success_threshold (`float`, *optional*, defaults to `0.5`):
            (Weighted sum of) rewards above which a rollout counts as a success.
    """

    vade_lambda_selected: float = field(default=0.2, metadata={"help": "Evidence kept by a visited prompt."})
    vade_lambda_unselected: float = field(default=0.999, metadata={"help": "Evidence kept by the others."})
    vade_score: str = field(
        default="info_gain",
        metadata={"help": "Score of a success probability.", "choices": ["info_gain", "variance"]},
    )
    vade_selection: str = field(
        default="thompson",
        metadata={"help": "Score a draw from the posterior or its mean.", "choices": ["thompson", "greedy"]},
    )
    vade_init: float = field(default=0.0, metadata={"help": "Successes and failures at the start."})
    vade_uniform_fraction: float = field(default=0.0, metadata={"help": "Share of prompts drawn uniformly."})
    vade_success_threshold: float = field(default=0.5, metadata={"help": "Reward above which a rollout succeeds."})

    def __post_init__(self):
        super().__post_init__()
        self.check_range("vade_lambda_selected", 0 <= self.vade_lambda_selected <= 1, "in [0, 1]")
        self.check_range("vade_lambda_unselected", 0 <= self.vade_lambda_unselected <= 1, "in [0, 1]")
        self.check_choices("vade_score", "vade_selection")
        self.check_range("vade_init", self.vade_init >= 0, "at least 0")
        self.check_range("vade_uniform_fraction", 0 <= self.vade_uniform_fraction < 1, "in [0, 1)")


def information_gain(rates: torch.Tensor, score: str = "info_gain") -> torch.Tensor:
    """
    What a visit to a prompt is worth.

    Args:
        rates (`torch.Tensor`):
            Success probabilities, any shape.
        score (`str`, *optional*, defaults to `"info_gain"`):
            `"info_gain"`, p(1 - p)^2 with its maximum 4/27 at 1/3, or `"variance"`, p(1 - p).

    Returns:
        `torch.Tensor`: Same shape.
    """
    return rates * (1 - rates) ** (2 if score == "info_gain" else 1)


def vade_posterior_means(alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Means of the posteriors Beta(alpha + 1, beta + 1), same shape."""
    return (alpha + 1) / (alpha + beta + 2)


def vade_draws(alpha: torch.Tensor, beta: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    One success probability per prompt from its posterior Beta(alpha + 1, beta + 1).

    Args:
        alpha (`torch.Tensor`), beta (`torch.Tensor`):
            Decayed successes and failures, shape `(P,)`.
        generator (`torch.Generator`):
            Source of randomness, on the CPU.

    Returns:
        `torch.Tensor`: Shape `(P,)`.
    """
    gamma = np.random.default_rng(int(torch.randint(2**62, (), generator=generator))).standard_gamma
    # NumPy's own beta draws are five times slower at Beta(1, 1), where every prompt starts.
    successes, failures = gamma(alpha.numpy() + 1), gamma(beta.numpy() + 1)
    return torch.from_numpy(successes / (successes + failures))


def vade_update(
    alpha: torch.Tensor,
    beta: torch.Tensor,
    rows: torch.Tensor,
    successes: torch.Tensor,
    failures: torch.Tensor,
    lambda_selected: float = 0.2,
    lambda_unselected: float = 0.999,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Posteriors after a generation: visited prompts forget fast and take in their outcomes, the others forget slowly.

    Args:
        alpha (`torch.Tensor`), beta (`torch.Tensor`):
            Decayed successes and failures, shape `(P,)`.
        rows (`torch.Tensor`):
            The visited prompts, each once, shape `(U,)`.
        successes (`torch.Tensor`), failures (`torch.Tensor`):
            Their outcomes, shape `(U,)`.
        lambda_selected (`float`, *optional*, defaults to `0.2`), lambda_unselected (`float`, *optional*, defaults to
            `0.999`):
            Shares of the evidence that are kept.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: new alpha and beta.
    """
    updated = []
    for counts, outcomes in ((alpha, successes), (beta, failures)):
        new = lambda_unselected * counts
        new[rows] = lambda_selected * counts[rows] + outcomes.to(counts)
        updated.append(new)
    return tuple(updated)


class VADETrainer(MethodTrainer):
    """
    VADE: Variance-Aware Dynamic Sampling via Online Sample-Level Difficulty Estimation ([arXiv
    2511.18902](https://huggingface.co/papers/2511.18902)). Every prompt keeps a posterior of its success probability;
    each generation takes the prompts whose draws from it are worth the most, those solved about one time in three. No
    rollout is made that is not trained on. There are no epochs: set `max_steps`.

    State: decayed successes and failures, and visits, of every prompt.

    Logs `vade/rate` (mean posterior success probability of the visited prompts, before the visit), `vade/mixed`
    (share of them with both outcomes) and `vade/visited` (share of the training set).
    """

    config_class = VADEConfig
    replaces = ("choose_prompts",)
    ignores = ("prompt_weights",)
    _name = "VADE"
    _paper = {
        "title": "VADE: Variance-Aware Dynamic Sampling via Online Sample-Level Difficulty Estimation for Multimodal "
        "RL",
        "id": "2511.18902",
        "citation": """\
@article{vade2025,
    title  = {{VADE: Variance-Aware Dynamic Sampling via Online Sample-Level Difficulty Estimation for Multimodal
              RL}},
    year   = 2025,
    eprint = {arXiv:2511.18902},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        size = len(self.train_dataset)
        self.vade_alpha = torch.full((size,), self.args.vade_init, dtype=torch.float64)
        self.vade_beta = self.vade_alpha.clone()
        self.vade_visits = torch.zeros(size, dtype=torch.long)

    def choose_prompts(self, n: int, generator: torch.Generator):
        args = self.args
        if args.vade_selection == "thompson":
            rates = vade_draws(self.vade_alpha, self.vade_beta, generator)
        else:
            rates = vade_posterior_means(self.vade_alpha, self.vade_beta)
        uniform = int(args.vade_uniform_fraction * n)
        chosen = top_rows(information_gain(rates, args.vade_score), n - uniform)
        if uniform:
            others = torch.ones(len(rates), dtype=torch.double)
            others[chosen] = 0.0
            others = others if others.any() else others + 1
            replacement = int((others > 0).sum()) < uniform
            chosen = torch.cat([chosen, torch.multinomial(others, uniform, replacement, generator=generator)])
        return chosen

    def observe(self, rollouts: Rollouts):
        super().observe(rollouts)
        args = self.args
        outcomes = success_rewards(rollouts.everything, self.mask_truncated_completions)
        rows, rewards = prompt_visits(rollouts.everything, outcomes)
        successes = (rewards > args.vade_success_threshold).sum(1)
        failures = (~rewards.isnan()).sum(1) - successes
        if len(rows):
            means = vade_posterior_means(self.vade_alpha[rows], self.vade_beta[rows])
            self.log_metric("vade/rate", means.mean())
            self.log_metric("vade/mixed", ((successes > 0) & (failures > 0)).double().mean())
        self.vade_alpha, self.vade_beta = vade_update(
            self.vade_alpha,
            self.vade_beta,
            rows,
            successes,
            failures,
            args.vade_lambda_selected,
            args.vade_lambda_unselected,
        )
        self.vade_visits[rows] += 1
        self.log_metric("vade/visited", (self.vade_visits > 0).double().mean())

    def prompt_table(self):
        rates = vade_posterior_means(self.vade_alpha, self.vade_beta)
        columns = {"visits": self.vade_visits, "rate": rates, "evidence": self.vade_alpha + self.vade_beta}
        columns["score"] = information_gain(rates, self.args.vade_score)
        return super().prompt_table() | {f"vade/{name}": column for name, column in columns.items()}

    def method_state(self):
        tracker = {"alpha": self.vade_alpha, "beta": self.vade_beta, "visits": self.vade_visits}
        return super().method_state() | {"vade": tracker}

    def load_method_state(self, state):
        super().load_method_state(state)
        tracker = state["vade"]
        self.vade_alpha, self.vade_beta, self.vade_visits = tracker["alpha"], tracker["beta"], tracker["visits"]
