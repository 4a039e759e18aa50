"""
PUCT state reuse (TTT-Discover): does going on from earlier solutions find better ones than starting anew?

A search without a policy: solutions are strings of 32 bits, their value that of a random landscape in which a bit's
contribution depends on three others (NK model), and a rollout changes each bit of its start with a probability of
1/16. 50 steps of 8 groups of 8 rollouts from one seed, on 10 landscapes. The archive is the method's; states are
picked by its rule, uniformly from the same archive, by value alone, or the seed is always the start. The paper's
rollouts are those of a model that is trained meanwhile.
"""

import torch
from common import over_seeds, report

from trl_ext.methods.puct import Archive


BITS, NEIGHBOURS, CHANGE, LANDSCAPES = 32, 3, 1 / 16, 10
STEPS, GROUPS, GROUP = 50, 8, 8


def landscape(generator):
    """Value of solutions, boolean, shape `(..., 32)`."""
    others = torch.stack([torch.randperm(BITS - 1, generator=generator)[:NEIGHBOURS] for _ in range(BITS)])
    others = (torch.arange(BITS)[:, None] + 1 + others) % BITS
    which = torch.cat([torch.arange(BITS)[:, None], others], dim=1)
    table = torch.rand(BITS, 2 ** (NEIGHBOURS + 1), generator=generator, dtype=torch.float64)
    powers = 2 ** torch.arange(NEIGHBOURS + 1)
    return lambda bits: table[torch.arange(BITS), (bits[..., which] * powers).sum(-1)].mean(-1)


def uniform(archive, generator):
    states = list(archive.states.values())
    return [states[i] for i in torch.randint(len(states), (GROUPS,), generator=generator)]


def highest(archive, _):
    states = sorted(archive.states.values(), key=lambda state: -state.value)
    return [states[i % len(states)] for i in range(GROUPS)]


PICKS = {
    "PUCT": lambda archive, generator: archive.pick(GROUPS),
    "uniform": uniform,
    "highest": highest,
    "seed only": lambda archive, generator: [archive.states[0]] * GROUPS,
}


def search(pick, value, generator):
    """Best value that was found up to each step."""
    start = torch.rand(BITS, generator=generator) < 0.5
    archive, best = Archive([value(start).item()]), []
    archive.states[0].content = start.tolist()
    for _ in range(STEPS):
        for state in pick(archive, generator):
            children = torch.tensor(state.content) ^ (torch.rand(GROUP, BITS, generator=generator) < CHANGE)
            for child in zip(value(children).tolist(), children.tolist(), strict=True):
                archive.update(state, [child])
        archive.trim()
        best.append(max(state.value for state in archive.states.values()))
    return best


def measure(generator):
    found = {}
    for number in range(LANDSCAPES):
        value = landscape(generator)
        for name, pick in PICKS.items():
            again = torch.Generator().manual_seed(LANDSCAPES * generator.initial_seed() + number)
            best = search(pick, value, again)
            for step in (1, 10, 20, 30, 40, STEPS):
                label = f"best value, {name}, step {step}"
                found[label] = found.get(label, 0.0) + best[step - 1] / LANDSCAPES
    return found


if __name__ == "__main__":
    report(
        "puct",
        over_seeds(measure),
        {
            f"the best solution after {STEPS} steps is better than with {words}": lambda run, name=name: (
                run[f"best value, PUCT, step {STEPS}"] > run[f"best value, {name}, step {STEPS}"]
            )
            for name, words in {
                "seed only": "every group from the seed",
                "uniform": "a uniform choice from the archive",
                "highest": "the states of the highest value",
            }.items()
        },
        "gpt-oss-120b, 50 steps, reuse and training together: Erdős minimum overlap 0.380876 (best before 0.380924), "
        "lower is better.",
        digits=4,
    )
