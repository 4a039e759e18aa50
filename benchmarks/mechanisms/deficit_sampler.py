"""
Deficit sampler: do the counts of prompts stay closer to their sampling weights than with independent draws?

50 prompts with weights from Dirichlet(1): the L1 distance of the shares drawn from the weights, after up to 200 draws.
PROPS, which the idea is from, corrects actions in reinforcement learning by a behaviour policy; this is the idea on
prompts.
"""

import torch
from common import over_seeds, report

from trl_ext.core.prompts import draw_by_deficit


PROMPTS, DRAWS, REPEATS = 50, (50, 100, 200), 20


def measure(generator):
    found = {
        f"distance from the weights, {name}, draws {n}": 0.0 for n in DRAWS for name in ("independent", "deficit")
    }
    for _ in range(REPEATS):
        weights = -torch.rand(PROMPTS, generator=generator, dtype=torch.float64).log()  # normalised: Dirichlet(1)
        weights /= weights.sum()
        rows = torch.multinomial(weights, DRAWS[-1], replacement=True, generator=generator)
        for name, drawn in {
            "independent": rows,
            "deficit": draw_by_deficit(torch.zeros_like(weights), weights, DRAWS[-1])[0],
        }.items():
            for n in DRAWS:
                shares = torch.bincount(drawn[:n], minlength=PROMPTS) / n
                found[f"distance from the weights, {name}, draws {n}"] += (
                    shares - weights
                ).abs().sum().item() / REPEATS
    return found


if __name__ == "__main__":
    label = "distance from the weights, {}, draws {}"
    report(
        "deficit_sampler",
        over_seeds(measure),
        {
            "after 50, 100 and 200 draws counts are closer to the weights than of independent draws": lambda run: all(
                run[label.format("deficit", n)] < run[label.format("independent", n)] for n in DRAWS
            )
        },
        "PROPS reports a lower sampling error and a better data efficiency on MuJoCo and discrete tasks.",
    )
