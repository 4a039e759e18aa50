"""
TTT-Discover: does the adaptive temperature make the weights of a group independent of the rewards' scale?

Groups of 64 normal rewards at three scales: the effective sample size of the tilted weights (1 / sum of squares) and
beta times the rewards' standard deviation, with the adaptive beta and with the code's fixed beta of 2, mean over 200
groups. The paper's figures are of discoveries; this is its objective alone.
"""

import torch
from common import over_seeds, report

from trl_ext.methods.ttt_discover import adaptive_beta, tilted_weights


SIZE, GROUPS, SCALES, FIXED = 64, 200, (0.01, 1.0, 100.0), 2.0


def measure(generator):
    normal, found = torch.randn(GROUPS, SIZE, generator=generator, dtype=torch.float64), {}
    ids = torch.arange(GROUPS).repeat_interleave(SIZE)
    for scale in SCALES:
        rewards = scale * normal
        fixed = torch.full((GROUPS,), FIXED, dtype=torch.float64)
        for name, betas in {"adaptive": adaptive_beta(rewards.flatten(), ids), "fixed": fixed}.items():
            sizes = 1 / tilted_weights(rewards, betas).square().sum(1)
            found[f"effective size, {name} beta, scale {scale:g}"] = sizes.mean().item()
            found[f"beta times sigma, {name} beta, scale {scale:g}"] = (betas * rewards.std(1)).mean().item()
    return found


def spread(run, name):
    """Ratio of the largest to the smallest effective size over the scales."""
    sizes = [run[f"effective size, {name} beta, scale {scale:g}"] for scale in SCALES]
    return max(sizes) / min(sizes)


if __name__ == "__main__":
    report(
        "ttt_discover",
        over_seeds(measure),
        {
            "the effective number of rollouts is the same at all scales of the reward with the adaptive beta": (
                lambda run: spread(run, "adaptive") < 1.001
            ),
            "with a fixed beta the effective number of rollouts changes more than tenfold": lambda run: (
                spread(run, "fixed") > 10
            ),
        },
        "gpt-oss-120b, 50 steps: Erdős minimum overlap 0.380876 (best before 0.380924), lower is better.",
    )
