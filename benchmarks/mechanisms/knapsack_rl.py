"""
Knapsack RL: do more rollouts have a signal if the same total is dealt by the knapsack?

256 prompts whose success rates are known, 40 draws from each of three Beta distributions: the expected share of
rollouts in groups with different outcomes, with 8 rollouts for every prompt and with the knapsack's budgets at the
same total. The share of prompts with such a group beside it. In training the rates are only estimates; the simulation
of samplers looks at that.
"""

import torch
from common import beta_rates, over_seeds, report

from trl_ext.methods.knapsack_rl import knapsack_budgets, mixed_probability


PROMPTS, GROUP, DRAWS = 256, 8, 40
SPREADS = {"Beta(0.3, 0.5)": (0.3, 0.5), "Beta(0.5, 0.5)": (0.5, 0.5), "U(0, 1)": (1.0, 1.0)}
SHARES = ("share of rollouts with a signal", "share of prompts with a signal")


def measure(generator):
    found = {}
    for spread, (a, b) in SPREADS.items():
        for _ in range(DRAWS):
            rates = beta_rates(a, b, PROMPTS, generator).clamp(1e-6, 1 - 1e-6).tolist()
            for name, budgets in {"uniform": [GROUP] * PROMPTS, "knapsack": knapsack_budgets(rates, GROUP)}.items():
                mixed = torch.tensor([mixed_probability(n, p) for n, p in zip(budgets, rates, strict=True)])
                weights = torch.tensor(budgets) / (GROUP * PROMPTS)
                for share, value in zip(SHARES, ((mixed * weights).sum(), mixed.mean()), strict=True):
                    label = f"{spread}: {share}, {name}"
                    found[label] = found.get(label, 0.0) + value.item() / DRAWS
    return found


if __name__ == "__main__":
    report(
        "knapsack_rl",
        over_seeds(measure),
        {
            f"a larger {share} than at equal budgets, whichever distribution": lambda run, share=share: all(
                run[f"{at}: {share}, knapsack"] > run[f"{at}: {share}, uniform"] for at in SPREADS
            )
            for share in SHARES
        },
        "The share of rollouts with a gradient rises by 20 to 40 points during training; hard prompts get up to 93 of "
        "a budget of 8 on average.",
    )
