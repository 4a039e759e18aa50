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
    seen, clipped = "{}, share of prompts with a signal, visit {}", "{}, share of tokens clipped, q {}"
    report(
        "dcpo",
        over_seeds(measure),
        {
            "more prompts have a signal than with GRPO from the second visit on": lambda run: all(
                run[seen.format("DCPO", i)] > run[seen.format("GRPO", i)] for i in range(2, VISITS + 1)
            ),
            "the share of prompts with a signal grows from visit to visit": lambda run: all(
                run[seen.format("DCPO", i)] > run[seen.format("DCPO", i - 1)] for i in range(2, VISITS + 1)
            ),
            "ten times fewer tokens of probability 0.1 and 0.01 are clipped": lambda run: all(
                10 * run[clipped.format("DCPO", q)] < run[clipped.format("GRPO", q)] for q in (0.1, 0.01)
            ),
            "ten times fewer tokens of probability 0.9 are clipped": (
                lambda run: 10 * run[clipped.format("DCPO", 0.9)] < run[clipped.format("GRPO", 0.9)]
            ),
        },
        "Over four models 28 % more responses have a non-zero advantage than with GRPO, and about ten times fewer "
        "tokens are clipped.",
    )
