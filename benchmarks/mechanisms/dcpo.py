"""
DCPO: do prompts whose rollouts all get the same reward teach from their history, and are fewer tokens clipped?

Simulated prompts with constant success rates from Beta(0.3, 0.3), 8 rollouts at each of 8 visits: the share of prompts
with a non-zero advantage. Then tokens of old probability q whose log-ratio is normal with a standard deviation of 0.3:
the share outside of the clip bounds, for DCPO's and GRPO's bounds.
"""

import torch
from common import beta_rates, over_seeds, report, simulated_groups

from trl_ext.core.rollouts import group_advantages
from trl_ext.methods.dcpo import dcpo_advantages, dcpo_bounds


VISITS, GROUP, PROMPTS = 8, 8, 20_000


def measure(generator):
    rates, found = beta_rates(0.3, 0.3, PROMPTS, generator), {}
    state = [torch.zeros(PROMPTS, dtype=torch.float64) for _ in range(3)]
    for visit in range(1, VISITS + 1):
        rewards, groups = simulated_groups(rates, GROUP, generator)
        advantages, *state = dcpo_advantages(rewards, groups, *state)
        found[f"DCPO, share of prompts with a signal, visit {visit}"] = signal(advantages)
        if visit in (1, VISITS):
            found[f"GRPO, share of prompts with a signal, visit {visit}"] = signal(group_advantages(rewards, groups))
    for q in (0.9, 0.1, 0.01):
        ratio = (0.3 * torch.randn(100_000, generator=generator, dtype=torch.float64)).exp().clamp(max=1 / q)
        low, high = dcpo_bounds(torch.full_like(ratio, q).log())
        found[f"DCPO, share of tokens clipped, q {q}"] = ((ratio < low) | (ratio > high)).double().mean().item()
        found[f"GRPO, share of tokens clipped, q {q}"] = ((ratio < 0.8) | (ratio > 1.2)).double().mean().item()
    return found


def signal(advantages):
    return (advantages.view(-1, GROUP) != 0).any(1).double().mean().item()


if __name__ == "__main__":
    report("dcpo", over_seeds(measure))
