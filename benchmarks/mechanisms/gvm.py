"""
GVM: does the gradient of accepted answers vary less if the same total of rollouts is dealt by acceptance rate and
gradient norm?

1,000 prompts with acceptance rates from Beta(0.8, 0.8), at least 0.03, whose gradients are larger the harder they are
(1 + 4 (1 - p)), 8 rollouts per prompt on average. The variance of the averaged gradient up to a constant, the mean of
G^2 / (p n) over the prompts, relative to equal budgets: with rates that are known, and with rates estimated from 8
rollouts, for which prompts without an accepted one get no rollouts and do not count.
"""

import torch
from common import beta_rates, over_seeds, report

from trl_ext.methods.gvm import gvm_budgets, gvm_ratios


PROMPTS, GROUP, PENALTIES = 1_000, 8, (0.0, 0.001, 0.01)


def variance(rates, norms, budgets):
    return (norms.square() / (rates * budgets)).mean().item()


def measure(generator):
    rates = beta_rates(0.8, 0.8, PROMPTS, generator).clamp(min=0.03)
    norms, total, found = 1 + 4 * (1 - rates), GROUP * PROMPTS, {}
    equal = variance(rates, norms, GROUP)
    for alpha in PENALTIES:
        budgets = gvm_budgets(gvm_ratios(rates, norms, total, alpha=alpha), total)
        found[f"variance over that of equal budgets, rates known, penalty {alpha}"] = (
            variance(rates, norms, budgets) / equal
        )
    estimated = torch.bernoulli(rates.expand(GROUP, -1), generator=generator).mean(0)
    budgets = gvm_budgets(gvm_ratios(estimated, norms, total), total)
    dealt = budgets > 0
    found["prompts without rollouts, rates estimated"] = (~dealt).double().mean().item()
    rates, norms, budgets = rates[dealt], norms[dealt], budgets[dealt]
    found["variance over that of equal budgets, rates estimated"] = variance(rates, norms, budgets) / variance(
        rates, norms, total / len(rates)
    )
    return found


if __name__ == "__main__":
    label = "variance over that of equal budgets, {}"
    report(
        "gvm",
        over_seeds(measure),
        {
            "with known rates and the default penalty the variance is about halved": lambda run: (
                0.4 < run[label.format("rates known, penalty 0.001")] < 0.6
            ),
            "a larger penalty on small rates costs some of that": lambda run: (
                run[label.format("rates known, penalty 0.01")] > run[label.format("rates known, penalty 0.001")]
            ),
            "with estimated rates it is below that of equal budgets, too": lambda run: (
                run[label.format("rates estimated")] < 1
            ),
        },
        "Average of five maths sets: Qwen2.5-Math-1.5B 27.94 untrained, GRPO 38.11, GVM-GRPO 40.42; 7B GRPO 49.07, "
        "GVM-GRPO 49.86; 2 to 4 times faster.",
    )
