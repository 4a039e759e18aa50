"""What the mechanism checks share: seeds, the claims to be shown, and a record of what came out, whatever it is."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


SEEDS = 5
QUIET = {  # settings of a short training on the CPU
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}
RESULTS = Path(__file__).parents[1] / "results"


def over_seeds(measure: Callable[[torch.Generator], dict[str, float]], seeds: int = SEEDS) -> list[dict[str, float]]:
    """
    Repeat a measurement.

    Args:
        measure (`Callable`):
            Takes a seeded generator, returns numbers by name.
        seeds (`int`, *optional*, defaults to 5):
            How often.

    Returns:
        `list[dict[str, float]]`: the numbers of each seed.
    """
    return [measure(torch.Generator().manual_seed(seed)) for seed in range(seeds)]


def report(
    slug: str,
    runs: Sequence[Mapping[str, float]],
    claims: Mapping[str, Callable[[Mapping[str, float]], bool]],
    paper: str,
    digits: int = 3,
) -> None:
    """
    Print and keep what came out, in `benchmarks/results/<slug>.json`.

    Args:
        slug (`str`):
            The method.
        runs (`Sequence[Mapping[str, float]]`):
            Numbers by name, of each seed; kept as mean and standard deviation.
        claims (`Mapping[str, Callable]`):
            What the method's argument rests on, in words that can be read alone, and whether the numbers of a seed
            show it; kept as the number of seeds that do.
        paper (`str`):
            The figure of the paper that this stands beside.
        digits (`int`, *optional*, defaults to 3):
            Decimal digits printed; one more is kept.
    """
    numbers = {}
    for name in runs[0]:
        values = [float(run[name]) for run in runs]
        mean, scatter = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name}: {mean:.{digits}f} +- {scatter:.{digits}f}")
        numbers[name] = [round(mean, digits + 1), round(scatter, digits + 1)]
    shown = {claim: sum(bool(holds(run)) for run in runs) for claim, holds in claims.items()}
    for claim, count in shown.items():
        print(f"{count} of {len(runs)} seeds: {claim}")
    record = {"seeds": len(runs), "paper": paper, "claims": shown, "numbers": numbers}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{slug}.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
