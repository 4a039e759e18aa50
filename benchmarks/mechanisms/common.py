"""What the mechanism checks share: several seeds, and a record of what came out, whatever it is."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch


SEEDS = 5


def over_seeds(measure: Callable[[torch.Generator], dict[str, float]], seeds: int = SEEDS) -> dict[str, list[float]]:
    """
    Repeat a measurement.

    Args:
        measure (`Callable`):
            Takes a seeded generator, returns numbers by name.
        seeds (`int`, *optional*, defaults to 5):
            How often.

    Returns:
        `dict[str, list[float]]`: mean and standard deviation over the seeds, by name.
    """
    runs = [measure(torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    return {
        name: [statistics.mean(run[name] for run in runs), statistics.stdev(run[name] for run in runs)]
        for name in runs[0]
    }


def report(slug: str, results: dict[str, list[float]], digits: int = 3) -> None:
    """Print and keep the numbers: `benchmarks/results/<slug>.json` has name -> [mean, scatter]."""
    for name, (mean, scatter) in results.items():
        print(f"{name}: {mean:.{digits}f} +- {scatter:.{digits}f}")
    path = Path(__file__).parents[1] / "results" / f"{slug}.json"
    path.parent.mkdir(exist_ok=True)
    rounded = {name: [round(value, digits + 1) for value in pair] for name, pair in results.items()}
    path.write_text(json.dumps(rounded, indent=2) + "\n")


def simulated_groups(rates: torch.Tensor, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """0/1 rewards of a group of `size` rollouts for every success rate, and their group ids, shape `(M * size,)`."""
    rewards = torch.bernoulli(rates.unsqueeze(1).expand(-1, size), generator=generator)
    return rewards.double().flatten(), torch.arange(len(rates)).repeat_interleave(size)


def beta_rates(a: float, b: float, count: int, generator: torch.Generator) -> torch.Tensor:
    """Success rates drawn from Beta(a, b), shape `(count,)`."""
    first, second = (
        torch._standard_gamma(torch.full((count,), shape, dtype=torch.float64), generator=generator)
        for shape in (a, b)
    )
    return first / (first + second)
