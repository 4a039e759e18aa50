"""
VAS: do groups of prompts that are drawn by the variance of their outcomes have a signal more often?

20,000 prompts with success rates from Beta(0.5, 0.5), scored by the outcome variance of 8 rollouts; then 8,192 prompts
with 8 new rollouts each, drawn uniformly, by the score, and half of them by either, which is the default. The share of
groups with different rewards. There are no answers here whose diversity could be looked at, and no policy that moves;
the simulation of samplers has one that does.
"""

import torch
from common import beta_rates, over_seeds, report, simulated_groups

from trl_ext.core.prompts import draw_rows
from trl_ext.core.rollouts import zero_signal
from trl_ext.methods.vas import outcome_variance, vas_batch_sizes


PROMPTS, DRAWN, GROUP = 20_000, 8_192, 8


def signal(rates, generator):
    return (~zero_signal(*simulated_groups(rates, GROUP, generator))).double().mean().item()


def measure(generator):
    rates = beta_rates(0.5, 0.5, PROMPTS, generator)
    scores = outcome_variance(simulated_groups(rates, GROUP, generator)[0].view(PROMPTS, GROUP))
    by_score = rates[draw_rows(scores, DRAWN, generator)]
    uniform = rates[torch.randperm(PROMPTS, generator=generator)[:DRAWN]]
    weighted, rest = vas_batch_sizes(DRAWN, 0.5)
    draws = {
        "uniform": uniform,
        "by score": by_score,
        "half by score": torch.cat([by_score[:weighted], uniform[:rest]]),
    }
    return {f"groups with a signal, {name}": signal(drawn, generator) for name, drawn in draws.items()}


if __name__ == "__main__":
    report(
        "vas",
        over_seeds(measure),
        {
            "more groups have a signal than of uniform prompts, the more the larger the share drawn by score": (
                lambda run: (
                    run["groups with a signal, uniform"]
                    < run["groups with a signal, half by score"]
                    < run["groups with a signal, by score"]
                )
            )
        },
        "Qwen2.5-VL-3B, average of five sets: 48.7 untrained, GRPO 51.8, with VAS 52.9.",
    )
