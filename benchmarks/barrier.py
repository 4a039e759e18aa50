"""
What waiting for the slowest rollout costs, in groups and in a single stream: SPO's argument about throughput.

A step needs 256 rollouts. More than that are started at once, and the step goes on when enough are there: of groups of
8, when 32 groups are complete; of a single stream, when any 256 rollouts are. With nothing started beyond the 256 both
wait for the slowest, and there is nothing to gain. Times are proportional to lengths of answers, drawn from the output
tokens of two services (Azure's LLM inference trace of 2023) or log-normal with a coefficient of variation. Rollouts of
one prompt may resemble each other (a normal copula with this correlation within a group).

Printed, over 1,000 steps: time of a step in groups over that in a stream, and the mean length of the rollouts that are
kept over the mean of all: what comes first is shorter, which is the price of not waiting. Then what waiting costs in
all: time of a full batch over that of a stream which carries unfinished rollouts over to the next steps, so that none
is lost and none waited for (they are a little off-policy instead).

```bash
python benchmarks/barrier.py       # writes benchmarks/results/barrier.json
```
"""

import json
import math
from pathlib import Path

import torch


HERE = Path(__file__).parent
STEPS, GROUP, WANTED, STARTED = 1000, 8, 256, (1.0, 1.25, 1.5, 2.0)
CORRELATIONS, VARIATIONS = (0.0, 0.5), (0.5, 1.0, 2.0, 4.0)


def group_steps(times: torch.Tensor, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Steps that wait for whole groups.

    Args:
        times (`torch.Tensor`):
            Durations, shape `(steps, groups, G)`.
        wanted (`int`):
            Groups that a step needs.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: durations of the steps and mean duration of the rollouts that are used,
        both of shape `(steps,)`.
    """
    ends, first = times.max(2).values.topk(wanted, dim=1, largest=False)
    used = times.gather(1, first.unsqueeze(2).expand(-1, -1, times.shape[2]))
    return ends.max(1).values, used.mean((1, 2))


def stream_steps(times: torch.Tensor, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Steps that take the first rollouts that end.

    Args:
        times (`torch.Tensor`):
            Durations, shape `(steps, rollouts)`.
        wanted (`int`):
            Rollouts that a step needs.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: as from [`group_steps`].
    """
    used = times.topk(wanted, dim=1, largest=False).values
    return used.max(1).values, used.mean(1)


def uniforms(groups: int, correlation: float, generator: torch.Generator) -> torch.Tensor:
    """Uniform numbers, shape `(steps, groups, GROUP)`, of which those of a group are correlated."""
    shared, own = (torch.randn(STEPS, groups, size, generator=generator, dtype=torch.float64) for size in (1, GROUP))
    normal = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    return torch.special.ndtr(normal).clamp(1e-12, 1 - 1e-12)


def distributions() -> dict:
    """Quantile functions of durations, by name."""
    data = json.loads((HERE / "data/azure_llm_2023.json").read_text())
    levels = torch.tensor(data["levels"], dtype=torch.float64)

    def measured(values):
        values = torch.tensor(values, dtype=torch.float64)

        def quantile(u):
            right = torch.searchsorted(levels, u).clamp(1, len(levels) - 1)
            share = (u - levels[right - 1]) / (levels[right] - levels[right - 1])
            return values[right - 1] + share * (values[right] - values[right - 1])

        return quantile

    def log_normal(variation):
        sigma = math.sqrt(math.log1p(variation**2))
        return lambda u: (sigma * torch.special.ndtri(u)).exp()

    found = {f"{name} service": measured(data[name]) for name in ("conversation", "code")}
    return found | {f"log-normal, coefficient of variation {v:g}": log_normal(v) for v in VARIATIONS}


def main():
    torch.set_num_threads(1)
    generator, results = torch.Generator().manual_seed(0), {}
    for name, quantile in distributions().items():
        for correlation in CORRELATIONS:
            for started in STARTED:
                groups = int(started * WANTED) // GROUP
                times = quantile(uniforms(groups, correlation, generator))
                (grouped, kept_groups), (stream, kept_stream) = (
                    group_steps(times, WANTED // GROUP),
                    stream_steps(times.flatten(1), WANTED),
                )
                found = results[f"{name}, correlation {correlation:g}, started {started:g}"] = {
                    "time of groups / of a stream": round((grouped.mean() / stream.mean()).item(), 3),
                    "kept length, groups": round((kept_groups.mean() / times.mean()).item(), 3),
                    "kept length, stream": round((kept_stream.mean() / times.mean()).item(), 3),
                }
                if started == 1:
                    found["full batch / carrying over"] = round((stream.mean() / times.mean()).item(), 2)
    for name, row in results.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
    record = {"steps": STEPS, "rollouts": WANTED, "group": GROUP, "rows": results}
    (HERE / "results/barrier.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
