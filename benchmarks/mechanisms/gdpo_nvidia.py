"""
GDPO: how many outcomes of a group are told apart that a sum of rewards makes equal?

Takes every multiset of outcomes of two binary rewards in a group of G rollouts and counts the distinct patterns of
advantages: of GRPO on the sum of the rewards, and of each reward normalised on its own and then summed. What GDPO does
over the batch afterwards is the same for all groups and tells nothing more apart.
"""

import itertools
import json
from pathlib import Path

import torch

from trl_ext.core.rollouts import group_advantages
from trl_ext.methods.gdpo_nvidia import gdpo_advantages


OUTCOMES = list(itertools.product((0.0, 1.0), repeat=2))
EPS = 1e-12  # a larger one alone would tell sums of 0 and 1 from sums of 0 and 2, in the fourth digit


def pattern(advantages: torch.Tensor) -> tuple[float, ...]:
    """Advantages without the order of the rollouts; `+ 0.0` makes -0.0 the same as 0.0."""
    return tuple(sorted(round(a, 6) + 0.0 for a in advantages.tolist()))


def count(size: int) -> dict[str, int]:
    groups = list(itertools.combinations_with_replacement(OUTCOMES, size))
    ids, weights = torch.zeros(size, dtype=torch.long), torch.ones(2, dtype=torch.float64)
    summed, decoupled = set(), set()
    for group in groups:
        rewards = torch.tensor(group, dtype=torch.float64)
        summed.add(pattern(group_advantages(rewards.sum(1), ids, eps=EPS)))
        decoupled.add(pattern(gdpo_advantages(rewards, weights, ids, batch_norm="none", eps=EPS)))
    return {"outcomes": len(groups), "GRPO on the sum": len(summed), "GDPO": len(decoupled)}


def main():
    counts = {f"G={size}": count(size) for size in (2, 4, 8)}
    for size, found in counts.items():
        print(f"{size}: {', '.join(f'{number} {name}' for name, number in found.items())}")
    path = Path(__file__).parents[1] / "results" / "gdpo_nvidia.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"distinct advantage patterns of two binary rewards": counts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
