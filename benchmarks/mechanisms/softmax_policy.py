"""
A softmax policy that learns in a second, for losses that differ once a batch of rollouts serves several updates.

32 prompts x 6 positions x 12 actions; 3 actions are right at each position, the reward is the share of right ones, so
the reward alone leaves up to ln 3 nats of entropy. Each phase draws 8 rollouts per prompt and makes 8 updates on them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from trl_ext.core.rollouts import group_advantages


PROMPTS, POSITIONS, ACTIONS, RIGHT, GROUP, UPDATES = 32, 6, 12, 3, 8, 8


@dataclass(frozen=True)
class Batch:
    """
    What a loss is computed from; B = 256 rollouts, T = 6 positions.

    Attributes:
        logps (`torch.Tensor`), entropies (`torch.Tensor`), success (`torch.Tensor`):
            Of the present policy, with gradient, shape `(B, T)`: log-probabilities of the actions, entropies, and
            probabilities of a right action, whose mean is the expected reward.
        old_logps (`torch.Tensor`), advantages (`torch.Tensor`):
            Of the policy that drew the actions, and GRPO's, shape `(B, T)`.
        rewards (`torch.Tensor`), update (`int`):
            Shape `(B,)`; number of updates made with these rollouts before.
    """

    logps: torch.Tensor
    entropies: torch.Tensor
    success: torch.Tensor
    old_logps: torch.Tensor
    advantages: torch.Tensor
    rewards: torch.Tensor
    update: int

    @property
    def log_ratio(self) -> torch.Tensor:
        return self.logps - self.old_logps

    @property
    def mask(self) -> torch.Tensor:
        return torch.ones_like(self.logps, dtype=torch.bool)


def train(
    loss: Callable[[Batch], torch.Tensor], generator: torch.Generator, phases: int = 20, features: int | None = None
) -> list[Batch]:
    """
    Train a policy from a random start with Adam, learning rate 0.05.

    Args:
        loss (`Callable`):
            Takes a [`Batch`], returns a scalar.
        generator (`torch.Generator`):
            Left as it is, so that every loss meets the same start, the same right actions and the same luck.
        phases (`int`, *optional*, defaults to 20):
            Phases of 8 updates.
        features (`int`, *optional*):
            Random features that all logits are linear in, so that learning at one position moves the others; by
            default every position of every prompt has logits of its own.

    Returns:
        `list[Batch]`: the batch of every phase as it is after its updates, without gradient.
    """
    generator, states = generator.clone_state(), PROMPTS * POSITIONS
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    inputs = torch.eye(states).double() if features is None else normal(states, features) / features**0.5
    weights = (0.5 * normal(inputs.shape[1], ACTIONS)).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.05)
    right = (torch.rand(states, ACTIONS, generator=generator).argsort(1) < RIGHT).double()
    groups, done = torch.arange(PROMPTS).repeat_interleave(GROUP), []

    def spread(table):  # one row per rollout
        return table.view(PROMPTS, POSITIONS, -1).repeat_interleave(GROUP, 0)

    for _ in range(phases):
        with torch.no_grad():
            old = spread((inputs @ weights).log_softmax(1))
            actions = torch.multinomial(old.exp().flatten(0, 1), 1, generator=generator).view(-1, POSITIONS, 1)
            rewards = spread(right).gather(2, actions).mean((1, 2))
            advantages = group_advantages(rewards, groups).unsqueeze(1).expand(-1, POSITIONS)
        for update in range(UPDATES + 1):  # the last look is at the outcome
            with torch.set_grad_enabled(update < UPDATES):
                now = spread((inputs @ weights).log_softmax(1))
                logps, old_logps = (table.gather(2, actions).squeeze(2) for table in (now, old))
                entropies, success = -(now.exp() * now).sum(2), (now.exp() * spread(right)).sum(2)
                batch = Batch(logps, entropies, success, old_logps, advantages, rewards, update)
            if update < UPDATES:
                optimizer.zero_grad()
                loss(batch).backward()
                optimizer.step()
        done.append(batch)
    return done
