"""
TTT-Discover: does the adaptive temperature make the weights of a group independent of the rewards' scale?

Draws groups of 64 normal rewards at three scales and reports the effective sample size of the tilted weights (1 / sum
of squares) and beta times the rewards' standard deviation, with the adaptive beta and with the code's fixed beta of 2.
Mean over groups, with the range over seeds.
"""

import json
from pathlib import Path

import torch

from trl_ext.methods.ttt_discover import adaptive_beta, tilted_weights


SIZE, GROUPS, SEEDS, SCALES, FIXED = 64, 200, range(5), (0.01, 1.0, 100.0), 2.0


def measure(seed: int, scale: float) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    rewards = scale * torch.randn(GROUPS, SIZE, generator=generator, dtype=torch.float64)
    ids = torch.arange(GROUPS).repeat_interleave(SIZE)
    result = {}
    for name, betas in (
        ("adaptive", adaptive_beta(rewards.flatten(), ids)),
        ("fixed", torch.full((GROUPS,), FIXED, dtype=torch.float64)),
    ):
        sizes = 1 / tilted_weights(rewards, betas).square().sum(1)
        result[f"effective size, {name}"] = sizes.mean().item()
        result[f"beta x sigma, {name}"] = (betas * rewards.std(1)).mean().item()
    return result


def main():
    torch.set_num_threads(1)
    results = {}
    for scale in SCALES:
        runs = [measure(seed, scale) for seed in SEEDS]
        results[f"rewards x {scale:g}"] = {
            name: {
                "mean": round(sum(run[name] for run in runs) / len(runs), 3),
                "range over seeds": [round(extreme(run[name] for run in runs), 3) for extreme in (min, max)],
            }
            for name in runs[0]
        }
    for scale, numbers in results.items():
        for name, value in numbers.items():
            low, high = value["range over seeds"]
            print(f"{scale}: {name} {value['mean']:.3f} ({low:.3f} to {high:.3f})")
    path = Path(__file__).parents[1] / "results" / "ttt_discover.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
